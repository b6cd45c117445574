"""One job of `serve.py` in a process of its own: a pool, an engine's answers, an engine's speed.

    python benchmarks/gpu/serve_engine.py JOB EVENTS

JOB is a file with a JSON object; events, JSON lines, go to the open file descriptor EVENTS: a
`record` for everything that is measured, an `error` at the end if it failed.
"""

import gc
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))

from counted import Counted  # noqa: E402

Tell = Callable[..., None]
PAGE_BYTES = 4096
WORDS_AT_ONCE = 32 << 20
SAMPLED_WORDS = 4096
RESIDENT_SLACK = 256 << 20
"""What a process may have grown by otherwise while a pool came and went."""


def main() -> None:
    """Do the job; the exit status is 1 if it failed."""
    job = json.loads(Path(sys.argv[1]).read_text())
    with os.fdopen(int(sys.argv[2]), "w") as events:

        def write(event: dict[str, Any]) -> None:
            print(json.dumps(event), file=events, flush=True)

        def tell(**record: Any) -> None:
            write({"record": record})

        try:
            prepare(job)
            JOBS[job["kind"]](job, tell)
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
            write({"error": text.strip().splitlines()[0][:2000]})
            raise


def prepare(job: dict[str, Any]) -> None:
    """What must be before vLLM is imported."""
    if not hasattr(torch.accelerator, "empty_host_cache"):
        # torch 2.11 has none; vLLM calls it when an engine ends.
        torch.accelerator.empty_host_cache = lambda: None  # type: ignore[attr-defined]
    if job.get("as_on_gpu"):
        from rehearsal import serve_as_on_gpu  # noqa: PLC0415

        serve_as_on_gpu()


def pool(job: dict[str, Any], tell: Tell) -> None:
    """A host pool comes, is written and read through the device's view, and goes."""
    from vllm_tailorkv.cache.host_pool import allocate_host_pool  # noqa: PLC0415
    from vllm_tailorkv.config import TailorKVConfig  # noqa: PLC0415
    from vllm_tailorkv.layout import GIB, DerivedKind  # noqa: PLC0415
    from vllm_tailorkv.plan import page_layout  # noqa: PLC0415

    device = torch.device(job["device"])
    layout = page_layout(
        TailorKVConfig(),
        DerivedKind.ONEBIT,
        num_kv_heads=8,
        head_size=128,
        block_size=128,
        kv_itemsize=2,
        on_gpu=True,
    )
    num_blocks = int(job["gib"] * GIB) // layout.host_bytes
    size = num_blocks * layout.host_bytes
    for number in range(job["rounds"]):
        words = torch.zeros(1, dtype=torch.int64, device=device)  # the context comes with it
        synchronize(device)
        gc.collect()
        before = resident_bytes()
        with timed(device) as allocating:
            host = allocate_host_pool(num_blocks, layout, device)
        words = host.pages.view(torch.int64).flatten()
        with timed(device) as writing:
            for start in range(0, len(words), WORDS_AT_ONCE):
                end = min(start + WORDS_AT_ONCE, len(words))
                torch.arange(start, end, out=words[start:end])
        with timed(device) as reading:
            total = words.sum()
        at = torch.randint(len(words), (SAMPLED_WORDS,), device=device)
        seen = bool((words[at] == at).all()) and int(total) == len(words) * (len(words) - 1) // 2
        held = resident_bytes()
        del words
        with timed(device) as releasing:
            host.release()
        del host
        gc.collect()
        after = resident_bytes()
        failures = [] if seen else ["the device reads something else than it wrote"]
        if after - before > RESIDENT_SLACK + size // 100:
            failures.append(f"{(after - before) / GIB:.2f} GiB stay with the process")
        tell(
            case=f"round {number + 1}",
            failures=failures,
            gib=size / GIB,
            allocate_s=allocating["seconds"],
            write_s=writing["seconds"],
            write_gb_s=round(size / writing["seconds"] / 1e9, 2),
            read_s=reading["seconds"],
            read_gb_s=round(size / reading["seconds"] / 1e9, 2),
            release_s=releasing["seconds"],
            resident_bytes={"before": before, "held": held, "after": after},
        )


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def timed(device: torch.device) -> Iterator[dict[str, float]]:
    """Seconds of a block, and of what it has the device do."""
    found: dict[str, float] = {}
    start = time.perf_counter()
    yield found
    synchronize(device)
    found["seconds"] = round(time.perf_counter() - start, 6)


