"""Speed of one decode step of one layer's attention, ours against vLLM's on the same pages.

    python benchmarks/decode_attention.py --context 8192,32768,131072

Both run alternately in one process on the same host pages. Steps rotate among page sets that
are larger together than the last-level cache, as the layers of a model are. They lie in huge
pages where the system has them, as the cache does in service; both sides gain. For every case
one line of JSON is printed (or written with `--json FILE`):

    layer, index, bits, context, batch, threads   what ran
    rerank                                        candidates ranked again for every token kept;
                                                  1 is no second ranking
    ms, baseline_ms, ratio                        medians; ratio = baseline_ms / ms
    parts                                         medians of the single ops, ms
    bytes_read, bandwidth_share                   of the pages; share of the read bandwidth
                                                  that a plain sum over 1 GB reaches here
    relative_error                                of one row against float64 on the same codes
                                                  and tokens
    baseline_error                                of vLLM's output against float64, all tokens
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vllm_tailorkv.cache.huge_pages import advise_huge_pages
from vllm_tailorkv.cache.views import HostPages, derived_pages, host_pages
from vllm_tailorkv.kernels import ops, reference
from vllm_tailorkv.kernels.types import ChannelIndex, DerivedPages, OnebitIndex
from vllm_tailorkv.layout import DerivedKind, PageLayout

DTYPE = torch.bfloat16
BLOCK_SIZE, GROUP_SIZE = 128, 64
SINKS, RECENT, SELECTED, RESIDUAL, CHANNELS = 8, 56, 128, 128, 8
RERANK, SAMPLES, LINE_BYTES = 4, 16, 64
MIN_ROTATED_BYTES = 128 << 20
MAX_PAGES_BYTES = 10 << 30


@dataclass(frozen=True)
class Shape:
    """Heads of one attention layer."""

    heads: int
    kv_heads: int
    head_size: int


SHAPES = {
    "llama-3.1-8b": Shape(32, 8, 128),
    "llama-3.2-1b": Shape(32, 8, 64),
    "qwen2.5-7b": Shape(28, 4, 128),
    "mha-7b": Shape(32, 32, 128),
}


@dataclass(frozen=True)
class Case:
    """One kind of layer."""

    layer: str
    kind: DerivedKind
    bits: int
    rerank: int = 1


CASES = (
    Case("sparse", DerivedKind.ONEBIT, 1, RERANK),
    Case("sparse", DerivedKind.ONEBIT, 1),
    Case("sparse", DerivedKind.CHANNELS, 1, RERANK),
    Case("sparse", DerivedKind.CHANNELS, 1),
    Case("dense", DerivedKind.DENSE, 1),
    Case("dense", DerivedKind.DENSE, 2),
)


@dataclass
class PageSet:
    """The pages of one layer, full of tokens."""

    host: HostPages
    derived: DerivedPages
    block_table: torch.Tensor


class Bench:
    """One shape, context and batch: the inputs that every case shares."""

    def __init__(self, shape: Shape, case: Case, context: int, batch: int) -> None:
        self.shape, self.case, self.context, self.batch = shape, case, context, batch
        self.layout = PageLayout(
            case.kind, shape.kv_heads, shape.head_size, BLOCK_SIZE, GROUP_SIZE, case.bits, 2
        )
        self.scale = shape.head_size**-0.5
        self.query = torch.randn(batch, shape.heads, shape.head_size).to(DTYPE)
        self.output = torch.empty_like(self.query)
        self.baseline_output = torch.empty_like(self.query)
        self.seq_lens = torch.full((batch,), context, dtype=torch.int32)
        # As METHOD-like settings have it: the last complete group before the recent tokens.
        tail = max(0, context - RECENT) // GROUP_SIZE * GROUP_SIZE
        self.tail_start = torch.full((batch,), max(tail, min(SINKS, context)), dtype=torch.int32)
        coded = max(0, context - RESIDUAL) // GROUP_SIZE * GROUP_SIZE
        self.num_quantized = torch.full((batch,), coded, dtype=torch.int32)
        self.scores = torch.empty(batch, shape.kv_heads, context)
        self.indices = torch.empty(batch, shape.kv_heads, SELECTED, dtype=torch.int32)
        self.candidates = self.indices.new_empty(batch, shape.kv_heads, SELECTED * case.rerank)
        self.ranked_channels = max(1, shape.head_size * 3 // 8)
        self.sets = self.make_sets()
        self.metadata = self.baseline_metadata()

    def make_sets(self) -> list[PageSet]:
        """Random pages; K has channels of very different sizes, as models do."""
        blocks = math.ceil(self.context / BLOCK_SIZE)
        page_bytes = self.layout.host_bytes + self.layout.derived_bytes
        set_bytes = blocks * self.batch * page_bytes
        count = max(2, math.ceil(MIN_ROTATED_BYTES / self.bytes_read))
        count = max(1, min(count, MAX_PAGES_BYTES // set_bytes))
        bias = torch.randn(self.shape.head_size) * 2
        sample = torch.randn(64, self.shape.kv_heads, BLOCK_SIZE, self.shape.head_size)
        sets = []
        for _ in range(count):
            raw = torch.empty(blocks * self.batch, page_bytes, dtype=torch.uint8)
            advise_huge_pages(raw)
            host = host_pages(raw[:, : self.layout.host_bytes], self.layout, DTYPE)
            derived = derived_pages(raw[:, self.layout.host_bytes :], self.layout, DTYPE)
            for start in range(0, raw.shape[0], 64):
                n = min(64, raw.shape[0] - start)
                noise = sample[torch.randperm(64)[:n]]
                host.key[start : start + n].copy_(noise.roll(start, 2) + bias)
                host.value[start : start + n].copy_(noise.roll(start + 5, 3))
            groups = torch.arange(raw.shape[0] * self.layout.groups_per_block)
            ops.quantize_groups(groups, host.key, host.value, derived)
            table = torch.randperm(raw.shape[0], dtype=torch.int32).view(self.batch, blocks)
            sets.append(PageSet(host, derived, table))
        return sets

    @property
    def bytes_read(self) -> int:
        """Bytes of the pages that a step reads."""
        fields = self.layout.fields
        groups = int(self.num_quantized[0]) // GROUP_SIZE
        exact = RESIDUAL
        if self.case.layer == "sparse":
            groups = int(self.tail_start[0]) // GROUP_SIZE
            exact = SINKS + SELECTED + self.context - int(self.tail_start[0])
        token = 2 * self.shape.head_size * 2
        total = groups * sum(field.num_bytes for field in fields.values()) + exact * token
        if self.case.kind is DerivedKind.CHANNELS:
            total += groups * GROUP_SIZE * CHANNELS * 2
        if self.case.rerank > 1:
            # K is channel-major: an element costs a cache line.
            rows = self.case.rerank * SELECTED * self.ranked_channels
            rows += SAMPLES * (self.shape.head_size - self.ranked_channels)
            total += rows * LINE_BYTES
        return total * self.shape.kv_heads * self.batch

    def steps(self) -> dict[str, Callable[[PageSet], None]]:
        """The ops of one step in order."""
        if self.case.layer == "dense":
            return {"quantized_decode_attention": self.attend_codes}
        refine = {"refine_topk": self.refine} if self.case.rerank > 1 else {}
        return {
            "score_tokens": self.score,
            "select_topk": self.select,
            **refine,
            "sparse_decode_attention": self.attend_selected,
        }

    def attend_codes(self, pages: PageSet) -> None:
        """The step of a dense layer."""
        ops.quantized_decode_attention(
            self.output,
            self.query,
            pages.host.key,
            pages.host.value,
            pages.derived,  # type: ignore[arg-type]
            pages.block_table,
            self.seq_lens,
            self.num_quantized,
            scale=self.scale,
        )

    def score(self, pages: PageSet) -> None:
        """The step of a sparse layer: its average query scores all tokens."""
        query = self.query.float().unflatten(1, (self.shape.kv_heads, -1)).mean(2, keepdim=True)
        assert isinstance(pages.derived, OnebitIndex | ChannelIndex)
        ops.score_tokens(
            self.scores,
            query,
            pages.derived,
            pages.host.key,
            pages.block_table,
            self.tail_start,
            sink_tokens=SINKS,
            critical_channels=CHANNELS,
        )

    def select(self, _: PageSet) -> None:
        """The best tokens of the scores: the candidates where they are ranked again."""
        best = self.candidates if self.case.rerank > 1 else self.indices
        ops.select_topk(best, self.scores, self.tail_start, sink_tokens=SINKS)

    def refine(self, pages: PageSet) -> None:
        """The candidates that truly weigh most."""
        ops.refine_topk(
            self.indices,
            self.candidates,
            self.query,
            pages.host.key,
            pages.block_table,
            channels=self.ranked_channels,
            scale=self.scale,
        )

    def attend_selected(self, pages: PageSet) -> None:
        """Exact attention over what was selected."""
        ops.sparse_decode_attention(
            self.output,
            self.query,
            pages.host.key,
            pages.host.value,
            self.indices,
            pages.block_table,
            self.seq_lens,
            self.tail_start,
            sink_tokens=SINKS,
            scale=self.scale,
        )

    def baseline_metadata(self) -> dict[str, Any]:
        """What vLLM's CPU backend prepares once a step for all layers."""
        from vllm import _custom_ops as vllm_ops  # noqa: PLC0415

        starts = torch.arange(self.batch + 1, dtype=torch.int32)
        metadata = vllm_ops.cpu_attn_get_scheduler_metadata(
            num_reqs=self.batch,
            num_heads=self.shape.heads,
            num_kv_heads=self.shape.kv_heads,
            head_dim=self.shape.head_size,
            seq_lens=self.seq_lens,
            dtype=DTYPE,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=-1,
            isa="vec",
            enable_kv_split=True,
        )
        return {
            "call": vllm_ops.cpu_attention_with_kv_cache,
            "query_start_loc": starts,
            "scheduler_metadata": metadata,
        }

    def baseline(self, pages: PageSet) -> None:
        """vLLM's attention over all tokens."""
        self.metadata["call"](
            query=self.query,
            key_cache=pages.host.stored_key,
            value_cache=pages.host.value,
            output=self.baseline_output,
            query_start_loc=self.metadata["query_start_loc"],
            seq_lens=self.seq_lens,
            scale=self.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=pages.block_table,
            softcap=0.0,
            scheduler_metadata=self.metadata["scheduler_metadata"],
            s_aux=None,
        )

    def exact(self, pages: PageSet, tokens: str) -> torch.Tensor:
        """float64 attention of row 0 over `all`, the `coded` or the `selected` tokens."""
        blocks = pages.block_table[0].long()
        key, value = (
            page[blocks].double().transpose(0, 1).flatten(1, 2)[:, : self.context]
            for page in (pages.host.key, pages.host.value)
        )
        kept = torch.ones(key.shape[:2], dtype=torch.bool)
        if tokens == "coded":
            codes, coded = pages.derived, int(self.num_quantized[0])
            for i, block in enumerate(blocks.tolist()):
                span = slice(i * BLOCK_SIZE, min((i + 1) * BLOCK_SIZE, coded))
                n = span.stop - span.start
                if n > 0:
                    args = (block, GROUP_SIZE)
                    key[:, span] = reference.dequantize_keys(codes.key, *args)[:, :n].double()  # type: ignore[union-attr]
                    value[:, span] = reference.dequantize_values(
                        codes.value,  # type: ignore[union-attr]
                        *args,
                        self.case.bits,
                        self.shape.head_size,
                    )[:, :n].double()
        if tokens == "selected":
            kept[:, SINKS : int(self.tail_start[0])] = False
            chosen = self.indices[0].long().clamp(min=0)
            kept.scatter_(1, chosen, True)
        query = self.query[0].double().unflatten(0, (self.shape.kv_heads, -1))
        scores = torch.einsum("hgd,hnd->hgn", query, key) * self.scale
        scores.masked_fill_(~kept[:, None], -math.inf)
        return torch.einsum("hgn,hnd->hgd", scores.softmax(-1), value).flatten(0, 1)


