"""Checkpoints with 8-bit weights and activations, as compressed-tensors saves them."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
_ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token"}
_CONFIG: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": _WEIGHTS | {"dynamic": False},
            "input_activations": _ACTIVATIONS | {"dynamic": True},
        }
    },
}


def save_int8_checkpoint(source: Path, directory: Path) -> Path:
    """Quantize the linear layers of a checkpoint, a scale for each row of their weights."""
    shutil.copytree(source, directory)
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        scale = tensor.abs().amax(1, keepdim=True) / 127
        tensors[name] = (tensor / scale).round().to(torch.int8)
        tensors[f"{name}_scale"] = scale
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    path = directory / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": _CONFIG}
    path.write_text(json.dumps(config))
    return directory
