"""A batch's metadata, built once a step for all layers of one spec."""

from dataclasses import dataclass

import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import get_num_attention_heads_from_layers
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_tailorkv.attention.carried import plan_of
from vllm_tailorkv.attention.rows import (
    completed_groups,
    decode_mask,
    tail_starts,
    token_indices,
)
from vllm_tailorkv.attention.spec import TailorKVSpec
from vllm_tailorkv.attention.workspace import Workspace
from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.failures import noted


@dataclass
class ExactRows:
    """The rows that vLLM's own attention op serves, as it wants them.

    tokens: int64, their query tokens in the batch; None if they are all of it.
    query_start_loc, seq_lens: int32; block_table: int32 [n, max_blocks].
    scheduler_metadata: vLLM's plan of the work over threads.
    """

    tokens: torch.Tensor | None
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    scheduler_metadata: torch.Tensor


@dataclass
class DecodeRows:
    """The rows that the tailored ops serve, one query token each.

    tokens: int64 [R], their query tokens in the batch; None if they are all of it.
    seq_lens: int32 [R]; block_table: int32 [R, max_blocks].
    tail_start: int32 [R]; a dense layer reads codes before it, a sparse layer's exact tail
        starts there.
    max_tail_start: the largest of them.
    """

    tokens: torch.Tensor | None
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    tail_start: torch.Tensor
    max_tail_start: int


@dataclass
class TailorKVMetadata(AttentionMetadata):
    """What every layer of one spec needs to know of a batch.

    num_actual_tokens: query tokens, padding excluded.
    slot_mapping: int64 [>= num_actual_tokens].
    groups: int64 [N], the groups that this step completes.
    """

    num_actual_tokens: int
    slot_mapping: torch.Tensor
    groups: torch.Tensor
    exact: ExactRows | None
    decode: DecodeRows | None
    workspace: Workspace


def attention_isa(head_size: int) -> str:
    """The variant of vLLM's CPU attention op whose page layout is known.

    vLLM's own choice may be one with another K layout (AMX).
    """
    return "vec" if head_size % 32 == 0 else "vec16"


class TailorKVMetadataBuilder(AttentionMetadataBuilder[TailorKVMetadata]):
    """Builds `TailorKVMetadata` for the layers of one spec."""

    @noted
    def __init__(
        self,
        kv_cache_spec: KVCacheSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if not isinstance(kv_cache_spec, TailorKVSpec):
            raise TailorKVError(
                f"--attention-backend tailorkv: layers such as {layer_names[0]} have a cache of "
                f"type {type(kv_cache_spec).__name__}, which is not supported"
            )
        self.spec = kv_cache_spec
        self.config = plan_of(vllm_config).config
        self.num_heads = get_num_attention_heads_from_layers(
            vllm_config, layer_names
        ) or vllm_config.model_config.get_num_attention_heads(vllm_config.parallel_config)
        self.workspace = Workspace()

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> TailorKVMetadata:
        """See `AttentionMetadataBuilder.build`."""
        common = common_attn_metadata
        if common.causal is not True:
            raise TailorKVError("--attention-backend tailorkv serves causal attention only")
        query_lens = common.query_start_loc[1:] - common.query_start_loc[:-1]
        mask = decode_mask(
            query_lens, common.seq_lens, common.is_prefilling, self.config.exact_below
        )
        return TailorKVMetadata(
            num_actual_tokens=common.num_actual_tokens,
            slot_mapping=common.slot_mapping,
            groups=completed_groups(
                query_lens,
                common.seq_lens,
                common.block_table_tensor,
                self.spec.layout.group_size,
                self.spec.block_size,
            ),
            exact=self._exact_rows(common, ~mask),
            decode=self._decode_rows(common, mask),
            workspace=self.workspace,
        )

    def _exact_rows(self, common: CommonAttentionMetadata, mask: torch.Tensor) -> ExactRows | None:
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
        scheduler_metadata = ops.cpu_attn_get_scheduler_metadata(
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
        return ExactRows(tokens, query_start_loc, seq_lens, block_table, scheduler_metadata)

    def _decode_rows(
        self, common: CommonAttentionMetadata, mask: torch.Tensor
    ) -> DecodeRows | None:
        if not mask.any():
            return None
        requests = mask.nonzero().flatten()
        every = len(requests) == len(mask)
        seq_lens = common.seq_lens if every else common.seq_lens[requests]
        table = common.block_table_tensor if every else common.block_table_tensor[requests]
        tokens = None if every else common.query_start_loc[requests].long()
        layout = self.spec.layout
        tail_start = tail_starts(seq_lens, layout.kind, layout.group_size, self.config)
        return DecodeRows(tokens, seq_lens, table, tail_start, int(tail_start.max()))
