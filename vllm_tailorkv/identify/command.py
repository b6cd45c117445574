"""The command `vllm-tailorkv identify`."""

import argparse
import importlib.util
import json
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vllm_tailorkv.arguments import json_object
from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.identify.prompt import build_prompt
from vllm_tailorkv.identify.report import print_scores
from vllm_tailorkv.profile import NEIGHBOUR, Profile, base_name, load_profile, write_profile
from vllm_tailorkv.quiet import quiet

_INTERRUPTED = 130
EXAMPLES = """\
examples:
  vllm-tailorkv identify ./my-model
      write ./my-model/tailorkv.json, which vLLM with this backend finds by itself
  vllm-tailorkv identify ./my-model --plot scores.png
      and draw the scores
  vllm-tailorkv identify mistralai/Mistral-7B-Instruct-v0.3 --prompt-tokens 32768 --dtype bfloat16
      write Mistral-7B-Instruct-v0.3.tailorkv.json here, from a longer prompt
  vllm-tailorkv identify ./my-model --prompt-file book.txt --prompt-tokens 131072 \\
      --max-model-len 140000 --output book.json
  VLLM_CPU_OMP_THREADS_BIND='0-15|16-31' \\
  vllm-tailorkv identify ./my-model --tensor-parallel-size 2

then:
  vllm serve ./my-model --attention-backend tailorkv
  vllm serve MODEL --attention-backend tailorkv \\
      --additional-config '{"tailorkv": {"profile": "Mistral-7B-Instruct-v0.3.tailorkv.json"}}'
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-tailorkv identify",
        description="Find the dense layers of a model: read a long prompt through vLLM with exact "
        "attention, measure how much of its attention every layer spreads beyond a few tokens, "
        "and write a profile. An older profile stays as it is until the new one is whole; an "
        "interrupted run leaves nothing behind, and the same command runs it again. It runs "
        "on CPUs; the profile serves GPUs too.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a directory, or a name on the hub")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help=f"where the profile goes (default: {NEIGHBOUR} beside a local model, else "
        "NAME.tailorkv.json in this directory)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the scores there")

    prompt = parser.add_argument_group("prompt")
    prompt.add_argument(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help="UTF-8 text (default: 50 word problems with worked answers, of our own)",
    )
    prompt.add_argument(
        "--prompt-tokens",
        type=_positive,
        metavar="N",
        help="length of the prompt: the file is cut, or as many problems are made",
    )

    score = parser.add_argument_group("score")
    score.add_argument(
        "--alpha",
        type=_alpha,
        default=0.05,
        metavar="X",
        help="share of the context whose largest weights are summed (default: %(default)s)",
    )
    score.add_argument(
        "--beta",
        type=_beta,
        default=0.2,
        metavar="X",
        help="layers with a score above it are dense (default: %(default)s)",
    )
    score.add_argument(
        "--queries",
        type=_positive,
        default=32,
        metavar="N",
        help="last queries of the prompt that count (default: %(default)s)",
    )

    engine = parser.add_argument_group("vLLM's engine, as you will serve the model")
    engine.add_argument("--tensor-parallel-size", type=_positive, default=1, metavar="N")
    engine.add_argument("--pipeline-parallel-size", type=_positive, default=1, metavar="N")
    engine.add_argument("--dtype", default="auto", help="auto, bfloat16, float16 or float32")
    engine.add_argument("--quantization", metavar="METHOD", help="default: the model's own")
    engine.add_argument(
        "--max-model-len",
        type=_positive,
        metavar="N",
        help="longest context (default: the prompt's length); give the one that you will serve "
        "with if the model's rotary embedding depends on it",
    )
    engine.add_argument(
        "--max-num-batched-tokens", type=_positive, metavar="N", help="tokens read at a time"
    )
    engine.add_argument("--trust-remote-code", action="store_true", help="run the model's own code")
    engine.add_argument(
        "--engine-args",
        type=json_object,
        default={},
        metavar="JSON",
        help="any other arguments of vLLM's LLM class, for instance "
        """'{"load_format": "dummy", "tokenizer": "gpt2"}'""",
    )
    parser.add_argument("--verbose", action="store_true", help="show vLLM's log, and tracebacks")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _alpha(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def _beta(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def output_path(model: str, output: Path | None) -> Path:
    """Where the profile goes; an older profile may stand there, and nothing else.

    Raises:
        TailorKVError: nothing can be written there.
    """
    if output is not None:
        path = output
    elif Path(model).is_dir():
        path = Path(model) / NEIGHBOUR
    else:
        path = Path(f"{base_name(model)}.{NEIGHBOUR}")
    _require_writable("--output", path)
    # It is written beside its place and moved there once it is whole.
    if not os.access(path.resolve().parent, os.W_OK):
        raise TailorKVError(
            f"--output {path}: no file can be made in its directory; give another path"
        )
    if path.exists():
        try:
            load_profile(path)
        except TailorKVError:
            raise TailorKVError(
                f"--output {path} exists and is no profile; remove it or give another path"
            ) from None
    return path


def _require_writable(option: str, path: Path) -> None:
    """Refuse now what would fail after minutes of work."""
    if path.is_dir():
        raise TailorKVError(f"{option} {path} is a directory; give a file")
    if not path.parent.is_dir():
        raise TailorKVError(f"{option} {path}: there is no directory {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise TailorKVError(f"{option} {path} cannot be written; give another path")


def _engine_arguments(options: argparse.Namespace) -> dict[str, Any]:
    arguments = {
        "tensor_parallel_size": options.tensor_parallel_size,
        "pipeline_parallel_size": options.pipeline_parallel_size,
        "dtype": options.dtype,
        "trust_remote_code": options.trust_remote_code,
    }
    for name in ("quantization", "max_num_batched_tokens"):
        if getattr(options, name) is not None:
            arguments[name] = getattr(options, name)
    return {**arguments, **options.engine_args}


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _measure(options: argparse.Namespace, console: Console) -> Profile:
    with console.status("Importing vLLM"):
        from vllm_tailorkv.identify import engine  # noqa: PLC0415  (seconds; not for --help)

    engine.drop_option_overrides()
    settings = engine.EngineOptions(
        options.model, options.max_model_len, _engine_arguments(options)
    )
    with console.status("Preparing the prompt"):
        model_config = engine.load_model_config(settings)
        prompt = build_prompt(
            engine.encoder(model_config),
            file=options.prompt_file,
            num_tokens=options.prompt_tokens,
            # One token is generated.
            longest=model_config.max_model_len - 1,
            queries=options.queries,
        )
    count = len(prompt.token_ids)
    with ExitStack() as stack:
        with console.status(f"Loading {escape(options.model)}"):
            llm = stack.enter_context(engine.open_engine(settings, model_config, count))
        with _progress(console) as progress:
            task = progress.add_task(f"Reading {count:,} tokens", total=1)
            layers = engine.record_scores(
                llm,
                prompt.token_ids,
                alpha=options.alpha,
                queries=options.queries,
                on_progress=lambda share: progress.update(task, completed=share),
            )
        return engine.make_profile(
            llm.llm_engine.vllm_config,
            prompt,
            layers,
            alpha=options.alpha,
            beta=options.beta,
            queries=options.queries,
        )


def _run(options: argparse.Namespace, console: Console) -> None:
    path = output_path(options.model, options.output)
    if options.plot is not None:
        _require_writable("--plot", options.plot)
        if importlib.util.find_spec("matplotlib") is None:
            raise TailorKVError("--plot needs matplotlib; pip install matplotlib, or leave it out")
    profile = _measure(options, console)
    replaced = " (the one before is replaced)" if path.exists() else ""
    write_profile(path, profile)
    print_scores(console, profile)
    console.print(f"Profile: {path}{replaced}", soft_wrap=True, highlight=False, markup=False)
    if options.plot is not None:
        with console.status("Drawing"):
            from vllm_tailorkv.identify.plot import save_plot  # noqa: PLC0415  (matplotlib)

            save_plot(options.plot, profile)
        console.print(f"Picture: {options.plot}", soft_wrap=True, highlight=False, markup=False)
    if path.parent.resolve() == Path(options.model).resolve() and path.name == NEIGHBOUR:
        use = f"vllm serve {options.model} --attention-backend tailorkv"
    else:
        value = json.dumps({"tailorkv": {"profile": str(path)}})
        use = (
            f"vllm serve {options.model} --attention-backend tailorkv "
            f"--additional-config {shlex.quote(value)}"
        )
    console.print(f"Use it: {use}", soft_wrap=True, highlight=False, markup=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: those after `identify`.

    Returns:
        The exit status: 0, 1 after a line on what is wrong, or 130 if it was interrupted.
    """
    options = _parser().parse_args(arguments)
    if not options.verbose:
        quiet()
    try:
        _run(options, Console())
    except TailorKVError as error:
        if options.verbose:
            traceback.print_exception(error)
        print(f"vllm-tailorkv: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vllm-tailorkv: interrupted", file=sys.stderr)
        return _INTERRUPTED
    return 0
