"""The command `vllm-tailorkv plan`."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console

from vllm_tailorkv.arguments import json_object
from vllm_tailorkv.capacity.cards import CARDS, Card, find_card
from vllm_tailorkv.config import load_config
from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.layout import GIB
from vllm_tailorkv.plan import Plan, make_plan
from vllm_tailorkv.quiet import quiet

if TYPE_CHECKING:
    from vllm_tailorkv.capacity.arithmetic import Fit, Worker
    from vllm_tailorkv.capacity.model import Model, Weights

_INTERRUPTED = 130
OVERHEAD_GIB = {"cuda": 1.5, "cpu": 1.0}
"""Allowed for what vLLM measures at its start, where the user knows no better, by device: CUDA's
context, activations of a step and graphs; on CPUs libraries and activations."""
BLOCK_SIZE = 128
"""Tokens of a block of ours, and of vLLM's on CPUs."""
VLLM_BLOCK_SIZE = {"cuda": 16, "cpu": BLOCK_SIZE}
UTILIZATION = 0.92
"""vLLM's default."""

EXAMPLES = """\
examples:
  vllm-tailorkv plan ./my-model --device-gib 24 --host-gib 64
      what fits on a GPU with 24 GiB in a machine with 64 GiB to spare
  vllm-tailorkv plan meta-llama/Llama-3.1-8B-Instruct --device-gib 80 --host-gib 512 \\
      --context 131072 --card h100
      only this card's times
  vllm-tailorkv plan ./my-model --tp 2 --device-gib 24 --host-gib 256 --config '{"bits": 1}'
      two GPUs, other options of tailorkv
  vllm-tailorkv plan ./my-model --cpu --host-gib 64
      a server without a GPU
  vllm-tailorkv plan ./my-model --device-gib 24 --host-gib 64 --json
      one JSON object

No GPU and no weights are needed, only the model's config.json.
"""


class _Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise TailorKVError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="vllm-tailorkv plan",
        description="What fits: the longest context and the requests that a machine's memory "
        "holds, with vLLM's own cache in 16 and 8 bits and with tailorkv, and what a decode step "
        "reads.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a directory, or a name on the hub")
    parser.add_argument("--json", action="store_true", help="print one JSON object")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", choices=("cuda", "cpu"), help="what computes (default: cuda)")
    machine.add_argument(
        "--cpu", action="store_const", const="cpu", dest="device", help="the same as --device cpu"
    )
    machine.add_argument("--device-gib", type=_amount, metavar="GIB", help="memory of each GPU")
    machine.add_argument(
        "--host-gib",
        type=_amount,
        metavar="GIB",
        required=True,
        help="the machine's memory that may be used, all workers together",
    )
    machine.add_argument(
        "--card",
        metavar="NAME",
        help=f"tell only this card's times: {', '.join(card.name for card in CARDS)}",
    )

    engine = parser.add_argument_group("vLLM's engine")
    engine.add_argument(
        "--context", type=_count, metavar="TOKENS", help="of a request (default: the longest)"
    )
    engine.add_argument(
        "--tp",
        "--tensor-parallel-size",
        type=_count,
        default=1,
        metavar="N",
        help="workers that share the model, each with a GPU of its own (default: %(default)s)",
    )
    engine.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        default="auto",
        help="of weights, K and V (default: the checkpoint's)",
    )
    engine.add_argument(
        "--utilization",
        type=_share,
        default=UTILIZATION,
        metavar="X",
        help="share of the memory that vLLM may use, its --gpu-memory-utilization "
        "(default: %(default)s)",
    )
    engine.add_argument(
        "--block-size",
        type=_count,
        metavar="TOKENS",
        help=f"of every kind of cache (default: {BLOCK_SIZE} with tailorkv, vLLM's own "
        f"{VLLM_BLOCK_SIZE['cuda']} on a GPU and {VLLM_BLOCK_SIZE['cpu']} on a CPU)",
    )
    engine.add_argument(
        "--weights-gib", type=_amount, metavar="GIB", help="weights of the whole model, if known"
    )
    engine.add_argument(
        "--overhead-gib",
        type=_amount,
        metavar="GIB",
        help="allowed to each worker for activations, graphs and libraries (default: "
        f"{OVERHEAD_GIB['cuda']:g} on a GPU, {OVERHEAD_GIB['cpu']:g} on a CPU)",
    )
    engine.add_argument(
        "--config",
        type=json_object,
        default={},
        metavar="JSON",
        help="""options of tailorkv, for instance '{"preset": "fast", "host_pool_gib": 30}'""",
    )
    return parser


