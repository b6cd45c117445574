"""What lossless speculation costs and gains on a CPU: a real model goes on with real texts.

Ways of serving run one after the other, each in a fresh process, on the same texts:

    vllm         vLLM's own attention
    exact        tailorkv with every context attended in full: tokens that differ from vllm's are
                 ties, which another order of sums decides another way; none with float32
    tailorkv     the tailored steps, whose tokens may differ
    drafts       the tailored steps draft, and steps of exact attention judge

All requests are answered at the same time, greedily, with their prompts in the cache, so that
decode steps are timed. A line of JSON for each:

    model, text, dtype, context, batch, output_tokens, drafts, threads, config   what ran
    way                         one of those above
    tokens_per_second           of all requests
    accepted_share              of the drafted tokens; null without drafts
    tokens_per_judging          tokens of a request for each exact step; null without drafts
    same_tokens, same_share     as vllm, where that ran: tokens before the first difference, mean;
                                share of equal answers
    tokens                      the answers
    command, date, revision, versions, processor   of this run

At the end a table. With `--json FILE` a run can be stopped: the same command goes on with what the
file lacks.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import models
from accuracy.text_quality import KINDS, held_out
from decode_e2e import EngineError, environment, reason
from rich.console import Console
from rich.table import Table
from speed.answering import AnsweringJob
from speed.command import Lines, add_output, numbers, parser, positive, refuse
from speed.job import kv_bytes_per_token
from tokenizers import Tokenizer

from vllm_tailorkv.arguments import json_object
from vllm_tailorkv.attention.carried import DRAFTER
from vllm_tailorkv.config import MOST_TOKENS

WAYS = ("vllm", "exact", "tailorkv", "drafts")
_EXAMPLES = """\
  python benchmarks/lossless.py --context 4096
  python benchmarks/lossless.py --model qwen2.5-coder-0.5b --text code --context 8192 --batch 4
  python benchmarks/lossless.py --context 7936 --batch 8 --drafts 2,4 --json lossless.jsonl
