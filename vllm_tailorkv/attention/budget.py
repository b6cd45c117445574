"""The two budgets that bound the number of blocks, and what the user is told of them."""

import json
from collections.abc import Mapping

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_tailorkv.attention.name import LOGGER
from vllm_tailorkv.attention.settings import load_settings
from vllm_tailorkv.attention.spec import TailorKVSpec
from vllm_tailorkv.cache.sizing import GIB, CacheSizing, size_cache
from vllm_tailorkv.errors import TailorKVError

logger = init_logger(LOGGER)


def cache_sizing(vllm_config: VllmConfig, specs: Mapping[str, KVCacheSpec]) -> CacheSizing | None:
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


def _pool_bytes(host_pool_gib: float | None) -> int | None:
    return None if host_pool_gib is None else int(host_pool_gib * GIB)


def bound_memory(vllm_config: VllmConfig, sizing: CacheSizing | None, available: int) -> int:
    """Cut vLLM's memory to the blocks that the host tier can hold as well.

    Args:
        available: bytes that the worker found for its cache.

    Raises:
        TailorKVError: the host pool cannot hold one request of the model's length.
    """
    if sizing is None:
        return available
    gib = load_settings(vllm_config).config.host_pool_gib
    pool = _pool_bytes(gib)
    if sizing.split and pool is not None and vllm_config.model_config.original_max_model_len != -1:
        tokens = vllm_config.model_config.max_model_len
        needed = -(-tokens // sizing.block_size) + 1
        if pool // sizing.host_bytes < needed:
            fits = max(0, pool // sizing.host_bytes - 1) * sizing.block_size
            raise TailorKVError(
                f"host_pool_gib={gib:g} holds {fits:,} tokens, but one request may have "
                f"{tokens:,}; give at least {needed * sizing.host_bytes / GIB:.3f}, or lower "
                f"--max-model-len to {fits:,}"
            )
    return sizing.memory_for_vllm(available, pool)


def check_and_log(vllm_config: VllmConfig, sizing: CacheSizing | None, num_blocks: int) -> None:
    """Check the resulting number of blocks against the host pool, and print the sizes.

    Raises:
        TailorKVError: `--num-gpu-blocks-override` asks for more than the host pool holds.
    """
    if sizing is None:
        return
    settings = load_settings(vllm_config)
    pool = _pool_bytes(settings.config.host_pool_gib)
    if pool is not None and num_blocks * sizing.host_bytes > pool:
        raise TailorKVError(
            f"--num-gpu-blocks-override {num_blocks} needs "
            f"{num_blocks * sizing.host_bytes / GIB:.3f} GiB of host pool, host_pool_gib is "
            f"{settings.config.host_pool_gib:g}; raise it, or lower the override"
        )
    config, block = settings.config, sizing.block_size
    for line in sizing.describe(num_blocks):
        logger.info("TailorKV %s.", line)
    plan = {
        "dense_layers": sizing.dense_layers,
        "sparse_layers": sizing.sparse_layers,
        "plan_source": settings.plan.source,
        "num_kv_heads": sizing.num_kv_heads,
        "head_size": sizing.head_size,
        "placement": "split" if sizing.split else "joint",
        "host_bytes_per_token": sizing.host_bytes // block,
        "derived_bytes_per_token": sizing.derived_bytes // block,
        "full_bytes_per_token": sizing.host_bytes // block,
        "num_blocks": num_blocks,
        "block_size": block,
        "num_tokens": (num_blocks - 1) * block,
        "budget_tokens": config.budget_tokens,
        "exact_below": config.exact_below,
        "bits": config.bits,
        "index": config.index,
        "critical_channels": config.critical_channels,
    }
    logger.info("TailorKV plan: %s", json.dumps(plan))
