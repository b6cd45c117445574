"""What the user is told of the plan: lines of the start-up log, and a metric that programs read."""

import os
from collections.abc import Sequence
from functools import cache

from prometheus_client import Gauge
from vllm.config import VllmConfig
from vllm.logger import init_logger

from vllm_tailorkv.attention.limits import pool_name
from vllm_tailorkv.attention.memory import memory_nodes
from vllm_tailorkv.attention.meters import publish
from vllm_tailorkv.attention.name import LOGGER
from vllm_tailorkv.cache.sizing import CacheSizing
from vllm_tailorkv.layout import GIB
from vllm_tailorkv.plan import HOST_SHARE, Plan

logger = init_logger(LOGGER)

METRIC = "tailorkv_plan_info"
"""A metric of value 1 whose labels are the plan; under `/metrics` of a server.

Of several engines made in one process it tells the last one's.
"""

_LABELS = (
    "dense_layers",
    "sparse_layers",
    "plan_source",
    "placement",
    "index",
    "bits",
    "critical_channels",
    "budget_tokens",
    "exact_below",
    "num_kv_heads",
    "head_size",
    "full_bytes_per_token",
    "host_bytes_per_token",
    "derived_bytes_per_token",
)


@cache
def _gauge() -> Gauge:
    # A name without `vllm`: vLLM unregisters all that have it when an engine starts.
    return Gauge(METRIC, "The plan of TailorKV.", _LABELS, multiprocess_mode="mostrecent")


def _listed(layers: tuple[int, ...]) -> str:
    """Indices, runs of them as `first-last`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs) or "none"


def tell_plan(plan: Plan, sizing: CacheSizing | None, windowed: Sequence[int]) -> None:
    """Log the plan, set the metric, and make room for those of other processes.

    Args:
        sizing: of every worker, if that is known: bytes of a token in all its layers.
        windowed: layers with a sliding window, which are vLLM's.
    """
    config, layers = plan.config, plan.layers
    dense = tuple(layer for layer in layers.dense if layer not in windowed)
    sparse = tuple(layer for layer in layers.sparse if layer not in windowed)
    others = f"; left to vLLM: {_listed(tuple(windowed))}" if windowed else ""
    logger.info_once(
        "TailorKV: dense layers (quantized to %d bit): %s; sparse layers: %s%s; from %s.",
        config.bits,
        _listed(dense),
        _listed(sparse),
        others,
        layers.source,
    )
    if ignored := sorted(set(layers.dense) - set(dense)):
        logger.warning_once(
            "TailorKV: the profile calls layers %s dense, which have a sliding window and are left "
            "to vLLM.",
            ", ".join(map(str, ignored)),
        )
    logger.info_once(
        "TailorKV: contexts up to %s tokens are attended in full; beyond, a sparse layer reads %s "
        "tokens a step, found by index %s.",
        f"{config.exact_below:,}",
        f"{config.budget_tokens:,}",
        config.index,
    )
    if plan.on_gpu and config.host_pool_gib is None and plan.host_pool:
        logger.info_once(
            "TailorKV: each worker's host pool takes %.3g GiB, %.0f%% of its share of what is "
            "available on memory nodes %s; host_pool_gib sets it.",
            plan.host_pool / GIB,
            100 * HOST_SHARE,
            ", ".join(map(str, memory_nodes())),
        )
    tokens = sizing.block_size if sizing else 1
    values: dict[str, object] = {
        "dense_layers": ",".join(map(str, dense)),
        "sparse_layers": ",".join(map(str, sparse)),
        "plan_source": layers.source,
        "placement": "split" if plan.split else "joint",
        "index": config.index,
        "bits": config.bits,
        "critical_channels": config.critical_channels,
        "budget_tokens": config.budget_tokens,
        "exact_below": config.exact_below,
        "num_kv_heads": sizing.num_kv_heads if sizing else "",
        "head_size": plan.model.head_size,
        "full_bytes_per_token": sizing.full_bytes // tokens if sizing else "",
        "host_bytes_per_token": sizing.host_bytes // tokens if sizing else "",
        "derived_bytes_per_token": sizing.derived_bytes // tokens if sizing else "",
    }
    gauge = _gauge()
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:  # where labels cannot be cleared
        gauge.clear()
    gauge.labels(**values).set(1)
    publish()


def tell_sizes(vllm_config: VllmConfig, sizing: CacheSizing, num_blocks: int) -> None:
    """Log what the cache holds."""
    for line in sizing.describe(num_blocks, vllm_config.model_config.max_model_len):
        logger.info("TailorKV %s.", line)


def tell_bound(
    vllm_config: VllmConfig, plan: Plan, workers: Sequence[tuple[CacheSizing, int]]
) -> None:
    """Log which of a GPU's two budgets bounds the cache, and the option that raises it.

    Args:
        workers: what a block takes in each worker, and the bytes that vLLM found for its cache.
    """
    cache, pool = vllm_config.cache_config, plan.host_pool
    if not plan.on_gpu or pool is None or cache.num_gpu_blocks_override is not None:
        return
    # All workers get as many blocks as the one that has room for the fewest.
    rooms = [(*one.blocks_of_each(memory, pool), memory, one.block_size) for one, memory in workers]
    on_device, on_host, memory, block_size = min(rooms, key=lambda room: min(room[:2]))
    option = "--gpu-memory-utilization"
    if cache.kv_cache_memory_bytes is not None:
        option = "--kv-cache-memory-bytes"
    budgets = [
        (on_device, f"{memory / GIB:.3g} GiB of device memory ({option})", option),
        (on_host, pool_name(plan), "host_pool_gib"),
    ]
    (fewer, bounding, raised), (more, other, _) = sorted(budgets)
    logger.info(
        "TailorKV: %s holds %s tokens and bounds the cache; %s would hold %s: to have more, raise "
        "%s.",
        bounding,
        f"{max(0, fewer - 1) * block_size:,}",
        other,
        f"{max(0, more - 1) * block_size:,}",
        raised,
    )
