"""The steps for a GPU machine, rehearsed to their end. See `benchmarks/gpu/serve.py`."""

import json
import os
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
GPU = ROOT / "benchmarks/gpu"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("serve")
    small = ["--variants", "everything", "--modes", "FULL_AND_PIECEWISE", "--engines", "ours,bf16"]
    done = subprocess.run(
        [
            *(sys.executable, GPU / "serve.py", "pool", "eager", "graphs", "speed"),
            *("--out", out, "--rehearse", "--seconds", "1200", *small),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    steps = ("pool", "eager", "graphs", "speed")
    return {
        step: [json.loads(line) for line in (out / f"{step}.jsonl").read_text().splitlines()]
        for step in steps
    }


def agreements(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {record["case"]: record for record in records if " as " in record["case"]}


def test_every_line_tells_where_it_came_from(results: dict[str, Any]) -> None:
    for step, records in results.items():
        assert records
        for record in records:
            assert record["step"] == step
            assert record["failures"] == []
            assert record["rehearsal"]
            assert {"hardware", "date", "revision", "versions", "command"} <= set(record)


def test_pool(results: dict[str, Any]) -> None:
    assert [record["case"] for record in results["pool"]] == ["round 1", "round 2", "round 3"]
    assert all(record["read_gb_s"] > 0 for record in results["pool"])


def test_eager(results: dict[str, Any]) -> None:
    """Tokens as vLLM's own; the same in chunks, without the hits of prefixes."""
    found = agreements(results["eager"])
    ours = "float32-everything-eager"
    assert set(found) == {
        f"{ours} as float32-peer-eager",
        f"float32-everything-chunked as {ours}",
    }
    for record in found.values():
        assert record["compared"] == record["positions"] > 0
        assert record["ties"] == 0
    by_case = {record["case"]: record for record in results["eager"]}
    assert by_case[f"{ours} hits"]["cached_tokens"] == 128
    assert by_case["float32-everything-chunked hits"]["cached_tokens"] == 0
    assert by_case["float32-everything-chunked hits"]["counted"]["stage_rows"] > 0


def test_graphs(results: dict[str, Any]) -> None:
    (record,) = agreements(results["graphs"]).values()
    assert record["compared"] == record["positions"] > 0
    replays = [record["counted"]["run_fullgraph"] for record in results["graphs"][:4]]
    assert min(replays) > 0


def test_speed(results: dict[str, Any]) -> None:
    measured = {
        (record["engine"], record["case"]): record
        for record in results["speed"]
        if record["case"] != "engine"
    }
    cases = ("40x1", "70x2")
    assert set(measured) == {(engine, case) for engine in ("ours", "bf16") for case in cases}
    assert all(record["seconds_per_token"] > 0 for record in measured.values())
    ours = next(record for record in results["speed"] if record["engine"] == "ours")
    assert ours["device_bytes_per_token"] == ours["planned_device_bytes_per_token"]
    assert ours["requests_that_fit"] > 0


def test_metadata_for_a_machine_without_pip(tmp_path: Path) -> None:
    """vLLM finds the plugin by it as by that of an installed package."""
    subprocess.run(["bash", GPU / "carry.sh", "--metadata", tmp_path], check=True)
    (folder,) = tmp_path.iterdir()
    installed = distribution("vllm_tailorkv")
    assert folder.name == f"vllm_tailorkv-{installed.version}.dist-info"
    (group,) = (entry for entry in installed.entry_points if entry.group == "vllm.general_plugins")
    assert (
        f"[{group.group}]\n{group.name} = {group.value}\n"
        == (folder / "entry_points.txt").read_text()
    )
