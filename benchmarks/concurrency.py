"""Many requests at the same time on a CPU: `vllm serve` and `vllm bench serve`, ours and vLLM's.

For each backend a server is started; for each number of streams `vllm bench serve` sends as many
random prompts at once, and then the same ones again. The first time prompts are read; the second
time they are in the cache (prefix caching), so that almost all is decode steps of a full batch.
Both backends get the same cache memory, prompts, cores and chunks. A line of JSON for each:

    model, context, output_tokens, cache_gib, threads, config   what ran
    backend, streams                tailorkv or vllm; requests at once
    read, cached                    what was found while prompts are read, and when they are cached:
        output_tokens_per_second    of all requests, from the first prompt to the last token
        seconds_per_token           between two tokens of a request, median
        seconds_to_first_token      median
        seconds                     of the whole
    command, date, revision, versions, processor   of this run

At the end a table. With `--json FILE` a run can be stopped: the same command goes on with the
backends and streams that FILE lacks.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
from rich.console import Console
from rich.table import Table
from speed.command import Lines, add_output, numbers, parser, positive, refuse

from vllm_tailorkv.arguments import json_object
from vllm_tailorkv.demo.server import HOST, MODEL_NAME, ServerError, ServerOptions, VllmServer
from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.scripts import find_script

_EXAMPLES = """\
  python benchmarks/concurrency.py --streams 4 --context 4096
  python benchmarks/concurrency.py --model smollm2-135m --streams 8,16 --context 7936 --json c.jsonl
  python benchmarks/concurrency.py --backends tailorkv --config '{"preset": "fast"}'
"""
BACKENDS = ("tailorkv", "vllm")
PROMPTS = ("read", "cached")
_START_SECONDS = 600
_INTERRUPTED = 130
# Of the context, left free: vLLM's benchmark sends random tokens as text, which may be more tokens.
_SPARE_TOKENS = 64


class BenchError(RuntimeError):
    """`vllm bench serve` ended without a result; what it printed last."""


def main() -> None:
    """Run each backend with every number of streams."""
    args = _arguments()
    settings = {
        name: getattr(args, name)
        for name in ("model", "context", "output_tokens", "cache_gib", "threads", "config")
    }
    try:
        folder = models.resolve(args.model)
        output = Lines(args.json, settings)
    except (models.ModelError, OSError, ValueError) as error:
        refuse(__file__, str(error))
    there = {(record["backend"], record["streams"]) for record in output.records}
    with output as lines:
        for backend in args.backends:
            left = [streams for streams in args.streams if (backend, streams) not in there]
            if not left:
                continue
            try:
                _measure(args, folder, backend, left, lambda record: lines.add(settings | record))
            except ServerError as error:
                refuse(__file__, f"{backend}: {'; '.join((str(error), *error.log_lines))}")
            except (TailorKVError, BenchError) as error:
                refuse(__file__, f"{backend}: {error}")
            except KeyboardInterrupt:
                print("concurrency.py: interrupted, server stopped", file=sys.stderr)
                raise SystemExit(_INTERRUPTED) from None
    Console(stderr=True).print(table(output.records))


def _measure(
    args: argparse.Namespace,
    folder: Path,
    backend: str,
    all_streams: list[int],
    add: Callable[[dict[str, Any]], None],
) -> None:
    # vLLM's workers heed this alone.
    cores = sorted(os.sched_getaffinity(0))[: args.threads]
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    with tempfile.TemporaryDirectory() as directory:
        options = ServerOptions(
            model=folder,
            log=Path(directory) / "server.log",
            max_model_len=args.context + args.output_tokens + 1,
            cache_gib=args.cache_gib,
            backend=backend if backend == "tailorkv" else None,
            config=args.config if backend == "tailorkv" else None,
            is_eager=True,
            arguments=("--max-num-seqs", str(max(all_streams))),
        )
        print(f"concurrency.py: starting {backend}", file=sys.stderr)
        with VllmServer(options) as server:
            server.wait_until_healthy(lambda line: None, _START_SECONDS)
            for streams in all_streams:
                record: dict[str, Any] = {"backend": backend, "streams": streams}
                for prompts in PROMPTS:
                    print(
                        f"concurrency.py: {backend}, {streams} streams, {prompts}", file=sys.stderr
                    )
                    record[prompts] = _bench(args, server.port, folder, streams, Path(directory))
                add(record)


def _bench(
    args: argparse.Namespace, port: int, folder: Path, streams: int, directory: Path
) -> dict[str, Any]:
    """What vLLM's own benchmark finds."""
    vllm = find_script("vllm")
    assert vllm is not None, "a server runs"
    result = directory / "result.json"
    result.unlink(missing_ok=True)
    done = subprocess.run(
        [
            *(vllm, "bench", "serve", "--backend", "openai", "--host", HOST, "--port", str(port)),
            *("--model", MODEL_NAME, "--tokenizer", str(folder), "--dataset-name", "random"),
            *("--random-input-len", str(args.context - _SPARE_TOKENS)),
            *("--random-output-len", str(args.output_tokens), "--ignore-eos"),
            *("--num-prompts", str(streams), "--max-concurrency", str(streams)),
            # Prompts of their own for each number of streams, the same ones each time.
            *("--seed", str(streams), "--temperature", "0", "--disable-tqdm"),
            *("--save-result", "--result-dir", str(directory), "--result-filename", result.name),
        ],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "NO_PROXY": HOST, "no_proxy": HOST},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode or not result.is_file():
        said = (done.stderr or done.stdout).strip().splitlines()
        raise BenchError(said[-1] if said else f"vllm bench serve ended with {done.returncode}")
    found = json.loads(result.read_text())
    if found["completed"] < streams:
        raise BenchError(f"{found['completed']} of {streams} requests were answered")
    return {
        "output_tokens_per_second": round(found["output_throughput"], 3),
        "seconds_per_token": round(found["median_tpot_ms"] / 1e3, 6),
        "seconds_to_first_token": round(found["median_ttft_ms"] / 1e3, 3),
        "seconds": round(found["duration"], 3),
    }


