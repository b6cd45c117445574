"""A model's shape and weights, from its config alone."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig
from transformers.utils import cached_file
from vllm.config.model import MODEL_ARCH_CONFIG_CONVERTORS, ModelArchConfigConvertorBase

from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.profile import ModelShape

DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of an element, by the name of a type."""


@dataclass(frozen=True)
class Model:
    """What a config tells.

    Args:
        shape: before tensor parallelism.
        dtype: the type that it is served in.
        longest: tokens of its longest context.
        config: as transformers reads it.
        quantization: the method that its checkpoint is quantized by, or None.
        num_experts: of a layer; 0 if it has none.
    """

    shape: ModelShape
    dtype: str
    longest: int
    config: Any
    quantization: str | None
    num_experts: int

    @property
    def itemsize(self) -> int:
        """Bytes of an element of K or V."""
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Weights:
    """The weights of one worker.

    Args:
        held: bytes in memory.
        read: bytes that a decode step reads.
        source: how they were counted.
    """

    held: int
    read: int
    source: str


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def read_model(name: str, dtype: str) -> Model:
    """The model of a folder or a name on the hub.

    Args:
        dtype: the type to serve it in; "auto" for the checkpoint's.

    Raises:
        TailorKVError: its config cannot be read, or its cache is of a kind that is not counted.
    """
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise TailorKVError(f"MODEL {name}: there is no config.json in this folder")
    if not path.is_dir() and (path.is_absolute() or name.startswith(".")):
        raise TailorKVError(f"MODEL {name}: there is no such folder")
    transformers.logging.set_verbosity_error()
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        text = config.get_text_config()
        convertor = MODEL_ARCH_CONFIG_CONVERTORS.get(
            config.model_type, ModelArchConfigConvertorBase
        )
        found = convertor(config, text).convert()
    except Exception as error:
        raise TailorKVError(
            f"MODEL {name}: its config.json cannot be read: {_first_line(error)} Give a "
            "folder that has one, or a name that the hub knows."
        ) from error
    _refuse_other_caches(name, config, text, found)
    own = str(getattr(config, "dtype", None) or getattr(text, "dtype", None) or torch.float32)
    own = own.removeprefix("torch.")
    if dtype == "auto":
        # vLLM serves checkpoints of 32 bits in 16.
        dtype = own if own in ("bfloat16", "float16") else "bfloat16"
    shape = ModelShape(
        name=name,
        architecture=(config.architectures or ["unknown"])[0],
        num_layers=found.total_num_hidden_layers,
        num_kv_heads=found.total_num_kv_heads,
        head_size=found.head_size,
        num_heads=found.total_num_attention_heads,
    )
    quantization = (found.quantization_config or {}).get("quant_method")
    if found.quantization_config and quantization is None:
        quantization = "a method without a name"
    longest = found.derived_max_model_len_and_key[0]
    if longest == float("inf"):
        raise TailorKVError(f"MODEL {name}: its config tells no longest context")
    return Model(shape, dtype, int(longest), config, quantization, found.num_experts)


def _refuse_other_caches(name: str, config: Any, text: Any, found: Any) -> None:
    """Refuse a model whose layers do not all keep K and V of all tokens, each head its own."""
    kinds = set(getattr(text, "layer_types", None) or [])
    window = None if kinds else getattr(text, "sliding_window", None)
    why = None
    if found.is_deepseek_mla:
        why = "multi-head latent attention (MLA)"
    elif config.is_encoder_decoder:
        why = "an encoder"
    elif kinds - {"full_attention"}:
        why = f"layers of type {', '.join(sorted(kinds - {'full_attention'}))}"
    elif window and getattr(text, "use_sliding_window", True):
        why = "layers with a sliding window"
    elif found.per_layer_overrides:
        why = "layers of different shapes"
    elif not (found.total_num_kv_heads and found.head_size):
        why = "layers without K and V"
    if why is not None:
        raise TailorKVError(
            f"MODEL {name} has {why}; this command counts models all of whose layers have full "
            "attention"
        )


def count_weights(model: Model, workers: int, given: int | None) -> Weights:
    """The weights of one worker.

    Args:
        workers: that share the model by tensor parallelism.
        given: bytes of the whole model, if the user knows better.

    Raises:
        TailorKVError: they cannot be counted from the config.
    """
    shares = f", divided by {workers} workers" if workers > 1 else ""
    if given is not None:
        return Weights(given // workers, given // workers, f"--weights-gib{shares}")
    if model.quantization is not None:
        total, where = _checkpoint_bytes(model)
        what = f"{where}, {model.quantization}{shares}"
        return Weights(total // workers, total // workers, what)
    return _counted_weights(model, workers)


def _checkpoint_bytes(model: Model) -> tuple[int, str]:
    """Bytes of a checkpoint's tensors, and where that was found."""
    name = model.shape.name
    files = sorted(Path(name).glob("*.safetensors"))
    if files:
        return sum(file.stat().st_size for file in files), "files of the checkpoint"
    index = "model.safetensors.index.json"
    try:
        found = cached_file(name, index, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            return int(json.loads(Path(found).read_text())["metadata"]["total_size"]), index
    except (OSError, ValueError, KeyError):
        pass
    raise TailorKVError(
        f"MODEL {name} is quantized ({model.quantization}), and the size of its checkpoint is not "
        "found; give --weights-gib"
    )


def _counted_weights(model: Model, workers: int) -> Weights:
    """From the shapes of the parameters, of which no memory is taken."""
    shape, size = model.shape, model.itemsize
    try:
        with torch.device("meta"):
            built = getattr(transformers, shape.architecture)._from_config(model.config)
    except Exception as error:
        raise TailorKVError(
            f"MODEL {shape.name}: transformers cannot count the parameters of "
            f"{shape.architecture} ({_first_line(error)}); give --weights-gib"
        ) from error
    parameters = list(built.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    matrices = sum(parameter.numel() for parameter in parameters if parameter.ndim > 1)
    table, head = built.get_input_embeddings(), built.get_output_embeddings()
    is_tied = head is not None and head.weight is table.weight
    # A step reads a few rows of the table of embeddings, and all of it where it is the head too.
    rows = 0 if is_tied else table.weight.numel()
    # Workers beyond the KV heads hold copies of them.
    copies = max(0, workers - shape.num_kv_heads) * shape.num_layers * shape.head_size
    copies *= 2 * model.config.get_text_config().hidden_size
    held = ((matrices + copies) // workers + total - matrices) * size
    source = f"{total:,} parameters of {size} bytes"
    if workers > 1:
        source += f", matrices divided by {workers} workers"
    if model.num_experts:
        source += f"; a step is taken to read all {model.num_experts} experts"
    return Weights(held, held - rows // workers * size, source)
