"""Batches on CPUs."""

from dataclasses import dataclass

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_tailorkv.attention.metadata import DecodeRows, Step, TailorKVMetadata
from vllm_tailorkv.attention.rows import (
    completed_groups,
    decode_mask,
    tail_starts,
)
from vllm_tailorkv.attention.spec import TailorKVSpec
from vllm_tailorkv.attention.workspace import Workspace
from vllm_tailorkv.config import TailorKVConfig
from vllm_tailorkv.kernels import ops


@dataclass
class PagedRows:
    """Exact rows, attended to where they lie in the batch.

    query_start, query_lens, seq_lens: int32 [n]; block_table: int32 [n, max_blocks].
    """

    query_start: torch.Tensor
    query_lens: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor

    def attend(self, step: Step) -> None:
        """See `ExactRows`."""
        ops.exact_attention(
            step.output,
            step.query,
            step.host.key,
            step.host.value,
            self.block_table,
            self.query_start,
            self.query_lens,
            self.seq_lens,
            scale=step.scale,
            softcap=step.softcap,
            sink_logits=step.sink_logits,
        )


class CpuBatch:
    """Makes the metadata of batches for the layers of one spec."""

    def __init__(self, spec: TailorKVSpec, config: TailorKVConfig) -> None:
        self.spec = spec
        self.config = config
        self.workspace = Workspace(torch.device("cpu"))

    def build(self, common: CommonAttentionMetadata) -> TailorKVMetadata:
        """See `AttentionMetadataBuilder.build`."""
        query_lens = common.query_start_loc[1:] - common.query_start_loc[:-1]
        mask = decode_mask(
            query_lens, common.seq_lens, common.is_prefilling, self.config.exact_below
        )
        slots = common.slot_mapping[: common.num_actual_tokens]
        groups = completed_groups(slots, self.spec.layout.group_size)
        return TailorKVMetadata(
            num_actual_tokens=common.num_actual_tokens,
            slot_mapping=common.slot_mapping,
            groups=groups[groups >= 0],
            single_tokens=False,
            exact=self._exact_rows(common, ~mask),
            decode=self._decode_rows(common, mask),
            workspace=self.workspace,
        )

    def _exact_rows(self, common: CommonAttentionMetadata, mask: torch.Tensor) -> PagedRows | None:
        if not mask.any():
            return None
        start = common.query_start_loc
        rows = (start[:-1], start[1:] - start[:-1], common.seq_lens, common.block_table_tensor)
        return PagedRows(*(rows if mask.all() else (part[mask] for part in rows)))

    def _decode_rows(
        self, common: CommonAttentionMetadata, mask: torch.Tensor
    ) -> DecodeRows | None:
        if not mask.any():
            return None
        requests = mask.nonzero().flatten()
        every = len(requests) == len(mask)
        seq_lens = common.seq_lens if every else common.seq_lens[requests]
        table = common.block_table_tensor if every else common.block_table_tensor[requests]
        tokens: slice | torch.Tensor = slice(0, len(requests))
        if not every:
            tokens = common.query_start_loc[requests].long()
        layout = self.spec.layout
        tail_start = tail_starts(seq_lens, layout.kind, layout.group_size, self.config)
        return DecodeRows(tokens, seq_lens, table, tail_start, int(tail_start.max()))
