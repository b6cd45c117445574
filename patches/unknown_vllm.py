"""In a vLLM that this package does not know, selecting our backend is an error, and no more."""

from collections.abc import Callable
from typing import Any

from vllm_tailorkv.attention.name import CLASS_PATH, NAME
from vllm_tailorkv.errors import TailorKVError


def refuse_selection(reason: TailorKVError) -> None:
    """Let vLLM end with `reason` where our backend is selected.

    Where this vLLM lacks what is needed even for that, our name stays unknown to it, which it
    refuses by itself.
    """
    try:
        from vllm.config import AttentionConfig, VllmConfig  # noqa: PLC0415
        from vllm.platforms import current_platform  # noqa: PLC0415
        from vllm.v1.attention.backends.registry import (  # noqa: PLC0415
            AttentionBackendEnum,
            register_backend,
        )

        platform = type(current_platform)
        original: Callable[..., Any] = platform.check_and_update_config.__func__
        # What the selection is read from below. Were it elsewhere, nothing would refuse it.
        places = (VllmConfig, "attention_config"), (AttentionConfig, "backend")
        if any(name not in owner.__dataclass_fields__ for owner, name in places):
            return
    except (ImportError, AttributeError):
        return
    if NAME in AttentionBackendEnum.__members__:
        return

    def check_and_update_config(cls: type, vllm_config: Any, *others: Any, **named: Any) -> None:
        attention = vllm_config.attention_config
        per_kind = getattr(attention, "backend_per_kind", None) or {}
        selected = [attention.backend, *per_kind.values()]
        if any(getattr(backend, "name", None) == NAME for backend in selected):
            raise reason
        original(cls, vllm_config, *others, **named)

    platform.check_and_update_config = classmethod(check_and_update_config)
    register_backend(NAME, CLASS_PATH)
