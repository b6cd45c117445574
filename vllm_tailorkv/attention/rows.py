"""Which rows of a batch are attended exactly, which by the tailored ops, and where."""

import torch

from vllm_tailorkv.config import TailorKVConfig
from vllm_tailorkv.layout import DerivedKind


def decode_mask(
    query_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    is_prefilling: torch.Tensor | None,
    exact_below: int,
) -> torch.Tensor:
    """The requests that the tailored ops serve: bool [num_reqs].

    One query token, more than `exact_below` tokens in context, and no part of a prompt: a
    prompt's attention is exact whatever the chunks, so that its K and V depend on neither
    the chunking nor a prefix hit.

    Args:
        query_lens, seq_lens: int [num_reqs].
        is_prefilling: bool [num_reqs], or None if unknown (no prompt is in the batch).
    """
    mask = (query_lens == 1) & (seq_lens > exact_below)
    return mask if is_prefilling is None else mask & ~is_prefilling


def tail_starts(
    seq_lens: torch.Tensor, kind: DerivedKind, group_size: int, config: TailorKVConfig
) -> torch.Tensor:
    """Where the exact tail of each row starts: int32 [R].

    All that lies before it is in complete groups. A dense layer reads codes there, a sparse layer
    what its index finds.

    Args:
        seq_lens: int32 [R]; tokens in context.
        kind: what the layer keeps in its derived pages.
        group_size: tokens of a group.
    """
    complete = seq_lens // group_size * group_size
    if kind is DerivedKind.DENSE:
        coded = (seq_lens - config.residual_tokens).clamp(min=0)
        return coded // group_size * group_size
    # Tokens of the group in progress are not in the index: the tail covers them.
    return torch.minimum(seq_lens - config.recent_tokens, complete)


def completed_groups(
    query_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    group_size: int,
    block_size: int,
) -> torch.Tensor:
    """The groups that this step's tokens complete, as `quantize_groups` takes them.

    Args:
        query_lens, seq_lens: int [num_reqs]; a step writes tokens `[L - q, L)`.
        block_table: int32 [num_reqs, max_blocks].

    Returns:
        int64 [N], `block * groups_per_block + group within the block`.
    """
    first = ((seq_lens - query_lens) // group_size).long()
    counts = (seq_lens // group_size).long() - first
    total = int(counts.sum())
    if total == 0:
        return torch.empty(0, dtype=torch.int64)
    requests = torch.repeat_interleave(torch.arange(len(counts)), counts)
    starts = torch.repeat_interleave(first - (counts.cumsum(0) - counts), counts)
    groups = starts + torch.arange(total)
    per_block = block_size // group_size
    blocks = block_table[requests, groups // per_block].long()
    return blocks * per_block + groups % per_block


def token_indices(query_start_loc: torch.Tensor, requests: torch.Tensor) -> torch.Tensor:
    """The query tokens of some requests, in order: int64.

    Args:
        query_start_loc: int [num_reqs + 1].
        requests: int64 [n].
    """
    starts = query_start_loc[requests].long()
    counts = query_start_loc[requests + 1].long() - starts
    offsets = torch.repeat_interleave(starts - (counts.cumsum(0) - counts), counts)
    return offsets + torch.arange(int(counts.sum()))
