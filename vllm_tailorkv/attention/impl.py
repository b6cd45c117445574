"""The attention of one layer: write, derive, attend."""

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl, AttentionLayer, AttentionType

from vllm_tailorkv.attention.carried import plan_of
from vllm_tailorkv.attention.hot import make_hot_rows
from vllm_tailorkv.attention.metadata import DecodeRows, Step, TailorKVMetadata
from vllm_tailorkv.attention.name import LOGGER, OTHER_BACKEND
from vllm_tailorkv.attention.selection import (
    Layer,
    Pages,
    Selector,
    attend_retrieved,
    attend_selected,
    retrieve,
)
from vllm_tailorkv.attention.sinks import sink_logits
from vllm_tailorkv.attention.spec import TailorKVSpec
from vllm_tailorkv.attention.staged import Staging
from vllm_tailorkv.attention.varlen import Asked, choose_varlen
from vllm_tailorkv.cache.host_pool import HostPool, allocate_host_pool
from vllm_tailorkv.cache.huge_pages import advise_huge_pages
from vllm_tailorkv.cache.views import derived_pages, host_pages
from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.failures import noted
from vllm_tailorkv.kernels import ops
from vllm_tailorkv.kernels.types import DenseCodes, HotRows

if TYPE_CHECKING:
    from vllm_tailorkv.attention.builder import TailorKVMetadataBuilder

logger = init_logger(LOGGER)


