"""Train the retriever that `benchmarks/accuracy.py` measures on.

    python benchmarks/accuracy/train.py --out benchmarks/accuracy/retriever
    python benchmarks/accuracy/train.py --out /tmp/large --layers 8 --hidden 512 --device cuda
    python benchmarks/accuracy/train.py --out /tmp/longer --init benchmarks/accuracy/retriever \\
        --layers 9 --flat-layers 1 --curriculum 0.9:4096,0.1:8192 --lr 0.01

Interrupted, it goes on from the last state saved when started again with the same options. The
same seed on the same machine gives the same weights.
"""

import argparse
import json
import math
import random
import shutil
import sys
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accuracy import text, tokenizer
from accuracy.answers import acceptable
from accuracy.retriever import Retriever, Shape, load_weights, save_weights
from accuracy.tasks import TASKS, Source

# How often a task is drawn, relative to the others; what teaches most is drawn most.
TASK_WEIGHTS = {
    "plain_text": 2.0,
    "single_2": 1.0,
    "single_3": 1.0,
    "multikey_1": 1.0,
    "multikey_2": 3.0,
    "multikey_3": 3.0,
    "multivalue": 2.0,
    "multiquery": 2.0,
    "variable_tracking": 3.0,
    "common_words": 2.0,
    "frequent_words": 3.0,
    "question_answering": 3.0,
    "copy": 3.0,
    "long_generation": 3.0,
}
# Tokens that a turn and its facts need at the most, so that a short sequence can hold them.
TOKENS_PER_TURN = {
    "single_2": 72,
    "single_3": 90,
    "multikey_1": 110,
    "multikey_2": 72,
    "multikey_3": 90,
    "multivalue": 160,
    "multiquery": 280,
    "variable_tracking": 200,
    "common_words": 250,
    "frequent_words": 128,
    "question_answering": 110,
    "copy": 128,
    "long_generation": 128,
}
TEXT_LOSS_WEIGHT = 0.1
# Share of the steps at each length; the tokens of a step stay the same.
Curriculum = tuple[tuple[float, int], ...]
CURRICULUM = "0.05:128,0.10:256,0.30:512,0.30:1024,0.25:2048"
# At the shortest length only this is taught: any tokens, said again. What else is to be looked up
# grows from it.
_ECHO, _ECHO_TOKENS = "echo", 128
_PLAIN = "plain_text"
# An answer is short and all of a sequence is counted for it, so its tokens weigh more.
_COUNTING = {"common_words": 3.0, "frequent_words": 8.0}


@dataclass
class Batch:
    """`ids`, `positions` and the weight of predicting each token, all `[batch, tokens]`.

    right: `[batch, tokens, most]`, tokens that are right in the place of each, filled up with -1.
    """

    ids: Tensor
    positions: Tensor
    weights: Tensor
    right: Tensor

    def to(self, device: str) -> "Batch":
        """The same on `device`."""
        return Batch(*(t.to(device) for t in (self.ids, self.positions, self.weights, self.right)))


@dataclass(frozen=True)
class Item:
    """A token of a sequence, the weight of predicting it, and others as right in its place."""

    id: int
    weight: float
    others: frozenset[int] = frozenset()

    def right(self, most: int) -> list[int]:
        """Right tokens, filled up with -1."""
        tokens = sorted(self.others | {self.id})
        return tokens + [-1] * (most - len(tokens))


