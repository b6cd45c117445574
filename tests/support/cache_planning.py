"""vLLM's planning of its caches, called as its engine core calls it, in every version."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from vllm.v1.engine import core


def vllms_own() -> Callable[..., Any]:
    """The function that our patch wraps, wrapped or not in the engine core."""
    # Where it is defined since 0.33, and before.
    names = ("vllm.v1.core.kv_cache_planning", "vllm.v1.core.kv_cache_utils")
    name = next(name for name in names if find_spec(name))
    return import_module(name).get_kv_cache_configs


def plan_caches(
    config: Any, specs: list[Any], memory: list[int], planned: Callable[..., Any] | None = None
) -> Any:
    """The configurations of the workers' caches.

    Args:
        specs: of each worker, by layer.
        memory: bytes that each worker found.
        planned: what makes them; by default what the engine core calls.
    """
    grouped = getattr(core, "get_global_kv_cache_groups", None)
    # Since 0.33 the core groups the layers first.
    groups = [] if grouped is None else [grouped(config, specs)]
    return (planned or core.get_kv_cache_configs)(config, specs, memory, *groups)
