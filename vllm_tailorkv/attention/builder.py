"""Builds a batch's metadata, once a step for all layers of one spec."""

from typing import NamedTuple, Protocol

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_tailorkv.attention.carried import drafts_itself, plan_of
from vllm_tailorkv.attention.counting import StepCounter
from vllm_tailorkv.attention.cpu_batch import CpuBatch
from vllm_tailorkv.attention.gpu_batch import GpuBatch
from vllm_tailorkv.attention.guard import Guard
from vllm_tailorkv.attention.hot import HotMeter
from vllm_tailorkv.attention.impl import TailorKVImpl
from vllm_tailorkv.attention.metadata import TailorKVMetadata
from vllm_tailorkv.attention.spec import TailorKVSpec
from vllm_tailorkv.config import MOST_TOKENS, TailorKVConfig
from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.failures import noted
from vllm_tailorkv.kernels.dispatch import GPU_OPS, choose
from vllm_tailorkv.layout import DerivedKind


class Batch(Protocol):
    """What plans batches where their tensors are."""

    def build(self, common: CommonAttentionMetadata) -> TailorKVMetadata:
        """See `AttentionMetadataBuilder.build`."""
        ...


class LastStep(NamedTuple):
    """Where the requests of a step lie.

    block_table: int32 [R, max_blocks]; seq_lens: int32 [R], tokens in context after it.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor


class Planner(NamedTuple):
    """Plans the batches of one kind of step, and counts what they do."""

    batch: Batch
    counter: StepCounter

    def build(self, common: CommonAttentionMetadata) -> TailorKVMetadata:
        """See `AttentionMetadataBuilder.build`."""
        metadata = self.batch.build(common)
        self.counter.count(common)
        return metadata


class TailorKVMetadataBuilder(AttentionMetadataBuilder[TailorKVMetadata]):
    """Builds `TailorKVMetadata` for the layers of one spec.

    last: where the engine's last step lay, if the model drafts for itself.
    """

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
    ) -> AttentionCGSupport:
        """On a GPU, steps of one token for each request replay as one graph."""
        if plan_of(vllm_config).on_gpu:
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return AttentionCGSupport.NEVER

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
        plan = plan_of(vllm_config)
        layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase, layer_names)
        impls = [layer.impl for layer in layers.values() if isinstance(layer.impl, TailorKVImpl)]
        batch: Batch
        config = plan.config
        if plan.on_gpu:
            for op in GPU_OPS:
                choose(op, device.type)
            staging = impls[0].staging
            assert staging is not None
            batch = GpuBatch(kv_cache_spec, config, vllm_config, device, staging)
        else:
            if drafts_itself(vllm_config):
                # What drafts is judged by: exact at any length.
                config = config.model_copy(update={"full_attention_below": MOST_TOKENS})
            batch = CpuBatch(kv_cache_spec, config)
        self.hot: HotMeter | None = None
        if plan.config.hot_tokens and kv_cache_spec.layout.kind is not DerivedKind.DENSE:
            chosen = choose("retrieve_attention", device.type)
            if chosen.name != "triton":
                raise TailorKVError(
                    f"hot_tokens={plan.config.hot_tokens} needs the ops in Triton, but "
                    f"{chosen.name} was chosen ({chosen.reason}); leave it out, or unset "
                    "VLLM_TAILORKV_KERNELS"
                )
            self.hot = HotMeter(device)
        parallel = vllm_config.parallel_config
        first_rank = parallel.rank % parallel.tensor_parallel_size == 0

        def counter(config: TailorKVConfig) -> StepCounter:
            return StepCounter(
                kv_cache_spec.layout,
                config,
                len(layer_names),
                on_gpu=plan.on_gpu,
                first_rank=first_rank,
            )

        self.served = Planner(batch, counter(config))
        self.drafted: Planner | None = None
        self.last: LastStep | None = None
        if config is not plan.config:
            self.drafted = Planner(CpuBatch(kv_cache_spec, plan.config), counter(plan.config))
            for impl in impls:
                impl.builder = self
        self.guard: Guard | None = None
        if plan.config.guard_share > 0:
            self.guard = Guard(kv_cache_spec.layout, plan.config, layer_names)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> TailorKVMetadata:
        """See `AttentionMetadataBuilder.build`."""
        if common_attn_metadata.causal is not True:
            raise TailorKVError("--attention-backend tailorkv serves causal attention only")
        if self.drafted is not None:
            lengths = common_attn_metadata.seq_lens.clone()
            self.last = LastStep(common_attn_metadata.block_table_tensor, lengths)
        if self.hot is not None:
            self.hot.look()
        return self._guarded(self.served.build(common_attn_metadata))

    def build_for_drafting(
        self, common_attn_metadata: CommonAttentionMetadata, draft_index: int
    ) -> TailorKVMetadata:
        """See `AttentionMetadataBuilder.build_for_drafting`: a step of our own `Drafter`."""
        assert self.drafted is not None
        return self._guarded(self.drafted.build(common_attn_metadata))

    def _guarded(self, metadata: TailorKVMetadata) -> TailorKVMetadata:
        if self.guard is not None:
            metadata.guard = self.guard.next(metadata.decode)
        return metadata
