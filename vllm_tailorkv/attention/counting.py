"""What the layers of one spec do in a step, counted once from lengths that the CPU knows.

Nothing is measured and no device is asked, so that a step that replays as a CUDA graph is counted
like any other. Bytes are those of the elements that the ops need, each once a step and layer: what
caches hold, and whole cache lines around single elements, do not count.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_tailorkv.attention import metrics
from vllm_tailorkv.attention.meters import Meter, Metric, meter
from vllm_tailorkv.attention.rows import decode_mask, tail_starts
from vllm_tailorkv.config import TailorKVConfig
from vllm_tailorkv.kernels.types import SPREAD_GROUPS
from vllm_tailorkv.layout import DerivedKind, PageLayout

Array = npt.NDArray[Any]


class StepCounts(NamedTuple):
    """What one layer does in a step; names as those of the metrics.

    host_read: bytes, by decode steps, by attention in full, and to derive records.
    """

    decode_rows: int
    exact_rows: int
    context_tokens: int
    selected_tokens: int
    quantized_groups: int
    host_read_decode: int
    host_read_exact: int
    host_read_derive: int
    host_written: int
    derived_read: int
    derived_written: int


_OF_WRITERS = {"quantized_groups", "host_read_derive", "host_written", "derived_written"}


class StepCounter:
    """Counts for the layers of one spec.

    Args:
        layout: of their pages.
        config: the options.
        layers: how many they are.
        sharing: how many of them read K and V of another one, and write none.
        on_gpu: whether prompts without a prefix are attended from the K and V at hand.
        first_rank: whether rows and tokens are counted here, not only bytes: tensor parallel ranks
            serve the same rows, each some heads of them.
    """

    def __init__(
        self,
        layout: PageLayout,
        config: TailorKVConfig,
        layers: int,
        sharing: int = 0,
        *,
        on_gpu: bool = False,
        first_rank: bool = True,
    ) -> None:
        self.layout, self.config = layout, config
        self.layers, self.writers, self.on_gpu = layers, layers - sharing, on_gpu
        self._row_bytes = layout.num_kv_heads * layout.head_size * layout.kv_itemsize
        used = sum(field.num_bytes for field in layout.fields.values())
        self._record_bytes = layout.num_kv_heads * used
        kind = layer_kind(layout)
        always: list[tuple[str, Metric, tuple[str, ...]]] = [
            ("host_read_decode", metrics.HOST_READ, ("decode",)),
            ("host_read_exact", metrics.HOST_READ, ("exact",)),
            ("host_read_derive", metrics.HOST_READ, ("derive",)),
            ("host_written", metrics.HOST_WRITTEN, ()),
            ("derived_read", metrics.DERIVED_READ, ()),
            ("derived_written", metrics.DERIVED_WRITTEN, ()),
        ]
        once: list[tuple[str, Metric, tuple[str, ...]]] = [
            ("decode_rows", metrics.DECODE_ROWS, ()),
            ("exact_rows", metrics.EXACT_ROWS, ()),
            ("context_tokens", metrics.CONTEXT_TOKENS, ()),
            ("quantized_groups", metrics.QUANTIZED_GROUPS, ()),
        ]
        if layout.kind is not DerivedKind.DENSE:
            once.append(("selected_tokens", metrics.SELECTED_TOKENS, ()))
        self._meters: list[tuple[int, int, Meter]] = [
            (
                StepCounts._fields.index(name),
                self.writers if name in _OF_WRITERS else self.layers,
                meter(metric, kind, *labels),
            )
            for name, metric, labels in always + (once if first_rank else [])
        ]

    def count(self, common: CommonAttentionMetadata) -> None:
        """Count the step of a batch; one of vLLM's own, for a warm-up or a graph, is none."""
        starts, lengths = common.query_start_loc_cpu, common.seq_lens
        if lengths.device.type != "cpu":
            if common.seq_lens_cpu_upper_bound is None:
                return
            # Drafts that will be rejected may be counted in it.
            lengths = common.seq_lens_cpu_upper_bound
        # Arrays, because a call of torch's costs two or three times as much.
        bounds, ends = starts.numpy(), lengths.numpy()
        query_lens, prefilling = bounds[1:] - bounds[:-1], None
        if common.is_prefilling is not None:
            prefilling = common.is_prefilling.numpy()
            # What has no entry there is padding.
            query_lens, ends = query_lens[: len(prefilling)], ends[: len(prefilling)]
            # A request's first tokens are its prompt's: rows that have none are no request's.
            if len(ends) and not prefilling[0] and ends[0] <= query_lens[0]:
                return
        counts = self.of_rows(query_lens, ends, prefilling)
        for index, layers, one in self._meters:
            if amount := counts[index] * layers:
                one.add(amount)

    def of_rows(self, query_lens: Array, ends: Array, prefilling: Array | None) -> StepCounts:
        """What one layer does for these requests.

        Args:
            query_lens, ends: int32 [R]; tokens of this step, and in context.
            prefilling: bool [R], or None if no prompt is among them.
        """
        layout = self.layout
        decode = decode_mask(query_lens, ends, prefilling, self.config.exact_below)
        contexts = ends[decode]
        tails = tail_starts(contexts, layout.kind, layout.group_size, self.config)
        context_tokens = int(contexts.sum())
        groups = int((ends // layout.group_size - (ends - query_lens) // layout.group_size).sum())
        read_again = ~decode
        if self.on_gpu:
            read_again &= query_lens < ends
        if layout.kind is DerivedKind.DENSE:
            coded, selected, parts = int(tails.sum()), 0, 2
            read = 2 * (context_tokens - coded) * self._row_bytes
            derived_read = coded // layout.group_size * self._record_bytes
        else:
            selected, read, derived_read = self._sparse(tails, context_tokens)
            parts = 1
        total, decode_rows = int(query_lens.sum()), len(contexts)
        return StepCounts(
            decode_rows=decode_rows,
            exact_rows=total - decode_rows,
            context_tokens=context_tokens,
            selected_tokens=selected,
            quantized_groups=groups,
            host_read_decode=read,
            host_read_exact=2 * int(ends[read_again].sum()) * self._row_bytes,
            host_read_derive=parts * groups * layout.group_size * self._row_bytes,
            host_written=total * layout.host_parts * self._row_bytes,
            derived_read=derived_read,
            derived_written=groups * self._record_bytes,
        )

    def _sparse(self, tails: Array, context_tokens: int) -> tuple[int, int, int]:
        """Tokens selected, bytes of K and V read, bytes of the index read, of all rows."""
        layout, config = self.layout, self.config
        middles = (tails - config.sink_tokens).clip(min=0)
        selected = int(np.minimum(middles, config.topk_tokens).sum())
        proposed = int(np.minimum(middles, config.candidate_tokens).sum())
        attended = context_tokens - int(middles.sum()) + selected
        # V of what is attended to, K of it and of the candidates that were dropped.
        read = (2 * attended + proposed - selected) * self._row_bytes
        groups = (middles > 0) * -(-tails // layout.group_size)
        if layout.kind is DerivedKind.ONEBIT:
            return selected, read, int(groups.sum()) * self._record_bytes
        channel = layout.num_kv_heads * layout.kv_itemsize * layout.group_size
        read += int(groups.sum()) * channel * config.critical_channels
        strides = np.maximum(-(-groups // SPREAD_GROUPS), 1)
        return selected, read, int((-(-groups // strides)).sum()) * self._record_bytes


def layer_kind(layout: PageLayout) -> str:
    """What the label `layers` says."""
    return "dense" if layout.kind is DerivedKind.DENSE else "sparse"
