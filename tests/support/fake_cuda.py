"""NVIDIA GPUs that vLLM believes in: it resolves a configuration for them, and runs nothing.

What is replaced is what would ask the driver: NVML's answers, the modules of CUDA code that a build
of vLLM for CPUs lacks, and Triton's driver. For a process of its own, before vLLM is imported.
"""

import importlib.metadata
import sys
import traceback
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

MEMORY = 80 << 30
CUDA_MODULES = (
    "vllm._C_stable_libtorch",
    "vllm._moe_C_stable_libtorch",
    "vllm._qutlass_C",
    "vllm.vllm_flash_attn._vllm_fa2_C",
    "vllm.vllm_flash_attn._vllm_fa3_C",
)
CUTLASS = (
    "cutlass_group_gemm_supported",
    "cutlass_scaled_mm_supports_block_fp8",
    "cutlass_scaled_mm_supports_fp4",
    "cutlass_scaled_mm_supports_fp8",
)


def _always(answer: Any) -> Any:
    return lambda *args, **kwargs: answer


def pretend(gpus: int = 1) -> list[str]:
    """Let vLLM, not yet imported, find so many H100s.

    Returns:
        A list that says, later, where CUDA was initialised, which makes a forked process useless.
    """
    assert "vllm" not in sys.modules
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: (
        # A build for CPUs says so in its version.
        version(name).partition("+")[0] if name == "vllm" else version(name)
    )
    sys.modules |= {name: ModuleType(name) for name in CUDA_MODULES}
    torch.version.cuda = "13.0"
    torch.cuda.device_count = _always(gpus)
    torch.accelerator.device_count = _always(gpus)
    initialisations: list[str] = []

    def initialise() -> None:
        initialisations.append("".join(traceback.format_stack(limit=4)))
        raise RuntimeError("there is no GPU")

    torch.cuda._lazy_init = initialise
    import triton.backends

    triton.backends.backends["nvidia"].driver.is_active = staticmethod(_always(True))
    from vllm.third_party import pynvml

    answers = {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlDeviceGetCount": gpus,
        "nvmlDeviceGetHandleByIndex": object(),
        "nvmlDeviceGetCudaComputeCapability": (9, 0),
        "nvmlDeviceGetName": "NVIDIA H100 80GB HBM3",
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=MEMORY, free=MEMORY, used=0),
        "nvmlDeviceGetUUID": "GPU-0",
    }
    for name, answer in answers.items():
        setattr(pynvml, name, _always(answer))
    from vllm.platforms import cuda, current_platform

    for name in CUTLASS:
        setattr(torch.ops._C, name, _always(False))
    cuda._cuda_device_count_stateless = _always(gpus)
    assert current_platform.is_cuda()
    return initialisations
