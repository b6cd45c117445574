"""Lossless speculation: the model's own tailored steps draft, and a step of exact attention judges.

vLLM makes the `Drafter` that `--speculative-config` names, gives it the model, and asks it for
drafts after every step. A draft is a decode step as it would be without speculation. It writes K
and V into the request's own blocks, beyond its tokens; the step that judges the drafts writes all
of these slots again before it attends to them. So greedy tokens are those of full attention, whose
K and V are read once for several tokens.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_tailorkv.attention.builder import LastStep, TailorKVMetadataBuilder
from vllm_tailorkv.attention.carried import plan_of
from vllm_tailorkv.attention.impl import TailorKVImpl

Ints = npt.NDArray[np.integer[Any]]


class Drafter:
    """What vLLM's speculation asks for drafts.

    Args:
        vllm_config: the engine's.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        assert vllm_config.speculative_config is not None
        self.vllm_config = vllm_config
        self.most_drafts = vllm_config.speculative_config.num_speculative_tokens
        self.most_tokens = vllm_config.model_config.max_model_len
        self.exact_below = plan_of(vllm_config).config.exact_below
        self.block_size = vllm_config.cache_config.block_size
        self.model: Any = None
        self._builders: dict[str, TailorKVMetadataBuilder] = {}

    def load_model(self, target_model: torch.nn.Module) -> None:
        """Draft with the model that is served."""
        self.model = target_model

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: Ints,
        token_ids_cpu: Ints,
        slot_mappings: object = None,
    ) -> list[list[int]]:
        """Draft what follows each request's tokens.

        Args:
            sampled_token_ids: what the step has given each request; none to one whose prompt is
                being read.
            num_tokens_no_spec: int [>= R]; tokens of each request, these included.
            token_ids_cpu: int [>= R, >= tokens].

        Returns:
            Drafts of each request, at most as many as `num_speculative_tokens`: none where
            attention is exact anyway.
        """
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        starts = num_tokens_no_spec[: len(drafts)].astype(np.int64)
        asking = np.array([len(given) > 0 for given in sampled_token_ids], dtype=bool)
        asking &= starts > self.exact_below
        if not asking.any():
            return drafts
        last = self._last_step()
        rooms = self._rooms(last, starts)
        inputs = token_ids_cpu[np.arange(len(drafts)), starts - 1]
        for index in range(self.most_drafts):
            rows = np.flatnonzero(asking & (index < rooms))
            if not len(rows):
                break
            tokens = self._step(last, rows, inputs[rows], starts[rows] + index, index)
            inputs[rows] = tokens
            for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
                drafts[row].append(token)
        return drafts

    def _rooms(self, last: LastStep, starts: Ints) -> Ints:
        """How many drafts of each request have a slot, and are followed by one more token."""
        # The last step's tokens, drafts included, all had slots: their blocks are the request's.
        ends = last.seq_lens.numpy().astype(np.int64)
        slots = -(-ends // self.block_size) * self.block_size - starts + 1
        return np.minimum(slots, self.most_tokens - 1 - starts)

    def _step(self, last: LastStep, rows: Ints, inputs: Ints, lengths: Ints, index: int) -> Ints:
        """One decode step of some of the requests.

        Args:
            last: the engine's last step.
            rows: the requests' rows there.
            inputs: the newest token of each.
            lengths: tokens of each, the newest included.
            index: of the draft.

        Returns:
            The likeliest token of each.
        """
        count = len(rows)
        table = last.block_table[torch.from_numpy(rows)]
        positions = torch.from_numpy(lengths - 1)
        blocks = table.gather(1, (positions // self.block_size).unsqueeze(1)).squeeze(1)
        bounds = torch.arange(count + 1, dtype=torch.int32)
        batch = CommonAttentionMetadata(
            query_start_loc=bounds,
            query_start_loc_cpu=bounds,
            seq_lens=torch.from_numpy(lengths.astype(np.int32)),
            num_reqs=count,
            num_actual_tokens=count,
            max_query_len=1,
            max_seq_len=int(lengths.max()),
            block_table_tensor=table,
            slot_mapping=blocks.long() * self.block_size + positions % self.block_size,
            causal=True,
        )
        built = {
            builder: builder.build_for_drafting(batch, index)
            for builder in dict.fromkeys(self._builders.values())
        }
        metadata = {name: built[builder] for name, builder in self._builders.items()}
        with set_forward_context(metadata, self.vllm_config, num_tokens=count):
            hidden = self.model(
                input_ids=torch.from_numpy(inputs.astype(np.int32)),
                positions=positions,
                intermediate_tensors=None,
                inputs_embeds=None,
            )
        best: Ints = self.model.compute_logits(hidden).argmax(dim=-1).numpy()
        return best

    def _last_step(self) -> LastStep:
        """What the builders were last given."""
        if not self._builders:
            layers = get_layers_from_vllm_config(self.vllm_config, AttentionLayerBase)
            for name, layer in layers.items():
                assert isinstance(layer.impl, TailorKVImpl)
                assert layer.impl.builder is not None
                self._builders[name] = layer.impl.builder
        last = next(iter(self._builders.values())).last
        assert last is not None
        return last
