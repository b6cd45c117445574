"""`vllm_tailorkv.kernels.cuda` on a GPU for tests that hold CPU tensors.

Inputs are copied to the device with their strides and their address modulo 16, K and V pages
to pinned host memory, and outputs back.
"""

import torch
from cuda_emulator import span_bytes

from vllm_tailorkv.kernels import cuda
from vllm_tailorkv.kernels.types import ChannelIndex


def copy_of(tensor: torch.Tensor, pinned: bool = False) -> torch.Tensor:
    """A copy on the device, or in pinned host memory."""
    count = span_bytes(tensor) // tensor.itemsize
    skipped = tensor.data_ptr() % 16 // tensor.itemsize
    kwargs = {"pin_memory": True} if pinned else {"device": "cuda"}
    flat = torch.empty(skipped + count, dtype=tensor.dtype, **kwargs)
    flat[skipped:].copy_(tensor.as_strided((count,), (1,)))
    return flat.as_strided(tensor.shape, tensor.stride(), skipped)


def copy_back(tensor: torch.Tensor, copy: torch.Tensor) -> None:
    """The gaps too: nothing may have been written there."""
    count = span_bytes(tensor) // tensor.itemsize
    flat = copy.as_strided((count,), (1,), copy.storage_offset())
    tensor.as_strided((count,), (1,), tensor.storage_offset()).copy_(flat)


class Device:
    """The ops on the current CUDA device."""

    def select_topk(self, indices, scores, tail_start, sink_tokens):
        copies = [copy_of(tensor) for tensor in (indices, scores, tail_start)]
        cuda.select_topk(*copies, sink_tokens)
        copy_back(indices, copies[0])

    def gather_rows(self, key_rows, value_rows, key_cache, value_cache, indices, block_table):
        outputs = [copy_of(key_rows), copy_of(value_rows)]
        caches = [copy_of(key_cache, pinned=True), copy_of(value_cache, pinned=True)]
        cuda.gather_rows(*outputs, *caches, copy_of(indices), copy_of(block_table))
        copy_back(key_rows, outputs[0])
        copy_back(value_rows, outputs[1])

    def pack_codes(self, codes, bits):
        return cuda.pack_codes(copy_of(codes), bits).cpu()

    def unpack_codes(self, packed, bits, length):
        return cuda.unpack_codes(copy_of(packed), bits, length).cpu()

    def reduce_channels(self, groups, key_cache, index):
        extremes = copy_of(index.extremes)
        pages = copy_of(key_cache, pinned=True)
        cuda.reduce_channels(copy_of(groups), pages, ChannelIndex(extremes))
        copy_back(index.extremes, extremes)
