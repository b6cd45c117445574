"""One decode step of one of our layers, as the engine runs it."""

from collections.abc import Callable
from typing import Any

import torch

from speed.inputs import Inputs
from speed.pages import PageSet, make_sets
from speed.shapes import CHANNELS, RESIDUAL, SINKS, Case
from vllm_tailorkv.attention.rows import tail_starts
from vllm_tailorkv.kernels import ops
from vllm_tailorkv.kernels.types import SPREAD_GROUPS, ChannelIndex, DenseCodes, OnebitIndex
from vllm_tailorkv.layout import DerivedKind


class Step:
    """The step of one kind of layer, and the pages it rotates among."""

    def __init__(self, inputs: Inputs, case: Case) -> None:
        self.inputs, self.case = inputs, case
        self.layout = case.layout(inputs.shape)
        batch, kv_heads = inputs.batch, inputs.shape.kv_heads
        self.tail_start = tail_starts(
            inputs.seq_lens, case.kind, self.layout.group_size, case.config
        )
        self.tail = int(self.tail_start.max())
        self.output = torch.empty_like(inputs.query)
        self.indices = torch.empty(batch, kv_heads, case.selected, dtype=torch.int32)
        self.sets = make_sets(inputs, self.layout, self.bytes_read)

    @property
    def bytes_read(self) -> int:
        """Bytes of the pages that a step reads."""
        inputs, head_size = self.inputs, self.inputs.shape.head_size
        size = self.layout.group_size
        groups = records = self.tail // size
        keys = values = RESIDUAL
        if self.case.layer == "sparse":
            groups = records = -(-self.tail // size)
            always = SINKS + inputs.context - self.tail
            # Candidates' K is read to rank them; that of those kept is then in the cache.
            keys = always + self.case.candidates
            values = always + self.case.selected
        if self.case.kind is DerivedKind.CHANNELS:
            records = -(-groups // -(-groups // SPREAD_GROUPS))
        total = records * sum(field.num_bytes for field in self.layout.fields.values())
        total += (keys + values) * head_size * 2
        if self.case.kind is DerivedKind.CHANNELS:
            total += groups * size * CHANNELS * 2
        return total * inputs.shape.kv_heads * inputs.batch

    def ops(self) -> dict[str, Callable[[PageSet], None]]:
        """The ops of one step by name, in order."""
        if self.case.layer == "dense":
            return {"quantized_decode_attention": self.attend_codes}
        return {"retrieve_attention": self.attend_retrieved}

    def attend_codes(self, pages: PageSet) -> None:
        """The step of a dense layer."""
        assert isinstance(pages.derived, DenseCodes)
        ops.quantized_decode_attention(
            self.output,
            self.inputs.query,
            pages.host.key,
            pages.host.value,
            pages.derived,
            pages.block_table,
            self.inputs.seq_lens,
            self.tail_start,
            scale=self.inputs.scale,
        )

    def attend_retrieved(self, pages: PageSet) -> None:
        """The step of a sparse layer."""
        assert isinstance(pages.derived, OnebitIndex | ChannelIndex)
        ops.retrieve_attention(
            self.output,
            self.inputs.query,
            pages.derived,
            pages.host.key,
            pages.host.gathered_key,
            pages.host.value,
            pages.block_table,
            self.inputs.seq_lens,
            self.tail_start,
            topk=self.case.selected,
            **self._retrieval,
        )

    def retrieve(self, pages: PageSet) -> None:
        """The tokens that the step of a sparse layer attends to, which it does not tell."""
        assert isinstance(pages.derived, OnebitIndex | ChannelIndex)
        ops.retrieve_topk(
            self.indices,
            self.inputs.query,
            pages.derived,
            pages.host.key,
            pages.host.gathered_key,
            pages.block_table,
            self.inputs.seq_lens,
            self.tail_start,
            **self._retrieval,
        )

    @property
    def _retrieval(self) -> dict[str, Any]:
        return {
            "sink_tokens": SINKS,
            "critical_channels": CHANNELS,
            "candidates": self.case.candidates,
            "channels": self.inputs.shape.head_size,
            "every_head": self.case.query_reduce == "max",
            "scale": self.inputs.scale,
            "max_tail_start": self.tail,
        }

    def planted_kept(self) -> float | None:
        """The share of the planted tokens that selection kept; None for a dense layer."""
        if self.case.layer == "dense":
            return None
        found = (self.inputs.planted.unsqueeze(-1) == self.indices.unsqueeze(2)).any(-1)
        return float(found.double().mean())
