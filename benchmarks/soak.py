"""Soak and chaos of a real server: `vllm serve` under load that misbehaves, checked as it goes.

A server with a tiny random float32 model and a small KV cache answers streams of mixed lengths,
within the token budget and beyond. Clients stop reading, reset connections, send what is too long
or malformed, hold conversations that share prefixes, and ask for more than the cache holds; the
server is sent SIGTERM under load, and its engine is killed. After each phase: every request has
ended within 300 s, /health is OK, no request runs or waits and no KV cache is in use, memory has
not grown by more than 32 MiB since the server was warm, and known answers equal those of the
undisturbed server.

The first round has every phase and is always completed, in about four minutes on two cores
whatever --minutes says; from the second on, phases begin while time is left, and the server is
ended every --restart-every rounds only, so that it lives long enough to leak.

Memory is resident bytes of all the server's processes. oneDNN keeps code for every number of rows
that a linear layer has seen, about 1 MiB for all layers of this model, with vLLM's own backend too.
So steps have 256 tokens at the most, and a server is warm after a step of each size, mixed load and
a full cache, from where it grew by 5 MiB at the most. A leak of 0.1 MiB a request passes the bound
within a round.

A batch's composition and a prompt's chunks change the last bits of what a float32 model computes,
so a known answer may leave its reference only where the two best logprobs are within 0.001, or 0.1
where the index leaves tokens out; until then logprobs agree as closely. A preempted request reads
what it had written again as a prompt, exactly, so beyond the budget as many answers may differ as
there were preemptions.

Each line of results is a phase:
    round, phase, seconds       the references are round 0
    requests, outcomes          finished, left (by the client), refused (4xx), failed, hung
    longest_seconds             that a request took
    preemptions, prefix_hits    in this phase: requests; tokens found in the cache
    kv_usage, running, waiting  at rest, after it
    rss_bytes, warm_rss_bytes   after it; when the server was warm
    answers                     compared, equal (up to a near tie), whole (to the end), tokens
                                (compared), tailored (beyond the budget), drift and tailored_drift
                                (of logprobs, the largest, where the index leaves none out and
                                where it does), wrong_exact and wrong_tailored (prompts' names)
    end_seconds, exit_status    of a server that was struck
    gave_up                     whether it ended only once clients had closed their streams, after
                                30 s: allowed on SIGTERM, where vLLM may kill its engine before it
                                has told the streams
    start_seconds               of the next one
    problems                    what failed, in words
    command, date, revision, versions, processor   of this run
"""

import argparse
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

# Loading a tokenizer in this process must not reach for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import httpx
from random_checkpoint import save_random_checkpoint
from rich.progress import TaskID
from soak.checks import Limits
from soak.phases import PHASES, Load
from soak.prompts import CHUNK, MAX_MODEL_LEN, Prompts
from soak.run import ENDINGS, Soak
from speed.command import Lines, parser, positive, progress, refuse
from transformers.utils.logging import disable_progress_bar

from vllm_tailorkv.arguments import json_object
from vllm_tailorkv.config import load_config
from vllm_tailorkv.demo.server import MODEL_NAME, ServerError, ServerOptions
from vllm_tailorkv.errors import TailorKVError

TAILORKV, VLLM = "tailorkv", "vllm"
CONFIG = {"preset": "fast", "full_attention_below": 0, "profile": {"dense_layers": [0]}}
_BLOCKS_A_STREAM = 10
_FEWEST_STREAMS = 16
_FAILED, _STOPPED = 1, 130
_EXAMPLES = """\
  python benchmarks/soak.py --minutes 4
  python benchmarks/soak.py --minutes 60 --streams 32 --output soak.jsonl
  python benchmarks/soak.py --minutes 10 --config '{"index": "channels", "full_attention_below": 0}'
  python benchmarks/soak.py --minutes 10 --backend vllm
"""