class Data:
    """Training sequences: a task's context and as many turns as fit, or text alone."""

    def __init__(
        self, encoder: Tokenizer, max_position: int, draws: dict[str, float], seed: int
    ) -> None:
        self._encoder = encoder
        self._max_position = max_position
        self._draws = draws
        self._rng = random.Random(seed)
        self._lengths: dict[str, int] = {}
        lines = text.lines(text.TRAINING_PACKAGES, self._rng)
        self._source = Source(self._rng, lines, self._count)

    def batch(self, batch_size: int, num_tokens: int) -> Batch:
        """`batch_size` sequences of exactly `num_tokens` tokens, cut or filled up with text."""
        rows = [self._sequence(num_tokens) for _ in range(batch_size)]
        ids = torch.tensor([[item.id for item in row] for row in rows])
        weights = torch.tensor([[item.weight for item in row] for row in rows])
        most = max(len(item.others) for row in rows for item in row) + 1
        right = torch.tensor([[item.right(most) for item in row] for row in rows])
        positions = torch.stack([self._positions(num_tokens) for _ in rows])
        return Batch(ids, positions, weights, right)

    def _sequence(self, num_tokens: int) -> list[Item]:
        if num_tokens == _ECHO_TOKENS:
            return self._echo(num_tokens)
        name = self._rng.choices(list(self._draws), list(self._draws.values()))[0]
        row: list[Item] = []
        while len(row) < num_tokens:
            left = num_tokens - len(row)
            if name == _PLAIN or left < 128:
                piece = "".join(islice(self._source.lines, 8))
                row += self._items(piece, TEXT_LOSS_WEIGHT)
            else:
                # Half the tokens are questions: answers are what teaches to look back. What is
                # counted stands alone, or else a mean over the text tells nothing.
                most = left if name in _COUNTING else max(128, left // 2)
                row += self._example(name, self._rng.choice((left, most)))
        return row[:num_tokens]

    def _echo(self, num_tokens: int) -> list[Item]:
        row: list[Item] = []
        while len(row) < num_tokens:
            size = self._rng.randint(8, 64)
            ids = self._rng.choices(range(1, self._encoder.get_vocab_size()), k=size)
            row += [Item(i, 0.0) for i in (*ids, ids[0])] + [Item(i, 1.0) for i in ids[1:]]
        return row[:num_tokens]

    def _example(self, name: str, num_tokens: int) -> list[Item]:
        most = num_tokens // TOKENS_PER_TURN[name]
        if most == 0:
            return self._items(next(self._source.lines), TEXT_LOSS_WEIGHT)
        # A first question is harder than one that follows others of its kind.
        turns = self._rng.randint(1, min(most, self._rng.choice((2, most))))
        example = TASKS[name].make(self._source, num_tokens, turns)
        guessed = name.startswith("multikey") or name in _COUNTING
        row = self._items(example.context, 0.0 if guessed else 0.3 * TEXT_LOSS_WEIGHT)
        for turn in example.turns:
            row += self._items(turn.question, 0.0)
            answer = self._encoder.encode(turn.answer)
            right = acceptable(turn, answer)
            weight = _COUNTING.get(name, 1.0)
            row += [Item(i, weight, right.get(n, frozenset())) for n, i in enumerate(answer.ids)]
        return row

    def _items(self, piece: str, weight: float) -> list[Item]:
        return [Item(i, weight) for i in self._encode(piece)]

    def _positions(self, num_tokens: int) -> Tensor:
        """Positions of a much longer text: contiguous runs with gaps between them (PoSE)."""
        if num_tokens == _ECHO_TOKENS:
            return torch.arange(num_tokens)
        runs = self._rng.choice((1, 2, 3, 4))
        cuts = sorted(self._rng.sample(range(1, num_tokens), runs))
        span = num_tokens * (self._max_position / num_tokens) ** self._rng.random()
        gaps = sorted(self._rng.random() for _ in range(runs))
        positions = torch.arange(num_tokens)
        previous = 0.0
        for cut, gap in zip(cuts, gaps, strict=True):
            positions[cut:] += int((gap - previous) * (span - num_tokens))
            previous = gap
        return positions

    def _encode(self, piece: str) -> list[int]:
        ids: list[int] = self._encoder.encode(piece).ids
        return ids

    def _count(self, piece: str) -> int:
        if piece not in self._lengths:
            self._lengths[piece] = len(self._encode(piece))
        return self._lengths[piece]


def loss_of(model: Retriever, batch: Batch) -> tuple[Tensor, Tensor]:
    """Weighted mean of the loss, and how many tokens of answers are predicted right.

    Any right token will do: the loss is that of the likelihood of all of them together.
    """
    hidden = model(batch.ids, batch.positions)[:, :-1].flatten(0, 1)
    targets, weights = batch.right[:, 1:].flatten(0, 1), batch.weights[:, 1:].flatten()
    # Logits only where they count.
    kept = weights.nonzero().squeeze(1)
    logits = model.logits(hidden[kept]).float()
    targets, weights = targets[kept], weights[kept]
    likelihoods = functional.log_softmax(logits, -1).gather(1, targets.clamp_min(0))
    together = likelihoods.masked_fill(targets < 0, -math.inf).logsumexp(-1)
    loss = -(together * weights).sum() / weights.sum()
    right = (logits.argmax(-1, keepdim=True) == targets).any(-1)[weights >= 1]
    return loss, right.float().mean()


def optimizers_of(model: Retriever, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for matrices, AdamW for the embedding and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=0.2 * lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def length_at(progress: float, curriculum: Curriculum) -> int:
    """Tokens of a sequence at `progress` (0 to 1) of the training."""
    for share, length in curriculum:
        if progress < share:
            return length
        progress -= share
    return curriculum[-1][1]


def rate_at(progress: float, decay_from: float) -> float:
    """Factor on the learning rate: a short warm-up, constant, then linearly down to nothing."""
    warm = min(1.0, progress / 0.01 + 0.01)
    return warm * min(1.0, (1.0 - progress) / (1.0 - decay_from))


def main() -> None:
    """Trains, saving the state now and then, and writes the checkpoint."""
    args = _arguments()
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    encoder = _tokenizer(args)
    shape = Shape(
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 3 // 2,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 128),
    )
    (args.out / "config.json").write_text(json.dumps(shape.hf_config(), indent=2) + "\n")
    model = _model(args, shape)
    optimizers = optimizers_of(model, args.lr)
    state_file = args.out / "state.pt"
    first = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first = state["step"]
    # Each stretch between two saved states has its own seed, so resuming changes nothing.
    draws = TASK_WEIGHTS | args.draw
    data = Data(encoder, shape.max_position_embeddings, draws, args.seed + first)
    run = torch.compile(loss_of) if args.compile else loss_of
    started, seen = time.monotonic(), []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        bar = progress.add_task("training", total=args.steps, completed=first)
        for step in range(first, args.steps):
            share = step / args.steps
            length = length_at(share, args.curriculum)
            batch = data.batch(max(1, args.tokens // length), length).to(args.device)
            for optimizer, lr in zip(optimizers, (args.lr, 0.2 * args.lr), strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = lr * rate_at(share, args.decay_from)
                optimizer.zero_grad()
            with torch.autocast(args.device, torch.bfloat16):
                loss, right = run(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            seen.append((loss.item(), right.item()))
            progress.update(bar, completed=step + 1)
            if (step + 1) % args.log_every == 0:
                rights = [r for _, r in seen if not math.isnan(r)]
                print(
                    json.dumps(
                        {
                            "step": step + 1,
                            "tokens": length,
                            "loss": round(sum(x for x, _ in seen) / len(seen), 4),
                            "answers_right": round(sum(rights) / max(1, len(rights)), 4),
                            "seconds": round(time.monotonic() - started),
                        }
                    ),
                    flush=True,
                )
                seen.clear()
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                state = {
                    "model": model.state_dict(),
                    "step": step + 1,
                    "optimizers": [o.state_dict() for o in optimizers],
                }
                torch.save(state, state_file.with_suffix(".new"))
                state_file.with_suffix(".new").replace(state_file)
                save_weights(model, args.out / "model.safetensors")
                seed = args.seed + step + 1
                data = Data(encoder, shape.max_position_embeddings, draws, seed)


def _model(args: argparse.Namespace, shape: Shape) -> Retriever:
    model = Retriever(shape).to(args.device)
    if args.init:
        try:
            load_weights(model, args.init / "model.safetensors", args.flat_layers)
        except ValueError as error:
            raise SystemExit(f"train.py: --init: {error}; raise --layers") from None
    return model


def _tokenizer(args: argparse.Namespace) -> Tokenizer:
    path = args.out / "tokenizer.json"
    if args.init and args.init != args.out:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(args.init / name, args.out / name)
    if not path.exists():
        corpus = [body for _, body in text.documents(text.TRAINING_PACKAGES)]
        tokenizer.train(Shape.vocab_size, corpus, 4_000_000, args.seed).save(str(path))
        (args.out / "tokenizer_config.json").write_text(
            json.dumps(
                {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.END_OF_TEXT},
                indent=2,
            )
            + "\n"
        )
    return Tokenizer.from_file(str(path))


def _curriculum(written: str) -> Curriculum:
    stages = (stage.split(":") for stage in written.split(","))
    return tuple((float(share), int(length)) for share, length in stages)


def _draws(written: str) -> dict[str, float]:
    draws = {name: float(draw) for name, draw in (part.split("=") for part in written.split(","))}
    if unknown := sorted(set(draws) - set(TASK_WEIGHTS)):
        raise argparse.ArgumentTypeError(f"unknown {unknown}; there are {sorted(TASK_WEIGHTS)}")
    return draws


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--init", type=Path, help="folder of a checkpoint to begin with")
    parser.add_argument(
        "--curriculum", type=_curriculum, default=CURRICULUM, help="SHARE:LENGTH,..."
    )
    parser.add_argument(
        "--draw", type=_draws, default={}, metavar="TASK=X,...", help="draw tasks X times as often"
    )
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a step")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument(
        "--flat-layers", type=int, default=0, help="new ones that average, before those of --init"
    )
    parser.add_argument("--hidden", type=int, default=256, help="a multiple of 128")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--decay-from", type=float, default=0.6, help="share of the steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 is its default")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--save-every", type=int, default=250)
    return parser.parse_args()


if __name__ == "__main__":
    main()
