"""How much quality a way of reading the KV cache costs: tasks, text and attention, side by side.

    python benchmarks/accuracy.py --quick
    python benchmarks/accuracy.py --lengths 16384 --methods full tailorkv paper oracle quest
    python benchmarks/accuracy.py --model PATH --tasks multikey_2,copy --lengths 4096,16384 \\
        --methods full 'tailorkv:index=onebit,budget=1024' --json out.json --plot out.png

A question, like everything after the context, is read by decode steps, so the method at hand
serves it. `--answers written` lets the model write the answers; `given` forces the right ones and
counts the tokens that it would have written, for models too small to finish a list. Every context
is read once an engine (prefix caching); methods that differ in nothing that lies in the cache
share one. Method names and options: `--list`.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

# Read when vLLM and OpenMP are loaded. Spinning threads would keep others from the cores.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from accuracy.attention_level import observed
from accuracy.engine import start
from accuracy.evaluate import ANSWERS, WRITTEN, Cell, make_cell, run_cell
from accuracy.methods import FULL, METHODS, Method, parse_method, selectors_of
from accuracy.report import Report, write_json
from accuracy.tasks import TASKS
from accuracy.text_quality import held_out, likelihood
from rich.console import Console
from rich.progress import Progress
from transformers import AutoConfig, AutoTokenizer

RETRIEVER = Path(__file__).parent / "accuracy" / "retriever"
QUICK = {
    "methods": [FULL, "tailorkv", "paper", "oracle", "streaming_llm"],
    "lengths": [4096],
    "samples": 1,
    "turns": 2,
    "text_steps": 64,
    "answers": list(ANSWERS),
}
_STANDARD = [FULL, "tailorkv", "paper", "oracle", "quest", "streaming_llm", "snapkv"]
_TEXT_STRETCH = 32


def main() -> None:
    """Runs what was asked for and writes it down."""
    args = _arguments()
    console = Console(width=None if sys.stdout.isatty() else 200)
    if args.list:
        console.print(f"methods: {', '.join(METHODS)}\ntasks:   {', '.join(TASKS)}")
        return
    num_layers = AutoConfig.from_pretrained(args.model).get_text_config().num_hidden_layers
    try:
        methods = [parse_method(text, num_layers) for text in args.methods]
        unknown = sorted(set(args.tasks) - set(TASKS))
        if unknown:
            raise ValueError(f"unknown tasks {', '.join(unknown)}; there are {', '.join(TASKS)}")
        if args.skip_unsolved and FULL not in args.methods:
            raise ValueError("--skip-unsolved needs the method full")
    except ValueError as error:
        raise SystemExit(f"accuracy.py: {error}") from None
    encoder = AutoTokenizer.from_pretrained(args.model).backend_tokenizer
    cells = [
        make_cell(encoder, task, length, args.samples, args.turns, args.seed, answers)
        for length in args.lengths
        for task in args.tasks
        for answers in args.answers
    ]
    left_out = {"json", "plot", "list", "model"}
    arguments = {k: str(v) for k, v in vars(args).items() if k not in left_out}
    report = Report(arguments | {"model": args.model.name}, methods)
    texts = [held_out(encoder, max(args.lengths), args.seed + i) for i in range(args.samples)]
    console.print(f"model {args.model}: {num_layers} layers, {len(methods)} methods")

    def engine_of(method: Method) -> tuple[bool, str]:
        # Full attention comes first: it tells which tasks count.
        return method.options is not None, str(method.engine_options)

    with Progress(console=console) as progress:
        total = len(methods) * len(cells)
        bar = progress.add_task("tasks", total=total)
        for _, served in groupby(sorted(methods, key=engine_of), engine_of):
            _run_engine(list(served), cells, texts, args, report, lambda: progress.advance(bar))
    report.print(console)
    if args.json:
        write_json(report, args.json)
        console.print(f"written: {args.json}")
    if args.plot:
        report.plot(args.plot)
        console.print(f"drawn: {args.plot}")


def _run_engine(
    methods: list[Method],
    cells: list[Cell],
    texts: list[list[int]],
    args: argparse.Namespace,
    report: Report,
    advance: Callable[[], None],
) -> None:
    """All cells with methods that share an engine: a context is read once, then asked by each."""
    longest = max(args.lengths) + args.spare_tokens
    options = methods[0].engine_options
    with start(str(args.model), longest, args.kv_cache_gib, options) as engine:
        tokenizer = engine.llm.get_tokenizer()
        selectors = {method.name: selectors_of(method, engine) for method in methods}
        for cell in cells:
            if args.skip_unsolved and methods[0].name != FULL and not report.counts(cell):
                for _ in methods:
                    advance()
                continue
            for method in methods:
                if method.options is not None:
                    engine.configure(method.options, selectors[method.name])
                started = time.monotonic()
                report.scores.append(run_cell(engine, method, cell, tokenizer.decode))
                spent = report.seconds.get(method.name, 0.0)
                report.seconds[method.name] = spent + time.monotonic() - started
                advance()
        for method in methods:
            if method.options is not None:
                engine.configure(method.options, selectors[method.name])
                report.bytes_per_token[method.name] = engine.bytes_per_token()
            with observed(engine, method.name) as layers:
                report.likelihoods.append(
                    likelihood(engine, method.name, texts, args.text_steps, _TEXT_STRETCH)
                )
            report.layers += layers


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=RETRIEVER, help="default: the retriever")
    parser.add_argument("--methods", nargs="+", default=_STANDARD, metavar="METHOD")
    parser.add_argument("--tasks", type=_names, default=list(TASKS), help="default: all")
    parser.add_argument("--lengths", type=_numbers, default=[16384], help="tokens of a context")
    parser.add_argument(
        "--answers", nargs="+", choices=ANSWERS, default=[WRITTEN], help="who writes the answers"
    )
    parser.add_argument(
        "--skip-unsolved",
        action="store_true",
        help="run other methods only where full attention reaches 90%%; `full` must be a method",
    )
    parser.add_argument("--samples", type=int, default=2, help="contexts a task and length")
    parser.add_argument("--turns", type=int, default=4, help="questions a context")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text-steps", type=int, default=256, help="decode steps of held-out text")
    parser.add_argument("--spare-tokens", type=int, default=1024, help="room after a context")
    parser.add_argument("--kv-cache-gib", type=float, default=2.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--quick", action="store_true", help="small: a few minutes on two cores")
    parser.add_argument("--list", action="store_true", help="names of methods and tasks")
    args = parser.parse_args()
    if args.quick:
        vars(args).update(QUICK)
    return args


def _names(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [int(item) for item in text.split(",")]


if __name__ == "__main__":
    main()
