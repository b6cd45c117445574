"""Dense preferences of all layers, recorded by each worker while vLLM reads one prompt."""

import os
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index

from vllm_tailorkv.attention.cpu_batch import PagedRows
from vllm_tailorkv.attention.impl import TailorKVImpl
from vllm_tailorkv.attention.metadata import TailorKVMetadata
from vllm_tailorkv.attention.sinks import sink_logits
from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.kernels import ops

EXTENSION_PATH = "vllm_tailorkv.attention.recorder.RecorderExtension"


class ProgressFile:
    """A number that one process writes and another reads.

    Args:
        path: a file that exists; empty, it holds 0.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("r+b", buffering=0)

    def write(self, number: int) -> None:
        """Set it, in one call to the system: a reader sees the old one or the new."""
        os.pwrite(self._file.fileno(), number.to_bytes(8, "little"), 0)

    def read(self) -> int:
        """Get it."""
        return int.from_bytes(os.pread(self._file.fileno(), 8, 0), "little")


@dataclass(frozen=True)
class Recording:
    """What is recorded.

    Args:
        prompt_tokens: tokens of the prompt.
        queries: its last queries that count, at most `prompt_tokens`.
        alpha: share of the context whose largest weights are summed.
    """

    prompt_tokens: int
    queries: int
    alpha: float


class LayerRecorder:
    """Keeps the prompt's last queries of one layer, and scores them when its keys are complete.

    A prompt may come in chunks: queries wait for the last one. Keys are read where they lie, in
    the host pages, one KV head at a time, so that no more than one head's keys are copied and
    the op holds a few rows of attention.
    """

    def __init__(self, impl: TailorKVImpl, recording: Recording) -> None:
        self.impl = impl
        self.recording = recording
        self.seen = 0
        self.scores: list[float] | None = None
        self._queries: torch.Tensor | None = None

    def observe(self, query: torch.Tensor, metadata: TailorKVMetadata) -> None:
        """Take one step's queries; the observer of `TailorKVImpl`.

        Args:
            query: [T, H, d].

        Raises:
            TailorKVError: another request is in the batch.
        """
        rows = metadata.exact
        if rows is not None and not isinstance(rows, PagedRows):
            raise TailorKVError(
                "identify: it runs on CPUs only; the profile that it writes there serves GPUs too"
            )
        if rows is None or metadata.decode is not None or len(rows.seq_lens) != 1:
            raise TailorKVError(
                "identify: another request is in the batch; leave the engine to the one prompt"
            )
        length = int(rows.seq_lens[0])
        self.seen = length
        wanted = self.recording.prompt_tokens - self.recording.queries
        start = length - len(query)
        first = max(start, wanted)
        if first < length:
            if self._queries is None:
                self._queries = query.new_empty(self.recording.queries, *query.shape[1:])
            self._queries[first - wanted : length - wanted] = query[first - start :]
        if length == self.recording.prompt_tokens:
            self.scores = self._score(rows.block_table[0], length)

    def _score(self, block_table: torch.Tensor, length: int) -> list[float]:
        impl, pages, queries = self.impl, self.impl.pages, self._queries
        assert pages is not None and queries is not None
        key_pages = pages.host.key
        blocks = block_table[: ceil(length / key_pages.shape[2])].long()
        scores: list[float] = []
        sinks = sink_logits(impl.sinks)
        for head, group in enumerate(queries.chunk(impl.num_kv_heads, dim=1)):
            key = key_pages[blocks, head].flatten(0, 1)[:length].unsqueeze(1)
            preference = ops.dense_preference(
                group.contiguous(),
                key.contiguous(),
                alpha=self.recording.alpha,
                scale=impl.scale,
                softcap=impl.softcap,
                sink_logits=None if sinks is None else sinks.chunk(impl.num_kv_heads)[head],
            )
            scores += preference.tolist()
        return scores


class RecorderExtension:
    """What `worker_extension_cls` adds to a worker, for `collective_rpc`."""

    vllm_config: VllmConfig
    rank: int

    def tailorkv_start_recording(
        self, prompt_tokens: int, queries: int, alpha: float, progress: str
    ) -> int:
        """Record the next prompt.

        Args:
            prompt_tokens, queries, alpha: see `Recording`.
            progress: the `ProgressFile` to which the first worker writes how many tokens its
                layers have seen, all together.

        Returns:
            The number of layers that this worker records.
        """
        recording = Recording(prompt_tokens, queries, alpha)
        recorders: dict[int, LayerRecorder] = {}
        file = ProgressFile(Path(progress)) if self.rank == 0 else None

        def observer(recorder: LayerRecorder) -> Any:
            def observe(query: torch.Tensor, metadata: TailorKVMetadata) -> None:
                recorder.observe(query, metadata)
                if file is not None:
                    file.write(sum(one.seen for one in recorders.values()))

            return observe

        for name, layer in self._tailorkv_layers().items():
            recorder = LayerRecorder(layer, recording)
            recorders[extract_layer_index(name)] = recorder
            layer.observer = observer(recorder)
        self._tailorkv_recorders = recorders
        return len(recorders)

    def tailorkv_take_scores(self) -> tuple[int, list[tuple[int, list[float]]]]:
        """Stop recording.

        Returns:
            The tensor-parallel rank, and each recorded layer with the scores of its query heads
            on this rank.

        Raises:
            TailorKVError: the prompt was not read to its end.
        """
        for layer in self._tailorkv_layers().values():
            layer.observer = None
        scores = []
        for index, recorder in self._tailorkv_recorders.items():
            if recorder.scores is None:
                raise TailorKVError(
                    f"identify: layer {index} saw {recorder.seen} of "
                    f"{recorder.recording.prompt_tokens} tokens; leave prefix caching off"
                )
            scores.append((index, recorder.scores))
        self._tailorkv_recorders = {}
        return get_tensor_model_parallel_rank(), scores

    def _tailorkv_layers(self) -> dict[str, TailorKVImpl]:
        context = self.vllm_config.compilation_config.static_forward_context
        found = {name: getattr(layer, "impl", None) for name, layer in context.items()}
        return {name: impl for name, impl in found.items() if isinstance(impl, TailorKVImpl)}