def main() -> None:
    """Run it and end with status 1 if a check failed."""
    args = _arguments()
    signal.signal(signal.SIGTERM, _stop)
    limits = _limits(args)
    # The null block of vLLM is never given to a request.
    load = Load(Prompts(args.seed), args.streams, _BLOCKS_A_STREAM * args.streams, MODEL_NAME)
    try:
        output = Lines(args.output)
    except OSError as error:
        refuse(__file__, f"--output: {error}")
    with tempfile.TemporaryDirectory() as folder, output as lines, progress() as bar:
        task = bar.add_task("", total=len(PHASES) + len(ENDINGS))
        options = _options(args, Path(folder), load.num_blocks + 1)
        with Soak(
            options,
            load,
            limits,
            lambda record: _tell(lines, bar, task, record | {"backend": args.backend}),
            lambda what: bar.update(task, description=what),
        ) as soak:
            try:
                soak.run(args.minutes, args.restart_every)
            except ServerError as error:
                soak.problems.append(f"{error}: {' | '.join(error.log_lines)}")
            except (httpx.HTTPError, LookupError) as error:
                soak.problems.append(f"no more is learnt of the server: {error!r}")
            except KeyboardInterrupt:
                raise SystemExit(_STOPPED) from None
    for problem in soak.problems:
        print(f"soak.py: {problem}", file=sys.stderr)
    if soak.problems:
        raise SystemExit(_FAILED)


def _stop(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _tell(lines: Lines, bar: Any, task: TaskID, record: dict[str, Any]) -> None:
    lines.add(record)
    bar.advance(task)
    state = "; ".join(record["problems"]) or "ok"
    bar.console.print(
        f"{record['round']:3} {record['phase']:14} {record['seconds']:6.1f} s "
        f"{record['requests']:4} requests  {state}",
        highlight=False,
        soft_wrap=True,
    )


def _options(args: argparse.Namespace, folder: Path, num_blocks: int) -> ServerOptions:
    disable_progress_bar()
    model = save_random_checkpoint(folder / "model", "Llama", max_position_embeddings=MAX_MODEL_LEN)
    return ServerOptions(
        model=model,
        log=args.log or folder / "server.log",
        max_model_len=MAX_MODEL_LEN,
        cache_gib=1,
        backend=TAILORKV if args.backend == TAILORKV else None,
        config=args.config if args.backend == TAILORKV else None,
        is_eager=True,
        dtype="float32",
        arguments=(
            *("--num-gpu-blocks-override", str(num_blocks)),
            *("--max-num-batched-tokens", str(CHUNK)),
            # As many at once as a step can have: the cache is what limits them.
            *("--max-num-seqs", str(CHUNK)),
        ),
    )


def _limits(args: argparse.Namespace) -> Limits:
    """How closely answers can be compared."""
    if args.backend == VLLM:
        return Limits(MAX_MODEL_LEN, MAX_MODEL_LEN)
    try:
        config = load_config(args.config)
    except TailorKVError as error:
        refuse(__file__, str(error))
    candidates = config.sink_tokens + config.candidate_tokens + config.recent_tokens
    return Limits(config.exact_below, max(config.exact_below, candidates))


def _arguments() -> argparse.Namespace:
    options = parser(__doc__ or "", _EXAMPLES)
    options.add_argument(
        "--minutes",
        type=float,
        default=4.0,
        metavar="N",
        help="phases begin for so long, after a whole first round (%(default)s)",
    )
    options.add_argument(
        "--streams",
        type=positive,
        default=_FEWEST_STREAMS,
        metavar="N",
        help=f"at once, at least {_FEWEST_STREAMS}; the cache grows with it (%(default)s)",
    )
    options.add_argument(
        "--restart-every",
        type=positive,
        default=3,
        metavar="N",
        help="rounds between ends of the server (%(default)s)",
    )
    options.add_argument(
        "--backend",
        choices=(TAILORKV, VLLM),
        default=TAILORKV,
        help=f"{VLLM}: vLLM's own, to compare (%(default)s)",
    )
    options.add_argument(
        "--config",
        type=json_object,
        default=CONFIG,
        metavar="JSON",
        help=f"options of tailorkv (default: {json.dumps(CONFIG)})",
    )
    options.add_argument("--seed", type=int, default=0, help="of the prompts (%(default)s)")
    options.add_argument(
        "--output",
        default="-",
        metavar="FILE",
        help="where lines of JSON go, one a phase, each as it is done; - is stdout (%(default)s)",
    )
    options.add_argument(
        "--log", type=Path, metavar="FILE", help="of the newest server, to be kept"
    )
    args = options.parse_args()
    if args.streams < _FEWEST_STREAMS:
        options.error(f"--streams must be at least {_FEWEST_STREAMS}, is {args.streams}")
    return args


if __name__ == "__main__":
    main()
