"""One engine in a process of its own: read random prompts, decode, tell how long it took.

    python -m speed.engine JOB EVENTS

JOB is a JSON object (`Job`); events, JSON lines, go to the open file descriptor EVENTS.
"""

import json
import os
import random
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from vllm import LLM, SamplingParams
from vllm.forward_context import get_forward_context

from speed.job import BLOCK_SIZE, CHUNK, Job
from vllm_tailorkv.attention.cpu_batch import PagedRows
from vllm_tailorkv.attention.impl import TailorKVImpl


def main() -> None:
    """Run the job and report it."""
    job = Job(**json.loads(sys.argv[1]))
    with os.fdopen(int(sys.argv[2]), "w") as events:

        def tell(**event: Any) -> None:
            print(json.dumps(event), file=events, flush=True)

        llm = _start(job)
        try:
            tell(result=_run(job, llm, lambda tokens: tell(tokens=tokens)))
        finally:
            llm.llm_engine.engine_core.shutdown()


def _start(job: Job) -> LLM:
    ours: dict[str, Any] = {}
    if job.options is not None:
        ours = {"attention_backend": "tailorkv", "additional_config": {"tailorkv": job.options}}
    return LLM(
        model=job.model,
        load_format=job.load_format,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        kv_cache_dtype=job.kv_cache_dtype,
        max_model_len=job.max_model_len,
        block_size=BLOCK_SIZE,
        # The pages that the requests fill, whatever a page of this backend costs.
        num_gpu_blocks_override=job.num_blocks,
        kv_cache_memory_bytes=4 * job.num_blocks * BLOCK_SIZE * job.kv_bytes_per_token,
        max_num_seqs=job.batch,
        max_num_batched_tokens=CHUNK,
        enable_prefix_caching=False,
        async_scheduling=False,
        enforce_eager=True,
        disable_log_stats=True,
        **ours,
    )


def _run(job: Job, llm: LLM, on_tokens: Callable[[int], None]) -> dict[str, Any]:
    """Steps of the engine, timed one by one."""
    engine = llm.llm_engine
    vocabulary = engine.model_config.get_vocab_size()
    numbers = random.Random(0)
    params = SamplingParams(
        temperature=0, max_tokens=job.max_tokens, ignore_eos=True, detokenize=False
    )
    with ExitStack() as stack:
        if job.warm:
            stack.enter_context(patch.object(_runner(llm), "_model_forward", _Filler(job, llm)))
        start = time.perf_counter()
        for i in range(job.batch):
            tokens = [numbers.randrange(3, vocabulary) for _ in range(job.context)]
            engine.add_request(str(i), {"prompt_token_ids": tokens}, params)
        begun: set[str] = set()
        read = 0
        while len(begun) < job.batch:
            begun |= {output.request_id for output in engine.step()}
            read = min(read + CHUNK, job.batch * job.context)
            on_tokens(read)
        first = time.perf_counter() - start
    seconds = []
    for _ in range(job.output_tokens):
        start = time.perf_counter()
        outputs = engine.step()
        seconds.append(time.perf_counter() - start)
        assert len(outputs) == job.batch, "a request ended, or waits: this is no decode step"
        on_tokens(read + len(seconds))
    engine.abort_request([str(i) for i in range(job.batch)])
    return {
        "first": first,
        "steps": seconds,
        "peak_rss_bytes": _peak_rss(),
        "kv_cache_bytes": _cache_bytes(llm, job),
        "isa": _isa(job),
    }


class _Filler:
    """Stands for the model while prompts are read: writes random K and V, attends to nothing.

    Pages are written and derived by the backend at hand as for any prompt.
    """

    def __init__(self, job: Job, llm: LLM) -> None:
        self.hidden_size = llm.llm_engine.model_config.get_hidden_size()
        self.layers = _layers(llm)
        self.is_ours = job.options is not None

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        assert get_forward_context().attn_metadata is not None
        count = len(input_ids)
        first = self.layers[0]
        query = torch.zeros(count, first.num_heads * first.head_size, dtype=torch.bfloat16)
        size = (count, first.num_kv_heads * first.head_size)
        key, value = (torch.randn(size, dtype=torch.bfloat16) for _ in range(2))
        for layer in self.layers:
            exact = (PagedRows, "attend") if self.is_ours else (layer.impl, "forward")
            with patch.object(*exact, lambda *_, **__: None):
                layer(query, key, value)
        return torch.zeros(count, self.hidden_size, dtype=torch.bfloat16)


def _runner(llm: LLM) -> Any:
    core: Any = llm.llm_engine.engine_core
    return core.engine_core.model_executor.driver_worker.worker.model_runner


def _layers(llm: LLM) -> list[Any]:
    """The attention layers."""
    context = _runner(llm).vllm_config.compilation_config.static_forward_context
    return [layer for layer in context.values() if hasattr(layer, "impl")]


def _cache_bytes(llm: LLM, job: Job) -> int:
    """Of all layers and tiers."""
    total = 0
    for layer in _layers(llm):
        if isinstance(layer.impl, TailorKVImpl):
            assert layer.impl.spec is not None
            layout = layer.impl.spec.layout
            total += job.num_blocks * (layout.host_bytes + layout.derived_bytes)
        else:
            total += layer.kv_cache.nbytes
    return total


def _peak_rss() -> int:
    """Bytes; of this program alone, unlike `getrusage`, whose peak outlives exec."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the system does not tell the peak of resident memory")


def _isa(job: Job) -> str | None:
    """Our instruction set."""
    return None if job.options is None else torch.ops.vllm_tailorkv.isa()


if __name__ == "__main__":
    main()
