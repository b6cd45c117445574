"""Attention sinks: a learned logit of each query head that takes part in its softmax."""

import torch


def sink_logits(sinks: torch.Tensor | None) -> torch.Tensor | None:
    """A layer's sinks as ops take them, see `kernels.ops`.

    Made anew for each step: the parameter is loaded after layers are made, and maybe again.

    Args:
        sinks: [H] of this rank's heads, any dtype.
    """
    return None if sinks is None else sinks.detach().float().contiguous()
