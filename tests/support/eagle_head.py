"""EAGLE heads: one layer that drafts from the hidden states of its model."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_KEPT = "model.layers.0."


def save_eagle_head(model: Path, directory: Path) -> Path:
    """A head for a checkpoint of Llama: its first layer behind a random projection.

    Embeddings and `lm_head` are the model's, which vLLM lends to heads that lack them.
    """
    shutil.copytree(model, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    path = directory / "config.json"
    config = json.loads(path.read_text()) | {"num_hidden_layers": 1}
    path.write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(1)
    layer = {
        name.replace(_KEPT, "layers.0."): tensor
        for name, tensor in load_file(model / "model.safetensors").items()
        # Its input is not normalized: `fc` makes it.
        if name.startswith(_KEPT) and "input_layernorm" not in name
    }
    size = config["hidden_size"]
    layer["fc.weight"] = torch.randn(size, 2 * size, generator=generator) * 0.05
    save_file(layer, directory / "model.safetensors", {"format": "pt"})
    return directory
