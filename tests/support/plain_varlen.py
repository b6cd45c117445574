"""Attention of prompts in plain torch, whose parts can be merged: see `varlen.Varlen`."""

from itertools import pairwise
from typing import Any

import torch


def attended(call: Any) -> torch.Tensor:
    """Write the output of a call; the log of sums."""
    starts, bounds = (part.tolist() for part in call.contexts[:2])
    per_head = call.query.shape[1] // call.key.shape[1]
    log_sums = []
    for i, (first, last) in enumerate(pairwise(starts)):
        query = call.query[first:last]
        key, value = (
            part[bounds[i] : bounds[i + 1]].repeat_interleave(per_head, 1)
            for part in (call.key, call.value)
        )
        scores = torch.einsum("qhd,khd->hqk", query, key) * call.scale
        if call.causal:
            future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + len(key) - len(query))
            scores = scores.masked_fill(future, -torch.inf)
        call.output[first:last] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)
        log_sums.append(scores.logsumexp(-1))
    return torch.cat(log_sums, 1)
