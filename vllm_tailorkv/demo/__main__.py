"""The command `vllm-tailorkv demo`: facts hidden in a long text, with tailorkv and without."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from vllm_tailorkv.arguments import json_object
from vllm_tailorkv.demo import model, report
from vllm_tailorkv.demo.checkpoint import Checkpoint, read_checkpoint
from vllm_tailorkv.demo.client import AnswerT, Measurement, measure, measure_chat
from vllm_tailorkv.demo.phase import Phase
from vllm_tailorkv.demo.questions import build_text
from vllm_tailorkv.demo.server import (
    ServerError,
    ServerOptions,
    TailorKVPlan,
    VllmServer,
    cache_gib_for,
)
from vllm_tailorkv.demo.text import build_haystack, make_needles
from vllm_tailorkv.errors import TailorKVError

ALL_RIGHT, SOME_WRONG, FAILED = 0, 1, 2

_SEED = 0
_START_TIMEOUT_SECONDS = 600.0
# Room after the haystack for a question and for the tokens that are timed.
_SLACK_TOKENS = 256
_DEFAULT_TOKENS = 16384
_ANSWER_TOKENS, _CHAT_ANSWER_TOKENS = 12, 48
# Longest reply to a question that has no right answer.
_FREE_TOKENS = 96
# Of a chat model's context, if that is less than _DEFAULT_TOKENS would need.
_DEFAULT_SHARE = 0.75

_EXAMPLES = """\
examples:
  vllm-tailorkv demo
  vllm-tailorkv demo --tokens 65536 --needles 12
  vllm-tailorkv demo --config '{"preset": "fast", "bits": 1}'
  vllm-tailorkv demo --config '{"topk_tokens": 16}' --json result.json
  vllm-tailorkv demo --model ./my-chat-model

exit status: 0 if every answer with tailorkv is right, 1 if one is wrong, 2 if the demo cannot run;
with --model: 1 if tailorkv misses what vLLM's own backend answers right, 2 also if that answers
nothing right, since there is nothing to compare then
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; returns its exit status."""
    options = _parse(arguments)
    console = Console()
    _stop_servers_on_signals()
    try:
        return _run(options, console)
    except ServerError as error:
        print(f"demo: {error}; its log is {error.log}", file=sys.stderr)
        for line in error.log_lines:
            print(f"  {line}", file=sys.stderr)
    except (TailorKVError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("demo: interrupted, servers stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    return FAILED


def _stop_servers_on_signals() -> None:
    """As an exception a signal unwinds the stack, and the servers are stopped on the way."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        # What `nohup` has begun goes on when the terminal is closed.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: sys.exit(128 + number))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="vllm-tailorkv demo",
        description="Hide facts in a long text of this machine's own files, ask vLLM for each, "
        "once with the backend tailorkv and once with its own, and compare.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="folder of a chat model, which is asked more; default: the demo's own tiny model",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help=f"length of the text ({_DEFAULT_TOKENS}, or {_DEFAULT_SHARE:.0%} of a shorter "
        "context of --model)".replace("%", "%%"),
    )
    parser.add_argument(
        "--needles", type=int, default=8, metavar="N", help="facts hidden in it (%(default)s)"
    )
    parser.add_argument(
        "--config", type=json_object, metavar="JSON", help="options of tailorkv, as one JSON object"
    )
    parser.add_argument("--port", type=int, default=0, help="port of the server (0: any free one)")
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
        metavar="N",
        help=f"longest answer ({_ANSWER_TOKENS}, with --model {_CHAT_ANSWER_TOKENS}); a hidden "
        "number takes 8",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument(
        "--keep-logs", action="store_true", help="keep the servers' logs after a success too"
    )
    options = parser.parse_args(arguments)
    options.checkpoint = None
    context, tokens, options.slack = model.MAX_POSITIONS, _DEFAULT_TOKENS, _SLACK_TOKENS
    if options.max_tokens is None:
        options.max_tokens = _ANSWER_TOKENS if options.model is None else _CHAT_ANSWER_TOKENS
    if options.model is not None:
        try:
            options.checkpoint = read_checkpoint(options.model)
        except TailorKVError as error:
            parser.error(f"--model: {error}")
        context = options.checkpoint.context
        options.slack += _FREE_TOKENS
        tokens = min(tokens, int(context * _DEFAULT_SHARE))
    if options.tokens is None:
        options.tokens = tokens
    longest = context - options.slack
    if not 0 < options.tokens <= longest:
        parser.error(f"--tokens must be from 1 to {longest}, is {options.tokens}")
    if options.needles < 1:
        parser.error(f"--needles must be at least 1, is {options.needles}")
    if not 1 <= options.max_tokens <= _SLACK_TOKENS // 2:
        parser.error(
            f"--max-tokens must be from 1 to {_SLACK_TOKENS // 2}, is {options.max_tokens}"
        )
    return options


