"""Greedy tokens with n-gram speculation, by vLLM's own backend without it and by ours with it.

Prints both as one line of JSON. Usage: python speculation.py MODEL
"""

import json
import sys
from pathlib import Path

from engines import engine, greedy, random_prompts

SPECULATION = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}


def main(model: Path) -> None:
    """Run both engines, ours last."""
    prompts = [random_prompts([40], seed=7)[0] * 4]
    with engine(model) as llm:
        expected = greedy(llm, prompts)
    with engine(model, {}, speculative_config=SPECULATION) as llm:
        tokens = greedy(llm, prompts)
    print(json.dumps([expected, tokens]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
