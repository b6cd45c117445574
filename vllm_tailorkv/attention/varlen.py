"""Attention of several query tokens a request over K and V that lie one after another.

One registry of what computes it on GPUs, best first. vLLM's Triton attention runs everywhere, and
in Triton's interpreter too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger

from vllm_tailorkv.attention.name import LOGGER

logger = init_logger(LOGGER)


class Contexts(NamedTuple):
    """Where requests lie in the query and in K and V.

    query_start, context_start: int32 [n + 1] on the device, from 0.
    query_lens, context_lens: the longest that each may be.
    """

    query_start: torch.Tensor
    context_start: torch.Tensor
    query_lens: list[int]
    context_lens: list[int]


class Call(NamedTuple):
    """One call of an attention op.

    query, output: [T, H, d]; key, value: [>= context_start[n], Hk, d], the last axis contiguous.
    causal: query token i of q attends to all but the last q - 1 - i tokens of its context; else to
        all.
    scale, softcap: see `kernels.ops`.
    sink_logits: see `kernels.ops`; for an op that does not merge, others do not count them.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    contexts: Contexts
    output: torch.Tensor
    causal: bool
    scale: float
    softcap: float
    sink_logits: torch.Tensor | None = None


class Asked(NamedTuple):
    """What a layer asks of an op; `device` is a type of torch's.

    sinks: whether heads have sink logits.
    """

    device: str
    dtype: torch.dtype
    head_size: int
    softcap: float
    sinks: bool = False


@dataclass(frozen=True)
class Varlen:
    """An attention op.

    Args:
        name: what the log says.
        merges: whether `attend` returns the log of each head's sum of `exp(score)`, float32
            [H, T], by which parts of a context, and sink logits, can be merged; else it returns
            None.
        obstacle: why it cannot serve a layer, or None.
        attend: writes the output of a call.
    """

    name: str
    merges: bool
    obstacle: Callable[[Asked], str | None]
    attend: Callable[[Call], torch.Tensor | None]


def _flash_version(asked: Asked) -> int | None:
    from vllm.v1.attention.backends.fa_utils import (  # noqa: PLC0415  loads CUDA libraries
        get_flash_attn_version,
        is_flash_attn_varlen_func_available,
    )

    if not is_flash_attn_varlen_func_available():
        return None
    return get_flash_attn_version(head_size=asked.head_size, requires_softcap=asked.softcap > 0)


def _flash_obstacle(asked: Asked) -> str | None:
    if asked.device != "cuda":
        return f"it does not run on {asked.device}"
    if asked.dtype == torch.float32:
        return "it knows no float32"
    if asked.head_size % 8 or asked.head_size > 256:
        return f"it knows no heads of {asked.head_size}"
    return None if _flash_version(asked) else "vLLM has none for this device"


def _flash_attend(call: Call) -> torch.Tensor | None:
    from vllm.v1.attention.backends.fa_utils import (  # noqa: PLC0415
        flash_attn_varlen_func,
    )

    query, contexts = call.query, call.contexts
    asked = Asked(query.device.type, query.dtype, query.shape[2], call.softcap)
    _, log_sum = flash_attn_varlen_func(
        q=query,
        k=call.key,
        v=call.value,
        max_seqlen_q=max(contexts.query_lens),
        cu_seqlens_q=contexts.query_start,
        max_seqlen_k=max(contexts.context_lens),
        cu_seqlens_k=contexts.context_start,
        softmax_scale=call.scale,
        causal=call.causal,
        softcap=call.softcap,
        return_softmax_lse=True,
        out=call.output,
        fa_version=_flash_version(asked),
    )
    return log_sum


def _lengths_are_known() -> bool:
    """Whether the CPU knows them when it plans a step: how many drafts of the last were taken."""
    config = get_current_vllm_config_or_none()
    if config is None or config.speculative_config is None:
        return True
    return not config.scheduler_config.async_scheduling


def _xformers_obstacle(asked: Asked) -> str | None:
    if asked.device != "cuda":
        return f"it does not run on {asked.device}"
    if asked.softcap > 0:
        return "it knows no soft cap"
    if asked.sinks:
        return "it knows no attention sinks"
    if asked.head_size % 8 or asked.head_size > 256:
        return f"it knows no heads of {asked.head_size}"
    if not _lengths_are_known():
        return "it wants lengths that are not known yet, with drafts and asynchronous scheduling"
    return None if find_spec("xformers") else "it is not installed"


def _xformers_attend(call: Call) -> None:
    from xformers.ops import fmha  # noqa: PLC0415

    query_lens, context_lens = call.contexts.query_lens, call.contexts.context_lens
    mask = fmha.attn_bias.BlockDiagonalMask.from_seqlens(query_lens, context_lens)
    if call.causal:
        mask = mask.make_causal_from_bottomright()
    heads, total = call.key.shape[1], sum(context_lens)
    grouped = call.query.unflatten(1, (heads, -1))
    shape = (total, *grouped.shape[1:])
    key, value = (x[:total].unsqueeze(2).expand(shape) for x in (call.key, call.value))
    result = fmha.memory_efficient_attention_forward(
        grouped[None], key[None], value[None], attn_bias=mask, scale=call.scale
    )
    call.output.copy_(result.view_as(call.output))


def _triton_obstacle(asked: Asked) -> str | None:
    return None


def _triton_attend(call: Call) -> None:
    from vllm.v1.attention.ops.triton_unified_attention import (  # noqa: PLC0415
        unified_attention,
    )

    contexts = call.contexts
    starts, longest = contexts.context_start, max(contexts.context_lens)
    # The op reads pages: each token is one of its own.
    pages = starts[:-1, None] + torch.arange(longest, dtype=torch.int32, device=starts.device)
    unified_attention(
        q=call.query,
        k=call.key.unsqueeze(1),
        v=call.value.unsqueeze(1),
        out=call.output,
        cu_seqlens_q=contexts.query_start,
        max_seqlen_q=max(contexts.query_lens),
        seqused_k=starts[1:] - starts[:-1],
        max_seqlen_k=longest,
        softmax_scale=call.scale,
        causal=call.causal,
        window_size=(-1, -1),
        block_table=pages,
        softcap=call.softcap,
        sinks=call.sink_logits,
        q_descale=None,
        k_descale=None,
        v_descale=None,
    )


REGISTRY = (
    Varlen("FlashAttention", True, _flash_obstacle, _flash_attend),
    Varlen("xformers", False, _xformers_obstacle, _xformers_attend),
    Varlen("vLLM's Triton attention", False, _triton_obstacle, _triton_attend),
)
"""What there is, best first."""


def choose_varlen(asked: Asked) -> Varlen:
    """The op that serves a layer; the log says which, and why no better one."""
    reasons: list[str] = []
    for varlen in REGISTRY:
        reason = varlen.obstacle(asked)
        if reason is None:
            why = f" ({'; '.join(reasons)})" if reasons else ""
            logger.info_once(
                "TailorKV: prompts are attended by %s%s.", varlen.name, why, scope="global"
            )
            return varlen
        reasons.append(f"{varlen.name}: {reason}")
    raise AssertionError("the last one serves every layer")
