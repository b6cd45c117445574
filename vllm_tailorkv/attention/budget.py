"""The two budgets that bound the number of blocks, and what the user is told of them."""

import json
from collections.abc import Mapping

import psutil
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import get_dtype_size
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_tailorkv.attention.name import LOGGER, NAME
from vllm_tailorkv.attention.settings import load_settings
from vllm_tailorkv.attention.spec import TailorKVSpec
from vllm_tailorkv.cache.sizing import GIB, CacheSizing, size_cache
from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.layout import PageLayout

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


def _blocks_of_one_request(vllm_config: VllmConfig, block_size: int) -> int:
    """Blocks of the longest request, and vLLM's null block."""
    return -(-vllm_config.model_config.max_model_len // block_size) + 1


def _check_budget(
    vllm_config: VllmConfig, name: str, sizing: CacheSizing, budget: int, block_bytes: int
) -> None:
    """Refuse a budget that cannot hold one request of the model's length.

    Args:
        name: the option that sets the budget, with its value.
        budget: bytes.
        block_bytes: bytes of it that a block takes.
    """
    if vllm_config.model_config.original_max_model_len == -1:
        # vLLM then fits the length to the cache.
        return
    needed = _blocks_of_one_request(vllm_config, sizing.block_size)
    if budget // block_bytes >= needed:
        return
    fits = max(0, budget // block_bytes - 1) * sizing.block_size
    raise TailorKVError(
        f"{name} holds {fits:,} tokens, but one request may have "
        f"{vllm_config.model_config.max_model_len:,}; give at least "
        f"{needed * block_bytes / GIB:.3f} GiB, or lower --max-model-len to {fits:,}"
    )


def check_budgets(vllm_config: VllmConfig) -> None:
    """Check what is known of the budgets before the engine starts: those given as numbers.

    Raises:
        TailorKVError: one of them cannot hold one request of the model's length.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1 or model.get_sliding_window() is not None:
        # Which layers a worker has is known there.
        return
    settings = load_settings(vllm_config)
    block_size = vllm_config.cache_config.block_size
    layouts = {
        layer: PageLayout(
            num_kv_heads=model.get_num_kv_heads(parallel),
            head_size=model.get_head_size(),
            block_size=block_size,
            kv_itemsize=get_dtype_size(model.dtype),
            **settings.layout_fields(layer, block_size),
        )
        for layer in range(settings.plan.num_layers)
    }
    sizing = size_cache(layouts, 0, split=settings.split)
    gib = settings.config.host_pool_gib
    if gib is not None:
        name = f"host_pool_gib={gib:g}"
        _check_budget(vllm_config, name, sizing, int(gib * GIB), sizing.host_bytes)
        available = psutil.virtual_memory().available
        if gib * GIB > available:
            # Untouched pages cost nothing, so the system would end us later, while serving.
            raise TailorKVError(
                f"{name} is more than the {available / GIB:.1f} GiB of memory available; lower it"
            )
    memory = vllm_config.cache_config.kv_cache_memory_bytes
    if memory is not None and vllm_config.cache_config.num_gpu_blocks_override is None:
        shared = sizing.split and gib is None
        block_bytes = sizing.pool_bytes + (sizing.host_bytes if shared else 0)
        name = f"--kv-cache-memory-bytes (or VLLM_CPU_KVCACHE_SPACE) of {memory / GIB:.3f} GiB"
        _check_budget(vllm_config, name, sizing, memory, block_bytes)


def require_a_layer(vllm_config: VllmConfig) -> None:
    """Refuse a model none of whose layers is ours, if our backend was asked for.

    Raises:
        TailorKVError: all its layers have a sliding window.
    """
    backend = vllm_config.attention_config.backend
    if backend is not None and backend.name == NAME:
        raise TailorKVError(
            f"--attention-backend tailorkv: {vllm_config.model_config.model} has no layer with "
            "full attention (sliding windows are left to vLLM); leave --attention-backend out"
        )


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
    if gib is None:
        return sizing.memory_for_vllm(available, None)
    pool = int(gib * GIB)
    _check_budget(vllm_config, f"host_pool_gib={gib:g}", sizing, pool, sizing.host_bytes)
    return sizing.memory_for_vllm(available, pool)


def check_and_log(vllm_config: VllmConfig, sizing: CacheSizing | None, num_blocks: int) -> None:
    """Check the resulting number of blocks against the host pool, and print the sizes.

    Raises:
        TailorKVError: `--num-gpu-blocks-override` asks for more than the host pool holds.
    """
    if sizing is None:
        return
    settings = load_settings(vllm_config)
    gib = settings.config.host_pool_gib
    if gib is not None and num_blocks * sizing.host_bytes > gib * GIB:
        raise TailorKVError(
            f"--num-gpu-blocks-override {num_blocks} needs "
            f"{num_blocks * sizing.host_bytes / GIB:.3f} GiB of host pool, host_pool_gib is "
            f"{gib:g}; raise it, or lower the override"
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
        "full_bytes_per_token": sizing.full_bytes // block,
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
