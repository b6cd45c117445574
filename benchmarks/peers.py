"""Time of an answer on the CPU: tailorkv, vLLM's own backend and ik_llama.cpp on one real model.

At every context each system runs in a fresh process, one after the other, with the same random
tokens and threads: a prompt is read, then decode steps of one request are timed. A line of JSON
each:

    model, peer, context, threads        what ran
    checkpoint                           with --checkpoint, its folder's name
    weights, kv                          how weights, and K and V, are encoded
    seconds_to_read                      until the first token
    seconds_per_token, min_seconds_per_token   of a decode step: median, least
    command, date, revision, versions, processor   of this run

At the end a table: milliseconds of a step, and what 1,000 tokens of context add to it, which is
what attention costs. ik_llama.cpp comes with `pip install -r requirements/peers.txt`; without it
the others run alone.

With `--json FILE` a run can be stopped: the same command goes on with what FILE lacks.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import models
from decode_e2e import EngineError, reason, run_engine
from rich.console import Console
from rich.table import Table
from speed.command import Lines, add_output, numbers, parser, positive, refuse
from speed.job import Job, kv_bytes_per_token

from vllm_tailorkv.arguments import json_object

_EXAMPLES = """\
  python benchmarks/peers.py --context 2048,4096
  python benchmarks/peers.py --model qwen2.5-coder-0.5b --context 2048,8192,30000 --json peers.jsonl
  python benchmarks/peers.py --peers tailorkv,vllm --config '{"preset": "fast"}'
