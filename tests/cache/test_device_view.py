"""What can be seen from a device; the view itself is tested by the op tests on a GPU."""

import pytest
import torch

from vllm_tailorkv.cache.device_view import device_view


@pytest.mark.parametrize(
    "memory",
    [
        torch.zeros(8, dtype=torch.uint8),
        torch.zeros(8, dtype=torch.float32),
        torch.zeros(4, 8, dtype=torch.uint8)[:, ::2],
    ],
)
def test_only_pinned_bytes(memory):
    with pytest.raises(ValueError, match="pinned"):
        device_view(memory)