def resident_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


@contextmanager
def engine(job: dict[str, Any]) -> Iterator[tuple[Any, Counted]]:
    """An `LLM` as the job asks, and the calls of what shows how it serves."""
    from vllm import LLM  # noqa: PLC0415
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager  # noqa: PLC0415

    from vllm_tailorkv.config import TailorKVConfig  # noqa: PLC0415
    from vllm_tailorkv.kernels import ops  # noqa: PLC0415

    counted = Counted()
    for name in ("quantized_decode_attention", "retrieve_attention", "stage_rows"):
        counted.watch(ops, name)
    counted.watch(CudaGraphManager, "run_fullgraph")
    if job.get("forced"):
        # Else what selects everything would be attended in full.
        TailorKVConfig.exact_below = property(lambda config: 0)  # type: ignore[assignment,method-assign]
    llm = LLM(**job["engine"])
    if job.get("graphs"):
        from rehearsal import stand_in_for_graphs  # noqa: PLC0415

        stand_in_for_graphs(llm, job["graphs"], (1, 2, 4, 8, 64))
    try:
        yield llm, counted
    finally:
        llm.llm_engine.engine_core.shutdown()


def tokens(job: dict[str, Any], tell: Tell) -> None:
    """Greedy tokens of batches, one after another, and the log-probabilities beside them."""
    from vllm import SamplingParams  # noqa: PLC0415

    with engine(job) as (llm, counted):
        for name, batch in job["batches"].items():
            before, cached = dict(counted), metric(llm, "prefix_cache_hits")
            params = SamplingParams(
                temperature=0,
                max_tokens=batch["tokens"],
                logprobs=5,
                ignore_eos=True,
                detokenize=False,
            )
            prompts = [{"prompt_token_ids": prompt} for prompt in batch["prompts"]]
            start = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            seconds = time.perf_counter() - start
            tell(
                case=name,
                seconds=round(seconds, 3),
                cached_tokens=int(metric(llm, "prefix_cache_hits") - cached),
                counted=counted.since(before),
                answers=[answer(output.outputs[0]) for output in outputs],
            )
        tell(case="engine", **facts(llm))


def answer(output: Any) -> dict[str, Any]:
    """Tokens and the log-probabilities of the best ones, of keys as JSON has them."""
    return {
        "tokens": list(output.token_ids),
        "logprobs": [
            {str(token): round(entry.logprob, 6) for token, entry in at.items()}
            for at in output.logprobs
        ],
    }


def metric(llm: Any, name: str) -> float:
    """A counter of an engine."""
    return float({one.name: one for one in llm.get_metrics()}[f"vllm:{name}"].value)


def facts(llm: Any) -> dict[str, Any]:
    """What became of the engine's arguments, and what its cache costs."""
    found: dict[str, Any] = {}

    def look(worker: Any) -> None:
        config = worker.model_runner.vllm_config
        cache = config.cache_config
        layers = [
            layer
            for layer in config.compilation_config.static_forward_context.values()
            if hasattr(layer, "impl")
        ]
        found["block_size"] = cache.block_size
        found["kv_tokens"] = cache.num_gpu_blocks * cache.block_size
        held = sum(layer.kv_cache.nbytes for layer in layers)
        found["device_bytes_per_token"] = held / found["kv_tokens"]
        found["backend"] = sorted({type(layer.impl).__name__ for layer in layers})
        room = getattr(worker, "available_kv_cache_memory_bytes", cache.kv_cache_memory_bytes)
        found["device_kv_bytes"] = room
        found["cudagraph_mode"] = str(config.compilation_config.cudagraph_mode)
        ours = [layer.impl for layer in layers if hasattr(layer.impl, "staging")]
        layouts = [impl.spec.layout for impl in ours]
        if not layouts:
            return
        found["prompts_by"] = sorted({impl.staging.varlen.name for impl in ours})
        planned = sum(layout.derived_bytes for layout in layouts) / cache.block_size
        full = sum(
            2 * layout.num_kv_heads * layout.head_size * layout.kv_itemsize for layout in layouts
        )
        found["planned_device_bytes_per_token"] = planned
        found["host_bytes_per_token"] = (
            sum(layout.host_bytes for layout in layouts) / cache.block_size
        )
        found["share_of_full"] = round(planned / full, 5)

    llm.collective_rpc(look)
    return found


