"""What a GPU without the CUDA extension is left with: a few calls of torch.

Nothing waits for the device and shapes follow from shapes, so that a CUDA graph can capture it.
"""

import torch

SELECT_SCRATCH = 4
"""What `select_topk` takes beside the scores, in multiples of their bytes: a copy of them, two
arrays of int32 and four masks."""


def unavailable() -> str | None:
    """None: it needs torch alone."""
    return None


def select_topk(
    indices: torch.Tensor, scores: torch.Tensor, tail_start: torch.Tensor, sink_tokens: int
) -> None:
    """See `ops.select_topk`."""
    length = scores.shape[2]
    count = min(indices.shape[2], length)
    indices.fill_(-1)
    if not count:
        return
    position = torch.arange(length, dtype=torch.int32, device=scores.device)
    middle = (position >= sink_tokens) & (position < tail_start[:, None, None])
    scores = scores.masked_fill(~middle, -torch.inf)
    last = scores.topk(count, sorted=False).values.amin(-1, keepdim=True)
    # Tokens outside of the middle may equal the last score, but count for nothing.
    above, equal = scores > last, (scores == last) & middle
    missing = count - above.sum(-1, keepdim=True, dtype=torch.int32)
    chosen = above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= missing))
    found = torch.where(chosen, position, length).topk(count, largest=False, sorted=True).values
    indices[:, :, :count] = found.masked_fill(found == length, -1)
