"""What full attention thinks at every step of a text, kept in a file and compared with others."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vllm_tailorkv.files import replaced

_EXACT = 64


@dataclass(frozen=True)
class Reference:
    """Log-probabilities of `steps` decode steps over the whole vocabulary, in a file.

    They are kept in float16, the likeliest 64 of a step also in float32: so a divergence from them
    is right to 1e-4 nats and better.
    """

    path: Path
    steps: int

    @property
    def complete(self) -> bool:
        """It was recorded to its end."""
        return self._likeliest.exists()

    @property
    def _likeliest(self) -> Path:
        return self.path.with_suffix(".likeliest.npz")

    def forget(self) -> None:
        """It is not complete any more."""
        self._likeliest.unlink(missing_ok=True)

    def row(self, step: int, vocab_size: int) -> Tensor:
        """The log-probabilities of a step, float32 [V]."""
        kept = np.memmap(self.path, np.float16, "r", shape=(self.steps, vocab_size))
        row = torch.from_numpy(kept[step].astype(np.float32))
        indices, values = self._exact[step]
        row[indices] = values
        return row

    def complete_with(self, indices: np.ndarray, values: np.ndarray) -> None:
        """The likeliest tokens of each step and their log-probabilities, both [steps, n]."""
        # Written last and all at once: where it is, the reference is complete.
        with replaced(self._likeliest) as file:
            np.savez(file, indices=indices, values=values)

    @cached_property
    def _exact(self) -> list[tuple[Tensor, Tensor]]:
        with np.load(self._likeliest) as file:
            pairs = zip(file["indices"], file["values"], strict=True)
            return [(torch.from_numpy(i), torch.from_numpy(v)) for i, v in pairs]


class Recorder:
    """Writes a reference as the steps go by. The first place belongs to the prompt: left out."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self._indices: list[np.ndarray] = []
        self._values: list[np.ndarray] = []
        reference.path.parent.mkdir(parents=True, exist_ok=True)
        reference.forget()

    def __call__(self, place: int, logits: Tensor) -> None:
        """See `engine.Watch`."""
        step = place - 1
        if not 0 <= step < self.reference.steps:
            return
        row = logits.float().log_softmax(-1)
        shape = (self.reference.steps, len(row))
        kept = np.memmap(self.reference.path, np.float16, "r+" if step else "w+", shape=shape)
        kept[step] = row.half().cpu().numpy()
        top = row.topk(min(_EXACT, len(row)))
        self._indices.append(top.indices.cpu().numpy())
        self._values.append(top.values.cpu().numpy())

    def finish(self) -> None:
        """All steps were seen."""
        # Rows must be on disk before anything says that they are there.
        with self.reference.path.open("rb") as file:
            os.fsync(file.fileno())
        self.reference.complete_with(np.stack(self._indices), np.stack(self._values))


class Comparison:
    """Compares the steps of a method with a reference.

    divergences: Kullback-Leibler, of the method from full attention, nats; one a step.
    agreed: both think the same token likeliest.
    """

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.divergences: list[float] = []
        self.agreed: list[bool] = []

    def __call__(self, place: int, logits: Tensor) -> None:
        """See `engine.Watch`."""
        step = place - 1
        if not 0 <= step < self.reference.steps:
            return
        full = self.reference.row(step, logits.shape[-1])
        ours = logits.float().log_softmax(-1).cpu()
        self.divergences.append(divergence(full, ours))
        self.agreed.append(bool(full.argmax() == ours.argmax()))


def divergence(full: Tensor, ours: Tensor) -> float:
    """Sum of p (log p - log q) over log-probabilities [V], nats. What has p = 0 adds nothing."""
    terms = full.exp() * (full - ours)
    return float(terms.masked_fill(full == -torch.inf, 0.0).double().sum())
