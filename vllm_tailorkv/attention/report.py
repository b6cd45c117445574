"""What the user is told of the plan: lines of the start-up log, and a metric that programs read.

Each line is told once, however many processes serve: by the one that makes the plan, and by the
first engine.
"""

import hashlib
import multiprocessing
import os
from collections.abc import Sequence
from functools import cache

from prometheus_client import Gauge
from vllm.config import VllmConfig
from vllm.logger import init_logger

from vllm_tailorkv.attention.limits import pool_name
from vllm_tailorkv.attention.meters import publish
from vllm_tailorkv.attention.name import LOGGER
from vllm_tailorkv.cache.sizing import CacheSizing
from vllm_tailorkv.layout import GIB
from vllm_tailorkv.plan import Plan

logger = init_logger(LOGGER)

METRIC = "tailorkv_plan_info"
"""A metric of value 1 whose labels are the plan; under `/metrics` of a server.

Of several engines made in one process it tells the last one's.
"""

_TOLD = "_TAILORKV_TOLD"
"""The variable that says what was told to the processes that this one starts."""

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


def _is_told(lines: Sequence[str]) -> bool:
    """Whether a process that has started this one has said the same; notes that it is said."""
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    # Another program that was started from this one's shell or script speaks for itself.
    if multiprocessing.parent_process() is not None and os.environ.get(_TOLD) == digest:
        return True
    os.environ[_TOLD] = digest
    return False


def tell_plan(
    plan: Plan, sizing: CacheSizing | None, windowed: Sequence[int], drafts: int = 0
) -> None:
    """Log the plan, set the metric, and make room for those of other processes.

    Args:
        sizing: of every worker, if that is known: bytes of a token in all its layers.
        windowed: layers with a sliding window, which are vLLM's.
        drafts: how many tokens the model drafts for itself, 0 where it does not.
    """
    config, layers = plan.config, plan.layers
    dense = tuple(layer for layer in layers.dense if layer not in windowed)
    sparse = tuple(layer for layer in layers.sparse if layer not in windowed)
    _log_plan(plan, dense, sparse, windowed, drafts)
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


def _log_plan(
    plan: Plan,
    dense: tuple[int, ...],
    sparse: tuple[int, ...],
    windowed: Sequence[int],
    drafts: int,
) -> None:
    config, layers, name = plan.config, plan.layers, plan.model.name
    others = f"; left to vLLM: {_listed(tuple(windowed))}" if windowed else ""
    beyond = "beyond,"
    if drafts:
        beyond = f"beyond, full attention judges drafts of up to {drafts} tokens, for which"
    lines = [
        f"TailorKV: dense layers (quantized to {config.bits} bit): {_listed(dense)}; sparse "
        f"layers: {_listed(sparse)}{others}; from {layers.source}.",
        f"TailorKV: contexts up to {config.exact_below:,} tokens are attended in full; {beyond} a "
        f"sparse layer reads {config.budget_tokens:,} tokens a step, found by index "
        f"{config.index}.",
    ]
    warnings = []
    if ignored := tuple(sorted(set(layers.dense) - set(dense))):
        warnings.append(
            f"TailorKV: the profile calls layers {', '.join(map(str, ignored))} dense, which have "
            "a sliding window and are left to vLLM."
        )
    if layers.is_fallback:
        warnings.append(
            f"TailorKV: no profile is known for {name}, so all its layers are sparse. Where some "
            "spread their attention over very many tokens, a profile keeps more of it: "
            f"vllm-tailorkv identify {name}"
        )
    if _is_told(lines + warnings):
        return
    for line in lines:
        logger.info_once("%s", line)
    for line in warnings:
        logger.warning_once("%s", line)


def tell_sizes(vllm_config: VllmConfig, sizing: CacheSizing, num_blocks: int) -> None:
    """Log what the cache holds; of several data parallel engines, which are alike, the first does.

    Args:
        sizing: of all workers of the engine together.
    """
    parallel = vllm_config.parallel_config
    if parallel.data_parallel_index:
        return
    workers = f", {parallel.world_size} workers together," if parallel.world_size > 1 else ""
    *tiers, blocks = sizing.describe(num_blocks, vllm_config.model_config.max_model_len)
    for line in ("; ".join(tiers), blocks):
        logger.info("TailorKV%s %s.", workers, line)


def tell_bound(
    vllm_config: VllmConfig, plan: Plan, workers: Sequence[tuple[CacheSizing, int]]
) -> None:
    """Log which of a GPU's two budgets bounds the cache, and the option that raises it; once.

    Args:
        workers: what a block takes in each worker, and the bytes that vLLM found for its cache.
    """
    cache, pool = vllm_config.cache_config, plan.host_pool
    if vllm_config.parallel_config.data_parallel_index:
        return
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
