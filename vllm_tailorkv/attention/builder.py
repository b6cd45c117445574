"""Builds a batch's metadata, once a step for all layers of one spec."""

from typing import Protocol

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_tailorkv.attention.carried import plan_of
from vllm_tailorkv.attention.counting import StepCounter
from vllm_tailorkv.attention.cpu_batch import CpuBatch
from vllm_tailorkv.attention.gpu_batch import GpuBatch
from vllm_tailorkv.attention.guard import Guard
from vllm_tailorkv.attention.hot import HotMeter
from vllm_tailorkv.attention.impl import TailorKVImpl
from vllm_tailorkv.attention.metadata import TailorKVMetadata
from vllm_tailorkv.attention.spec import TailorKVSpec
from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.failures import noted
from vllm_tailorkv.kernels.dispatch import GPU_OPS, choose
from vllm_tailorkv.layout import DerivedKind


class Batch(Protocol):
    """What plans batches where their tensors are."""

    def build(self, common: CommonAttentionMetadata) -> TailorKVMetadata:
        """See `AttentionMetadataBuilder.build`."""
        ...


class TailorKVMetadataBuilder(AttentionMetadataBuilder[TailorKVMetadata]):
    """Builds `TailorKVMetadata` for the layers of one spec."""

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
        self.batch: Batch
        if plan.on_gpu:
            for op in GPU_OPS:
                choose(op, device.type)
            layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase, layer_names)
            impl = layers[layer_names[0]].impl
            assert isinstance(impl, TailorKVImpl)
            assert impl.staging is not None
            self.batch = GpuBatch(kv_cache_spec, plan.config, vllm_config, device, impl.staging)
        else:
            self.batch = CpuBatch(kv_cache_spec, plan.config)
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
        self.counter = StepCounter(
            kv_cache_spec.layout,
            plan.config,
            len(layer_names),
            self._sharing(),
            on_gpu=plan.on_gpu,
            first_rank=parallel.rank % parallel.tensor_parallel_size == 0,
        )
        self.guard: Guard | None = None
        if plan.config.guard_share > 0:
            self.guard = Guard(kv_cache_spec.layout, plan.config, layer_names)

    def _sharing(self) -> int:
        """How many of the layers write no K and V: they share those of another one."""
        layers = get_layers_from_vllm_config(
            self.vllm_config, AttentionLayerBase, self.layer_names
        ).values()
        return sum(layer.impl.owner is not None for layer in layers)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> TailorKVMetadata:
        """See `AttentionMetadataBuilder.build`."""
        if common_attn_metadata.causal is not True:
            raise TailorKVError("--attention-backend tailorkv serves causal attention only")
        metadata = self.batch.build(common_attn_metadata)
        self.counter.count(common_attn_metadata)
        if self.hot is not None:
            self.hot.look()
        if self.guard is not None:
            metadata.guard = self.guard.next(metadata.decode)
        return metadata
