"""The KV cache spec of a TailorKV layer: what vLLM's allocator needs to know of a page."""

import copy
from dataclasses import dataclass, replace
from typing import Self

from vllm.config import VllmConfig
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import get_dtype_size
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec

from vllm_tailorkv.attention.block_manager import TailorKVBlockManager
from vllm_tailorkv.attention.carried import plan_of
from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.layout import PageLayout


@register_kv_cache_spec(
    manager_class=TailorKVBlockManager, uniform_type_base_spec=FullAttentionSpec
)
@dataclass(frozen=True, kw_only=True)
class TailorKVSpec(FullAttentionSpec):
    """A full-attention layer whose page is `[host | derived]`, or derived alone if split.

    Args:
        layout: where every byte of a page lies.
        split: whether the host region lies in our own pool.
    """

    layout: PageLayout
    split: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layout.block_size != self.block_size:
            # vLLM copies specs with another block size.
            object.__setattr__(self, "layout", replace(self.layout, block_size=self.block_size))

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """The one spec of layers that share it."""
        if any(spec != specs[0] for spec in specs):
            # vLLM probes for uniformity by catching this very exception.
            raise AssertionError("layers of one group must have the same spec")
        return copy.deepcopy(specs[0])


def layer_spec(spec: KVCacheSpec, layer_name: str, vllm_config: VllmConfig) -> TailorKVSpec:
    """The spec of one layer, from the one that vLLM would give it.

    Raises:
        TailorKVError: it is no full attention, or V has another head size than K.
    """
    if not isinstance(spec, FullAttentionSpec):
        raise TailorKVError(
            f"--attention-backend tailorkv: {layer_name} has a cache of type "
            f"{type(spec).__name__}, which is not supported"
        )
    if spec.head_size_v != spec.head_size:
        raise TailorKVError(
            f"--attention-backend tailorkv: {layer_name} has V heads of {spec.head_size_v} "
            f"channels and K heads of {spec.head_size}, which is not supported"
        )
    plan = plan_of(vllm_config)
    layout = plan.layout(
        extract_layer_index(layer_name),
        num_kv_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        block_size=spec.block_size,
        kv_itemsize=get_dtype_size(spec.dtype),
    )
    page_bytes = layout.derived_bytes + (0 if plan.split else layout.host_bytes)
    return TailorKVSpec(
        block_size=spec.block_size,
        num_kv_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        dtype=spec.dtype,
        layout=layout,
        split=plan.split,
        state_content_bytes=page_bytes // (spec.num_kv_heads * spec.block_size),
    )
