"""Every layer gets the pages of its kind, and learns where they lie."""

from collections.abc import Callable
from typing import Any

from vllm_tailorkv.failures import noted
from vllm_tailorkv.patches.record import Patch


def _wrap_spec(original: Callable[..., Any]) -> Callable[..., Any]:
    @noted
    def get_kv_cache_spec(self: Any, vllm_config: Any) -> Any:
        from vllm_tailorkv.attention.impl import TailorKVImpl  # noqa: PLC0415
        from vllm_tailorkv.attention.spec import layer_spec  # noqa: PLC0415

        spec = original(self, vllm_config)
        if not isinstance(self.impl, TailorKVImpl):
            return spec
        self.impl.spec = layer_spec(spec, self.layer_name, vllm_config)
        return self.impl.spec

    return get_kv_cache_spec


def _wrap_bind(original: Callable[..., Any]) -> Callable[..., Any]:
    @noted
    def bind_kv_cache(self: Any, kv_cache: Any) -> None:
        from vllm_tailorkv.attention.impl import TailorKVImpl  # noqa: PLC0415

        original(self, kv_cache)
        if isinstance(self.impl, TailorKVImpl):
            self.impl.bind(self.layer_name, kv_cache)

    return bind_kv_cache


SPEC = Patch(
    name="layer-spec",
    target="vllm.model_executor.layers.attention.attention:Attention.get_kv_cache_spec",
    why="`AttentionBackend.customize_spec` is not told which layer a spec is for",
    how="layers of our backend get the spec of their kind in the layer plan",
    process="workers",
    remove_when="customize_spec is given the layer's name",
    wrap=_wrap_spec,
    upstream="https://github.com/vllm-project/vllm/issues/42449",
)

BIND = Patch(
    name="bind-pages",
    target="vllm.model_executor.layers.attention.attention:Attention.bind_kv_cache",
    why="an attention implementation is not told when its cache is allocated",
    how="our implementation views its pages, and allocates its host pool, at start-up",
    process="workers",
    remove_when="vLLM tells the implementation that its cache is bound",
    wrap=_wrap_bind,
)
