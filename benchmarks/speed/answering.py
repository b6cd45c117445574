"""One engine in a process of its own: read texts, then time how it goes on with them.

    python -m speed.answering < JOB

JOB is a JSON object (`AnsweringJob`). The last line of stdout is the result, a JSON object:

    tokens              of each answer
    seconds             from the first token of the answers to their last
    drafted, accepted   tokens
"""

import json
import sys
import time
from dataclasses import dataclass
from typing import Any

from vllm import LLM, SamplingParams

from speed.job import BLOCK_SIZE, CHUNK


@dataclass(frozen=True)
class AnsweringJob:
    """What to run.

    Args:
        model: directory of a checkpoint.
        texts: token ids of each request.
        output_tokens: of each answer.
        options: of tailorkv; None for vLLM's own backend.
        speculation: vLLM's; None for none.
        dtype: of the model.
        kv_bytes_per_token: in full precision.
    """

    model: str
    texts: list[list[int]]
    output_tokens: int
    options: dict[str, Any] | None
    speculation: dict[str, Any] | None
    dtype: str
    kv_bytes_per_token: int


def main() -> None:
    """Run the job and print what was found."""
    job = AnsweringJob(**json.loads(sys.stdin.read()))
    llm = _start(job)
    try:
        result = _run(job, llm)
    finally:
        llm.llm_engine.engine_core.shutdown()
    print(json.dumps(result))


def _start(job: AnsweringJob) -> LLM:
    ours: dict[str, Any] = {}
    if job.options is not None:
        ours = {"attention_backend": "tailorkv", "additional_config": {"tailorkv": job.options}}
    longest = max(map(len, job.texts)) + job.output_tokens + 1
    num_blocks = len(job.texts) * -(-longest // BLOCK_SIZE) + 1
    return LLM(
        model=job.model,
        skip_tokenizer_init=True,
        dtype=job.dtype,
        max_model_len=longest,
        block_size=BLOCK_SIZE,
        # The pages that the requests fill, whatever a page of this backend costs.
        num_gpu_blocks_override=num_blocks,
        kv_cache_memory_bytes=4 * num_blocks * BLOCK_SIZE * job.kv_bytes_per_token,
        max_num_seqs=len(job.texts),
        max_num_batched_tokens=CHUNK,
        enforce_eager=True,
        disable_log_stats=False,
        speculative_config=job.speculation,
        **ours,
    )


def _run(job: AnsweringJob, llm: LLM) -> dict[str, Any]:
    # The second time prompts are in the cache, all but their last block.
    _answer(job, llm, 1)
    start = time.perf_counter()
    _answer(job, llm, 1)
    first = time.perf_counter() - start
    before = _counts(llm)
    start = time.perf_counter()
    tokens = _answer(job, llm, job.output_tokens)
    seconds = time.perf_counter() - start - first
    drafted, accepted = (now - then for now, then in zip(_counts(llm), before, strict=True))
    return {"tokens": tokens, "seconds": seconds, "drafted": drafted, "accepted": accepted}


def _answer(job: AnsweringJob, llm: LLM, count: int) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    outputs = llm.generate(
        [{"prompt_token_ids": text} for text in job.texts], params, use_tqdm=False
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def _counts(llm: LLM) -> tuple[int, int]:
    """Tokens drafted and accepted so far."""
    values: dict[str, int] = {
        metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()
    }
    names = ("draft_tokens", "accepted_tokens")
    drafted, accepted = (values.get(f"vllm:spec_decode_num_{name}", 0) for name in names)
    return drafted, accepted


if __name__ == "__main__":
    main()
