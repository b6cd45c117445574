"""What engines on a GPU are asked, and when two of them agree.

Arithmetic in 16 bits decides near ties one way or the other: shapes of matrices differ with chunks
and with padding. So tokens are compared up to the first that differ, and these must be a tie.
"""

import random
from typing import Any

VARIANTS = ("exact", "everything", "budget", "hot")
"""Of options of tailorkv.

exact: contexts are attended in full. everything: the tailored ops serve, but all tokens are
selected, and codes are never read. budget: tokens are selected and codes are read. hot: the same,
and rows that were read last are kept on the device, fewer than there are.
"""


def options_of(variant: str, beyond: int) -> dict[str, Any]:
    """The options of a variant.

    Args:
        beyond: more tokens than any context has.
    """
    options = {
        "exact": {"full_attention_below": beyond},
        "everything": {"topk_tokens": beyond, "recent_tokens": 16, "residual_tokens": beyond},
        "budget": {"topk_tokens": 40, "sink_tokens": 4, "recent_tokens": 16},
    }
    options["hot"] = options["budget"] | {"hot_tokens": 256}
    return options[variant] | {"profile": {"dense_layers": [0]}}


TOLERANCE = {"float32": 1e-3, "float16": 0.03, "bfloat16": 0.25}
"""Of log-probabilities, by the model's dtype."""
SELECTED_TOLERANCE = 4
"""Times the above where another rounding may select other tokens."""


def engine_name(dtype: str, variant: str, mode: str) -> str:
    """Of an engine: `mode` is `eager`, `chunked`, or how its graphs are made."""
    return f"{dtype}-{variant}-{mode}".lower()


def random_tokens(length: int, seed: int, vocabulary: int = 320) -> list[int]:
    """The same everywhere; without the tokens that begin and end a text."""
    numbers = random.Random(seed)
    return [numbers.randrange(2, vocabulary) for _ in range(length)]


def workload(block: int, tiny: bool) -> dict[str, dict[str, Any]]:
    """Batches by name: one request, three (which a graph pads), eight, and hits of prefixes.

    Contexts grow past groups and blocks.

    Args:
        block: tokens of a block.
        tiny: for a rehearsal; every token of a prompt costs it a tenth of a second.
    """
    if tiny:
        lengths = {"alone": [62], "three": [30, 10, 70], "eight": [2, 3, 5, 7, 9, 11, 13, 17]}
        steps, more = {"alone": 4}, 2
    else:
        lengths = {
            "alone": [250],
            "three": [333, 60, 900],
            "eight": [5, 63, 64, 65, 127, 190, 255, 700],
        }
        steps, more = {"alone": 80}, 40
    batches = {
        name: [random_tokens(n, 100 * i + j) for j, n in enumerate(of)]
        for i, (name, of) in enumerate(lengths.items())
    }
    longest = batches["three"][-1]
    kept = longest[: len(longest) // block * block]
    # The second has one token beside what is cached.
    batches["hits"] = [kept + random_tokens(n, 900 + n) for n in (8, 1)]
    return {
        name: {"prompts": prompts, "tokens": steps.get(name, more)}
        for name, prompts in batches.items()
    }


def compare(
    found: dict[str, Any], expected: dict[str, Any], tolerance: float
) -> tuple[dict[str, Any], list[str]]:
    """What two engines said to one workload: a summary, and what is wrong.

    Args:
        found, expected: by batch, for every request its tokens and, at each, the best tokens'
            log-probabilities.
    """
    positions = compared = ties = 0
    worst = 0.0
    failures = []
    for batch, answers in expected.items():
        for i, (theirs, ours) in enumerate(zip(answers, found[batch], strict=True)):
            positions += len(theirs["tokens"])
            for at, (token, other) in enumerate(zip(theirs["tokens"], ours["tokens"], strict=True)):
                said, told = theirs["logprobs"][at], ours["logprobs"][at]
                gaps = [abs(said[t] - told[t]) for t in said.keys() & told.keys()]
                worst = max([worst, *gaps])
                if token == other:
                    compared += 1
                    continue
                # The contexts differ from here on.
                gap = said[str(token)] - said.get(str(other), -float("inf"))
                if gap <= tolerance:
                    ties += 1
                else:
                    failures.append(
                        f"{batch}, request {i}, token {at}: {other} instead of {token}, whose "
                        f"log-probability is {gap:.3g} higher"
                    )
                break
    if worst > tolerance:
        failures.append(f"log-probabilities differ by up to {worst:.3g}")
    if 2 * compared < positions:
        failures.append(f"only {compared} of {positions} tokens could be compared")
    summary = {
        "positions": positions,
        "compared": compared,
        "ties": ties,
        "worst_logprob": round(worst, 6),
        "tolerance": tolerance,
    }
    return summary, failures
