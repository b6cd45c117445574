"""The memory of this machine, and who shares it."""

import psutil
from vllm.config import VllmConfig
from vllm.utils.cpu_resource_utils import (
    get_cgroup_memory_limit,
    get_cgroup_memory_usage,
    get_memory_node_info,
    get_visible_memory_node,
)


def local_workers(vllm_config: VllmConfig) -> int:
    """Workers that share the memory of this machine."""
    parallel = vllm_config.parallel_config
    workers: int = parallel.local_world_size * max(1, parallel.data_parallel_size_local)
    return workers


def memory_nodes() -> list[int]:
    """The NUMA nodes whose memory this process may use."""
    return get_visible_memory_node() or [0]


def available_memory() -> int:
    """Bytes that this machine, or the container that this is, has left for all workers."""
    available = sum(get_memory_node_info(node).available_memory for node in memory_nodes())
    limit = get_cgroup_memory_limit()
    if limit is not None:
        # vLLM holds each memory node against the limit, not all of them together.
        available = min(available, max(0, limit - (get_cgroup_memory_usage() or 0)))
    return min(available, psutil.virtual_memory().available)
