"""Engines as on a GPU, on a CPU: vLLM's second model runner, its kernels and ours interpreted.

A script, for a process of its own: Triton must be told before it is imported.

    python tests/support/gpu_engine.py MODEL {cpu,gpu} [SCENARIO ...]

prints one JSON object: for each scenario the tokens and what was counted. `cpu` is what they must
be: vLLM's first runner, and the reference of every op.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

MODEL, MODE = Path(sys.argv[1]), sys.argv[2]
ON_GPU = MODE == "gpu"
BLOCK = 128

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_TAILORKV_KERNELS": "triton" if ON_GPU else "reference",
    "VLLM_USE_V2_MODEL_RUNNER": str(int(ON_GPU)),
}
if ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.backends

    # vLLM looks for a driver of Triton's for CPUs; there is none, nor need of one.
    driver = SimpleNamespace(is_active=lambda: True)
    triton.backends.backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "benchmarks")]

import torch  # noqa: E402
from engines import engine, greedy, random_prompts  # noqa: E402
from features import metric  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes  # noqa: E402

from vllm_tailorkv.attention import carried, impl, staged, varlen  # noqa: E402

OPTIONS = {"topk_tokens": 40, "bits": 4, "profile": {"dense_layers": [0]}}
ARGUMENTS = {
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "block_size": BLOCK,
    "async_scheduling": False,
    "disable_log_stats": False,
}
STEPS = 8
LENGTHS = [5, 70, 200, 330]


class Counted(dict[str, int]):
    """How often each of some functions was called."""

    def watch(self, owner: Any, name: str) -> None:
        original = getattr(owner, name)
        self[name] = 0

        def counting(*arguments: Any, **named: Any) -> Any:
            self[name] += 1
            return original(*arguments, **named)

        setattr(owner, name, counting)


COUNTED = Counted()


def counted_since(before: dict[str, int]) -> dict[str, int]:
    return {name: count - before[name] for name, count in COUNTED.items()}


# What copies a value to the host, makes a shape of it, or a tensor of what the host holds.
FORBIDDEN = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "is_nonzero",
    "lift_fresh",
    "unique",
)


class NoSync(TorchDispatchMode):
    """Refuses what no CUDA graph could capture."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in FORBIDDEN):
            raise RuntimeError(f"{func} in a captured region")
        return func(*args, **(kwargs or {}))


class Replayed:
    """A stand-in for a CUDA graph: runs again what was captured, on the tensors of that time."""

    def __init__(self, forward: Callable[[], None]) -> None:
        self.forward = forward
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        with NoSync():
            self.forward()


def stand_in_for_graphs(llm: Any) -> list[Replayed]:
    """Have the runner of an engine capture and replay its decode steps."""
    from triton.runtime import interpreter
    from vllm.config import CUDAGraphMode
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu import cudagraph_utils
    from vllm.v1.worker.workspace import init_workspace_manager

    # A kernel is one launch, whatever its interpreter does inside.
    launch = interpreter.GridExecutor.__call__

    def launched(*arguments: Any, **named: Any) -> Any:
        with _disable_current_modes():
            return launch(*arguments, **named)

    interpreter.GridExecutor.__call__ = launched
    graphs: list[Replayed] = []

    def capture(manager: Any, create: Any, progress_bar_desc: str = "") -> None:
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

    def prepare(worker: Any) -> None:
        runner = worker.model_runner
        init_workspace_manager(runner.device)  # the CPU worker has none
        compilation = runner.vllm_config.compilation_config
        compilation.cudagraph_capture_sizes = [1, 2, 4]
        compilation.max_cudagraph_capture_size = 4
        runner.cudagraph_manager = cudagraph_utils.ModelCudaGraphManager(
            runner.vllm_config, runner.device, CUDAGraphMode.FULL_DECODE_ONLY, 1
        )
        runner.capture_model()

    llm.collective_rpc(prepare)
    return graphs


@contextmanager
def opened(**changes: Any) -> Iterator[Any]:
    memory = {"kv_cache_memory_bytes": 64 << 20}
    pool = {"host_pool_gib": 0.05} if ON_GPU else {}
    with engine(MODEL, OPTIONS | pool, **(ARGUMENTS | memory | changes)) as llm:
        yield llm


