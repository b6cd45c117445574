"""Layers that read K and V of an earlier one get the metadata of that one's kind."""

from collections.abc import Callable
from typing import Any

from vllm_tailorkv.failures import noted
from vllm_tailorkv.patches.record import Patch


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    @noted
    def maybe_add_kv_sharing_layers_to_kv_cache_groups(self: Any, kv_cache_config: Any) -> None:
        from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs  # noqa: PLC0415

        original(self, kv_cache_config)
        for group in kv_cache_config.kv_cache_groups:
            if not isinstance(group.kv_cache_spec, UniformTypeKVCacheSpecs):
                continue
            specs = group.kv_cache_spec.kv_cache_specs
            for name, owner in self.shared_kv_cache_layers.items():
                if owner in specs:
                    specs.setdefault(name, specs[owner])

    return maybe_add_kv_sharing_layers_to_kv_cache_groups


PATCH = Patch(
    name="shared-layers",
    target="vllm.v1.worker.gpu_model_runner:"
    "GPUModelRunner.maybe_add_kv_sharing_layers_to_kv_cache_groups",
    why="in a group whose layers have specs of their own, vLLM looks for the spec of a layer that "
    "has none because it shares another's cache, and ends with a KeyError",
    how="such a layer is given the spec of the layer that it shares with",
    process="workers",
    remove_when="add_kv_sharing_layers_to_kv_cache_groups does it",
    wrap=_wrap,
)
