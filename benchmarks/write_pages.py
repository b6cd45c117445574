"""What a prompt costs one layer on the CPU: writing, deriving and exact attention.

Rounds alternate in one process: ours writes K and V chunk by chunk and derives every group of
tokens as it completes; vLLM's writes to a cache of its own. Each has its own attention over the
prompt. Each kind of layer gives a line of JSON; milliseconds are for one whole prompt and layer:

    shape, layer, index, bits, context, chunk, threads   what ran; tokens of a prompt and a chunk
    implementation, isa         of our ops
    write_ms, derive_ms         ours, medians
    attention_ms                our exact attention over the prompt, from attention_rows queries
                                timed at its begin, middle and end
    ms                          the sum of the three
    us_per_token                microseconds of it for each token
    baseline_write_ms, baseline_isa   vLLM's reshape_and_cache, and its name for the code path
    baseline_attention_ms       vLLM's exact attention, timed likewise
    speedup                     vLLM's two by our three
"""

import argparse

import torch
from speed.command import Lines, add_output, numbers, parser, positive, progress
from speed.shapes import CASES, SHAPES

_EXAMPLES = """\
  python benchmarks/write_pages.py --context 8192,32768
  python benchmarks/write_pages.py --shape mha-7b --context 8192 --threads 1 --json write.jsonl
"""

# Ranking again changes no page.
# One case for each kind of pages: how many tokens a step selects is no matter to a prompt.
PAGE_CASES = tuple({(case.kind, case.bits): case for case in CASES}.values())


def main() -> None:
    """Run all kinds of layers of the given shape."""
    args = _arguments()
    from speed.prompt import Prompt, TheirPages, measure  # noqa: PLC0415  vLLM: seconds

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    shape = SHAPES[args.shape]
    with Lines(args.json) as lines, progress() as bar:
        task = bar.add_task("", total=len(args.context) * (len(PAGE_CASES) + 1))
        for context in args.context:
            bar.update(task, description=f"{context:,} tokens: vLLM's attention")
            prompt = Prompt.random(shape, context, args.chunk)
            theirs = TheirPages(prompt, torch.randperm(prompt.num_blocks))
            theirs.write()
            rows = min(args.attention_rows, context)
            attention = theirs.attend(rows)
            bar.advance(task)
            for case in PAGE_CASES:
                name = case.index or f"{case.bits} bit"
                bar.update(task, description=f"{context:,} tokens: {case.layer}, {name}")
                result = measure(prompt, case, theirs, attention, rows, args.seconds)
                lines.add({"shape": args.shape, **result})
                bar.advance(task)


def _arguments() -> argparse.Namespace:
    options = parser(__doc__ or "", _EXAMPLES)
    options.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    options.add_argument(
        "--context", type=numbers, default=[8192, 32768], metavar="N[,N...]", help="tokens"
    )
    options.add_argument(
        "--chunk",
        type=positive,
        default=2048,
        metavar="N",
        help="tokens written at once, a multiple of 128, as the scheduler's budget (%(default)s)",
    )
    options.add_argument(
        "--attention-rows",
        type=positive,
        default=256,
        metavar="N",
        help="queries timed at each of three places (%(default)s)",
    )
    options.add_argument(
        "--seconds", type=float, default=2.0, help="of rounds for each case (%(default)s)"
    )
    add_output(options)
    args = options.parse_args()
    largest = max(case.layout(SHAPES[args.shape]).group_size for case in CASES)
    if args.chunk % largest:
        options.error(f"--chunk must be a multiple of {largest}, is {args.chunk}")
    return args


if __name__ == "__main__":
    main()
