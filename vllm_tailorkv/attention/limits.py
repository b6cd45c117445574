"""What the budgets refuse."""

from vllm.config import VllmConfig

from vllm_tailorkv.attention.budget import blocks_of_one_request
from vllm_tailorkv.attention.carried import FULL_ATTENTION, has_full_attention, is_selected
from vllm_tailorkv.attention.memory import available_memory, local_workers
from vllm_tailorkv.attention.name import OTHER_BACKEND
from vllm_tailorkv.cache.sizing import CacheSizing
from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.layout import GIB
from vllm_tailorkv.plan import HOST_SHARE, Plan


def require_room(
    vllm_config: VllmConfig, name: str, block_size: int, budget: int, block_bytes: int
) -> None:
    """Refuse a budget that cannot hold one request of the model's length.

    Args:
        name: the option that sets the budget, with its value.
        budget: bytes.
        block_bytes: bytes of it that a block takes.

    Raises:
        TailorKVError: it cannot.
    """
    # Without a length of the user's, vLLM fits it to the cache: at least a block, and the null one.
    is_free = vllm_config.model_config.original_max_model_len == -1
    needed = 2 if is_free else blocks_of_one_request(vllm_config, block_size)
    if budget // block_bytes >= needed:
        return
    fits = max(0, budget // block_bytes - 1) * block_size
    length = block_size if is_free else vllm_config.model_config.max_model_len
    lower = f", or lower --max-model-len to {fits:,}" if fits else ""
    raise TailorKVError(
        f"{name} holds {fits:,} tokens, but one request may have {length:,}; give at least "
        f"{needed * block_bytes / GIB:.3g} GiB{lower}"
    )


def pool_name(plan: Plan) -> str:
    """The host pool, by the option that sets it."""
    if plan.config.host_pool_gib is not None:
        return f"host_pool_gib={plan.config.host_pool_gib:g}"
    return (
        f"the host pool of {(plan.host_pool or 0) / GIB:.3g} GiB ({HOST_SHARE:.0%} of the memory "
        "available to a worker; host_pool_gib sets it)"
    )


def require_pool_room(vllm_config: VllmConfig, plan: Plan, sizing: CacheSizing) -> None:
    """Refuse a host pool that cannot hold one request of the model's length.

    Raises:
        TailorKVError: it cannot.
    """
    if plan.host_pool is not None:
        name = pool_name(plan)
        require_room(vllm_config, name, sizing.block_size, plan.host_pool, sizing.host_bytes)


def check_budgets(vllm_config: VllmConfig, plan: Plan, sizing: CacheSizing | None) -> None:
    """Check what is known of the budgets before the engine starts: those given as numbers.

    Args:
        sizing: of every worker, if that is known.

    Raises:
        TailorKVError: one of them cannot hold one request of the model's length, or is not there.
    """
    pool, workers = plan.host_pool, local_workers(vllm_config)
    if pool is not None:
        available = available_memory()
        if pool * workers > available:
            # Untouched pages cost nothing, so the system would end us later, while serving.
            each = f", for each of {workers} workers here," if workers > 1 else ""
            raise TailorKVError(
                f"{pool_name(plan)}{each} is more than the "
                f"{available / GIB:.1f} GiB of memory available; lower it"
            )
    if sizing is None:
        return
    require_pool_room(vllm_config, plan, sizing)
    memory = vllm_config.cache_config.kv_cache_memory_bytes
    if memory is not None and vllm_config.cache_config.num_gpu_blocks_override is None:
        shared = sizing.split and pool is None
        block_bytes = sizing.pool_bytes + (sizing.host_bytes if shared else 0)
        variable = "" if plan.on_gpu else " (or VLLM_CPU_KVCACHE_SPACE)"
        name = f"--kv-cache-memory-bytes{variable} of {memory / GIB:.3g} GiB"
        require_room(vllm_config, name, sizing.block_size, memory, block_bytes)


def require_a_layer(vllm_config: VllmConfig) -> None:
    """Refuse to serve without a layer that is ours, if our backend was asked for.

    Raises:
        TailorKVError: all layers have a sliding window, or the others were given to another
            backend.
    """
    if not is_selected(vllm_config):
        return
    if not has_full_attention(vllm_config):
        raise TailorKVError(
            "--attention-config backend_per_kind gives layers with full attention to another "
            "backend than tailorkv, and sliding windows are left to vLLM: no layer would be ours; "
            f"give it {FULL_ATTENTION}=TAILORKV, or --attention-backend tailorkv alone"
        )
    raise TailorKVError(
        f"--attention-backend tailorkv: {vllm_config.model_config.model} has no layer with "
        f"full attention (sliding windows are left to vLLM); {OTHER_BACKEND}"
    )


def require_pool_blocks(plan: Plan, sizing: CacheSizing, num_blocks: int) -> None:
    """Refuse more blocks than the host pool holds.

    Raises:
        TailorKVError: `--num-gpu-blocks-override` asks for more.
    """
    pool = plan.host_pool
    if pool is not None and num_blocks * sizing.host_bytes > pool:
        raise TailorKVError(
            f"--num-gpu-blocks-override {num_blocks} needs "
            f"{num_blocks * sizing.host_bytes / GIB:.3f} GiB of host pool, more than "
            f"{pool_name(plan)}; raise it, or lower the override"
        )