def read_bandwidth() -> float:
    """Bytes a second of a plain sum over 1 GB."""
    data = torch.ones(1 << 28)
    best = math.inf
    for _ in range(6):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return data.numel() * 4 / best


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative error of a whole row."""
    return float((actual.double() - expected).norm() / expected.norm())


def measure(bench: Bench, seconds: float, bandwidth: float) -> dict[str, Any]:
    """Alternate ours and theirs for about `seconds`, after one round to warm up."""
    parts: dict[str, list[float]] = {name: [] for name in bench.steps()}
    ours: list[float] = []
    theirs: list[float] = []
    deadline = math.inf
    rounds = 0
    while time.perf_counter() < deadline or rounds < 5:
        pages = bench.sets[rounds % len(bench.sets)]
        times = [time.perf_counter()]
        for step in bench.steps().values():
            step(pages)
            times.append(time.perf_counter())
        # The baseline reads another set, or it would find ours in the cache.
        bench.baseline(bench.sets[(rounds + 1) % len(bench.sets)])
        end = time.perf_counter()
        rounds += 1
        if deadline == math.inf:
            deadline = end + seconds
            continue
        for i, name in enumerate(parts):
            parts[name].append(1e3 * (times[i + 1] - times[i]))
        ours.append(1e3 * (times[-1] - times[0]))
        theirs.append(1e3 * (end - times[-1]))
    pages = bench.sets[0]
    for step in bench.steps().values():
        step(pages)
    bench.baseline(pages)
    tokens = "selected" if bench.case.layer == "sparse" else "coded"
    ms, baseline_ms = statistics.median(ours), statistics.median(theirs)
    return {
        "layer": bench.case.layer,
        "index": bench.case.kind.value if bench.case.layer == "sparse" else None,
        "bits": bench.case.bits,
        "rerank": bench.case.rerank if bench.case.layer == "sparse" else None,
        "context": bench.context,
        "batch": bench.batch,
        "threads": torch.get_num_threads(),
        "ms": round(ms, 4),
        "baseline_ms": round(baseline_ms, 4),
        "ratio": round(baseline_ms / ms, 2),
        "parts": {name: round(statistics.median(part), 4) for name, part in parts.items()},
        "bytes_read": bench.bytes_read,
        "bandwidth_share": round(bench.bytes_read / (ms / 1e3) / bandwidth, 3),
        "relative_error": relative(bench.output[0], bench.exact(pages, tokens)),
        "baseline_error": relative(bench.baseline_output[0], bench.exact(pages, "all")),
        "rounds": rounds,
    }


def main() -> None:
    """Run all cases of the given shape."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--context", default="8192,32768,131072", help="tokens, comma-separated")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each case")
    parser.add_argument("--json", default="-", help="file for the lines, or - for stdout")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    bandwidth = read_bandwidth()
    lines = []
    for context in (int(text) for text in arguments.context.split(",")):
        for case in CASES:
            bench = Bench(SHAPES[arguments.shape], case, context, arguments.batch)
            result = measure(bench, arguments.seconds, bandwidth)
            lines.append(json.dumps({"shape": arguments.shape, **result}))
            print(lines[-1], file=sys.stdout if arguments.json == "-" else sys.stderr, flush=True)
            del bench
    if arguments.json != "-":
        with open(arguments.json, "w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
