"""`benchmarks/accuracy.py --quick`: the command that anyone can run, on the retriever."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("accuracy")
    command = [sys.executable, "benchmarks/accuracy.py", "--quick"]
    command += ["--json", str(folder / "out.json"), "--plot", str(folder / "out.png")]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "out.json").read_text()) | {
        "printed": done.stdout,
        "picture": (folder / "out.png").read_bytes()[:4],
    }


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
        if method == "oracle":
            assert found["recall"] == 1
            assert found["mass"] >= layers["streaming_llm", layer]["mass"] - 1e-6


def test_writes_everything_down(report):
    assert report["picture"] == b"\x89PNG"
    assert "tailorkv" in report["printed"] and "4,096 tokens" in report["printed"]
    methods = {m["name"]: m for m in report["methods"]}
    assert methods["paper"]["config"]["query_reduce"] == "mean"
    assert methods["full"]["config"] is None
    assert methods["tailorkv"]["bytes_per_token"]["host"] > 0
    assert {x["method"] for x in report["likelihoods"]} == set(methods)
