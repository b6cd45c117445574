"""Speed of a whole engine on the CPU, tailorkv against vLLM's own backend.

The model has the shape of a real one and random weights, so nothing is downloaded and nothing
can be said of quality: attention is about flat. For every context each backend runs in a fresh
process, one after the other, on the same random prompts: prompts are read, then decode steps of
the whole batch are timed one by one. Each context gives a line of JSON; what vLLM's own backend
took has the prefix baseline_:

    shape, layers, context, batch, threads, warm, config   what ran
    isa                                  instruction set of our ops
    ttft_seconds, ttft_ratio             until every request has its first token; null with --warm
    seconds_per_token, min_seconds_per_token   of a decode step: median, least
    ratio                                baseline_seconds_per_token / seconds_per_token
    decode_steps                         timed
    peak_rss_bytes                       of the engine's process
    kv_cache_bytes                       all layers, both tiers, just enough for the batch
    command, date, revision, versions, processor   of this run

Reading a long prompt takes minutes (the work grows with its square). `--warm` reads it without
the model: the backend writes and derives pages of random K and V, then decodes as ever.

With `--json FILE` a run can be stopped (Ctrl-C, kill, reboot): the same command goes on with the
contexts that FILE lacks. More contexts may be asked for; lines of other settings are refused. To
measure anew, name another file or remove it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from speed.command import Lines, add_output, numbers, parser, positive, progress, refuse
from speed.job import CHUNK, Job
from speed.machine import free_bytes
from speed.models import MODELS, Model
from speed.plot import lines_of, save_plot

from vllm_tailorkv.arguments import json_object

_EXAMPLES = """\
  python benchmarks/decode_e2e.py --context 8192
  python benchmarks/decode_e2e.py --context 16384,32768,65536 --warm --plot e2e.png
  python benchmarks/decode_e2e.py --context 8192,65536 --json e2e.jsonl   # again: it goes on
  python benchmarks/decode_e2e.py --shape smollm2-360m --config '{"index": "onebit", "bits": 1}'
