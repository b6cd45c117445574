"""The sanitizers do see faults, and the ops have none on shapes drawn at random."""

import os
import subprocess
import sys

import pytest
import sanitize
import torch

from vllm_tailorkv.kernels import ops
from vllm_tailorkv.kernels.types import ChannelIndex


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


# Each breaks a contract about values, which nothing checks without the debug switch.


def read_behind_blocks():
    """A group of a block that the cache does not have."""
    pages = torch.zeros(2, 1, 32, 64)
    extremes = ChannelIndex(torch.zeros(3, 1, 1, 2, 64)[:2])
    ops.quantize_groups(torch.tensor([2]), pages, pages, extremes)


def read_behind_pages():
    """Vectors of a block that the cache does not have."""
    pages, query = torch.zeros(2, 1, 32, 64), torch.zeros(1, 1, 64)
    # Rows without a middle are not weighed.
    tokens = {"seq_lens": int32(32), "tail_start": int32(1)}
    table, mass = int32(2)[None], torch.zeros(1, 1)
    ops.log_mass(mass, query, pages, table, **tokens, sink_tokens=0, scale=1.0)


def write_behind_pages():
    """A slot of that block."""
    pages, rows = torch.zeros(2, 1, 32, 64), torch.zeros(1, 1, 64)
    ops.write_kv(rows, rows, pages, torch.zeros(2, 1, 32, 64), torch.tensor([64]))


def overflow():
    """The length of a middle that is no 32-bit integer."""
    indices = torch.zeros(1, 1, 8, dtype=torch.int32)
    ops.select_topk(indices, torch.zeros(1, 1, 100), int32(-(2**31)), sink_tokens=1)


FAULTS = {
    read_behind_blocks: "heap-buffer-overflow",
    read_behind_pages: "heap-buffer-overflow",
    write_behind_pages: "heap-buffer-overflow",
    overflow: "signed integer overflow",
}


@pytest.mark.skipif(not sanitize.active(), reason="runs under sanitizers: `make sanitize`")
@pytest.mark.parametrize("isa", ["avx512_gfni", "avx512", "avx2", "portable"])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(monkeypatch, isa, fault):
    monkeypatch.setenv("VLLM_TAILORKV_CHECK_VALUES", "0")
    try:
        torch.ops.vllm_tailorkv.set_isa(isa)
    except RuntimeError:
        pytest.skip(f"this processor lacks {isa}")
    assert FAULTS[fault] in sanitize.report_of(fault)


@pytest.mark.slow
@pytest.mark.skipif(sanitize.active(), reason="runs under sanitizers already")
def test_ops_have_none():
    """A part of `make sanitize`."""
    tests = ["tests/kernels/test_sanitizers.py", "tests/kernels/test_any_shape.py"]
    subprocess.run(
        [sys.executable, "tests/support/sanitize.py", *tests],
        cwd=sanitize.ROOT,
        env=os.environ | {"TAILORKV_EXAMPLES": "25"},
        check=True,
    )
