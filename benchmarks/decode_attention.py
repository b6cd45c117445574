"""Speed of one decode step of one layer's attention on the CPU, ours against vLLM's.

In one process, round after round, our ops read our pages and vLLM's attention op reads the same
tokens in a cache of its own, in the model's dtype and in fp8. Steps rotate among sets of pages
that are larger together than the last-level cache, as the layers of a model are. Ours lie in huge
pages where the system has them, as in service; vLLM's lie where vLLM puts them. K and V are
random, with a few heavy tokens planted in every row and KV head. Each case gives a line of JSON:

    shape, layer, index, bits, context, batch, threads   what ran
    selected            tokens that a sparse layer retrieves
    rerank              candidates ranked again for every token kept; 1 is no second ranking
    query_reduce        how the query heads of a KV head agree
    implementation, isa         of our ops; VLLM_TAILORKV_KERNELS and _CPU_ISA choose them
    ms, min_ms                  ours: median and least
    baseline_ms, _min_ms, _isa  vLLM's with the model's dtype, and its name for the code path
    ratio                       baseline_ms / ms
    fp8_baseline_ms, _min_ms    vLLM's with --kv-cache-dtype fp8; null where vLLM has no such
    fp8_ratio                   path (fp8_missing says why)
    parts                       medians of our single ops, ms
    page_sets                   sets that steps rotate among
    bytes_read                  of our pages by a step
    bandwidth_share             of the read bandwidth that a plain sum over 1 GB reaches here
    relative_error              ours against float64 on the same codes or selected tokens, the
                                largest of rows_checked rows
    baseline_error, fp8_baseline_error   vLLM's against float64 over all tokens, likewise
    planted_weight              share of full attention that planted tokens have
    planted_kept                share of planted tokens that selection kept; null when dense
    command, date, revision, versions, processor   of this run
"""

import argparse

import torch
from speed.command import Lines, add_output, numbers, parser, positive, progress, refuse
from speed.inputs import Inputs
from speed.machine import free_bytes, read_bandwidth
from speed.plot import decode_name, save_decode_plot
from speed.shapes import BLOCK_SIZE, CASES, DTYPE, MIN_CONTEXT, SHAPES

_EXAMPLES = """\
  python benchmarks/decode_attention.py --context 8192,32768,131072 --plot ms.png
  python benchmarks/decode_attention.py --shape qwen2.5-7b --batch 8 --context 32768 --threads 2
  VLLM_TAILORKV_CPU_ISA=avx2 python benchmarks/decode_attention.py --json avx2.jsonl
"""


def main() -> None:
    """Run all cases of the given shape."""
    args = _arguments()
    _check_memory(args)
    from speed.rounds import measure  # noqa: PLC0415  vLLM takes seconds to load

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    bandwidth = read_bandwidth()
    with Lines(args.json) as lines, progress() as bar:
        task = bar.add_task("", total=len(args.context) * len(CASES))
        for context in args.context:
            inputs = Inputs(SHAPES[args.shape], context, args.batch)
            for case in CASES:
                head = {"shape": args.shape, "layer": case.layer, "index": case.index}
                name = decode_name(
                    head
                    | {
                        "bits": case.bits,
                        "selected": case.selected,
                        "rerank": case.rerank,
                        "query_reduce": case.query_reduce,
                    }
                )
                bar.update(task, description=f"{context:,} tokens: {name}")
                lines.add(head | measure(inputs, case, args.seconds, bandwidth))
                bar.advance(task)
    if args.plot:
        save_decode_plot(args.plot, lines.records)


def _arguments() -> argparse.Namespace:
    options = parser(__doc__ or "", _EXAMPLES)
    options.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    options.add_argument(
        "--context", type=numbers, default=[8192, 32768, 131072], metavar="N[,N...]", help="tokens"
    )
    options.add_argument("--batch", type=positive, default=1, metavar="B", help="(%(default)s)")
    options.add_argument(
        "--seconds", type=float, default=3.0, help="of rounds for each case (%(default)s)"
    )
    options.add_argument("--plot", metavar="FILE", help="ms against context, as a picture")
    add_output(options)
    args = options.parse_args()
    if min(args.context) < MIN_CONTEXT:
        options.error(f"--context must be at least {MIN_CONTEXT}, is {min(args.context)}")
    return args


def _check_memory(args: argparse.Namespace) -> None:
    """Refuse what does not fit: ours, what is derived, vLLM's, vLLM's in fp8, float64."""
    shape = SHAPES[args.shape]
    tokens = -(-max(args.context) // BLOCK_SIZE) * BLOCK_SIZE * args.batch
    full = 2 * tokens * shape.kv_heads * shape.head_size * DTYPE.itemsize
    needed, free = 4 * full, free_bytes()
    if needed > free:
        refuse(
            __file__,
            f"about {needed / 2**30:.1f} GiB of pages needed, {free / 2**30:.1f} GiB free: "
            "lower --context or --batch",
        )


if __name__ == "__main__":
    main()
