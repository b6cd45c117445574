"""What vLLM calls in each of its processes: `register`, through `vllm.general_plugins`."""

import logging

from vllm_tailorkv import failures
from vllm_tailorkv.errors import TailorKVError


def register() -> None:
    """Make `--attention-backend tailorkv` known to this process. Idempotent.

    A vLLM that this package does not know is left as it is, with a warning, for those who serve by
    its own backends; our name is then refused where it is selected.
    """
    failures.report_in_one_line()
    import vllm  # noqa: PLC0415  (the check must come before anything of vLLM's is touched)

    from vllm_tailorkv.patches.record import apply_patches, check_version  # noqa: PLC0415

    try:
        check_version(vllm.__version__)
        from vllm_tailorkv.patches.catalog import PATCHES  # noqa: PLC0415

        apply_patches(PATCHES, vllm.__version__)
    except TailorKVError as error:
        from vllm_tailorkv.patches.unknown_vllm import refuse_selection  # noqa: PLC0415

        refuse_selection(error)
        if failures.is_first_to_say(str(error)):
            logging.getLogger("vllm").warning("TailorKV is off: %s", error)
        return
    from vllm_tailorkv.patches.backend_name import backend_member  # noqa: PLC0415

    backend_member()
    _enter_variables()


def _enter_variables() -> None:
    """Enter our environment variables where vLLM keeps its own, which warns of all others."""
    from vllm import envs as vllm_envs  # noqa: PLC0415

    from vllm_tailorkv import envs  # noqa: PLC0415
    from vllm_tailorkv.config import TailorKVConfig  # noqa: PLC0415

    # What vLLM caches of a compiled model is known by these values: addresses of Kubernetes, which
    # change with every pod, must not be among them.
    for name, value in envs.values(TailorKVConfig.model_fields).items():
        vllm_envs.environment_variables.setdefault(name, lambda value=value: value)
