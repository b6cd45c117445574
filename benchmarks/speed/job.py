"""What an engine is to run: the order that goes to its process."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

BLOCK_SIZE = 128
CHUNK = 2048


def kv_bytes_per_token(folder: Path, itemsize: int) -> int:
    """Bytes of K and V of a token, as the model computes them.

    Args:
        folder: of a checkpoint.
        itemsize: bytes of an element.
    """
    config = json.loads((folder / "config.json").read_text())
    heads = config.get("num_key_value_heads", config["num_attention_heads"])
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return 2 * itemsize * int(config["num_hidden_layers"]) * int(heads) * int(size)


@dataclass(frozen=True)
class Job:
    """What to run.

    Args:
        model: directory with `config.json`.
        options: of tailorkv; None for vLLM's own backend.
        warm: prompts cost no model: their K and V are random numbers.
        kv_bytes_per_token: in full precision.
        load_format: vLLM's; weights are random unless told.
        kv_cache_dtype: vLLM's.
    """

    model: str
    options: dict[str, Any] | None
    context: int
    batch: int
    output_tokens: int
    warm: bool
    kv_bytes_per_token: int
    load_format: str = "dummy"
    kv_cache_dtype: str = "auto"

    def with_options(self, options: dict[str, Any] | None) -> "Job":
        """The same with other options."""
        return replace(self, options=options)

    def as_json(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))

    @property
    def reading_steps(self) -> int:
        """Steps in which a chunk of some prompt is read; decodes take part of their budget."""
        return -(-self.batch * self.context // (CHUNK - self.batch))

    @property
    def max_tokens(self) -> int:
        """Enough for the first request to decode until the last one has done so."""
        return self.reading_steps + self.output_tokens + 2

    @property
    def max_model_len(self) -> int:
        """Of one request."""
        return self.context + self.max_tokens

    @property
    def num_blocks(self) -> int:
        """What all requests fill, and vLLM's null block."""
        return self.batch * -(-self.max_model_len // BLOCK_SIZE) + 1
