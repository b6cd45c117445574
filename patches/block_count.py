"""The number of blocks is bounded by both tiers, and told to the user."""

from collections.abc import Callable
from typing import Any

from vllm_tailorkv.patches.record import Patch


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_kv_cache_configs(
        vllm_config: Any, kv_cache_specs: list[dict[str, Any]], available_memory: list[int]
    ) -> Any:
        from vllm_tailorkv.attention import budget  # noqa: PLC0415

        sizings = [budget.cache_sizing(vllm_config, specs) for specs in kv_cache_specs]
        if not any(sizings):
            budget.require_a_layer(vllm_config)
            return original(vllm_config, kv_cache_specs, available_memory)
        memory = [
            budget.bound_memory(vllm_config, sizing, available)
            for sizing, available in zip(sizings, available_memory, strict=True)
        ]
        configs = original(vllm_config, kv_cache_specs, memory)
        for sizing, config in zip(sizings, configs, strict=True):
            budget.check_and_log(vllm_config, sizing, config.num_blocks)
        return configs

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
)
