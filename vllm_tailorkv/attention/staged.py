"""Exact attention on GPUs for rows with several query tokens: prompts, and drafts.

A prompt without a prefix is attended from the K and V at hand. Where a prefix lies on the host, the
contexts of some requests are staged: gathered into one buffer, and attended from there. A context
beyond the buffer is staged piece by piece, and the results are merged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch.nn.functional import pad
from vllm.config import VllmConfig
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

from vllm_tailorkv.attention.metadata import Step
from vllm_tailorkv.attention.varlen import Call, Contexts, Varlen
from vllm_tailorkv.kernels import ops, plain
from vllm_tailorkv.kernels.composed import SCORES_BYTES
from vllm_tailorkv.kernels.dispatch import choose

STAGING_BYTES = 512 << 20
"""Of the buffer, where the attention op can merge pieces; else it holds the longest context."""


@dataclass(frozen=True)
class Piece:
    """A part of the contexts of a pack, staged at once.

    first_token: where the part starts in each context.
    contexts: where it lies in the buffer.
    causal: whether the query tokens are the last ones of it; else they come after it.
    """

    first_token: int
    contexts: Contexts
    causal: bool


@dataclass(frozen=True)
class Pack:
    """Requests that are attended together.

    tokens: their query tokens in the batch.
    block_table: int32 [n, max_blocks].
    pieces: the parts of their contexts, the last of them causal.
    fresh: whether all their K and V are at hand, so that nothing is staged.
    """

    tokens: slice
    block_table: torch.Tensor
    pieces: list[Piece]
    fresh: bool


class Staging:
    """The buffer of one worker's layers, and how their attention is computed from it.

    Args:
        varlen: the attention op.
        num_kv_heads, head_size, dtype: of the layers.
        vllm_config: tells the longest context, and how many tokens a step has.
    """

    def __init__(
        self,
        varlen: Varlen,
        num_kv_heads: int,
        head_size: int,
        dtype: torch.dtype,
        vllm_config: VllmConfig,
    ) -> None:
        self.varlen = varlen
        self.row = (num_kv_heads, head_size)
        self.dtype = dtype
        longest = vllm_config.model_config.max_model_len
        rows = vllm_config.scheduler_config.max_num_seqs
        self._scores_bytes = min(SCORES_BYTES, 4 * rows * num_kv_heads * longest)
        self.capacity: int = longest
        """Tokens of the buffer."""
        if varlen.merges:
            fits = STAGING_BYTES // (2 * num_kv_heads * head_size * dtype.itemsize)
            # The last piece of a context has all query tokens, and as many before them.
            step = 2 * vllm_config.scheduler_config.max_num_batched_tokens + _ALIGNED
            self.capacity = min(longest, max(fits, step))

    def buffer(self, device: torch.device) -> torch.Tensor:
        """For K and V [2, capacity, Hk, d]; one size, so that torch hands out the same memory."""
        return torch.empty(2, self.capacity, *self.row, dtype=self.dtype, device=device)

    def reserve(self, device: torch.device) -> None:
        """Take once, and let go of, what a step takes: vLLM's measure of memory sees it so."""
        buffer = 2 * self.capacity * prod(self.row) * self.dtype.itemsize
        scores = self._scores_bytes
        if choose("select_topk", device.type).name == "plain":
            scores += plain.SELECT_SCRATCH * scores
        torch.empty(max(buffer, scores), dtype=torch.uint8, device=device)

    def plan(
        self,
        runs: Sequence[tuple[int, int]],
        starts: Sequence[int],
        lengths: Sequence[int],
        common: CommonAttentionMetadata,
    ) -> "StagedRows | None":
        """Pack the requests of some runs, or None if there are none.

        Args:
            runs: first requests, and those after the last.
            starts: the first query token of each request, and their count.
            lengths: tokens in context of each request, at the most.
        """
        packs = []
        for first, last in runs:
            start = first
            while start < last:
                end = self._end(start, last, starts, lengths)
                packs.append(self._pack(start, end, starts, lengths, common))
                start = end
        return StagedRows(packs, self) if packs else None

    def _end(self, start: int, last: int, starts: Sequence[int], lengths: Sequence[int]) -> int:
        """Where the pack ends that starts with a request: all fresh, or all in the buffer."""

        def fresh(request: int) -> bool:
            return starts[request + 1] - starts[request] == lengths[request]

        end, total = start + 1, lengths[start]
        while end < last and fresh(end) == fresh(start):
            total += lengths[end]
            if not fresh(start) and total > self.capacity:
                break
            end += 1
        return end

    def _pack(
        self,
        first: int,
        last: int,
        starts: Sequence[int],
        lengths: Sequence[int],
        common: CommonAttentionMetadata,
    ) -> Pack:
        query_lens = [starts[i + 1] - starts[i] for i in range(first, last)]
        context_lens = list(lengths[first:last])
        query_start = common.query_start_loc[first : last + 1] - starts[first]
        tokens = slice(starts[first], starts[last])
        table = common.block_table_tensor[first:last]
        if query_lens == context_lens:
            contexts = Contexts(query_start, query_start, query_lens, query_lens)
            return Pack(tokens, table, [Piece(0, contexts, True)], True)
        # Lengths as the device knows them: here, drafts not yet rejected may be counted.
        ends = common.seq_lens[first:last].cumsum(0, dtype=torch.int32)
        pieces = []
        if sum(context_lens) > self.capacity:
            # A single request. Its query tokens, and drafts that are not, lie in the last piece.
            before = max(0, context_lens[0] - 2 * query_lens[0]) // _ALIGNED * _ALIGNED
            for first_token in range(0, before, self.capacity):
                count = min(self.capacity, before - first_token)
                bounds = async_tensor_h2d([0, count], device=ends.device, dtype=torch.int32)
                contexts = Contexts(query_start, bounds, query_lens, [count])
                pieces.append(Piece(first_token, contexts, False))
            ends, context_lens = ends - before, [context_lens[0] - before]
            last_first = before
        else:
            last_first = 0
        contexts = Contexts(query_start, pad(ends, (1, 0)), query_lens, context_lens)
        pieces.append(Piece(last_first, contexts, True))
        return Pack(tokens, table, pieces, False)


