"""Every Triton kernel compiles for GPUs that are not here, and spills no register."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import vllm_tailorkv

ROOT = Path(vllm_tailorkv.__file__).parent.parent


def test_no_spills(tmp_path):
    path = tmp_path / "registers.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, ROOT / "benchmarks/gpu/registers.py", "--json", path],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert not [record for record in records if record["spill_bytes"]]
    compiled = {(record["kernel"], record["arch"]) for record in records}
    sources = "".join(path.read_text() for path in (ROOT / "kernels/triton").glob("*.py"))
    launched = set(re.findall(r"(_\w+)\[", sources)) & set(re.findall(r"def (_\w+)\(", sources))
    assert launched
    assert compiled == {(kernel, arch) for kernel in launched for arch in ("sm_80", "sm_90")}
