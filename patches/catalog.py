"""All patches of all known vLLMs, in the order in which they are applied."""

from vllm_tailorkv.patches import backend_name, block_count, layers, platform, shared_layers
from vllm_tailorkv.patches.record import Patch

PATCHES: tuple[Patch, ...] = (
    backend_name.PATCH,
    platform.BACKEND,
    platform.CONFIG,
    layers.SPEC,
    layers.BIND,
    shared_layers.PATCH,
    block_count.PATCH_0_32,
    block_count.PATCH,
)