def table(records: list[dict[str, Any]]) -> Table:
    """Output tokens a second by streams, and ours by vLLM's."""
    shown = Table(title="output tokens a second; ms between two tokens; seconds to the first")
    for header in ("streams", "prompts", *BACKENDS, "ratio"):
        shown.add_column(header, justify="left" if header == "prompts" else "right")
    by_key = {(one["streams"], one["backend"]): one for one in records}
    for streams in dict.fromkeys(record["streams"] for record in records):
        for prompts in PROMPTS:
            found = [by_key.get((streams, backend), {}).get(prompts) for backend in BACKENDS]
            rates = [one["output_tokens_per_second"] for one in found if one]
            ratio = f"{rates[0] / rates[1]:.2f}" if len(rates) == len(BACKENDS) else ""
            shown.add_row(str(streams), prompts, *map(_cell, found), ratio)
    return shown


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    return (
        f"{found['output_tokens_per_second']:.1f}; {1e3 * found['seconds_per_token']:.0f}; "
        f"{found['seconds_to_first_token']:.1f}"
    )


def _arguments() -> argparse.Namespace:
    options = parser(__doc__ or "", _EXAMPLES)
    options.add_argument(
        "--model", default="smollm2-135m", help="a name that models.py knows, or a folder"
    )
    options.add_argument(
        "--context", type=positive, default=4096, metavar="N", help="of a prompt, 64 spare"
    )
    options.add_argument(
        "--streams", type=numbers, default=[8], metavar="N[,N...]", help="requests at once"
    )
    options.add_argument(
        "--output-tokens", type=positive, default=64, metavar="N", help="of an answer (%(default)s)"
    )
    options.add_argument(
        "--cache-gib", type=positive, default=4, metavar="N", help="of each server (%(default)s)"
    )
    options.add_argument(
        "--backends",
        type=lambda text: text.split(","),
        default=list(BACKENDS),
        metavar="NAME[,NAME]",
        help=f"of {', '.join(BACKENDS)} (both)",
    )
    options.add_argument(
        "--config", type=json_object, default={}, metavar="JSON", help="options of tailorkv"
    )
    add_output(options)
    args = options.parse_args()
    if args.context <= _SPARE_TOKENS:
        options.error(f"--context: {args.context} is not more than {_SPARE_TOKENS}")
    if args.threads > len(os.sched_getaffinity(0)):
        options.error(f"--threads: {args.threads} are more than the cores of this process")
    for name in args.backends:
        if name not in BACKENDS:
            options.error(f"--backends: {name} is none of {', '.join(BACKENDS)}")
    return args


if __name__ == "__main__":
    main()
