"""Checkpoints whose flat layers are known by construction."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PERMUTED = (2, 3, 0, 4, 1, 5)
"""The demo model's layers in an order that keeps what each reads; 0 and 1 are the flat ones."""
PERMUTED_FLAT = (2, 4)


def permute_layers(source: Path, target: Path, order: tuple[int, ...]) -> Path:
    """A copy of a checkpoint whose layer i is the source's layer `order[i]`."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("tailorkv.json"))
    tensors = load_file(source / "model.safetensors")
    moved = {}
    for name, tensor in tensors.items():
        if name.startswith("model.layers."):
            *_, layer = name.split(".")[:3]
            rest = name.removeprefix(f"model.layers.{layer}.")
            name = f"model.layers.{order.index(int(layer))}.{rest}"  # noqa: PLW2901
        moved[name] = tensor
    save_file(moved, target / "model.safetensors", metadata={"format": "pt"})
    return target


def flatten_layer(directory: Path, flat: int, sharpen: float) -> Path:
    """Change a checkpoint: layer `flat` has queries of 0, those of the others are larger."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("q_proj.weight"):
            is_flat = name.startswith(f"model.layers.{flat}.")
            tensors[name] = torch.zeros_like(tensor) if is_flat else tensor * sharpen
    save_file(tensors, file, metadata={"format": "pt"})
    return directory
