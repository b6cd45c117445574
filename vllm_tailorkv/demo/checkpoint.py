"""What the demo must know of a real chat model's folder; reads its JSON files, loads nothing."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from vllm_tailorkv.errors import TailorKVError

_BYTES_PER_VALUE = 2


@dataclass(frozen=True)
class Checkpoint:
    """A local chat model.

    Args:
        directory: where it lies.
        context: longest sequence, in tokens.
        kv_bytes_per_token: K and V of a token in all layers, at 16 bits.
        weight_bytes: size of its weights on disk.
    """

    directory: Path
    context: int
    kv_bytes_per_token: int
    weight_bytes: int

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer, to count tokens with."""
        return Tokenizer.from_file(str(self.directory / "tokenizer.json"))


def read_checkpoint(directory: Path) -> Checkpoint:
    """What lies in `directory`.

    Raises:
        TailorKVError: it is no chat model that the demo can ask; the message says what is missing.
    """
    config = _read_json(directory / "config.json")
    config = config.get("text_config", config)
    if not (directory / "tokenizer.json").is_file():
        raise TailorKVError(f"{directory} has no tokenizer.json, with which the demo counts tokens")
    if not _has_chat_template(directory):
        raise TailorKVError(f"{directory} has no chat template; name a chat model")
    try:
        heads = config["num_attention_heads"]
        head_size = config.get("head_dim") or config["hidden_size"] // heads
        kv_heads = config.get("num_key_value_heads") or heads
        values = 2 * config["num_hidden_layers"] * kv_heads * head_size
        context = config["max_position_embeddings"]
    except KeyError as error:
        raise TailorKVError(f"{directory / 'config.json'} does not tell {error}") from None
    weights = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    return Checkpoint(directory, context, values * _BYTES_PER_VALUE, weights)


def _has_chat_template(directory: Path) -> bool:
    if (directory / "chat_template.jinja").is_file():
        return True
    config = directory / "tokenizer_config.json"
    return config.is_file() and "chat_template" in _read_json(config)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TailorKVError(f"{path} is missing; name the folder of a checkpoint") from None
    except json.JSONDecodeError as error:
        raise TailorKVError(f"{path} is no JSON: {error}") from None
    return content
