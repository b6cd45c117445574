"""A CPU that vLLM lets Ray lend as if it were a GPU: a platform plugin, for tests.

vLLM 0.32 refuses Ray on CPUs only because its CPU platform names no resource of Ray's.
"""

from vllm.platforms.cpu import CpuPlatform


class RayCpuPlatform(CpuPlatform):
    """vLLM's own, with a resource of Ray's."""

    ray_device_key = "GPU"


def name() -> str:
    """What vLLM asks the plugin for."""
    return "ray_platform.RayCpuPlatform"
