"""The host tier of the `split` placement: one tensor a layer, ours."""

import torch

from vllm_tailorkv.cache.huge_pages import advise_huge_pages
from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.layout import PageLayout


def allocate_host_pool(num_blocks: int, layout: PageLayout) -> torch.Tensor:
    """Host regions for every block of one layer: uint8 [num_blocks, host_bytes], zeros.

    Raises:
        TailorKVError: the memory is not there.
    """
    try:
        pool = torch.empty(num_blocks, layout.host_bytes, dtype=torch.uint8)
        advise_huge_pages(pool)
        return pool.zero_()
    except RuntimeError as error:
        # torch has no type of its own for this on CPUs.
        if "DefaultCPUAllocator" not in str(error):
            raise
        gib = num_blocks * layout.host_bytes / (1 << 30)
        raise TailorKVError(
            f"no memory for {gib:.2f} GiB of a layer's host pool; lower host_pool_gib"
        ) from None