"""
_PROCESS_BYTES = 2 << 30
_INTERRUPTED = 130


class EngineError(RuntimeError):
    """An engine ended without a result; what it printed last."""


def main() -> None:
    """Run both backends at every context."""
    args = _arguments()
    model = MODELS[args.shape].with_layers(args.layers)
    _check_memory(args, model)
    settings = _settings(args, model)
    try:
        output = Lines(args.json, settings)
    except (OSError, ValueError) as error:
        refuse(__file__, f"--json: {error}")
    left = _left(args.context, output.records)
    if len(left) < len(args.context):
        _say(f"goes on from {args.json}, which lacks {len(left)} of {len(args.context)} contexts")
    try:
        with output as lines:
            _measure(args, model, left, lambda *found: lines.add(_record(settings, *found)))
    except KeyboardInterrupt:
        again = (
            "with --json FILE it could go on" if args.json == "-" else "the same command goes on"
        )
        _say(f"interrupted; {again}")
        raise SystemExit(_INTERRUPTED) from None
    if args.plot:
        # A file may hold more contexts than were asked for now.
        _save_plot(args, [x for x in output.records if x["context"] in args.context])


def _say(what: str) -> None:
    """On stderr: results may go to stdout."""
    print(f"{Path(__file__).name}: {what}", file=sys.stderr)


def _left(contexts: list[int], records: list[dict[str, Any]]) -> list[int]:
    """The contexts that no record is of; one that is given twice wants two."""
    there = Counter(record["context"] for record in records)
    left = []
    for context in contexts:
        if there[context]:
            there[context] -= 1
        else:
            left.append(context)
    return left


def _measure(
    args: argparse.Namespace,
    model: Model,
    contexts: list[int],
    on_result: Callable[[int, dict[str, Any], dict[str, Any]], None],
) -> None:
    """Both backends at each of these contexts.

    Args:
        on_result: takes the context, what we took and what vLLM's own backend took.
    """
    with progress() as bar, tempfile.TemporaryDirectory() as directory:
        for context in contexts:
            job = Job(
                model=directory,
                options=args.config,
                context=context,
                batch=args.batch,
                output_tokens=args.output_tokens,
                warm=args.warm,
                kv_bytes_per_token=model.kv_bytes_per_token,
            )
            model.write_config(Path(directory), job.max_model_len)
            results = []
            for name, options in (("tailorkv", args.config), ("vLLM's own", None)):
                task = bar.add_task(
                    f"{context:,} tokens, {name}", total=args.batch * context + args.output_tokens
                )
                try:
                    result = run_engine(
                        job.with_options(options),
                        args.threads,
                        lambda tokens, task=task: bar.update(task, completed=tokens),
                    )
                except EngineError as error:
                    refuse(__file__, f"{context:,} tokens, {name}: {error}")
                results.append(result)
                bar.remove_task(task)
            on_result(context, *results)


def _arguments() -> argparse.Namespace:
    options = parser(__doc__ or "", _EXAMPLES)
    options.add_argument("--shape", choices=MODELS, default="llama-160m")
    options.add_argument(
        "--layers", type=positive, metavar="N", help="so many, not the model's own number"
    )
    options.add_argument(
        "--context", type=numbers, default=[8192], metavar="N[,N...]", help="tokens of a prompt"
    )
    options.add_argument(
        "--batch",
        type=positive,
        default=1,
        metavar="B",
        help=f"requests at once, below {CHUNK} (%(default)s)",
    )
    options.add_argument(
        "--output-tokens",
        type=positive,
        default=64,
        metavar="N",
        help="decode steps that are timed (%(default)s)",
    )
    options.add_argument(
        "--warm", action="store_true", help="fill the cache without the model: no time to read"
    )
    options.add_argument(
        "--config", type=json_object, default={}, metavar="JSON", help="options of tailorkv"
    )
    options.add_argument(
        "--plot", metavar="FILE", help="seconds per output token against context, as a picture"
    )
    add_output(options)
    args = options.parse_args()
    if args.batch >= CHUNK:
        options.error(f"--batch must be below {CHUNK}, is {args.batch}")
    return args


def _check_memory(args: argparse.Namespace, model: Model) -> None:
    cache = 1.75 * args.batch * max(args.context) * model.kv_bytes_per_token
    needed, free = cache + model.weight_bytes + _PROCESS_BYTES, free_bytes()
    if needed > free:
        refuse(
            __file__,
            f"about {needed / 2**30:.1f} GiB needed, {free / 2**30:.1f} GiB free: "
            "lower --context, --batch or --layers",
        )


def environment(threads: int) -> dict[str, str]:
    """Of a process with an engine in it."""
    here = str(Path(__file__).parent)
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH")))),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
    }


def run_engine(job: Job, threads: int, on_tokens: Callable[[int], None]) -> dict[str, Any]:
    """Run an engine in a process of its own.

    Args:
        on_tokens: called with the tokens read and written so far.

    Raises:
        EngineError: it ended without a result.
    """
    result = None
    reader, writer = os.pipe()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "speed.engine", job.as_json(), str(writer)],
            env=environment(threads),
            stdout=log,
            stderr=log,
            pass_fds=(writer,),
        )
        os.close(writer)
        try:
            with os.fdopen(reader) as events:
                for line in events:
                    event = json.loads(line)
                    result = event.get("result", result)
                    if "tokens" in event:
                        on_tokens(event["tokens"])
            process.wait()
        finally:
            process.kill()
            process.wait()
        if result is None:
            log.seek(0)
            raise EngineError(reason(log.read().splitlines(), process.returncode))
    return result


def reason(log: list[str], status: int) -> str:
    """The last error that a program printed (`error: ...`, `ValueError: ...`), in one line."""
    errors = [line.strip() for line in log if "rror: " in line]
    return errors[-1] if errors else f"the engine ended with status {status}"


def _settings(args: argparse.Namespace, model: Model) -> dict[str, Any]:
    """What lines of one run have in common: all that times depend on but the context."""
    return {
        "shape": args.shape,
        "layers": model.layers,
        "batch": args.batch,
        "threads": args.threads,
        "warm": args.warm,
        "config": args.config,
        "decode_steps": args.output_tokens,
    }


def _record(
    settings: dict[str, Any], context: int, ours: dict[str, Any], theirs: dict[str, Any]
) -> dict[str, Any]:
    record = settings | {"context": context, "isa": ours["isa"]}
    warm = settings["warm"]
    for prefix, result in (("", ours), ("baseline_", theirs)):
        record |= {
            f"{prefix}ttft_seconds": None if warm else round(result["first"], 3),
            f"{prefix}seconds_per_token": round(statistics.median(result["steps"]), 6),
            f"{prefix}min_seconds_per_token": round(min(result["steps"]), 6),
            f"{prefix}peak_rss_bytes": result["peak_rss_bytes"],
            f"{prefix}kv_cache_bytes": result["kv_cache_bytes"],
        }
    record["ttft_ratio"] = None if warm else round(theirs["first"] / ours["first"], 3)
    record["ratio"] = round(record["baseline_seconds_per_token"] / record["seconds_per_token"], 2)
    return record


def _save_plot(args: argparse.Namespace, records: list[dict[str, Any]]) -> None:
    save_plot(
        args.plot,
        f"{args.shape}, batch {args.batch}, threads: {args.threads}",
        "seconds per output token",
        lines_of(records, "seconds_per_token", "tailorkv"),
        lines_of(records, "baseline_seconds_per_token", "vLLM"),
        "context, tokens",
    )


if __name__ == "__main__":
    main()
