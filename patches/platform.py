"""The platform hands our layers to our backend, and configurations are checked early."""

from collections.abc import Callable
from typing import Any

from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_tailorkv.attention.name import CLASS_PATH, LOGGER, NAME
from vllm_tailorkv.failures import noted
from vllm_tailorkv.patches.record import Patch

logger = init_logger(LOGGER)

_PLATFORM = f"{type(current_platform).__module__}:{type(current_platform).__qualname__}"
"""What vLLM serves on here."""


def _wrap_backend(original: Callable[..., Any]) -> Callable[..., Any]:
    @noted
    def get_attn_backend_cls(
        cls: type, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        if selected_backend is not None and selected_backend.name == NAME:
            from vllm_tailorkv.attention.support import check_layer  # noqa: PLC0415

            check_layer(attn_selector_config)
            if not attn_selector_config.has_sliding_window:
                # The plan is told by the first process, and which layers it leaves to vLLM.
                logger.debug_once("Using %s backend.", NAME)
                return CLASS_PATH
            selected_backend = None
        backend: str = original(cls, selected_backend, attn_selector_config, num_heads)
        return backend

    return get_attn_backend_cls


def _wrap_config(original: Callable[..., Any]) -> Callable[..., Any]:
    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        original(cls, vllm_config)
        from vllm_tailorkv.attention import carried  # noqa: PLC0415

        # Those who did not ask for our backend load no more of it than this.
        if not carried.is_selected(vllm_config):
            carried.refuse_other_backend(vllm_config)
            return
        from vllm_tailorkv.attention.support import check_engine  # noqa: PLC0415

        check_engine(vllm_config)

    return check_and_update_config


BACKEND = Patch(
    name="layer-backend",
    target=f"{_PLATFORM}.get_attn_backend_cls",
    why="the CPU platform returns its own backend whatever the user selects, and the CUDA platform "
    "refuses without a remedy",
    how="full-attention layers get our backend where ours is selected; sliding-window layers "
    "keep vLLM's on CPUs, and anything else that we cannot serve is an error",
    process="workers",
    remove_when="the CPU platform honours a registered backend, and a backend can say why it "
    "refuses a layer",
    wrap=_wrap_backend,
)

CONFIG = Patch(
    name="early-check",
    target=f"{_PLATFORM}.check_and_update_config",
    why="a plugin has no hook that sees the whole configuration before the engine starts",
    how="our options are validated, and what we cannot serve is refused, in the first process",
    process="the one that the user starts",
    remove_when="vLLM lets an attention backend validate the configuration",
    wrap=_wrap_config,
)