def _count(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more")
    return int(text)


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def _share(text: str) -> float:
    value = _amount(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} is above 1")
    return value


def _check_alone(options: argparse.Namespace) -> None:
    """Check what can be said without the model.

    Raises:
        TailorKVError: naming the option at fault.
    """
    if options.device == "cpu":
        for option in ("device_gib", "card"):
            if getattr(options, option) is not None:
                raise TailorKVError(f"--{option.replace('_', '-')} is of GPUs; drop it, or --cpu")
    elif options.device_gib is None:
        raise TailorKVError("--device-gib is needed: the memory of each GPU (or give --cpu)")
    if options.card is not None:
        find_card(options.card)
    load_config(options.config)


def _check_with_model(options: argparse.Namespace, model: "Model", plan: Plan) -> None:
    """Check what the model bounds.

    Raises:
        TailorKVError: naming the option at fault.
    """
    shape, workers = model.shape, options.tp
    if options.context is not None and options.context > model.longest:
        raise TailorKVError(
            f"--context {options.context} is longer than the model's {model.longest}; lower it"
        )
    for what, heads in (("query", shape.num_heads), ("KV", shape.num_kv_heads)):
        # KV heads are copied to workers that are more than they.
        divides = heads is not None and heads % workers == 0
        if not divides and not (what == "KV" and workers % shape.num_kv_heads == 0):
            raise TailorKVError(f"--tp {workers} does not divide the model's {heads} {what} heads")
    if options.block_size is not None and options.block_size % plan.config.group_size:
        raise TailorKVError(
            f"--block-size {options.block_size} is no multiple of group_size "
            f"{plan.config.group_size}"
        )
    pool = (plan.host_pool or 0) * workers
    if pool > options.host_gib * GIB:
        raise TailorKVError(
            f"--config host_pool_gib={plan.config.host_pool_gib:g}: {workers} of them are more "
            f"than --host-gib {options.host_gib:g}; lower it"
        )


def _worker(options: argparse.Namespace, model: "Model", weights: "Weights") -> "Worker":
    from vllm_tailorkv.capacity.arithmetic import Worker  # noqa: PLC0415

    shape, workers, on_cpu = model.shape, options.tp, options.device == "cpu"
    overhead = options.overhead_gib or OVERHEAD_GIB[options.device]
    assert shape.num_heads is not None
    return Worker(
        num_layers=shape.num_layers,
        num_heads=shape.num_heads // workers,
        num_kv_heads=max(1, shape.num_kv_heads // workers),
        head_size=shape.head_size,
        itemsize=model.itemsize,
        longest=model.longest,
        context=options.context or model.longest,
        weights=weights.held,
        step_weights=weights.read,
        memory=int((options.host_gib / workers if on_cpu else options.device_gib) * GIB),
        utilization=options.utilization,
        overhead=int(overhead * GIB),
    )


def _fits(options: argparse.Namespace, dtype: str, worker: "Worker", plan: Plan) -> "list[Fit]":
    from vllm_tailorkv.capacity.arithmetic import fit_tailorkv, fit_vllm  # noqa: PLC0415

    block_size = options.block_size or VLLM_BLOCK_SIZE[options.device]
    own = fit_vllm(f"vLLM, {dtype}", worker, itemsize=worker.itemsize, block_size=block_size)
    fp8 = fit_vllm("vLLM, fp8", worker, itemsize=1, block_size=block_size)
    ours = fit_tailorkv("tailorkv", worker, plan, block_size=options.block_size or BLOCK_SIZE)
    return [own, fp8, ours]


def _cards(options: argparse.Namespace) -> tuple[Card, ...]:
    """Whose times are told: all, or the one asked for; none on a CPU."""
    if options.card is not None:
        return (find_card(options.card),)
    return CARDS if options.device == "cuda" else ()


def _run(options: argparse.Namespace, console: Console) -> None:
    options.device = options.device or "cuda"
    _check_alone(options)
    with Console(stderr=True).status("Reading the model's config"):
        from vllm_tailorkv.capacity.model import count_weights, read_model  # noqa: PLC0415
        from vllm_tailorkv.capacity.report import as_json, print_report  # noqa: PLC0415

        model = read_model(options.model, options.dtype)
        host_memory = int(options.host_gib * GIB) // options.tp
        plan = make_plan(
            options.config, model.shape, device=options.device, host_memory=host_memory
        )
        _check_with_model(options, model, plan)
        given = None if options.weights_gib is None else int(options.weights_gib * GIB)
        weights = count_weights(model, options.tp, given)
        worker = _worker(options, model, weights)
        fits = _fits(options, model.dtype, worker, plan)
    cards = _cards(options)
    if options.json:
        print(json.dumps(as_json(model, plan, weights, fits, cards, options.tp), indent=2))
    else:
        print_report(console, model, plan, weights, fits, cards, options.tp)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: those after `plan`.

    Returns:
        The exit status: 0, 1 after a line on what is wrong, or 130 if it was interrupted.
    """
    quiet()
    try:
        _run(_parser().parse_args(arguments), Console())
    except TailorKVError as error:
        print(f"vllm-tailorkv: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vllm-tailorkv: interrupted", file=sys.stderr)
        return _INTERRUPTED
    return 0
