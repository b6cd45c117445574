"""Prompts as GPUs attend to them: from the K and V at hand, or staged, in pieces too.

What needs vLLM is imported where a test runs: these files are collected without it, too.
"""

import json
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plain_varlen import attended

from vllm_tailorkv.kernels import reference
from vllm_tailorkv.layout import DerivedKind

HEADS, GROUP, SIZE, SCALE = 1, 2, 64, 0.125
ROOT = Path(__file__).parents[2]


def attended_whole(call: Any) -> None:
    """Like an op that cannot merge: it counts sink logits itself."""
    log_sum = attended(call)
    if call.sink_logits is not None:
        call.output.mul_((log_sum.T - call.sink_logits).sigmoid().unsqueeze(-1))


OPS = {"merging": attended, "not merging": attended_whole}
REQUESTS = {
    # query tokens, tokens in context
    "fresh": [(20, 20), (7, 7)],
    "with prefixes": [(3, 60), (20, 100)],
    "in pieces": [(6, 400)],
}


def staging_of(name: str) -> Any:
    from vllm_tailorkv.attention.staged import Staging
    from vllm_tailorkv.attention.varlen import Varlen

    op = Varlen("plain torch", name == "merging", lambda asked: None, OPS[name])
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=500),
        scheduler_config=SimpleNamespace(max_num_seqs=4, max_num_batched_tokens=64),
    )
    staging = Staging(op, HEADS, SIZE, torch.float32, config)
    if op.merges:
        staging.capacity = 192
    return staging


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("requests", REQUESTS)
def test_equals_reference(build_context, error_of, sinks_of, op, requests):
    from vllm_tailorkv.attention.metadata import Step

    counts, lengths = (list(column) for column in zip(*REQUESTS[requests], strict=True))
    context = build_context(
        lengths, kind=DerivedKind.ONEBIT, heads=HEADS, head_size=SIZE, dtype=torch.float32
    )
    starts = [0, *accumulate(counts)]
    query = torch.randn(sum(counts), HEADS * GROUP, SIZE)
    host, logits = context.cache.host, sinks_of(HEADS * GROUP)
    rows = [torch.tensor(part, dtype=torch.int32) for part in (starts[:-1], counts)]
    expected = torch.full_like(query, torch.nan)
    reference.exact_attention(
        expected, query, *host[:2], context.block_table, *rows, context.seq_lens, SCALE, 0.0, logits
    )
    key, value = (
        torch.cat(
            [
                reference.gather_rows(pages, context.block_table[i], length)[:, length - count :]
                for i, (count, length) in enumerate(zip(counts, lengths, strict=True))
            ],
            dim=1,
        ).transpose(0, 1)
        for pages in host[:2]
    )
    common: Any = SimpleNamespace(
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        seq_lens=context.seq_lens,
        block_table_tensor=context.block_table,
    )
    staged = staging_of(op).plan([(0, len(counts))], starts, lengths, common)
    output = torch.full_like(query, torch.nan)
    staged.attend(Step(query, key, value, output, host, SCALE, 0.0, logits))
    assert error_of(output, expected) < 1e-5


def test_the_op_of_vllm():
    """Interpreted, in a process where vLLM takes Triton to be there."""
    script = str(ROOT / "tests/support/triton_varlen.py")
    result = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert max(json.loads(result.stdout.splitlines()[-1])) < 1e-5


def test_an_op_that_knows_no_sinks():
    from vllm_tailorkv.attention import varlen

    xformers = next(op for op in varlen.REGISTRY if op.name == "xformers")
    asked = varlen.Asked("cuda", torch.float16, 128, 0.0, True)
    assert xformers.obstacle(asked) == "it knows no attention sinks"
