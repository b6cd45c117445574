"""Engines as on a GPU, on a CPU: vLLM's second model runner, its kernels and ours interpreted.

For a process of its own, whose environment has `ENVIRONMENT` before Triton is imported.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TRITON_INTERPRET": "1",
    "VLLM_TAILORKV_KERNELS": "triton",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
}

# What copies a value to the host, makes a shape of it, or a tensor of what the host holds.
FORBIDDEN = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "is_nonzero",
    "lift_fresh",
    "unique",
)


def serve_as_on_gpu() -> None:
    """Before vLLM is imported: the plans of its engines will be those of a GPU."""
    import triton.backends  # noqa: PLC0415

    # vLLM looks for a driver of Triton's for CPUs; there is none, nor need of one.
    driver = SimpleNamespace(is_active=lambda: True)
    triton.backends.backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)

    from vllm_tailorkv.attention import carried  # noqa: PLC0415

    carried.serving_device = lambda vllm_config: "cuda"


class NoSync(TorchDispatchMode):
    """Refuses what no CUDA graph could capture."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an op that a graph could hold."""
        if any(name in str(func) for name in FORBIDDEN):
            raise RuntimeError(f"{func} in a captured region")
        return func(*args, **(kwargs or {}))


class Replayed:
    """A stand-in for a CUDA graph: runs again what was captured, on the tensors of that time."""

    def __init__(self, forward: Callable[[], None]) -> None:
        self.forward = forward
        self.replays = 0

    def replay(self) -> None:
        """As `torch.cuda.CUDAGraph.replay`."""
        self.replays += 1
        with NoSync():
            self.forward()


def stand_in_for_graphs(
    llm: Any, mode: str = "FULL_DECODE_ONLY", sizes: Sequence[int] = (1, 2, 4)
) -> list[Replayed]:
    """Have the runner of an engine capture and replay its decode steps.

    What is captured in pieces runs eagerly here, but on batches that are padded to `sizes`.

    Args:
        mode: a name of vLLM's `CUDAGraphMode`.
        sizes: tokens of the batches that are captured, in ascending order.
    """
    from triton.runtime import interpreter  # noqa: PLC0415
    from vllm.config import CUDAGraphMode  # noqa: PLC0415
    from vllm.platforms import current_platform  # noqa: PLC0415
    from vllm.v1.worker.gpu import cudagraph_utils  # noqa: PLC0415
    from vllm.v1.worker.workspace import init_workspace_manager  # noqa: PLC0415

    # A kernel is one launch, whatever its interpreter does inside.
    launch = interpreter.GridExecutor.__call__

    def launched(*arguments: Any, **named: Any) -> Any:
        with _disable_current_modes():
            return launch(*arguments, **named)

    interpreter.GridExecutor.__call__ = launched
    graphs: list[Replayed] = []

    def capture(manager: Any, create: Any, progress_bar_desc: str = "") -> None:
        for descriptor in manager._capture_descs.get(CUDAGraphMode.PIECEWISE, ()):
            create(descriptor, warmup=True)(CUDAGraphMode.NONE)
        for descriptor in manager._capture_descs[CUDAGraphMode.FULL]:
            create(descriptor, warmup=True)(CUDAGraphMode.NONE)
            forward = create(descriptor, warmup=False)
            graph = Replayed(lambda forward=forward: forward(CUDAGraphMode.NONE))
            with NoSync():
                graph.forward()
            manager.graphs[descriptor] = graph
            graphs.append(graph)
        manager._graphs_captured = True

    type(current_platform).get_global_graph_pool = classmethod(lambda cls: None)
    cudagraph_utils.CudaGraphManager.capture = capture
    # Pieces are cut by the compiler, which runs nothing here.
    cudagraph_utils.has_compiled_submodule = lambda model: True

    def prepare(worker: Any) -> None:
        runner = worker.model_runner
        init_workspace_manager(runner.device)  # the CPU worker has none
        compilation = runner.vllm_config.compilation_config
        compilation.cudagraph_capture_sizes = list(sizes)
        compilation.max_cudagraph_capture_size = sizes[-1]
        runner.cudagraph_manager = cudagraph_utils.ModelCudaGraphManager(
            runner.vllm_config, runner.device, CUDAGraphMode[mode], 1
        )
        runner.capture_model()

    llm.collective_rpc(prepare)
    return graphs
