"""What vLLM calls in each of its processes: `register`, through `vllm.general_plugins`."""

import sys
from types import TracebackType

from vllm_tailorkv.errors import TailorKVError


def report_in_one_line() -> None:
    """Let a `TailorKVError` that nobody catches end the process with one line, status 1."""
    previous = sys.excepthook
    if getattr(previous, "_tailorkv", False):
        return

    def hook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, TailorKVError):
            print(f"vllm-tailorkv: error: {error}", file=sys.stderr)
        else:
            previous(kind, error, traceback)

    hook._tailorkv = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def register() -> None:
    """Make `--attention-backend tailorkv` known to this process. Idempotent.

    Raises:
        TailorKVError: this vLLM is unknown, or lacks something that a patch needs.
    """
    report_in_one_line()
    import vllm  # noqa: PLC0415  (the check must come before anything of vLLM's is touched)

    from vllm_tailorkv.patches.record import apply_patches, check_version  # noqa: PLC0415

    check_version(vllm.__version__)
    from vllm_tailorkv.patches.backend_name import backend_member  # noqa: PLC0415
    from vllm_tailorkv.patches.catalog import PATCHES  # noqa: PLC0415

    apply_patches(PATCHES, vllm.__version__)
    backend_member()
