"""The script for GPU machines runs to its end without one, tiny and under the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vllm_tailorkv
from vllm_tailorkv.kernels import composed, cpu, dispatch

ROOT = Path(vllm_tailorkv.__file__).parent.parent


@pytest.mark.slow
def test_rehearsal(tmp_path):
    if cpu.unavailable():
        pytest.skip("no C++ extension")
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        ["bash", ROOT / "benchmarks/gpu/run.sh", "--rehearse", tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    records = [json.loads(line) for line in (tmp_path / "ops.jsonl").read_text().splitlines()]
    assert records[0]["rehearsal"]
    measured = {record["op"].split()[0] for record in records if record["what"] == "op"}
    # Others are made of these.
    assert measured >= {op for op in dispatch.GPU_OPS if not hasattr(composed, op)}
    layers = {record["layer"]: record["error"] for record in records if record["what"] == "layer"}
    assert set(layers) == {"sparse onebit", "sparse channels", "dense 1 bit", "dense 2 bit"}
    assert all(error < 1e-2 for error in layers.values())


@pytest.mark.slow
def test_sweep_of_launch_options(tmp_path):
    results = tmp_path / "sweep.jsonl"
    script = ROOT / "benchmarks/gpu/sweep.py"
    subprocess.run(
        [sys.executable, script, "--device", "cpu", "--tiny", "--json", results],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"},
        check=True,
    )
    records = [json.loads(line) for line in results.read_text().splitlines()]
    kernels = [(record["kernel"], record["bits"]) for record in records]
    assert kernels == [("_score_codes", 1), ("_attend_codes", 1), ("_attend_codes", 2)]


def test_kernels_and_their_tests_need_no_vllm():
    code = (
        "import sys; sys.modules['vllm'] = None; import pytest; "
        f"sys.exit(pytest.main(['-q', '--collect-only', '-p', 'no:cacheprovider', "
        f"{str(ROOT / 'tests/kernels')!r}]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
