"""Greedy tokens of our backend with speculation, in a process of its own.

Prints one line of JSON: the tokens, the rows that tailored ops served, how many tokens were drafted
and accepted, and how often a request was preempted. Usage: python speculation.py MODEL CASE [DRAFT]
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engines import VOCABULARY, engine, greedy, random_prompts
from features import metric
from tailored import BOTH_EXACT, SMALL_BUDGET, tailored_ops

from vllm_tailorkv.attention.carried import DRAFTER

STEPS = 16


@dataclass(frozen=True)
class Speculation:
    """Options and prompts: a token that is in its prompt has a draft.

    Args:
        start: what all prompts start with.
        lengths: random tokens after it.
        engine: arguments of the engine.
    """

    options: dict[str, Any]
    start: list[int]
    lengths: list[int]
    engine: dict[str, Any] = field(default_factory=dict)

    @property
    def prompts(self) -> list[list[int]]:
        return [[*self.start, *prompt] for prompt in random_prompts(self.lengths, seed=7)]


CASES = {
    "always": Speculation(SMALL_BUDGET, list(range(VOCABULARY)), [300, 700]),
    "sometimes": Speculation(BOTH_EXACT, [], [130, 257, 300]),
    "right": Speculation(BOTH_EXACT, [], [1, 126, 250, 380, 900]),
    # A few tokens are read of each context, chunks of prompts share steps with drafts, and there
    # are blocks for the longest request and little more.
    "wrong": Speculation(
        SMALL_BUDGET | {"profile": {"dense_layers": [0, 2]}, "bits": 1, "residual_tokens": 0},
        [],
        [126, 127, 125, 126, 124, 126, 250],
        {"num_gpu_blocks_override": 9, "max_model_len": 1024, "max_num_batched_tokens": 75},
    ),
}


@dataclass(frozen=True)
class Result:
    """What the process printed."""

    tokens: list[list[int]]
    tailored: int
    drafted: int
    accepted: int
    preempted: int


def run(model: Path, name: str, draft: Path | str | None = None) -> Result:
    """Run one case in a process of its own.

    Args:
        draft: a model that drafts, or our drafter; without one, n-grams of the prompt do.

    After speculation, vLLM's CPU worker cannot start again in the same process: it trips over
    modules that speculation has imported.
    """
    command = [sys.executable, __file__, str(model), name, *([] if draft is None else [str(draft)])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return Result(**json.loads(done.stdout.splitlines()[-1]))


def main(model: Path, case: Speculation, *draft: str) -> None:
    """Run our engine."""
    ngrams = {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    drafter = {"method": "draft_model", "model": draft[0]} if draft else ngrams
    if draft == (DRAFTER,):
        drafter = {"model": DRAFTER}
    config = {"num_speculative_tokens": 3} | drafter
    arguments = {"speculative_config": config, "disable_log_stats": False} | case.engine
    with tailored_ops() as rows, engine(model, case.options, **arguments) as llm:
        tokens = greedy(llm, case.prompts, STEPS)
        drafted = int(metric(llm, "spec_decode_num_draft_tokens"))
        accepted = int(metric(llm, "spec_decode_num_accepted_tokens"))
        preempted = int(metric(llm, "num_preemptions"))
    print(json.dumps(asdict(Result(tokens, rows.total, drafted, accepted, preempted))))


if __name__ == "__main__":
    main(Path(sys.argv[1]), CASES[sys.argv[2]], *sys.argv[3:])
