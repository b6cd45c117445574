"""`vllm_tailorkv.kernels.cuda` on a GPU for tests that hold CPU tensors.

Inputs are copied to the device with their strides and their address modulo 16, and outputs back.
"""

import torch
from cuda_emulator import span_bytes

from vllm_tailorkv.kernels import cuda


def copy_of(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the device."""
    count = span_bytes(tensor) // tensor.itemsize
    skipped = tensor.data_ptr() % 16 // tensor.itemsize
    flat = torch.empty(skipped + count, dtype=tensor.dtype, device="cuda")
    flat[skipped:].copy_(tensor.as_strided((count,), (1,)))
    return flat.as_strided(tensor.shape, tensor.stride(), skipped)


def copy_back(tensor: torch.Tensor, copy: torch.Tensor) -> None:
    """The gaps too: nothing may have been written there."""
    count = span_bytes(tensor) // tensor.itemsize
    flat = copy.as_strided((count,), (1,), copy.storage_offset())
    tensor.as_strided((count,), (1,), tensor.storage_offset()).copy_(flat)


class Device:
    """The op on the current CUDA device."""

    def select_topk(self, indices, scores, tail_start, sink_tokens):
        copies = [copy_of(tensor) for tensor in (indices, scores, tail_start)]
        cuda.select_topk(*copies, sink_tokens)
        copy_back(indices, copies[0])
