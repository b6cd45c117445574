"""The number of blocks is bounded by both tiers, and told to the user."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from vllm_tailorkv.failures import noted
from vllm_tailorkv.patches import seams
from vllm_tailorkv.patches.record import Patch


def _bounded(
    vllm_config: Any,
    kv_cache_specs: list[dict[str, Any]],
    available_memory: list[int],
    planned: Callable[[list[int]], Any],
) -> Any:
    """vLLM's configurations of the workers' caches, with no more blocks than both budgets hold.

    Args:
        planned: vLLM's own function, to be given the memory of each worker.
    """
    from vllm_tailorkv.attention import budget, limits, report  # noqa: PLC0415
    from vllm_tailorkv.attention.carried import plan_of  # noqa: PLC0415
    from vllm_tailorkv.cache.sizing import together  # noqa: PLC0415

    sizings = [budget.cache_sizing(specs) for specs in kv_cache_specs]
    if not any(sizings):
        limits.require_a_layer(vllm_config)
        return planned(available_memory)
    if vllm_config.model_config.is_hybrid:
        # Groups of layers take blocks of one pool in turn, which vLLM alone counts.
        return planned(available_memory)
    plan, memory = plan_of(vllm_config), list(available_memory)
    for i, sizing in enumerate(sizings):
        if sizing is not None:
            limits.require_pool_room(vllm_config, plan, sizing)
            memory[i] = sizing.memory_for_vllm(memory[i], plan.host_pool)
    configs = planned(memory)
    found = zip(sizings, available_memory, strict=True)
    report.tell_bound(vllm_config, plan, [(one, free) for one, free in found if one])
    ours = []
    for sizing, config in zip(sizings, configs, strict=True):
        if sizing is not None:
            limits.require_pool_blocks(plan, sizing, config.num_blocks)
            ours.append(sizing)
    # All workers have as many blocks.
    report.tell_sizes(vllm_config, together(ours), configs[0].num_blocks)
    return configs


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    @noted
    def get_kv_cache_configs(
        vllm_config: Any,
        kv_cache_specs: list[dict[str, Any]],
        available_memory: list[int],
        global_kv_cache_groups: Any,
    ) -> Any:
        def planned(memory: list[int]) -> Any:
            return original(vllm_config, kv_cache_specs, memory, global_kv_cache_groups)

        return _bounded(vllm_config, kv_cache_specs, available_memory, planned)

    return get_kv_cache_configs


def _wrap_0_32(original: Callable[..., Any]) -> Callable[..., Any]:
    @noted
    def get_kv_cache_configs(
        vllm_config: Any, kv_cache_specs: list[dict[str, Any]], available_memory: list[int]
    ) -> Any:
        def planned(memory: list[int]) -> Any:
            return original(vllm_config, kv_cache_specs, memory)

        return _bounded(vllm_config, kv_cache_specs, available_memory, planned)

    return get_kv_cache_configs


PATCH = Patch(
    name="block-count",
    target="vllm.v1.engine.core:get_kv_cache_configs",
    why="vLLM sizes its cache by one budget; with split placement a block also needs its host "
    "page, from a second one",
    how="the memory is cut to what both budgets allow, and the result is checked and logged",
    process="engine core",
    remove_when="a KV cache spec can name a second budget",
    wrap=_wrap,
    vllm=seams.V0_33,
    upstream="https://github.com/vllm-project/vllm/issues/42449",
)

PATCH_0_32 = replace(PATCH, wrap=_wrap_0_32, vllm=seams.V0_32)
