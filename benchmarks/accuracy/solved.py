"""What a retriever solves with full attention: the share of answers' tokens that it predicts.

    python benchmarks/accuracy/solved.py
    python benchmarks/accuracy/solved.py --lengths 4096,16384 --tasks copy,multivalue --samples 8

In torch, the right answer before each token; in a list whose order does not matter, anything still
to be said is right. One JSON line for each task and length.
"""

import argparse
import json
import random
import sys
from dataclasses import fields
from pathlib import Path

import torch
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accuracy import text
from accuracy.answers import acceptable
from accuracy.retriever import Retriever, Shape, load_weights
from accuracy.tasks import TASKS, Example, Source

RETRIEVER = Path(__file__).with_name("retriever")


def load(folder: Path) -> tuple[Retriever, Tokenizer]:
    """Model and tokenizer of a checkpoint that `train.py` made."""
    config = json.loads((folder / "config.json").read_text())
    model = Retriever(Shape(**{field.name: config[field.name] for field in fields(Shape)}))
    load_weights(model, folder / "model.safetensors")
    return model, Tokenizer.from_file(str(folder / "tokenizer.json"))


@torch.no_grad()
def count_right(model: Retriever, encoder: Tokenizer, example: Example) -> tuple[int, int]:
    """Tokens of the references that are predicted right, and how many there are."""
    ids: list[int] = encoder.encode(example.context).ids
    right: dict[int, frozenset[int]] = {}
    for turn in example.turns:
        ids = ids + encoder.encode(turn.question).ids + encoder.encode(turn.begun).ids
        answer = encoder.encode(turn.answer)
        right |= {len(ids) + n: tokens for n, tokens in acceptable(turn, answer).items()}
        ids += answer.ids
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(torch.tensor([ids]), torch.arange(len(ids))[None])[0]
        said = model.logits(hidden[torch.tensor(list(right)) - 1]).argmax(-1).tolist()
    found = (token in tokens for token, tokens in zip(said, right.values(), strict=True))
    return sum(found), len(right)


def main() -> None:
    """Prints the shares."""
    args = _arguments()
    try:
        _print_shares(args)
    except (OSError, ValueError) as error:
        raise SystemExit(f"solved.py: {error}") from None


def _print_shares(args: argparse.Namespace) -> None:
    model, encoder = load(args.model)
    for length in args.lengths:
        for name in args.tasks:
            counts = [
                count_right(model, encoder, _example(name, encoder, length, args.turns, seed))
                for seed in range(args.seed, args.seed + args.samples)
            ]
            found, asked = (sum(column) for column in zip(*counts, strict=True))
            row = {"task": name, "tokens": length, "contexts": args.samples}
            print(json.dumps(row | {"answer_tokens": asked, "right": round(found / asked, 4)}))
            sys.stdout.flush()


def _example(name: str, encoder: Tokenizer, length: int, turns: int, seed: int) -> Example:
    rng = random.Random(seed)
    lines = text.lines(text.EVALUATION_PACKAGES, rng)
    source = Source(rng, lines, lambda piece: len(encoder.encode(piece).ids))
    return TASKS[name].make(source, length, turns)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=RETRIEVER, help="folder of a checkpoint")
    parser.add_argument("--lengths", type=_lengths, default="4096", metavar="N,...")
    parser.add_argument("--tasks", type=_tasks, default=",".join(TASKS), metavar="TASK,...")
    parser.add_argument("--samples", type=_positive, default=3, help="contexts of each length")
    parser.add_argument("--turns", type=_positive, default=4, help="questions over a context")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _positive(written: str) -> int:
    if not written.isdecimal() or int(written) == 0:
        raise argparse.ArgumentTypeError(f"{written!r} is no positive number")
    return int(written)


def _lengths(written: str) -> list[int]:
    return [_positive(length) for length in written.split(",")]


def _tasks(written: str) -> list[str]:
    names = written.split(",")
    if unknown := sorted(set(names) - set(TASKS)):
        raise argparse.ArgumentTypeError(f"unknown {unknown}; there are {sorted(TASKS)}")
    return names


if __name__ == "__main__":
    main()
