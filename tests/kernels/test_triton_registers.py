"""Every Triton kernel compiles for GPUs that are not here; which spill registers is known."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vllm_tailorkv

ROOT = Path(vllm_tailorkv.__file__).parent.parent


SPILLING = {
    # Up to 276 bytes. No number of warps holds a group.
    ("_attend_codes", "bfloat16 d256 G4 g128 b4 token_major"),
    # Up to 40 bytes, on sm_80 alone, with sink logits or rows kept on the device.
    ("_attend_gathered", "bfloat16 d128 G4 g64 b1 token_major"),
    ("_attend_gathered", "bfloat16 d256 G4 g128 b4 token_major"),
    # 2,332 bytes, on sm_90 alone, with rows kept on the device: float32, which GPUs seldom serve.
    ("_attend_gathered", "float32 d80 G4 g64 b1 token_major"),
    # Up to 1,120 bytes, of groups of 128 tokens, which it writes once in so many steps.
    ("_derive", "bfloat16 d128 G4 g128 b1 token_major"),
    # Up to 568 bytes: float32 again.
    ("_score_candidates", "float32 d80 G4 g64 b1 token_major"),
}
SPILLED_BYTES = 2400


@pytest.mark.slow
def test_spills(tmp_path):
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
    spilling = [record for record in records if record["spill_bytes"]]
    assert {(record["kernel"], record["case"]) for record in spilling} <= SPILLING
    assert all(record["spill_bytes"] <= SPILLED_BYTES for record in spilling)
    compiled = {(record["kernel"], record["arch"]) for record in records}
    sources = "".join(path.read_text() for path in (ROOT / "kernels/triton").glob("*.py"))
    launched = set(re.findall(r"(_\w+)\[", sources)) & set(re.findall(r"def (_\w+)\(", sources))
    assert launched
    assert compiled == {(kernel, arch) for kernel in launched for arch in ("sm_80", "sm_90")}