_ALIGNED = 64
"""Pieces start at multiples of so many tokens."""


@dataclass(frozen=True)
class StagedRows:
    """The rows of a step that are attended this way."""

    packs: list[Pack]
    staging: Staging

    def attend(self, step: Step) -> None:
        """See `ExactRows`."""
        buffer = None
        for pack in self.packs:
            query, output = step.query[pack.tokens], step.output[pack.tokens]
            key, value = step.key[pack.tokens], step.value[pack.tokens]
            if not pack.fresh:
                if buffer is None:
                    buffer = self.staging.buffer(query.device)
                key, value = buffer
            parts = []
            for piece in pack.pieces:
                if not pack.fresh:
                    ops.stage_rows(
                        key,
                        value,
                        step.host.key,
                        step.host.value,
                        pack.block_table,
                        piece.contexts.context_start,
                        first_token=piece.first_token,
                        max_tokens=max(piece.contexts.context_lens),
                    )
                target = output if piece is pack.pieces[0] else torch.empty_like(query)
                call = Call(
                    query,
                    key,
                    value,
                    piece.contexts,
                    target,
                    piece.causal,
                    step.scale,
                    step.softcap,
                    None if self.staging.varlen.merges else step.sink_logits,
                )
                parts.append((target, self.staging.varlen.attend(call)))
                if len(parts) == 2:
                    parts = [_merged(*parts[0], *parts[1])]
            result, log_sum = parts[0]
            if step.sink_logits is not None and log_sum is not None:
                result = _with_sinks(result, log_sum, step.sink_logits)
            if result is not output:
                output.copy_(result)


def _with_sinks(
    output: torch.Tensor, log_sum: torch.Tensor, sink_logits: torch.Tensor
) -> torch.Tensor:
    """An attention whose heads pay to their sink logits too: the tokens' share of all is kept."""
    share = torch.sigmoid(log_sum.T - sink_logits)
    return output * share.unsqueeze(-1)


def _merged(
    output: torch.Tensor,
    log_sum: torch.Tensor | None,
    other: torch.Tensor,
    other_log_sum: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention over two parts of a context, and its log of sums; see `Varlen`."""
    assert log_sum is not None
    assert other_log_sum is not None
    merged, merged_log_sum = torch.empty_like(output), torch.empty_like(log_sum)
    merge_attn_states(merged, output, log_sum, other, other_log_sum, merged_log_sum)
    return merged, merged_log_sum
