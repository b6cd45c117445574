"""What the speed benchmarks time is what they say: heavy tokens, error against full attention."""

import math

import pytest
import torch
from speed.exact import exact_row, planted_weight, relative_error
from speed.inputs import PLANTED, PLANTED_ODDS, Inputs
from speed.shapes import BLOCK_SIZE, CASES, SINKS, Shape
from speed.step import Step

SHAPES = [Shape(8, 2, 64), Shape(7, 1, 128), Shape(4, 4, 64)]


@pytest.mark.parametrize("shape", SHAPES)
def test_planted_tokens_draw_every_query_head_alike(shape: Shape) -> None:
    inputs = Inputs(shape, context=640, batch=3)
    heads = inputs.query.float().unflatten(1, (shape.kv_heads, -1))
    scores = torch.einsum("bhgd,bhd->bhg", heads, inputs.planted_key) * inputs.scale
    torch.testing.assert_close(
        scores, torch.full_like(scores, math.log(640 / PLANTED * PLANTED_ODDS))
    )
    assert inputs.planted.shape == (3, shape.kv_heads, PLANTED)
    assert inputs.planted.min() >= SINKS
    for case in CASES:
        assert inputs.planted.max() < Step(inputs, case).tail


def tokens(step: Step, page: torch.Tensor, row: int) -> torch.Tensor:
    """One row's K or V, [Hk, N, d]."""
    blocks = step.sets[0].block_table[row].long()
    size = (step.inputs.shape.kv_heads, len(blocks) * BLOCK_SIZE, -1)
    return page[blocks].transpose(0, 1).reshape(size)[:, : step.inputs.context].double()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_exact_rows(case) -> None:
    torch.manual_seed(0)
    step = Step(Inputs(Shape(8, 2, 64), context=600, batch=2), case)
    pages = step.sets[0]
    for op in step.ops().values():
        op(pages)
    if case.layer == "sparse":
        step.retrieve(pages)
    for row in range(2):
        key, value = (tokens(step, page, row) for page in (pages.host.key, pages.host.value))
        full = torch.nn.functional.scaled_dot_product_attention(
            step.inputs.query[row].double().unsqueeze(1), key, value, enable_gqa=True
        ).squeeze(1)
        torch.testing.assert_close(exact_row(step, pages, row, as_ours=False), full)
        assert planted_weight(step, pages, row) > 0.8
        ours = exact_row(step, pages, row, as_ours=True)
        assert relative_error(step.output[row], ours) < 5e-3
        # Codes and left out tokens make a difference, or nothing was measured.
        assert relative_error(ours, full) > 1e-3


def test_planted_kept_counts_what_selection_found() -> None:
    sparse = next(case for case in CASES if case.layer == "sparse")
    step = Step(Inputs(Shape(8, 2, 64), context=600, batch=2), sparse)
    step.indices.fill_(-1)
    assert step.planted_kept() == 0
    step.indices[0, :, :PLANTED] = step.inputs.planted[0].int()
    assert step.planted_kept() == 0.5
