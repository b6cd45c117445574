"""Batches on GPUs: planned from what the CPU knows, without waiting for the device.

What the layers read lies in buffers that stay where they are, because a CUDA graph reads them again
in every step: the runner's own, and two of ours. Single tokens of a request are one kind of row,
whatever they are. Where all of a context is attended (short contexts, the last token of a prompt)
its exact tail starts at 0, so that one graph serves all.
"""

from itertools import pairwise

import torch
from vllm.config import VllmConfig
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_tailorkv.attention.metadata import DecodeRows, TailorKVMetadata
from vllm_tailorkv.attention.rows import completed_groups, tail_starts
from vllm_tailorkv.attention.spec import TailorKVSpec
from vllm_tailorkv.attention.staged import StagedRows, Staging
from vllm_tailorkv.attention.workspace import Workspace
from vllm_tailorkv.config import TailorKVConfig

_ALIGNED = 64


class GpuBatch:
    """Makes the metadata of batches for the layers of one spec."""

    def __init__(
        self,
        spec: TailorKVSpec,
        config: TailorKVConfig,
        vllm_config: VllmConfig,
        device: torch.device,
        staging: Staging,
    ) -> None:
        self.spec = spec
        self.config = config
        self.device = device
        self.staging = staging
        self.workspace = Workspace(device)
        rows = max(
            vllm_config.scheduler_config.max_num_seqs,
            vllm_config.compilation_config.max_cudagraph_capture_size or 0,
        )
        self._tail_start = torch.zeros(rows, dtype=torch.int32, device=device)
        self._groups = torch.full((rows,), -1, dtype=torch.int64, device=device)

    def build(self, common: CommonAttentionMetadata) -> TailorKVMetadata:
        """See `AttentionMetadataBuilder.build`."""
        starts = common.query_start_loc_cpu[: common.num_reqs + 1].tolist()
        first, last = single_token_rows(starts)
        return TailorKVMetadata(
            num_actual_tokens=common.num_actual_tokens,
            slot_mapping=common.slot_mapping,
            groups=self._completed(common, starts, first, last),
            single_tokens=last - first == common.num_reqs,
            exact=self._exact_rows(common, starts, first, last),
            decode=self._decode_rows(common, starts, first, last),
            workspace=self.workspace,
        )

    def _completed(
        self, common: CommonAttentionMetadata, starts: list[int], first: int, last: int
    ) -> torch.Tensor:
        """Groups that the step completes, in a buffer of ours if all its rows are single tokens."""
        size = self.spec.layout.group_size
        tokens = common.num_actual_tokens
        groups = completed_groups(common.slot_mapping[:tokens], size)
        if last - first == common.num_reqs:
            kept = self._groups[:tokens]
            return kept.copy_(groups)
        # A row of n tokens ends n / size groups and one more at the most.
        counts = (end - start for start, end in pairwise(starts))
        most = sum(count // size + 1 for count in counts)
        return groups.topk(most).values if most < tokens else groups

    def _decode_rows(
        self, common: CommonAttentionMetadata, starts: list[int], first: int, last: int
    ) -> DecodeRows | None:
        count = last - first
        if not count:
            return None
        layout, seq_lens = self.spec.layout, common.seq_lens[first:last]
        exact = seq_lens <= self.config.exact_below
        if common.is_prefilling is not None:
            prompts = common.is_prefilling[first:last]
            if prompts.any():
                # Rows of padding have no entry.
                padded = torch.zeros(count, dtype=torch.bool)
                padded[: len(prompts)] = prompts
                exact |= async_tensor_h2d(padded, device=self.device)
        formula = tail_starts(seq_lens, layout.kind, layout.group_size, self.config)
        tail_start = self._tail_start[:count]
        tail_start.copy_(formula.masked_fill(exact, 0))
        return DecodeRows(
            slice(starts[first], starts[first] + count),
            seq_lens,
            common.block_table_tensor[first:last],
            tail_start,
            # Kernels are compiled anew for a length that is no multiple of 16.
            -(-common.max_seq_len // _ALIGNED) * _ALIGNED,
        )

    def _exact_rows(
        self, common: CommonAttentionMetadata, starts: list[int], first: int, last: int
    ) -> StagedRows | None:
        if last - first == common.num_reqs:
            return None
        assert common.seq_lens_cpu_upper_bound is not None
        lengths = common.seq_lens_cpu_upper_bound.tolist()
        runs = [(0, first), (last, common.num_reqs)]
        return self.staging.plan(runs, starts, lengths, common)


def single_token_rows(starts: list[int]) -> tuple[int, int]:
    """The run of requests with one query token: the first, and the one after the last.

    vLLM sorts requests by their query tokens, but for those with drafts, which come first. Rows of
    padding, which have none, stand behind single tokens in a graph's batch.

    Args:
        starts: the first query token of each request, and their count.
    """
    counts = [end - start for start, end in pairwise(starts)]
    first = next((i for i, count in enumerate(counts) if count == 1), len(counts))
    last = first
    while last < len(counts) and counts[last] <= 1:
        last += 1
    return first, last