"""


@dataclass(frozen=True)
class Peer:
    """A system, and how it keeps weights, and K and V.

    weights: "bf16" of the checkpoint; of GGUF files an encoding, or "4-bit" as published.
    """

    weights: str
    kv: str
    is_llama: bool = False


PEERS = {
    "tailorkv": Peer("bf16", "bf16"),
    "vllm": Peer("bf16", "bf16"),
    "vllm-fp8": Peer("bf16", "fp8"),
    "ik-bf16": Peer("bf16", "f16", is_llama=True),
    "ik-q8_0": Peer("q8_0", "q8_0", is_llama=True),
    "ik-4bit": Peer("4-bit", "q8_0", is_llama=True),
}


def main() -> None:
    """Run every system at every context."""
    args = _arguments()
    settings = {"model": args.model, "threads": args.threads, "config": args.config}
    settings["output_tokens"] = args.output_tokens
    peers = dict(PEERS)
    if args.checkpoint is not None:
        settings["checkpoint"] = args.checkpoint.name
        for name, peer in PEERS.items():
            if not peer.is_llama:
                peers[name] = replace(peer, weights=args.checkpoint.name)
    try:
        folder = args.checkpoint or models.resolve(args.model)
        output = Lines(args.json, settings)
    except (models.ModelError, OSError, ValueError) as error:
        refuse(__file__, str(error))
    there = {(record["peer"], record["context"]) for record in output.records}
    with output as lines:
        for context in args.context:
            for name in args.peers:
                if (name, context) in there:
                    continue
                try:
                    found = _run(args, peers[name], name, folder, context)
                except (EngineError, models.ModelError) as error:
                    print(f"peers.py: {context:,} tokens, {name}: {error}", file=sys.stderr)
                    continue
                lines.add(settings | _record(peers[name], name, context, found))
    Console(stderr=True).print(table(output.records))


def _record(peer: Peer, name: str, context: int, found: dict[str, Any]) -> dict[str, Any]:
    return {
        "peer": name,
        "context": context,
        "weights": peer.weights,
        "kv": peer.kv,
        "seconds_to_read": round(found["first"], 3),
        "seconds_per_token": round(statistics.median(found["steps"]), 6),
        "min_seconds_per_token": round(min(found["steps"]), 6),
    }


def _run(
    args: argparse.Namespace, peer: Peer, name: str, folder: Path, context: int
) -> dict[str, Any]:
    print(f"peers.py: {context:,} tokens, {name}", file=sys.stderr)
    if peer.is_llama:
        return _run_llama(args, peer, context)
    job = Job(
        model=str(folder),
        options=args.config if name == "tailorkv" else None,
        context=context,
        batch=1,
        output_tokens=args.output_tokens,
        warm=False,
        kv_bytes_per_token=kv_bytes_per_token(folder, 2),
        load_format="auto",
        kv_cache_dtype="fp8" if peer.kv == "fp8" else "auto",
    )
    return run_engine(job, args.threads, lambda tokens: None)


def _run_llama(args: argparse.Namespace, peer: Peer, context: int) -> dict[str, Any]:
    from peers.weights import encode  # noqa: PLC0415  needs the package gguf

    gguf = models.gguf_file(args.model, Console(stderr=True))
    if peer.weights != "4-bit":
        gguf = encode(gguf, gguf.with_name(f"{peer.weights}.gguf"), peer.weights)
    job = {
        "model": str(gguf),
        "context": context,
        "output_tokens": args.output_tokens,
        "threads": args.threads,
        "kv": peer.kv,
    }
    paths = (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))
    done = subprocess.run(
        [sys.executable, "-m", "peers.llama", json.dumps(job)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise EngineError(reason(done.stderr.splitlines(), done.returncode))
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(records: list[dict[str, Any]]) -> Table:
    """Milliseconds of a step by system and context, and what context costs."""
    contexts = sorted({record["context"] for record in records})
    shown = Table(title="ms of a decode step, and seconds to read the prompt")
    shown.add_column("system, weights, K and V")
    for context in contexts:
        shown.add_column(f"{context:,}", justify="right")
    shown.add_column("ms a 1,000 tokens", justify="right")
    for name in dict.fromkeys(record["peer"] for record in records):
        found = {record["context"]: record for record in records if record["peer"] == name}
        cells = []
        for context in contexts:
            one = found.get(context)
            cells.append("")
            if one is not None:
                cells[-1] = f"{1e3 * one['seconds_per_token']:.1f} ({one['seconds_to_read']:.1f} s)"
        of = next(iter(found.values()))
        shown.add_row(f"{name}, {of['weights']}, {of['kv']}", *cells, slope(list(found.values())))
    return shown


def slope(records: list[dict[str, Any]]) -> str:
    """Milliseconds that 1,000 tokens of context add, from the shortest to the longest."""
    ends = sorted(records, key=lambda record: record["context"])
    tokens = ends[-1]["context"] - ends[0]["context"]
    if not tokens:
        return ""
    return f"{1e6 * (ends[-1]['seconds_per_token'] - ends[0]['seconds_per_token']) / tokens:.2f}"


def _arguments() -> argparse.Namespace:
    options = parser(__doc__ or "", _EXAMPLES)
    options.add_argument(
        "--model", choices=models.NAMES, default="smollm2-135m", help="made if missing"
    )
    options.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="another one of that model for tailorkv and vLLM, as quantized_checkpoint.py makes "
        "them; the folder's name says how it keeps weights",
    )
    options.add_argument(
        "--context", type=numbers, default=[2048], metavar="N[,N...]", help="tokens of a prompt"
    )
    options.add_argument(
        "--peers",
        type=lambda text: text.split(","),
        metavar="NAME[,NAME...]",
        help=f"of {', '.join(PEERS)} (all that are installed)",
    )
    options.add_argument(
        "--output-tokens",
        type=positive,
        default=32,
        metavar="N",
        help="decode steps that are timed (%(default)s)",
    )
    options.add_argument(
        "--config", type=json_object, default={}, metavar="JSON", help="options of tailorkv"
    )
    add_output(options)
    args = options.parse_args()
    has_llama = importlib.util.find_spec("ik_llama_cpp") is not None
    if args.peers is None:
        args.peers = [name for name, peer in PEERS.items() if has_llama or not peer.is_llama]
    for name in args.peers:
        if name not in PEERS:
            options.error(f"--peers: {name} is none of {', '.join(PEERS)}")
        if PEERS[name].is_llama and not has_llama:
            options.error(f"--peers: {name} needs pip install -r requirements/peers.txt")
    if args.checkpoint is not None and not (args.checkpoint / "config.json").is_file():
        options.error(f"--checkpoint: {args.checkpoint} has no config.json")
    longest = models.MODELS[args.model].context
    if max(args.context) + args.output_tokens >= longest:
        options.error(f"--context: {args.model} knows {longest:,} tokens, answers included")
    return args


if __name__ == "__main__":
    main()
