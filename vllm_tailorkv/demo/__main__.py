"""`python -m vllm_tailorkv.demo`: facts hidden in a long text, found with 192 tokens a step."""

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from vllm_tailorkv.demo import model, report
from vllm_tailorkv.demo.client import Measurement, OnWait, measure
from vllm_tailorkv.demo.server import (
    ServerError,
    ServerOptions,
    TailorKVPlan,
    VllmServer,
    cache_gib_for,
)
from vllm_tailorkv.demo.text import Haystack, build_haystack, make_needles

ALL_RIGHT, SOME_WRONG, FAILED = 0, 1, 2

_SEED = 0
_START_TIMEOUT_SECONDS = 600.0
# Room after the haystack for a question and for the tokens that are timed.
_SLACK_TOKENS = 256
_PLAIN_UPDATE_SECONDS = 15.0
_NEWS_CHARS = 100

_EXAMPLES = """\
examples:
  python -m vllm_tailorkv.demo
  python -m vllm_tailorkv.demo --tokens 65536 --needles 12
  python -m vllm_tailorkv.demo --config '{"index": "onebit", "bits": 1}'
  python -m vllm_tailorkv.demo --config '{"topk_tokens": 16}' --json result.json

exit status: 0 if every answer with tailorkv is right, 1 if one is wrong, 2 if the demo cannot run
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; returns its exit status."""
    options = _parse(arguments)
    console = Console()
    # As an exception a SIGTERM unwinds the stack, and the servers are stopped on the way.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return _run(options, console)
    except ServerError as error:
        print(f"demo: {error}; its log is {error.log}", file=sys.stderr)
        for line in error.log_lines:
            print(f"  {line}", file=sys.stderr)
    except (MemoryError, OSError, ValueError) as error:
        print(f"demo: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("demo: interrupted, servers stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    return FAILED


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_tailorkv.demo",
        description="Hide facts in a long text of this machine's own files, ask vLLM for each, "
        "once with the backend tailorkv and once with its own, and compare.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    parser.add_argument(
        "--tokens", type=int, default=16384, metavar="N", help="length of the text (%(default)s)"
    )
    parser.add_argument(
        "--needles", type=int, default=8, metavar="N", help="facts hidden in it (%(default)s)"
    )
    parser.add_argument(
        "--config", type=_json_object, metavar="JSON", help="options of tailorkv, a JSON object"
    )
    parser.add_argument(
        "--port", type=int, default=0, help="port of the server; 0, the default: any free one"
    )
    parser.add_argument(
        "--cache-dir",
        type=Path,
        default=Path(cache, "vllm_tailorkv"),
        metavar="DIR",
        help="where the model and the servers' logs go (%(default)s)",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=12,
        metavar="N",
        help="longest answer, in tokens; a number takes 8 (%(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument(
        "--keep-logs", action="store_true", help="keep the servers' logs after a success too"
    )
    options = parser.parse_args(arguments)
    longest = model.MAX_POSITIONS - _SLACK_TOKENS
    if not 0 < options.tokens <= longest:
        parser.error(f"--tokens must be from 1 to {longest}, is {options.tokens}")
    if options.needles < 1:
        parser.error(f"--needles must be at least 1, is {options.needles}")
    if not 1 <= options.max_tokens <= _SLACK_TOKENS // 2:
        parser.error(
            f"--max-tokens must be from 1 to {_SLACK_TOKENS // 2}, is {options.max_tokens}"
        )
    return options


def _json_object(text: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return value


def _run(options: argparse.Namespace, console: Console) -> int:
    with _phase(console, "Building the model and the text") as on_wait:
        directory = model.load_or_build_demo_model(options.cache_dir, _SEED)
        on_wait(str(directory))
        haystack = build_haystack(
            model.load_tokenizer(directory),
            options.tokens,
            make_needles(options.needles, _SEED),
            _SEED,
        )

    tailorkv, plan, our_log = _serve_and_measure(options, console, directory, haystack, "tailorkv")
    reference, _, their_log = _serve_and_measure(options, console, directory, haystack, None)

    report.print_report(console, haystack, plan, tailorkv, reference)
    if options.json is not None:
        results = report.as_json(haystack, plan, tailorkv, reference)
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    if options.keep_logs:
        console.print(f"Logs: {our_log}, {their_log}", soft_wrap=True)
    else:
        our_log.unlink()
        their_log.unlink()
    return ALL_RIGHT if all(answer.is_right for answer in tailorkv.answers) else SOME_WRONG


def _serve_and_measure(
    options: argparse.Namespace,
    console: Console,
    directory: Path,
    haystack: Haystack,
    backend: str | None,
) -> tuple[Measurement, TailorKVPlan | None, Path]:
    """One server from start to stop: what was measured, its plan and its log."""
    name = backend or "vLLM's own backend"
    max_model_len = haystack.num_tokens + _SLACK_TOKENS
    server = VllmServer(
        ServerOptions(
            model=directory,
            log=options.cache_dir / "logs" / f"{backend or 'vllm'}-{os.getpid()}.log",
            max_model_len=max_model_len,
            cache_gib=cache_gib_for(max_model_len, model.KV_BYTES_PER_TOKEN),
            backend=backend,
            config=options.config if backend else None,
            is_eager=not torch.cuda.is_available(),
            port=options.port,
        )
    )
    with server:
        with _phase(console, f"Starting vLLM with {name}") as on_wait:
            server.wait_until_healthy(on_wait, _START_TIMEOUT_SECONDS)
        with _phase(console, f"Reading the text and answering with {name}") as on_wait:
            measurement = measure(server, haystack, options.max_tokens, on_wait)
        plan = server.plan()
        with _phase(console, f"Stopping vLLM with {name}"):
            server.stop()
    return measurement, plan, server.log


@contextlib.contextmanager
def _phase(console: Console, title: str) -> Iterator[OnWait]:
    """Show `title`, the seconds that go by and the newest news, until the block ends."""
    start = time.monotonic()
    printed = start

    def line(news: str) -> str:
        return f"{title}, {time.monotonic() - start:.0f} s: {escape(news[:_NEWS_CHARS])}"

    with console.status(title) as status:

        def on_wait(news: str) -> None:
            nonlocal printed
            status.update(line(news))
            # Where nothing can be redrawn, in a log for instance, a line now and then.
            if not console.is_terminal and time.monotonic() - printed > _PLAIN_UPDATE_SECONDS:
                printed = time.monotonic()
                console.print(line(news), highlight=False, soft_wrap=True)

        yield on_wait
    console.print(f"{title}: {time.monotonic() - start:.1f} s", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
