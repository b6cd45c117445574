"""Models without weights: shapes of real ones, for vLLM to fill with random numbers."""

import json
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Model:
    """A decoder of the Llama architecture."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def head_size(self) -> int:
        """Channels of a head."""
        return self.hidden_size // self.heads

    @property
    def weight_bytes(self) -> int:
        """Of all weights in bf16."""
        attention = 2 * self.hidden_size * (self.heads + self.kv_heads) * self.head_size
        mlp = 3 * self.hidden_size * self.intermediate_size
        embeddings = 2 * self.vocabulary * self.hidden_size
        return 2 * (self.layers * (attention + mlp) + embeddings)

    @property
    def kv_bytes_per_token(self) -> int:
        """Of K and V in bf16."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_size

    def with_layers(self, layers: int | None) -> "Model":
        """The same with so many layers; None for its own."""
        return self if layers is None else replace(self, layers=layers)

    def write_config(self, directory: Path, max_positions: int) -> None:
        """Write `config.json`, all that vLLM needs to load it with random weights."""
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": max_positions,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "bfloat16",
        }
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


MODELS = {
    "llama-160m": Model(768, 3072, 12, 12, 12, 32000),
    "smollm2-360m": Model(960, 2560, 32, 15, 5, 49152),
    "llama-3.2-1b": Model(2048, 8192, 16, 32, 8, 128256),
    "llama-3.1-8b": Model(4096, 14336, 32, 32, 8, 128256),
}