"""


def main() -> None:
    """Serve in every way, with every number of drafts."""
    args = _arguments()
    names = ("model", "text", "dtype", "context", "batch", "output_tokens", "threads", "config")
    settings = {name: getattr(args, name) for name in names}
    try:
        folder = models.resolve(args.model)
        output = Lines(args.json, settings)
    except (models.ModelError, OSError, ValueError) as error:
        refuse(__file__, str(error))
    texts = _texts(args, folder)
    with output as lines:
        for name, drafts in _runs(args.ways, args.drafts):
            if any((one["way"], one["drafts"]) == (name, drafts) for one in output.records):
                continue
            print(f"lossless.py: {name}{f', {drafts} drafts' if drafts else ''}", file=sys.stderr)
            job = AnsweringJob(
                model=str(folder),
                texts=texts,
                output_tokens=args.output_tokens,
                options=_options(name, args.config),
                speculation=_speculation(drafts),
                dtype=args.dtype,
                kv_bytes_per_token=kv_bytes_per_token(folder, 4 if args.dtype == "float32" else 2),
            )
            try:
                found = _run(job, args.threads)
            except EngineError as error:
                refuse(__file__, f"{name}: {error}")
            full = [one["tokens"] for one in output.records if one["way"] == "vllm"]
            lines.add(
                settings
                | {"way": name, "drafts": drafts}
                | record(found, drafts, full[0] if full else None)
            )
    Console(stderr=True).print(table(output.records))


def _runs(ways: list[str], drafts: list[int]) -> list[tuple[str, int]]:
    """Ways of serving, and how many tokens each drafts at once."""
    return [(way, count) for way in ways for count in (drafts if way == "drafts" else [0])]


def _options(way: str, config: dict[str, Any]) -> dict[str, Any] | None:
    """Of tailorkv."""
    if way == "vllm":
        return None
    return config | ({"full_attention_below": MOST_TOKENS} if way == "exact" else {})


def _speculation(drafts: int) -> dict[str, Any] | None:
    return {"model": DRAFTER, "num_speculative_tokens": drafts} if drafts else None


def record(found: dict[str, Any], drafts: int, full: list[list[int]] | None) -> dict[str, Any]:
    """What one way was measured to be.

    Args:
        found: by `speed.answering`.
        drafts: at once.
        full: vLLM's answers, or None: these are they.
    """
    tokens = found["tokens"]
    # The first token of each answer is not timed.
    timed = sum(map(len, tokens)) - len(tokens)
    same = [_same(*pair) for pair in zip(tokens, full or tokens, strict=True)]
    judging = found["drafted"] / drafts if drafts else 0
    return {
        "tokens_per_second": round(timed / found["seconds"], 3),
        "accepted_share": round(found["accepted"] / found["drafted"], 4) if judging else None,
        "tokens_per_judging": round(found["accepted"] / judging + 1, 3) if judging else None,
        "same_tokens": round(sum(same) / len(same), 2),
        "same_share": sum(one == len(own) for one, own in zip(same, tokens, strict=True))
        / len(tokens),
        "tokens": tokens,
    }


def _same(own: list[int], full: list[int]) -> int:
    """Tokens before the first difference."""
    pairs = enumerate(zip(own, full, strict=True))
    return next((i for i, (one, other) in pairs if one != other), len(own))


def _texts(args: argparse.Namespace, folder: Path) -> list[list[int]]:
    encoder = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [held_out(encoder, args.context, seed, args.text) for seed in range(args.batch)]


def _run(job: AnsweringJob, threads: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "speed.answering"],
        input=json.dumps(asdict(job)),
        env=environment(threads),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise EngineError(reason(done.stderr.splitlines(), done.returncode))
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(records: list[dict[str, Any]]) -> Table:
    """Speed and sameness of each way."""
    shown = Table(title="answers to texts that are in the cache, all at the same time")
    headers = ("tokens a second", "by vllm's", "accepted", "a judging", "same tokens", "all same")
    shown.add_column("way")
    for header in headers:
        shown.add_column(header, justify="right")
    base = next((one for one in records if one["way"] == "vllm"), None)
    for one in records:
        rate, share = one["tokens_per_second"], one["accepted_share"]
        shown.add_row(
            one["way"] + (f", {one['drafts']} at once" if one["drafts"] else ""),
            f"{rate:.1f}",
            f"{rate / base['tokens_per_second']:.2f}" if base else "",
            f"{share:.0%}" if share is not None else "",
            f"{one['tokens_per_judging']:.2f}" if share is not None else "",
            f"{one['same_tokens']:.1f}",
            f"{one['same_share']:.0%}",
        )
    return shown


def _arguments() -> argparse.Namespace:
    options = parser(__doc__ or "", _EXAMPLES)
    options.add_argument(
        "--model", default="smollm2-135m", help="a name that models.py knows, or a folder"
    )
    options.add_argument(
        "--ways",
        type=lambda text: text.split(","),
        default=list(WAYS),
        metavar="NAME[,NAME...]",
        help=f"of {', '.join(WAYS)} (all)",
    )
    options.add_argument("--text", choices=KINDS, default=KINDS[0], help="(%(default)s)")
    options.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(%(default)s)"
    )
    options.add_argument(
        "--context", type=positive, default=4096, metavar="N", help="tokens of a text (%(default)s)"
    )
    options.add_argument(
        "--batch", type=positive, default=1, metavar="N", help="texts (%(default)s)"
    )
    options.add_argument(
        "--drafts", type=numbers, default=[4], metavar="N[,N...]", help="tokens at once (4)"
    )
    options.add_argument(
        "--output-tokens", type=positive, default=64, metavar="N", help="of an answer (%(default)s)"
    )
    options.add_argument(
        "--config", type=json_object, default={}, metavar="JSON", help="options of tailorkv"
    )
    add_output(options)
    args = options.parse_args()
    for name in args.ways:
        if name not in WAYS:
            options.error(f"--ways: {name} is none of {', '.join(WAYS)}")
    if args.output_tokens < 2:
        options.error("--output-tokens: the first one is not timed; give 2 or more")
    return args


if __name__ == "__main__":
    main()
