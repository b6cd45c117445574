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
import shutil
import sys
import time
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accuracy import text, tokenizer
from accuracy.retriever import Retriever, Shape, load_weights, save_weights
from accuracy.sequences import TASK_WEIGHTS, Batch, Data

# Share of the steps at each length; the tokens of a step stay the same.
Curriculum = tuple[tuple[float, int], ...]
CURRICULUM = "0.05:128,0.10:256,0.30:512,0.30:1024,0.25:2048"


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
        "--draw",
        type=_draws,
        default={},
        metavar="TASK=X,...",
        help="how often each is drawn",
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
