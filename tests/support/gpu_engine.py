"""Engines as on a GPU, on a CPU: vLLM's second model runner, its kernels and ours interpreted.

A script, for a process of its own: Triton must be told before it is imported.

    python tests/support/gpu_engine.py MODEL {cpu,gpu} [SCENARIO ...]

prints one JSON object: for each scenario the tokens and what was counted. `cpu` is what they must
be: vLLM's first runner, and the reference of every op.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MODEL, MODE = Path(sys.argv[1]), sys.argv[2]
ON_GPU = MODE == "gpu"
BLOCK = 128

sys.path[:0] = [
    str(Path(__file__).parent),
    str(Path(__file__).parents[2] / "benchmarks"),
    str(Path(__file__).parents[2] / "benchmarks/gpu"),
]

import rehearsal  # noqa: E402

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_TAILORKV_KERNELS": "reference",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
}
if ON_GPU:
    os.environ |= rehearsal.ENVIRONMENT
    rehearsal.serve_as_on_gpu()

import torch  # noqa: E402
from counted import Counted  # noqa: E402
from engines import engine, greedy, random_prompts  # noqa: E402
from features import metric  # noqa: E402
from plain_varlen import attended  # noqa: E402

from vllm_tailorkv.attention import hot, impl, staged, varlen  # noqa: E402

OPTIONS = {"topk_tokens": 40, "bits": 4, "profile": {"dense_layers": [0]}}
ARGUMENTS = {
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "block_size": BLOCK,
    "async_scheduling": False,
    "disable_log_stats": False,
}
STEPS = 6
LENGTHS = [5, 70, 200, 330]


COUNTED = Counted()


@contextmanager
def opened(hot_tokens: int = 0, **changes: Any) -> Iterator[Any]:
    memory = {"kv_cache_memory_bytes": 64 << 20}
    pool = {"host_pool_gib": 0.05, "hot_tokens": hot_tokens} if ON_GPU else {}
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
        first = COUNTED.since(before)
        hits = greedy(llm, again, STEPS)
        cached = metric(llm, "prefix_cache_hits")
    return {"plain": plain, "hits": hits, "cached": cached, "counted": first}


def chunks_and_preemption() -> dict[str, Any]:
    """Prompts in chunks, beside decode steps, in a cache that does not hold them all.

    Blocks are used again, by others, whose rows are not those that were kept of them.
    """
    prompts = random_prompts([120, 250, 330], seed=2)
    arguments = {"max_model_len": 512, "num_gpu_blocks_override": 8, "max_num_batched_tokens": 100}
    with opened(hot_tokens=256, **arguments) as llm:
        tokens = greedy(llm, prompts, 12)
        preemptions = metric(llm, "num_preemptions")
    return {"tokens": tokens, "preemptions": preemptions}


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
        return {"tokens": tokens, "counted": COUNTED.since(before)}


def graphs() -> dict[str, Any]:
    """Decode steps replayed, rows of padding among them; lengths grow past groups and blocks."""
    prompts = random_prompts([60, 255, 330], seed=4)
    with opened(hot_tokens=2048) as llm:
        captured = rehearsal.stand_in_for_graphs(llm) if ON_GPU else []
        tokens = greedy(llm, prompts, STEPS)
        alone = greedy(llm, prompts[1:2], STEPS)
        kept = hot.counts_on(torch.device("cpu")).tolist() if ON_GPU else []
    return {
        "kept": kept,
        "tokens": tokens,
        "alone": alone,
        "replays": [graph.replays for graph in captured],
    }


def main() -> None:
    for name in ("quantized_decode_attention", "retrieve_attention", "stage_rows"):
        COUNTED.watch(impl.ops, name)
    every = (whole_prompts, chunks_and_preemption, small_buffer, pieces, graphs)
    wanted = sys.argv[3:] or [scenario.__name__ for scenario in every]
    chosen = [scenario for scenario in every if scenario.__name__ in wanted]
    print(json.dumps({scenario.__name__: scenario() for scenario in chosen}))


if __name__ == "__main__":
    main()
