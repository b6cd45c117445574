"""The model in vLLM, with exact attention, and the scores that its workers record."""

import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import vllm
from vllm import LLM, EngineArgs, SamplingParams
from vllm.config import ModelConfig, VllmConfig
from vllm.distributed.utils import get_pp_indices
from vllm.platforms import current_platform
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.utils.torch_utils import get_dtype_size

from vllm_tailorkv import envs
from vllm_tailorkv.attention.carried import SECTION, model_shape
from vllm_tailorkv.attention.recorder import EXTENSION_PATH, ProgressFile
from vllm_tailorkv.config import TailorKVConfig, load_config
from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.identify.prompt import Encode, TokenPrompt
from vllm_tailorkv.layout import DerivedKind
from vllm_tailorkv.plan import page_layout
from vllm_tailorkv.profile import SCHEMA_VERSION, Identification, LayerScore, Profile

_CPU_BLOCK_SIZE = 128
_POLL_SECONDS = 0.2

# Inline, so that no profile beside the model is read. Prompts are exact whatever the plan, and
# sparse layers have the smallest pages.
_OPTIONS: dict[str, Any] = {"profile": {"dense_layers": []}, "index": "channels"}

OURS: dict[str, Any] = {
    "attention_backend": "tailorkv",
    "additional_config": {SECTION: _OPTIONS},
    "worker_extension_cls": EXTENSION_PATH,
    # Tokens found in a cache would bring no queries.
    "enable_prefix_caching": False,
    "max_num_seqs": 1,
    "enforce_eager": True,
    "disable_log_stats": True,
}
"""Arguments of vLLM's engine that a recording needs."""

_STAGES: dict[str, Any] = {
    "enforce_eager": False,
    "compilation_config": {"mode": 1, "backend": "eager"},
}
"""Those of several pipeline stages: vLLM makes what passes between them in a warm-up, which it
leaves out on CPUs where nothing is to be compiled. Dynamo traces here, for no compiler."""


@dataclass(frozen=True)
class EngineOptions:
    """What the user says of the engine.

    Args:
        model: a directory or a hub name.
        max_model_len: the longest context to come; None for the prompt's length.
        arguments: others of `vllm.EngineArgs`.
    """

    model: str
    max_model_len: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if clash := sorted({*OURS, "model", "max_model_len"} & set(self.arguments)):
            raise TailorKVError(f"--engine-args: {', '.join(clash)} is not yours to set; drop it")


@contextmanager
def _blamed(model: str) -> Iterator[None]:
    """Turn what vLLM raises into one line."""
    try:
        yield
    except TailorKVError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # pydantic's first line only counts the errors.
        said = next((line for line in lines if "validation error" not in line), repr(error))
        if len(lines) > 1 and "validation error" in lines[0]:
            said = lines[min(2, len(lines) - 1)]
        raise TailorKVError(
            f"vLLM cannot serve {model}: {said.partition(' [type=')[0]} (--verbose tells more)"
        ) from error


def drop_option_overrides() -> None:
    """Take `VLLM_TAILORKV_<OPTION>` out of the environment: they are about serving.

    Raises:
        TailorKVError: one of them is unknown.
    """
    for option in envs.option_overrides(TailorKVConfig.model_fields):
        del os.environ[envs.PREFIX + option.upper()]


def load_model_config(options: EngineOptions) -> ModelConfig:
    """The model's configuration, as vLLM reads it.

    Raises:
        TailorKVError: vLLM cannot read the model.
    """
    with _blamed(options.model):
        arguments = EngineArgs(
            model=options.model, max_model_len=options.max_model_len, **options.arguments
        )
        return arguments.create_model_config()


def encoder(model_config: ModelConfig) -> Encode:
    """The model's tokenizer, special tokens included.

    Raises:
        TailorKVError: the model has none.
    """
    with _blamed(model_config.model):
        tokenizer = cached_tokenizer_from_config(model_config)
    if tokenizer is None:
        raise TailorKVError(f"{model_config.model} has no tokenizer; give one in --engine-args")
    return lambda text: list(tokenizer.encode(text))


