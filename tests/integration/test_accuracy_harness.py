"""`benchmarks/accuracy.py --quick`: the command that anyone can run, on the retriever."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEVEL = "VLLM_LOGGING_LEVEL"
"""What the settings of these tests change for engines in their own process."""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("accuracy")
    command = [sys.executable, "benchmarks/accuracy.py", "--quick"]
    command += ["--json", str(folder / "out.json"), "--plot", str(folder / "out.png")]
    done = run(command)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "out.json").read_text()) | {
        "printed": done.stdout,
        "picture": (folder / "out.png").read_bytes()[:4],
        "command": command,
        "said": done.stderr,
        "files": sorted(path.name for path in folder.iterdir()),
    }


def run(command, **variables):
    environment = {name: value for name, value in os.environ.items() if name != LEVEL} | variables
    return subprocess.run(
        command, env=environment, check=False, cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.parametrize("group", ["4096", "4096 given"])
def test_model_solves_tasks_with_full_attention(report, group):
    assert len(report["counting_tasks"][group]) >= 4


@pytest.mark.parametrize("group", ["4096", "4096 given"])
def test_ours_keeps_the_score_and_a_blind_method_does_not(report, group):
    share = {m["name"]: m["share_of_full"][group] for m in report["methods"]}
    assert share["full"] == 1
    assert share["tailorkv"] >= 0.9
    assert share["streaming_llm"] < share["tailorkv"] - 0.2


def test_layers_tell_what_was_kept(report):
    layers = {(x["method"], x["layer"]): x for x in report["layers"]}
    methods = {method for method, _ in layers}
    assert methods == {"tailorkv", "paper", "oracle", "streaming_llm"}
    for (method, layer), found in layers.items():
        assert 0 <= found["recall"] <= 1 and 0 < found["mass"] <= 1 + 1e-6
        assert 0 < found["of_oracle"] <= 1 + 1e-6 and len(found["heads"]) == 2
        if method == "oracle":
            assert found["of_oracle"] == pytest.approx(1)
            # Tokens that weigh nothing are alike to it.
            assert found["recall"] > 0.99
            assert found["mass"] >= layers["streaming_llm", layer]["mass"] - 1e-6


def test_writes_everything_down(report):
    assert report["picture"] == b"\x89PNG"
    assert report["said"] == ""
    assert "tailorkv" in report["printed"] and "4,096 tokens" in report["printed"]
    methods = {m["name"]: m for m in report["methods"]}
    assert methods["paper"]["config"]["query_reduce"] == "mean"
    assert methods["full"]["config"] is None
    assert methods["tailorkv"]["bytes_per_token"]["host"] > 0
    assert {x["method"] for x in report["likelihoods"]} == set(methods)


def test_distance_from_full_attention(report):
    found = {x["method"]: x for x in report["divergences"]}
    assert set(found) == {"tailorkv", "paper", "oracle", "streaming_llm"}
    assert all(x["steps"] == 64 and x["low"] <= x["mean"] <= x["high"] for x in found.values())
    assert -1e-4 < found["tailorkv"]["mean"] < found["streaming_llm"]["mean"]
    assert found["tailorkv"]["agreement"] > found["streaming_llm"]["agreement"]


def test_a_finished_run_is_not_run_again(report):
    """No engine is started, which needs the plugin; and it says the same."""
    assert report["finished"] and report["files"] == ["out.json", "out.png"]
    path = Path(report["command"][-3])
    before = json.loads(path.read_text())
    again = run(report["command"], VLLM_PLUGINS="")
    assert again.returncode == 0 and "goes on from" in again.stdout
    assert json.loads(path.read_text())["scores"] == before["scores"]


def test_other_arguments_are_refused_in_a_line(report):
    other = run([*report["command"], "--seed", "1"])
    assert other.returncode == 1
    (line,) = [line for line in other.stderr.splitlines() if "accuracy.py:" in line]
    assert "seed 0, not 1" in line and "name another file" in line
