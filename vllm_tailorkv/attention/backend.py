"""The backend that `--attention-backend tailorkv` selects."""

from typing import ClassVar

import torch
from vllm.config.cache import CacheDType
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.kv_cache_interface import KVCacheLayout, KVCacheSpec

from vllm_tailorkv.attention.builder import TailorKVMetadataBuilder
from vllm_tailorkv.attention.impl import TailorKVImpl
from vllm_tailorkv.attention.name import NAME
from vllm_tailorkv.attention.spec import TailorKVSpec


class TailorKVBackend(AttentionBackend):
    """Low-bit attention in dense layers, retrieval of tokens in sparse ones, exact prefill."""

    forward_includes_kv_cache_update: bool = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [
        torch.bfloat16,
        torch.float16,
        torch.float32,
    ]
    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = ["auto", "bfloat16", "float16"]

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,
    ) -> list[int | MultipleOf]:
        """Blocks are whole groups."""
        if isinstance(kv_cache_spec, TailorKVSpec):
            return [MultipleOf(kv_cache_spec.layout.group_size)]
        return [MultipleOf(32)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """What prefill takes: vLLM's CPU attention op, or FlashAttention on a GPU."""
        sizes = CPUAttentionBackend.get_supported_head_sizes()
        return [size for size in sizes if size <= 256] if current_platform.is_cuda() else sizes

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Pages are contiguous and a layer's pages lie together."""
        return (KVCacheLayout.LBHNC,)

    @staticmethod
    def get_name() -> str:
        """The member of vLLM's enum."""
        return NAME

    @classmethod
    def supports_sink(cls) -> bool:
        """Every op of ours counts them."""
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """A connector would carry one tier only."""
        return False

    @staticmethod
    def get_impl_cls() -> type[TailorKVImpl]:
        """The implementation of a layer."""
        return TailorKVImpl

    @staticmethod
    def get_builder_cls() -> type[TailorKVMetadataBuilder]:
        """The builder of a batch's metadata."""
        return TailorKVMetadataBuilder
