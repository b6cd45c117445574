"""float64 attention of single rows, which results are held against."""

import math

import torch

from speed.pages import PageSet
from speed.shapes import SINKS
from speed.step import Step
from vllm_tailorkv.kernels import reference
from vllm_tailorkv.kernels.types import DenseCodes, GroupCodes


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Of a whole row."""
    return float((actual.double() - expected).norm() / expected.norm())


def exact_row(step: Step, pages: PageSet, row: int, *, as_ours: bool) -> torch.Tensor:
    """float64 attention of one row, [H, d].

    Args:
        as_ours: over the same codes or the same selected tokens; else over all tokens.
    """
    heads = range(step.inputs.shape.kv_heads)
    return torch.cat([_exact_head(step, pages, row, head, as_ours)[0] for head in heads])


def planted_weight(step: Step, pages: PageSet, row: int) -> float:
    """The share of full attention that goes to planted tokens, mean over the query heads."""
    weights = [
        _exact_head(step, pages, row, head, False)[1][:, step.inputs.planted[row, head]].sum(-1)
        for head in range(step.inputs.shape.kv_heads)
    ]
    return float(torch.cat(weights).mean())


def _exact_head(
    step: Step, pages: PageSet, row: int, head: int, as_ours: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [G, d] and weights [G, N] of one KV head's group of query heads."""
    inputs = step.inputs
    blocks = pages.block_table[row].long()
    key, value = (
        page[blocks, head].flatten(0, 1)[: inputs.context].double()
        for page in (pages.host.key, pages.host.value)
    )
    kept = torch.ones(inputs.context, dtype=torch.bool)
    if as_ours and isinstance(pages.derived, DenseCodes):
        coded_key, coded_value = _dequantized(step, pages.derived, blocks, head)
        key[: step.tail] = coded_key[: step.tail].double()
        value[: step.tail] = coded_value[: step.tail].double()
    elif as_ours:
        kept[SINKS : step.tail] = False
        chosen = step.indices[row, head].long()
        kept[chosen[chosen >= 0]] = True
    query = inputs.query[row].double().unflatten(0, (inputs.shape.kv_heads, -1))[head]
    scores = (query @ key.T * inputs.scale).masked_fill(~kept, -math.inf)
    weights = scores.softmax(-1)
    return weights @ value, weights


def _dequantized(
    step: Step, codes: DenseCodes, blocks: torch.Tensor, head: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of one KV head in these blocks, [N, d] each."""
    key, value = (
        GroupCodes(*(part[:, head : head + 1] for part in parts))
        for parts in (codes.key, codes.value)
    )
    bits, head_size = step.case.bits, step.inputs.shape.head_size
    size = step.layout.group_size
    return (
        torch.cat([reference.dequantize_keys(key, i, size)[0] for i in blocks.tolist()]),
        torch.cat(
            [
                reference.dequantize_values(value, i, size, bits, head_size)[0]
                for i in blocks.tolist()
            ]
        ),
    )
