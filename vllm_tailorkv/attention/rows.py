"""Which rows of a batch are attended exactly, which by the tailored ops, and where."""

from typing import Any, TypeVar

import numpy.typing as npt
import torch

from vllm_tailorkv.config import TailorKVConfig
from vllm_tailorkv.layout import DerivedKind

T = TypeVar("T", torch.Tensor, npt.NDArray[Any])


def decode_mask(query_lens: T, seq_lens: T, is_prefilling: T | None, exact_below: int) -> T:
    """The requests that the tailored ops serve: bool [num_reqs].

    One query token, more than `exact_below` tokens in context, and no part of a prompt: a
    prompt's attention is exact whatever the chunks, so that its K and V depend on neither
    the chunking nor a prefix hit.

    Args:
        query_lens, seq_lens: int [num_reqs].
        is_prefilling: bool [num_reqs], or None if unknown (no prompt is in the batch).
    """
    mask: T = (query_lens == 1) & (seq_lens > exact_below)
    return mask if is_prefilling is None else mask & ~is_prefilling


def tail_starts(seq_lens: T, kind: DerivedKind, group_size: int, config: TailorKVConfig) -> T:
    """Where the exact tail of each row starts: int32 [R].

    All that lies before it is in complete groups. A dense layer reads codes there, a sparse layer
    what its index finds.

    Args:
        seq_lens: int32 [R]; tokens in context.
        kind: what the layer keeps in its derived pages.
        group_size: tokens of a group.
    """
    if kind is DerivedKind.DENSE:
        coded: T = (seq_lens - config.residual_tokens).clip(min=0)
        return coded // group_size * group_size
    complete: T = seq_lens // group_size * group_size
    # Tokens of the group in progress are not in the index: the tail covers them.
    beyond: T = (complete - (seq_lens - config.recent_tokens)).clip(min=0)
    return complete - beyond


def completed_groups(slot_mapping: torch.Tensor, group_size: int) -> torch.Tensor:
    """The group that each token completes, as `quantize_groups` takes them: int64 [T], or -1.

    Tokens of a group are written in order, so that its last one completes it; one that is written
    again, in place of a draft that was rejected, completes it again.

    Args:
        slot_mapping: int64 [T], slots of the tokens of a step, -1 for none; blocks are whole
            groups.
    """
    # No slot, -1, passes for the end of group -1.
    return torch.where((slot_mapping + 1) % group_size == 0, slot_mapping // group_size, -1)
