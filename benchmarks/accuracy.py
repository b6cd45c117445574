"""How much quality a way of reading the KV cache costs: tasks, text and attention, side by side.

    python benchmarks/accuracy.py --quick
    python benchmarks/accuracy.py --lengths 16384 --methods full tailorkv paper oracle quest
    python benchmarks/accuracy.py --model PATH --tasks multikey_2,copy --lengths 4096,16384 \\
        --methods full 'tailorkv:index=onebit,budget=1024' --json out.json --plot out.png
    python benchmarks/accuracy.py --model smollm2-135m --tasks ruler --lengths 4096 \\
        --text prose,code --text-steps 2000 --json out.json --hours 2

A question, like everything after the context, is read by decode steps, so the method at hand
serves it. Models with a chat template are asked in it, by RULER's definitions; others go on with
the text. `--answers written` lets the model write the answers; `given` forces the right ones and
counts the tokens that it would have written, for models too small to finish a list. Every context
is read once an engine (prefix caching); methods that differ in nothing that lies in the cache
share one. With `--json`, results are written as they come, each method's of a task and length or of
a kind of text, and a run can be stopped (Ctrl-C, kill, reboot): the same command goes on with what
the file lacks. A file of other settings is refused: name another one, or remove it. Method names
and options: `--list`.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_tailorkv.quiet import quiet

# Before vLLM and OpenMP are loaded. Spinning threads would keep others from the cores.
quiet()
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from accuracy.deadline import Deadline, OutOfTime
from accuracy.evaluate import ANSWERS, WRITTEN, make_cell
from accuracy.methods import FULL, METHODS, Method, parse_method
from accuracy.prompts import form_of
from accuracy.report import Report, write_json
from accuracy.runner import Run, Text
from accuracy.tasks import RULER, TASKS
from accuracy.text_quality import KINDS, PROSE, held_out, references
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer
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
_ALL, _RULER, _NONE = "all", "ruler", "none"
_COUNTS_FROM_CHAT, _COUNTS_FROM = 0.7, 0.9
_SPARE_CHAT, _SPARE = 512, 1024
_INTERRUPTED = "interrupted"
# 700 words by decode steps, for every method: left out where it is to be quick.
_SLOW = ("late_recall",)
# What does not change a result, so that a run with another value may go on from its file.
_LEFT_OUT = {"json", "plot", "list", "model", "hours"}


def main() -> None:
    """Runs what was asked for and writes it down."""
    args = _arguments()
    console = Console(width=None if sys.stdout.isatty() else 200)
    if args.list:
        console.print(f"methods: {', '.join(METHODS)}\ntasks:   {', '.join(TASKS)}")
        console.print(f"         {_RULER}: {', '.join(RULER)}")
        return
    with _reference_folder(args.json) as folder:
        try:
            run = _prepared(args, console, folder)
        except (ValueError, OSError) as error:
            raise SystemExit(f"accuracy.py: {error}") from None
        stopped = _shown(run, console, args.hours)
        _tell(run.report, console, args)
        if stopped:
            again = "the same command goes on" if args.json else "with --json it could go on"
            console.print(f"{stopped}; {again}")
        if stopped == _INTERRUPTED:
            raise SystemExit(130)
        if run.report.finished:
            shutil.rmtree(folder, ignore_errors=True)


def _prepared(args: argparse.Namespace, console: Console, folder: Path) -> Run:
    """What is to be run, with what a file has of it already.

    Raises:
        ValueError, OSError: arguments that do not go together, a bad model or file.
    """
    model = _model_folder(args.model)
    config = AutoConfig.from_pretrained(model).get_text_config()
    tokenizer = AutoTokenizer.from_pretrained(model)
    form = form_of(tokenizer, model)
    if args.counts_from is None:
        args.counts_from = _COUNTS_FROM_CHAT if form.chat else _COUNTS_FROM
    if args.spare_tokens is None:
        args.spare_tokens = _SPARE_CHAT if form.chat else _SPARE
    if args.json and not args.json.parent.is_dir():
        raise ValueError(f"--json {args.json}: there is no directory {args.json.parent}")
    methods = [parse_method(text, config.num_hidden_layers) for text in args.methods]
    _check(args, config.max_position_embeddings)
    arguments = {k: str(v) for k, v in vars(args).items() if k not in _LEFT_OUT}
    report = Report(arguments | {"model": model.name}, methods, args.counts_from)
    if args.json and args.json.exists():
        _resume(report, args.json)
        console.print(f"goes on from {args.json}")
    else:
        # What lies there is of a run whose results are gone, perhaps with other settings.
        shutil.rmtree(folder, ignore_errors=True)
    encoder = tokenizer.backend_tokenizer
    cells = [
        make_cell(encoder, task, length, args.samples, args.turns, args.seed, answers, form)
        for length in args.lengths
        for task in args.tasks
        for answers in args.answers
    ]
    _tell_exact(methods, args.lengths, console)
    asked = "as a chat" if form.chat else "as a text to be gone on with"
    console.print(f"model {model}: {config.num_hidden_layers} layers, asked {asked}")

    return Run(
        report,
        cells,
        _held_out(args, encoder, folder),
        model,
        longest=max(args.lengths) + args.spare_tokens,
        kv_cache_gib=args.kv_cache_gib,
        skip_unsolved=args.skip_unsolved,
        deadline=Deadline(args.hours, report.pieces),
        saved=lambda: write_json(report, args.json) if args.json else None,
    )


def _held_out(args: argparse.Namespace, encoder: Tokenizer, folder: Path) -> list[Text]:
    """The texts of each kind."""
    texts = []
    for kind in args.text:
        seeds = range(args.seed, args.seed + (args.text_samples or args.samples))
        ids = [held_out(encoder, max(args.lengths), seed, kind) for seed in seeds]
        texts.append(Text(kind, ids, references(folder, kind, ids, args.text_steps)))
    return texts


def _tell(report: Report, console: Console, args: argparse.Namespace) -> None:
    """Tables and a picture."""
    report.print(console)
    if args.json and args.json.exists():
        console.print(f"written: {args.json}")
    if args.plot:
        report.plot(args.plot)
        console.print(f"drawn: {args.plot}")


def _tell_exact(methods: list[Method], lengths: list[int], console: Console) -> None:
    """A warning where methods have nothing to select."""
    for length in sorted(lengths):
        exact = [m.name for m in methods if m.config and m.config.exact_below >= length]
        if exact:
            console.print(
                f"at {length:,} tokens {', '.join(exact)} attend in full, so nothing is compared; "
                "full_attention_below=0 changes that"
            )


def _shown(run: Run, console: Console, hours: float | None) -> str:
    """Runs it under a progress bar; why it stopped before its end, or nothing."""
    with Progress(console=console) as progress:
        bar = progress.add_task("", total=run.pieces)

        def show(what: str | None) -> None:
            if what is None:
                progress.advance(bar)
            else:
                progress.update(bar, description=what)

        try:
            run.run(show)
        except OutOfTime:
            return f"stopped: the next piece would end after {hours:g} hours"
        except KeyboardInterrupt:
            return _INTERRUPTED
    return ""


def _check(args: argparse.Namespace, max_positions: int) -> None:
    """Raises ValueError where arguments do not go together."""
    unknown = sorted(set(args.tasks) - set(TASKS))
    if unknown:
        raise ValueError(f"unknown tasks {', '.join(unknown)}; there are {', '.join(TASKS)}")
    unknown = sorted(set(args.text) - set(KINDS))
    if unknown:
        raise ValueError(f"unknown text {', '.join(unknown)}; there are {', '.join(KINDS)}")
    if args.skip_unsolved and FULL not in args.methods:
        raise ValueError("--skip-unsolved needs the method full")
    most = max(args.lengths)
    if most + args.spare_tokens > max_positions:
        raise ValueError(
            f"{most} tokens and {args.spare_tokens} to spare are more than the model's "
            f"{max_positions}; take --lengths up to {max_positions - args.spare_tokens}"
        )
    if args.text and args.text_steps + 2 > most:
        raise ValueError(f"--text-steps {args.text_steps} needs --lengths of more than that")


def _resume(report: Report, path: Path) -> None:
    """Raises ValueError if the file is of another run."""
    try:
        written: dict[str, Any] = json.loads(path.read_text())
        report.resume(written)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error if isinstance(error, ValueError) else "it is of another form"
        raise ValueError(
            f"cannot go on from {path}: {reason}; name another file with --json, or remove it"
        ) from None


@contextmanager
def _reference_folder(path: Path | None) -> Iterator[Path]:
    """Where full attention's log-probabilities are kept: beside the JSON, or for this run only."""
    if path is not None:
        yield path.with_name(path.name + ".reference")
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _model_folder(name: str) -> Path:
    """The folder of a name that `benchmarks/models.py` knows; what is none is left as it is."""
    if Path(name).is_dir():
        return Path(name)
    from models import NAMES, resolve  # noqa: PLC0415

    folder: Path = resolve(name) if name in NAMES else Path(name)
    return folder


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default=str(RETRIEVER),
        help="folder of a checkpoint, or a name that benchmarks/models.py knows; default: the "
        "retriever",
    )
    parser.add_argument("--methods", nargs="+", default=_STANDARD, metavar="METHOD")
    parser.add_argument(
        "--tasks",
        type=_tasks,
        help=f"default: {_ALL}; {_RULER}: its eleven; {_NONE}",
    )
    parser.add_argument("--lengths", type=_numbers, default=[16384], help="tokens of a context")
    parser.add_argument(
        "--answers", nargs="+", choices=ANSWERS, default=[WRITTEN], help="who writes the answers"
    )
    parser.add_argument(
        "--counts-from",
        type=float,
        help="a task counts where full attention reaches this; default: "
        f"{_COUNTS_FROM_CHAT} for chat models, {_COUNTS_FROM} for others",
    )
    parser.add_argument(
        "--skip-unsolved",
        action="store_true",
        help="run other methods only on tasks that count; `full` must be a method",
    )
    parser.add_argument("--samples", type=int, default=2, help="contexts a task and length")
    parser.add_argument("--turns", type=int, default=4, help="questions a context, at the most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--text", type=_texts, default=[PROSE], help=f"held-out text: {','.join(KINDS)}, or {_NONE}"
    )
    parser.add_argument("--text-steps", type=int, default=256, help="decode steps of held-out text")
    parser.add_argument("--text-samples", type=int, help="texts of a kind; default: --samples")
    parser.add_argument(
        "--spare-tokens",
        type=int,
        help=f"room after a context; default: {_SPARE_CHAT} for chat models, {_SPARE} for others",
    )
    parser.add_argument("--kv-cache-gib", type=float, default=2.0)
    parser.add_argument("--hours", type=float, help="stop in time; what is there is kept")
    parser.add_argument("--json", type=Path, help="results, as they come; goes on from what it has")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--quick", action="store_true", help="small: a few minutes on two cores")
    parser.add_argument("--list", action="store_true", help="names of methods and tasks")
    args = parser.parse_args()
    if args.quick:
        vars(args).update(QUICK)
    if args.tasks is None:
        args.tasks = [task for task in TASKS if not (args.quick and task in _SLOW)]
    return args


def _tasks(text: str) -> list[str]:
    groups = {_ALL: list(TASKS), _RULER: list(RULER), _NONE: []}
    return [task for name in text.split(",") for task in groups.get(name, [name])]


def _texts(text: str) -> list[str]:
    return [] if text == _NONE else text.split(",")


def _numbers(text: str) -> list[int]:
    return [int(item) for item in text.split(",")]


if __name__ == "__main__":
    main()
