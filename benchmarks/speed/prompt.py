"""What a prompt costs one layer: writing K and V, deriving pages, exact attention."""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from speed.machine import implementation
from speed.shapes import BLOCK_SIZE, DTYPE, Case, Shape
from speed.vllm_attention import VllmCache
from vllm_tailorkv.cache.views import derived_pages, host_pages
from vllm_tailorkv.kernels import ops

PROBED_DEPTHS = (0.0, 0.5, 1.0)
PROBES = 3


@dataclass(frozen=True)
class Prompt:
    """K and V of a prompt, [N, Hk, d] each, read in chunks as the scheduler cuts it."""

    shape: Shape
    chunk: int
    key: torch.Tensor
    value: torch.Tensor

    @classmethod
    def random(cls, shape: Shape, context: int, chunk: int) -> "Prompt":
        """Of `context` random tokens."""
        size = (context, shape.kv_heads, shape.head_size)
        return cls(shape, chunk, torch.randn(size).to(DTYPE), torch.randn(size).to(DTYPE))

    @property
    def context(self) -> int:
        """Tokens."""
        return len(self.key)

    @property
    def num_blocks(self) -> int:
        """Pages it fills."""
        return math.ceil(self.context / BLOCK_SIZE)

    def chunks(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Its tokens, chunk by chunk, and their K and V."""
        for start in range(0, self.context, self.chunk):
            span = slice(start, min(start + self.chunk, self.context))
            yield span, self.key[span], self.value[span]


class OurPages:
    """The pages of one layer of ours."""

    def __init__(self, prompt: Prompt, case: Case, blocks: torch.Tensor) -> None:
        self.prompt = prompt
        layout = case.layout(prompt.shape)
        page_bytes = layout.host_bytes + layout.derived_bytes
        # Zeros, so that the first write meets no page that the system has yet to give.
        raw = torch.zeros(prompt.num_blocks, page_bytes, dtype=torch.uint8)
        self.host = host_pages(raw[:, : layout.host_bytes], layout, DTYPE)
        self.derived = derived_pages(raw[:, layout.host_bytes :], layout, DTYPE)
        self.block_table = blocks.to(torch.int32).unsqueeze(0)
        self.slots = _slots(prompt, blocks)
        per_block, self.group_size = layout.groups_per_block, layout.group_size
        groups = blocks.unsqueeze(-1) * per_block + torch.arange(per_block)
        self.groups = groups.flatten()

    def read(self) -> tuple[float, float]:
        """Seconds to write the prompt, and to derive every group as it completes."""
        write = derive = 0.0
        for span, key, value in self.prompt.chunks():
            done = self.groups[span.start // self.group_size : span.stop // self.group_size]
            start = time.perf_counter()
            host, slots = self.host, self.slots[span]
            ops.write_kv(key, value, host.key, host.value, slots, host.key_rows)
            written = time.perf_counter()
            ops.quantize_groups(done, self.host.key, self.host.value, self.derived)
            derive += time.perf_counter() - written
            write += written - start
        return write, derive

    def attend(self, rows: int) -> float:
        """See `attention_seconds`."""
        start = torch.zeros(1, dtype=torch.int32)
        query_lens = torch.tensor([rows], dtype=torch.int32)

        def attend(query: torch.Tensor, output: torch.Tensor, seq_lens: torch.Tensor) -> None:
            ops.exact_attention(
                output,
                query,
                self.host.key,
                self.host.value,
                self.block_table,
                start,
                query_lens,
                seq_lens,
                scale=query.shape[-1] ** -0.5,
            )

        return attention_seconds(self.prompt, rows, attend)


class TheirPages:
    """vLLM's cache of one layer."""

    def __init__(self, prompt: Prompt, blocks: torch.Tensor) -> None:
        self.prompt = prompt
        self.cache = VllmCache(prompt.shape, prompt.num_blocks, "auto")
        self.slots = _slots(prompt, blocks)
        self.block_table = blocks.to(torch.int32).unsqueeze(0)

    def write(self) -> float:
        """Seconds to write the prompt."""
        start = time.perf_counter()
        for span, key, value in self.prompt.chunks():
            self.cache.write(key, value, self.slots[span])
        return time.perf_counter() - start

    def attend(self, rows: int) -> float:
        """See `attention_seconds`."""
        starts = torch.tensor([0, rows], dtype=torch.int32)

        def attend(query: torch.Tensor, output: torch.Tensor, seq_lens: torch.Tensor) -> None:
            schedule = self.cache.schedule(self.prompt.shape, seq_lens, starts)
            self.cache.attend(output, query, self.block_table, seq_lens, starts, schedule)

        return attention_seconds(self.prompt, rows, attend)


def attention_seconds(
    prompt: Prompt, rows: int, attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
) -> float:
    """Seconds that exact attention takes over a whole prompt.

    `rows` queries are timed at the prompt's begin, middle and end. As the cost of a query grows
    with its depth along a line, their mean stands for all.

    Args:
        rows: at most as many as the prompt has tokens.
        attend: with queries and outputs [rows, H, d] and the tokens in context, int32 [1].
    """
    shape = prompt.shape
    query = torch.randn(rows, shape.heads, shape.head_size).to(DTYPE)
    output = torch.empty_like(query)

    def probe(depth: float) -> float:
        seen = rows + round(depth * (prompt.context - rows))
        seq_lens = torch.tensor([seen], dtype=torch.int32)
        start = time.perf_counter()
        attend(query, output, seq_lens)
        return time.perf_counter() - start

    probe(PROBED_DEPTHS[0])
    begin, middle, end = (
        statistics.median(probe(depth) for _ in range(PROBES)) for depth in PROBED_DEPTHS
    )
    return (begin + 4 * middle + end) / 6 / rows * prompt.context


def _slots(prompt: Prompt, blocks: torch.Tensor) -> torch.Tensor:
    """The slot of every token."""
    return (blocks.unsqueeze(-1) * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten()[
        : prompt.context
    ]


def measure(
    prompt: Prompt, case: Case, theirs: TheirPages, attention: float, rows: int, seconds: float
) -> dict[str, Any]:
    """One line of results: rounds for about `seconds`, after one to warm up.

    Args:
        attention: of `theirs`, seconds.
        rows: queries timed, see `attention_seconds`.
    """
    ours = OurPages(prompt, case, theirs.block_table[0].long())
    rounds = list(_rounds(ours.read, theirs.write, seconds))
    write, derive, baseline = (
        1e3 * statistics.median(values) for values in zip(*rounds, strict=True)
    )
    attend, baseline_attend = 1e3 * ours.attend(rows), 1e3 * attention
    return {
        "layer": case.layer,
        "index": case.index,
        "bits": case.bits,
        "context": prompt.context,
        "chunk": prompt.chunk,
        "threads": torch.get_num_threads(),
        **implementation(["write_kv", "quantize_groups", "exact_attention"]),
        "write_ms": round(write, 4),
        "derive_ms": round(derive, 4),
        "attention_ms": round(attend, 2),
        "attention_rows": rows,
        "ms": round(write + derive + attend, 4),
        "us_per_token": round(1e3 * (write + derive + attend) / prompt.context, 4),
        "baseline_isa": theirs.cache.isa,
        "baseline_write_ms": round(baseline, 4),
        "baseline_attention_ms": round(baseline_attend, 2),
        "speedup": round((baseline + baseline_attend) / (write + derive + attend), 3),
        "rounds": len(rounds),
    }


def _rounds(
    ours: Callable[[], tuple[float, float]], theirs: Callable[[], float], seconds: float
) -> Iterator[tuple[float, float, float]]:
    ours(), theirs()
    deadline, number = time.perf_counter() + seconds, 0
    while number < 3 or time.perf_counter() < deadline:
        write, derive = ours()
        yield write, derive, theirs()
        number += 1