def whole_prompts() -> dict[str, Any]:
    """First chunks, mixed batches, and prefix hits: a hit whose rest is one token, and a longer."""
    prompts = random_prompts(LENGTHS)
    more = random_prompts([1, 90], seed=5)
    again = [prompts[3][: 2 * BLOCK] + more[0], prompts[2] + more[1], prompts[1]]
    with opened() as llm:
        before = dict(COUNTED)
        plain = greedy(llm, prompts, STEPS)
        first = counted_since(before)
        hits = greedy(llm, again, STEPS)
        cached = metric(llm, "prefix_cache_hits")
    return {"plain": plain, "hits": hits, "cached": cached, "counted": first}


def chunks_and_preemption() -> dict[str, Any]:
    """Prompts in chunks, beside decode steps, in a cache that does not hold them all."""
    prompts = random_prompts([120, 250, 330], seed=2)
    arguments = {"max_model_len": 512, "num_gpu_blocks_override": 8, "max_num_batched_tokens": 100}
    with opened(**arguments) as llm:
        tokens = greedy(llm, prompts, 12)
        preemptions = metric(llm, "num_preemptions")
    return {"tokens": tokens, "preemptions": preemptions}


def attended(call: Any) -> torch.Tensor:
    """Attention in plain torch that can be merged; see `varlen.Varlen`."""
    starts, bounds = (part.tolist() for part in call.contexts[:2])
    per_head = call.query.shape[1] // call.key.shape[1]
    log_sums = []
    for i, (first, last) in enumerate(pairwise(starts)):
        query = call.query[first:last]
        key, value = (
            part[bounds[i] : bounds[i + 1]].repeat_interleave(per_head, 1)
            for part in (call.key, call.value)
        )
        scores = torch.einsum("qhd,khd->hqk", query, key) * call.scale
        if call.causal:
            future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + len(key) - len(query))
            scores = scores.masked_fill(future, -torch.inf)
        call.output[first:last] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)
        log_sums.append(scores.logsumexp(-1))
    return torch.cat(log_sums, 1)


@contextmanager
def staging_of(capacity: int, *, merges: bool) -> Iterator[None]:
    """A buffer of so many tokens."""
    before = staged.Staging.__init__

    def small(self: Any, *arguments: Any) -> None:
        before(self, *arguments)
        self.capacity = capacity
        if merges:
            self.varlen = varlen.Varlen("plain torch", True, lambda asked: None, attended)

    staged.Staging.__init__ = small  # type: ignore[method-assign]
    try:
        yield
    finally:
        staged.Staging.__init__ = before  # type: ignore[method-assign]


def small_buffer() -> dict[str, Any]:
    """Contexts that fill the staging buffer one at a time."""
    prompts = random_prompts([150, 330, 260], seed=3)
    with staging_of(400, merges=False), opened(max_num_batched_tokens=160) as llm:
        return {"tokens": greedy(llm, prompts, 4)}


def pieces() -> dict[str, Any]:
    """Contexts of several buffers."""
    prompts = random_prompts([150, 430], seed=6)
    with staging_of(192, merges=True), opened(max_num_batched_tokens=64) as llm:
        before = dict(COUNTED)
        tokens = greedy(llm, prompts, 4)
        return {"tokens": tokens, "counted": counted_since(before)}


def graphs() -> dict[str, Any]:
    """Decode steps replayed, rows of padding among them; lengths grow past groups and blocks."""
    prompts = random_prompts([60, 255, 330], seed=4)
    with opened() as llm:
        captured = stand_in_for_graphs(llm) if ON_GPU else []
        tokens = greedy(llm, prompts, STEPS)
        alone = greedy(llm, prompts[1:2], STEPS)
    return {
        "tokens": tokens,
        "alone": alone,
        "replays": [graph.replays for graph in captured],
    }


def main() -> None:
    if ON_GPU:
        carried.serving_device = lambda vllm_config: "cuda"
    for name in ("quantized_decode_attention", "sparse_decode_attention", "stage_rows"):
        COUNTED.watch(impl.ops, name)
    every = (whole_prompts, chunks_and_preemption, small_buffer, pieces, graphs)
    wanted = sys.argv[3:] or [scenario.__name__ for scenario in every]
    chosen = [scenario for scenario in every if scenario.__name__ in wanted]
    print(json.dumps({scenario.__name__: scenario() for scenario in chosen}))


if __name__ == "__main__":
    main()