def speed(job: dict[str, Any], tell: Tell) -> None:
    """Seconds to the first token and between tokens, case by case until the time is over."""
    from vllm import SamplingParams  # noqa: PLC0415

    deadline = time.perf_counter() + job["seconds"]
    with engine(job) as (llm, _):
        known = facts(llm)
        longest = max(case["context"] for case in job["cases"])
        per_request = longest * known["device_bytes_per_token"]
        tell(
            case="engine",
            **known,
            longest=longest,
            requests_that_fit=known["kv_tokens"] // longest,
            requests_that_fit_on_device=int(known["device_kv_bytes"] // per_request),
        )
        for case in job["cases"]:
            if case["batch"] * (case["context"] + case["tokens"]) > known["kv_tokens"]:
                tell(**case, fits=False)
                continue
            params = SamplingParams(
                temperature=0, max_tokens=case["tokens"], ignore_eos=True, detokenize=False
            )
            end = min(deadline, time.perf_counter() + job["case_seconds"])
            measured = steps(llm, case, params, (job["warm_steps"], job["output_tokens"]), end)
            if measured is None:
                tell(**case, stopped=True)
            else:
                tell(**case, fits=True, **measured)


def steps(
    llm: Any, case: dict[str, Any], params: Any, counts: tuple[int, int], deadline: float
) -> dict[str, Any] | None:
    """One batch: its prompts are read, then steps are timed; None at the deadline.

    Args:
        counts: steps that do not count, and those that are timed after them.
    """
    warm, timed_steps = counts
    wanted = 1 + warm + timed_steps
    stepper = llm.llm_engine
    vocabulary = stepper.model_config.get_vocab_size()
    cached = metric(llm, "prefix_cache_hits")
    ids = [f"{case['case']}/{i}" for i in range(case["batch"])]
    prompts = []
    for i in range(len(ids)):
        # The first prompts of a batch are those of a smaller one before it, and cached.
        numbers = random.Random(f"{case['context']}/{i}")
        prompts.append([numbers.randrange(3, vocabulary) for _ in range(case["context"])])
    start = time.perf_counter()
    for request, prompt in zip(ids, prompts, strict=True):
        stepper.add_request(request, {"prompt_token_ids": prompt}, params)
    begun: dict[str, float] = {}
    arrivals: list[float] = []
    while len(arrivals) < wanted:
        outputs = stepper.step()
        now = time.perf_counter()
        if now > deadline:
            break
        for output in outputs:
            begun.setdefault(output.request_id, now - start)
        if len(outputs) == len(ids):
            arrivals.append(now)
        if len(arrivals) == 1 + warm:
            kept = hot_rows()
    stepper.abort_request(ids)
    while stepper.has_unfinished_requests():
        stepper.step()
    if len(arrivals) < wanted:
        return None
    found, fetched = (now - before for now, before in zip(hot_rows(), kept, strict=True))
    times = [later - now for now, later in pairwise(arrivals)][warm:]
    median = statistics.median(times)
    return {
        "first_token_s": round(min(begun.values()), 4),
        "last_first_token_s": round(max(begun.values()), 4),
        "cached_prompt_tokens": int(metric(llm, "prefix_cache_hits") - cached),
        "seconds_per_token": round(median, 6),
        "min_seconds_per_token": round(min(times), 6),
        "tokens_per_second": round(len(ids) / median, 2),
        "steps": len(times),
        **({"hot_rows_found": found, "hot_rows_fetched": fetched} if found + fetched else {}),
    }


def hot_rows() -> list[int]:
    """Rows of K and V found on the device, and fetched, by all layers so far."""
    from vllm_tailorkv.attention.hot import counts_on  # noqa: PLC0415

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return counts_on(device).tolist()


JOBS: dict[str, Callable[[dict[str, Any], Tell], None]] = {
    "pool": pool,
    "tokens": tokens,
    "speed": speed,
}

if __name__ == "__main__":
    main()