def _cache_bytes(model_config: ModelConfig, arguments: Mapping[str, Any], length: int) -> int:
    """What one worker needs to hold `length` tokens of every layer, and vLLM's null block."""
    ranks, stages = (arguments.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline"))
    layers = model_config.get_total_num_hidden_layers()
    bounds = [get_pp_indices(layers, stage, stages) for stage in range(stages)]
    layout = page_layout(
        load_config(_OPTIONS),
        DerivedKind.CHANNELS,
        num_kv_heads=max(1, model_config.get_total_num_kv_heads() // ranks),
        head_size=model_config.get_head_size(),
        block_size=arguments.get("block_size") or _CPU_BLOCK_SIZE,
        kv_itemsize=get_dtype_size(model_config.dtype),
    )
    blocks = ceil(length / layout.block_size) + 2
    page = layout.host_bytes + layout.derived_bytes
    return blocks * page * max(end - start for start, end in bounds)


@contextmanager
def open_engine(
    options: EngineOptions, model_config: ModelConfig, prompt_tokens: int
) -> Iterator[LLM]:
    """An engine that reads one prompt with exact attention, and records.

    Raises:
        TailorKVError: vLLM or this backend cannot serve the model.
    """
    length = options.max_model_len or prompt_tokens + 1
    arguments = {"use_tqdm_on_load": False, **OURS}
    if options.arguments.get("pipeline_parallel_size", 1) > 1:
        arguments |= _STAGES
    arguments |= options.arguments
    with _blamed(options.model):
        if current_platform.is_cpu() and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            # vLLM would take most of the machine's memory.
            needed = _cache_bytes(model_config, arguments, length)
            arguments.setdefault("kv_cache_memory_bytes", needed)
        llm = LLM(model=options.model, max_model_len=length, **arguments)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


@contextmanager
def _polling(
    file: ProgressFile, total: int, on_progress: Callable[[float], None]
) -> Iterator[None]:
    """Call `on_progress` with the file's share of `total`, now and then, from a thread."""
    done = threading.Event()

    def poll() -> None:
        while not done.wait(_POLL_SECONDS):
            on_progress(file.read() / total)

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        on_progress(file.read() / total)


def merge_ranks(
    parts: Sequence[tuple[int, Sequence[tuple[int, Sequence[float]]]]], num_layers: int
) -> tuple[LayerScore | None, ...]:
    """The scores of all layers from those of all workers.

    Args:
        parts: for each worker, its tensor-parallel rank, and its layers, each with the scores of
            its query heads.

    Returns:
        For each layer its score, or None if no worker recorded it.
    """
    heads: dict[int, list[float]] = {}
    for _, layers in sorted(parts, key=lambda part: part[0]):
        for layer, scores in layers:
            # Rounding may leave a sharp head a hair below 0.
            heads.setdefault(layer, []).extend(round(max(0.0, score), 6) for score in scores)

    def layer_score(scores: list[float]) -> LayerScore:
        return LayerScore(score=round(sum(scores) / len(scores), 6), heads=tuple(scores))

    return tuple(layer_score(heads[i]) if i in heads else None for i in range(num_layers))


def record_scores(
    llm: LLM,
    token_ids: list[int],
    *,
    alpha: float,
    queries: int,
    on_progress: Callable[[float], None] = lambda _: None,
) -> tuple[LayerScore | None, ...]:
    """Read a prompt, and score every layer over its last queries.

    Args:
        llm: of `open_engine`.
        alpha: share of the context whose largest weights are summed.
        on_progress: called now and then with the share of the work that is done, 0 to 1.

    Returns:
        For each layer its score; None for vLLM's and those with K and V of another.
    """
    with tempfile.NamedTemporaryFile(prefix="tailorkv-") as file:
        num_layers = llm.collective_rpc(
            "tailorkv_start_recording", args=(len(token_ids), queries, alpha, file.name)
        )
        total = num_layers[0] * len(token_ids)
        with _polling(ProgressFile(Path(file.name)), total, on_progress):
            llm.generate(
                {"prompt_token_ids": token_ids},
                SamplingParams(max_tokens=1, detokenize=False),
                use_tqdm=False,
            )
        parts = llm.collective_rpc("tailorkv_take_scores")
    shape = model_shape(llm.llm_engine.vllm_config)
    return merge_ranks(parts, shape.num_layers)


def make_profile(
    vllm_config: VllmConfig,
    prompt: TokenPrompt,
    layers: tuple[LayerScore | None, ...],
    *,
    alpha: float,
    beta: float,
    queries: int,
) -> Profile:
    """The profile of a model whose layers were scored."""
    shape, model = model_shape(vllm_config), vllm_config.model_config
    identified = Identification(
        model=shape.name,
        alpha=alpha,
        beta=beta,
        queries=queries,
        prompt=prompt.record,
        dtype=str(model.dtype).removeprefix("torch."),
        quantization=model.quantization,
        vllm=vllm.__version__,
        layers=layers,
    )
    return Profile(
        schema_version=SCHEMA_VERSION,
        architecture=shape.architecture,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_size=shape.head_size,
        dense_layers=identified.dense_layers,
        identified=identified,
    )
