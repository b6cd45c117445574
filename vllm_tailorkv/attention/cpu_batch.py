"""Batches on CPUs, whose exact rows vLLM's own CPU attention op serves."""

from dataclasses import dataclass

import torch
from vllm import _custom_ops as vllm_ops
from vllm import envs
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_tailorkv.attention.metadata import DecodeRows, Step, TailorKVMetadata
from vllm_tailorkv.attention.rows import (
    completed_groups,
    decode_mask,
    tail_starts,
    token_indices,
)
from vllm_tailorkv.attention.spec import TailorKVSpec
from vllm_tailorkv.attention.workspace import Workspace
from vllm_tailorkv.config import TailorKVConfig


@dataclass
class PagedRows:
    """Exact rows, as vLLM's op wants them.

    tokens: int64, their query tokens in the batch; None if they are all of it.
    query_start_loc, seq_lens: int32; block_table: int32 [n, max_blocks].
    scheduler_metadata: vLLM's plan of the work over threads.
    """

    tokens: torch.Tensor | None
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    scheduler_metadata: torch.Tensor

    def attend(self, step: Step) -> None:
        """See `ExactRows`."""
        query = step.query if self.tokens is None else step.query[self.tokens]
        part = step.output if self.tokens is None else torch.empty_like(query)
        vllm_ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=step.host.stored_key,
            value_cache=step.host.value,
            output=part,
            query_start_loc=self.query_start_loc,
            seq_lens=self.seq_lens,
            scale=step.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self.block_table,
            softcap=step.softcap,
            scheduler_metadata=self.scheduler_metadata,
            s_aux=None,
        )
        if self.tokens is not None:
            step.output[self.tokens] = part


def attention_isa(head_size: int) -> str:
    """The variant of vLLM's CPU attention op whose page layout is known.

    vLLM's own choice may be one with another K layout (AMX).
    """
    return "vec" if head_size % 32 == 0 else "vec16"


class CpuBatch:
    """Makes the metadata of batches for the layers of one spec."""

    def __init__(self, spec: TailorKVSpec, config: TailorKVConfig, num_heads: int) -> None:
        self.spec = spec
        self.config = config
        self.num_heads = num_heads
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
            exact=self._exact_rows(common, ~mask),
            decode=self._decode_rows(common, mask),
            workspace=self.workspace,
        )

    def _exact_rows(self, common: CommonAttentionMetadata, mask: torch.Tensor) -> PagedRows | None:
        if not mask.any():
            return None
        tokens = None
        query_start_loc, seq_lens = common.query_start_loc, common.seq_lens
        block_table = common.block_table_tensor
        if not mask.all():
            requests = mask.nonzero().flatten()
            tokens = token_indices(query_start_loc, requests)
            counts = (query_start_loc[1:] - query_start_loc[:-1])[requests]
            query_start_loc = torch.zeros(len(requests) + 1, dtype=torch.int32)
            query_start_loc[1:] = counts.cumsum(0)
            seq_lens, block_table = seq_lens[requests], block_table[requests]
        scheduler_metadata = vllm_ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(seq_lens),
            num_heads=self.num_heads,
            num_kv_heads=self.spec.num_kv_heads,
            head_dim=self.spec.head_size,
            seq_lens=seq_lens,
            dtype=self.spec.dtype,
            query_start_loc=query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=attention_isa(self.spec.head_size),
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        )
        return PagedRows(tokens, query_start_loc, seq_lens, block_table, scheduler_metadata)

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
