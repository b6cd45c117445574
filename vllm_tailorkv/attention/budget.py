"""The two budgets that bound the number of blocks: what a block takes, and how many fit."""

from collections.abc import Mapping

from vllm.config import VllmConfig
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import get_dtype_size
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_tailorkv.attention.carried import sharing_layers
from vllm_tailorkv.attention.spec import TailorKVSpec
from vllm_tailorkv.cache.sizing import CacheSizing, size_cache
from vllm_tailorkv.plan import Plan


def expected_sizing(vllm_config: VllmConfig, plan: Plan) -> CacheSizing | None:
    """The bytes of every worker's cache before there are workers; None where they differ."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1 or model.get_sliding_window() is not None:
        # Which layers a worker has is known there.
        return None
    if model.is_hybrid:
        # Recurrent layers and ours take blocks of one pool in turn.
        return None
    layouts = {
        layer: plan.layout(
            layer,
            num_kv_heads=model.get_num_kv_heads(parallel),
            head_size=model.get_head_size(),
            block_size=vllm_config.cache_config.block_size,
            kv_itemsize=get_dtype_size(model.dtype),
        )
        for layer in range(sharing_layers(model).start)
    }
    return size_cache(layouts, 0, split=plan.split)


def cache_sizing(specs: Mapping[str, KVCacheSpec]) -> CacheSizing | None:
    """The bytes of one worker's cache, or None if it has no layer of ours.

    Args:
        specs: the worker's specs by layer name.
    """
    ours = {name: spec for name, spec in specs.items() if isinstance(spec, TailorKVSpec)}
    if not ours:
        return None
    others = sum(spec.page_size_bytes for name, spec in specs.items() if name not in ours)
    layouts = {extract_layer_index(name): spec.layout for name, spec in ours.items()}
    return size_cache(layouts, others, split=next(iter(ours.values())).split)


def blocks_of_one_request(vllm_config: VllmConfig, block_size: int) -> int:
    """Blocks of the longest request, and vLLM's null block."""
    return -(-vllm_config.model_config.max_model_len // block_size) + 1
