"""The KV cache spec of a TailorKV layer: what vLLM's allocator needs to know of a page."""

import copy
from dataclasses import dataclass
from typing import Self

from vllm.config import VllmConfig
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import get_dtype_size
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec

from vllm_tailorkv.attention.block_manager import TailorKVBlockManager
from vllm_tailorkv.attention.settings import load_settings
from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.layout import DerivedKind, PageLayout


@register_kv_cache_spec(
    manager_class=TailorKVBlockManager, uniform_type_base_spec=FullAttentionSpec
)
@dataclass(frozen=True, kw_only=True)
class TailorKVSpec(FullAttentionSpec):
    """A full-attention layer whose page is `[host | derived]`, or derived alone if split.

    Args:
        kind: what the derived region holds.
        group_size: tokens or channels that share a scale.
        bits: bits of a code of a dense layer.
        key_rows: whether the host region holds K once more, token-major.
        split: whether the host region lies in our own pool.
    """

    kind: DerivedKind
    group_size: int
    bits: int
    key_rows: bool
    split: bool

    @property
    def layout(self) -> PageLayout:
        """Where every byte of a page lies."""
        return PageLayout(
            kind=self.kind,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            block_size=self.block_size,
            group_size=self.group_size,
            bits=self.bits,
            kv_itemsize=get_dtype_size(self.dtype),
            key_rows=self.key_rows,
        )

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
        TailorKVError: V has another head size than K.
    """
    assert isinstance(spec, FullAttentionSpec)
    if spec.head_size_v != spec.head_size:
        raise TailorKVError(
            f"--attention-backend tailorkv: {layer_name} has V heads of {spec.head_size_v} "
            f"channels and K heads of {spec.head_size}, which is not supported"
        )
    settings = load_settings(vllm_config)
    fields = {
        "block_size": spec.block_size,
        "num_kv_heads": spec.num_kv_heads,
        "head_size": spec.head_size,
        "dtype": spec.dtype,
        "split": settings.split,
        **settings.layout_fields(extract_layer_index(layer_name), spec.block_size),
    }
    layout = TailorKVSpec(**fields).layout
    page_bytes = layout.derived_bytes + (0 if settings.split else layout.host_bytes)
    content = page_bytes // (spec.num_kv_heads * spec.block_size)
    return TailorKVSpec(**fields, state_content_bytes=content)
