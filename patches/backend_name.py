"""The backend's name survives `spawn`."""

from collections.abc import Callable
from typing import Any

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vllm_tailorkv.attention.name import CLASS_PATH, NAME
from vllm_tailorkv.patches.record import Patch


def backend_member() -> AttentionBackendEnum:
    """Our member of vLLM's enum, registered on first use. Unpickling calls this."""
    if NAME not in AttentionBackendEnum.__members__:
        register_backend(NAME, CLASS_PATH)
    return AttentionBackendEnum[NAME]


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    def reduce_ex(self: AttentionBackendEnum, protocol: int) -> Any:
        if self.name == NAME:
            return backend_member, ()
        return original(self, protocol)

    return reduce_ex


PATCH = Patch(
    name="backend-name",
    target="vllm.v1.attention.backends.registry:AttentionBackendEnum.__reduce_ex__",
    why="a spawned process unpickles the configuration before it loads plugins, and then does "
    "not know the enum member that the plugin adds",
    how="our member pickles as a call that registers it and looks it up",
    process="all",
    remove_when="vLLM loads plugins before it unpickles its configuration",
    wrap=_wrap,
)
