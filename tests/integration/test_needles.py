"""The demo model answers every needle through every combination of the two tiers."""

from pathlib import Path
from typing import Any

import pytest
from engines import engine, greedy

CASES: list[dict[str, Any]] = [
    {"index": "channels", "bits": 1, "placement": "joint"},
    {"index": "channels", "bits": 2, "placement": "split"},
    {"index": "onebit", "bits": 2, "placement": "joint"},
    {"index": "onebit", "bits": 1, "placement": "split", "query_reduce": "mean"},
]
TOKENS = 6000


@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(map(str, o.values())))
def test_needles(demo_model: Path, options: dict[str, Any]) -> None:
    from vllm_tailorkv.demo.model import load_tokenizer
    from vllm_tailorkv.demo.text import build_haystack, make_needles

    tokenizer = load_tokenizer(demo_model)
    haystack = build_haystack(tokenizer, TOKENS, make_needles(6, seed=0), seed=0)
    arguments = {"dtype": "bfloat16", "max_model_len": 8192, "kv_cache_memory_bytes": 512 << 20}
    with engine(demo_model, options, **arguments) as llm:
        for placed in haystack.needles:
            # One after another: the haystack is read once, then found in the prefix cache.
            prompt = tokenizer.encode(haystack.text + placed.needle.question).ids
            answer = tokenizer.decode(greedy(llm, [prompt], 12)[0])
            assert placed.needle.is_answered_by(answer), (placed, answer)