class TailorKVImpl(AttentionImpl[TailorKVMetadata]):
    """Exact attention for prompts and short contexts, tailored attention for decode steps."""

    _unbind: Callable[[], object] = staticmethod(lambda: None)
    """Lets go of the pages; once, and also when vLLM drops its tensor."""

    @noted
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **unsupported: object,
    ) -> None:
        given = sorted(name for name, value in unsupported.items() if value is not None)
        if alibi_slopes is not None:
            given.append("ALiBi")
        if kv_sharing_target_layer_name is not None:
            given.append("K/V shared across layers")
        if sliding_window is not None:
            given.append("a sliding window")
        if given:
            raise TailorKVError(
                f"--attention-backend tailorkv: {', '.join(given)} is not supported; "
                f"{OTHER_BACKEND}"
            )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.softcap = logits_soft_cap or 0.0
        self.sinks = sinks
        """A parameter of the layer, of this rank's heads: its numbers are loaded later."""
        vllm_config = get_current_vllm_config()
        plan = plan_of(vllm_config)
        self.config = plan.config
        self.staging: Staging | None = None
        """Of prompts on a GPU, shared by no other layer but in its memory."""
        if plan.on_gpu:
            dtype = vllm_config.model_config.dtype
            has_sinks = sinks is not None
            asked = Asked(current_platform.device_type, dtype, head_size, self.softcap, has_sinks)
            varlen = choose_varlen(asked)
            self.staging = Staging(varlen, self.num_kv_heads, head_size, dtype, vllm_config)
        self.spec: TailorKVSpec | None = None
        self.hot: HotRows | None = None
        self.pages: Pages | None = None
        self.layer_name = ""
        self.builder: TailorKVMetadataBuilder | None = None
        """What plans the layer's steps, if the model drafts for itself."""
        self.selector: Selector = retrieve
        self.observer: Callable[[torch.Tensor, TailorKVMetadata], None] | None = None
        """Called with every step's queries [T, H, d] and metadata, its K and V written."""

    def bind(self, layer_name: str, kv_cache: torch.Tensor) -> None:
        """View the layer's pages; allocate its host pool if that is ours.

        Args:
            kv_cache: the model's dtype, [NB, Hk, bs, C], the last three axes contiguous;
                empty to let go of the pages.

        Raises:
            TailorKVError: the layer never asked for pages of ours.
        """
        self._unbind()
        if kv_cache.numel() == 0:
            return
        if self.spec is None:
            raise TailorKVError(
                f"--attention-backend tailorkv: the cache of {layer_name} is of a kind that is "
                f"not supported; {OTHER_BACKEND}"
            )
        self.layer_name = layer_name
        layout, dtype = self.spec.layout, self.spec.dtype
        raw = kv_cache.flatten(1).view(torch.uint8)
        if raw.device.type == "cpu" and (reason := advise_huge_pages(raw)):
            logger.info_once(
                "TailorKV: vLLM's cache keeps small pages: %s.", reason, scope="global"
            )
        self._keep_hot(raw.device)
        pool = None
        if self.spec.split:
            pool = allocate_host_pool(len(raw), layout, raw.device)
            host, derived = pool.pages, raw
        else:
            host, derived = raw[:, : layout.host_bytes], raw[:, layout.host_bytes :]
        derived = derived[:, : layout.derived_bytes]
        self.pages = Pages(host_pages(host, layout, dtype), derived_pages(derived, layout, dtype))
        # vLLM frees a cache by dropping the tensor; our views must not keep it alive.
        self._unbind = weakref.finalize(kv_cache, self._release, pool)

    def _keep_hot(self, device: torch.device) -> None:
        """Room on the device for rows of the pages, which are others from now on."""
        assert self.spec is not None
        if self.hot is None:
            self.hot = make_hot_rows(self.spec, self.config.hot_tokens, device)
        else:
            self.hot.tags.fill_(-1)

    def _release(self, pool: HostPool | None) -> None:
        self.pages = None
        if pool is not None:
            pool.release()

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TailorKVMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write this step's K and V, derive completed groups, attend.

        Args:
            query, output: [T, H, d]; key, value: [T, Hk, d].
            attn_metadata: None in a run that only measures memory.

        Returns:
            `output`.
        """
        if attn_metadata is None:
            if self.staging is not None:
                self.staging.reserve(query.device)
            if self.spec is not None:
                self._keep_hot(query.device)
            return output
        assert self.pages is not None
        host, derived = self.pages.host, self.pages.derived
        count = attn_metadata.num_actual_tokens
        step = Step(
            query[:count],
            key[:count],
            value[:count],
            output[:count],
            host,
            self.scale,
            self.softcap,
            sink_logits(self.sinks),
        )
        written = (step.key, step.value, host.key, host.value, attn_metadata.slot_mapping)
        groups, fit = attn_metadata.groups, self.config.fit_codes
        if attn_metadata.single_tokens:
            ops.append_tokens(*written, groups, derived, fit, self.hot)
        else:
            ops.write_kv(*written, host.key_rows, self.hot)
            if len(groups):
                ops.quantize_groups(groups, host.key, host.value, derived, fit)
        if attn_metadata.exact is not None:
            attn_metadata.exact.attend(step)
        if attn_metadata.decode is not None:
            self._decode(attn_metadata, attn_metadata.decode, step)
        if self.observer is not None:
            self.observer(step.query, attn_metadata)
        return output

    def _decode(self, metadata: TailorKVMetadata, rows: DecodeRows, step: Step) -> None:
        assert self.pages is not None
        host, derived = self.pages.host, self.pages.derived
        query = step.query[rows.tokens].contiguous()
        in_place = isinstance(rows.tokens, slice)
        result = step.output[rows.tokens] if in_place else torch.empty_like(query)
        layer = Layer(
            self.pages,
            self.config,
            step.scale,
            step.softcap,
            metadata.workspace,
            step.sink_logits,
        )
        if isinstance(derived, DenseCodes):
            ops.quantized_decode_attention(
                result,
                query,
                host.key,
                host.value,
                derived,
                rows.block_table,
                rows.seq_lens,
                rows.tail_start,
                scale=step.scale,
                softcap=step.softcap,
                sink_logits=step.sink_logits,
            )
        elif self.selector is retrieve:
            attend_retrieved(result, query, layer, rows, self.hot)
        else:
            attend_selected(result, query, self.selector(query, layer, rows), layer, rows)
        if metadata.guard is not None:
            metadata.guard.look(self.layer_name, layer, query, result, rows, self.selector)
        if not in_place:
            step.output[rows.tokens] = result
