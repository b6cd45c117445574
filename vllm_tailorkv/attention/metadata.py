"""What layers are told of a batch, once a step for all layers of one spec."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from vllm.v1.attention.backend import AttentionMetadata

from vllm_tailorkv.attention.workspace import Workspace
from vllm_tailorkv.cache.views import HostPages

if TYPE_CHECKING:
    from vllm_tailorkv.attention.guard import GuardedRow


class Step(NamedTuple):
    """One layer's part of a step, its K and V written.

    query, output: [T, H, d]; key, value: [T, Hk, d].
    host: the layer's pages of full precision.
    scale, softcap, sink_logits: see `kernels.ops`.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    host: HostPages
    scale: float
    softcap: float
    sink_logits: torch.Tensor | None


class ExactRows(Protocol):
    """The rows that are attended in full."""

    def attend(self, step: Step) -> None:
        """Write the attention of these rows into the step's output."""
        ...


@dataclass
class DecodeRows:
    """The rows that the tailored ops serve, one query token each.

    tokens: their query tokens in the batch, one after another or int64 [R].
    seq_lens: int32 [R]; block_table: int32 [R, max_blocks].
    tail_start: int32 [R]; a dense layer reads codes before it, a sparse layer's exact tail
        starts there; 0 where all is exact.
    max_tail_start: at least the largest of them.
    """

    tokens: slice | torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    tail_start: torch.Tensor
    max_tail_start: int


@dataclass
class TailorKVMetadata(AttentionMetadata):
    """What every layer of one spec needs to know of a batch.

    num_actual_tokens: query tokens, padding excluded.
    slot_mapping: int64 [>= num_actual_tokens].
    groups: int64 [N], the groups that this step completes; negative ones are none.
    single_tokens: whether every row has one token, and `groups` an entry for each.
    guard: the decode row that is attended exactly as well, in a step where one is.
    """

    num_actual_tokens: int
    slot_mapping: torch.Tensor
    groups: torch.Tensor
    single_tokens: bool
    exact: ExactRows | None
    decode: DecodeRows | None
    workspace: Workspace
    guard: "GuardedRow | None" = None