@dataclass(frozen=True)
class _Served:
    """What the servers need to know: the checkpoint, the longest sequence, memory."""

    directory: Path
    max_model_len: int
    kv_bytes_per_token: int
    weight_bytes: int = 0


def _run(options: argparse.Namespace, console: Console) -> int:
    if options.checkpoint is not None:
        return _run_chat(options, console, options.checkpoint)
    with Phase(console, "Building the model and the text") as phase:
        directory = model.load_or_build_demo_model(options.cache_dir, _SEED)
        phase.news(str(directory))
        haystack = build_haystack(
            model.load_tokenizer(directory),
            options.tokens,
            make_needles(options.needles, _SEED),
            _SEED,
        )
    served = _Served(directory, haystack.num_tokens + options.slack, model.KV_BYTES_PER_TOKEN)

    tailorkv, reference, plan = _serve_both(
        options,
        console,
        served,
        lambda server, phase: measure(server, haystack, options.max_tokens, phase.news),
        lambda ours, theirs, plan: report.print_report(console, haystack, plan, ours, theirs),
    )
    _write_json(options.json, report.as_json(haystack, plan, tailorkv, reference))
    return ALL_RIGHT if all(answer.is_right for answer in tailorkv.answers) else SOME_WRONG


def _run_chat(options: argparse.Namespace, console: Console, checkpoint: Checkpoint) -> int:
    with Phase(console, "Building the text"):
        text = build_text(
            checkpoint.load_tokenizer(),
            options.tokens,
            options.needles,
            _SEED,
        )
    served = _Served(
        checkpoint.directory,
        text.num_tokens + options.slack,
        checkpoint.kv_bytes_per_token,
        checkpoint.weight_bytes,
    )

    tailorkv, reference, plan = _serve_both(
        options,
        console,
        served,
        lambda server, phase: measure_chat(
            server,
            text,
            options.max_tokens,
            _FREE_TOKENS,
            phase.news,
            phase.answer if console.is_terminal else None,
        ),
        lambda ours, theirs, plan: report.print_chat_report(console, text, plan, ours, theirs),
    )
    _write_json(options.json, report.chat_as_json(text, plan, tailorkv, reference))
    if not any(reply.is_right for reply in reference.answers):
        raise TailorKVError(
            "this model answers nothing right with vLLM's own backend, so nothing can be said of "
            "tailorkv; lower --tokens or name another model"
        )
    return SOME_WRONG if report.lost(tailorkv, reference) else ALL_RIGHT


def _write_json(file: Path | None, results: dict[str, object]) -> None:
    if file is not None:
        file.write_text(json.dumps(results, indent=2) + "\n")


def _serve_both(
    options: argparse.Namespace,
    console: Console,
    served: _Served,
    ask: Callable[[VllmServer, Phase], Measurement[AnswerT]],
    show: Callable[[Measurement[AnswerT], Measurement[AnswerT], TailorKVPlan | None], None],
) -> tuple[Measurement[AnswerT], Measurement[AnswerT], TailorKVPlan | None]:
    """Ask with tailorkv and with vLLM's own backend, and show both; logs go after a success."""
    tailorkv, plan, our_log = _serve_and_measure(options, console, served, "tailorkv", ask)
    reference, _, their_log = _serve_and_measure(options, console, served, None, ask)
    show(tailorkv, reference, plan)
    if options.keep_logs:
        console.print(f"Logs: {our_log}, {their_log}", soft_wrap=True)
    else:
        our_log.unlink()
        their_log.unlink()
    return tailorkv, reference, plan


def _serve_and_measure(
    options: argparse.Namespace,
    console: Console,
    served: _Served,
    backend: str | None,
    ask: Callable[[VllmServer, Phase], Measurement[AnswerT]],
) -> tuple[Measurement[AnswerT], TailorKVPlan | None, Path]:
    """One server from start to stop: what was measured, its plan and its log."""
    name = backend or "vLLM's own backend"
    server = VllmServer(
        ServerOptions(
            model=served.directory,
            log=options.cache_dir / "logs" / f"{backend or 'vllm'}-{os.getpid()}.log",
            max_model_len=served.max_model_len,
            cache_gib=cache_gib_for(
                served.max_model_len, served.kv_bytes_per_token, served.weight_bytes
            ),
            backend=backend,
            config=options.config if backend else None,
            is_eager=not torch.cuda.is_available(),
            port=options.port,
        )
    )
    with server:
        with Phase(console, f"Starting vLLM with {name}") as phase:
            server.wait_until_healthy(phase.news, _START_TIMEOUT_SECONDS)
        with Phase(console, f"Reading the text and answering with {name}") as phase:
            measurement = ask(server, phase)
        plan = server.plan()
        with Phase(console, f"Stopping vLLM with {name}"):
            server.stop()
    return measurement, plan, server.log


if __name__ == "__main__":
    sys.exit(main())
