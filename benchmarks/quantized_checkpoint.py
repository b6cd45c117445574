"""Checkpoints with quantized weights, made of ordinary ones by rounding to the nearest value.

The linear layers of the decoder are quantized; embeddings, norms and biases stay as they are.
Nothing is calibrated: what is meant is speed, and that engines agree, not quality.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_EXAMPLES = """\
example:
  python benchmarks/quantized_checkpoint.py ~/.cache/vllm_tailorkv/models/smollm2-135m int8 ./int8
  python benchmarks/peers.py --model smollm2-135m --checkpoint ./int8 --peers tailorkv,vllm
"""
_GROUP = 32
"""Inputs that share a scale of 4 bits: a divisor of every layer's inputs."""
_FP8_MAX = 448
_BLOCK = 128
_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


@dataclass(frozen=True)
class Kind:
    """A way to keep the weights of linear layers.

    Args:
        config: what `quantization_config` says of it.
        quantize: from float32 weights [outputs, inputs] to what is kept of them, by the end of
            its name.
    """

    config: Mapping[str, Any]
    quantize: Callable[[Any], dict[str, Any]]


def _packed(values: Any, dim: int, bits: int = 4) -> Any:
    """Unsigned numbers of 4 or 8 bits along `dim`, the first in the lowest bits of an int32."""
    import torch  # noqa: PLC0415  takes seconds to load

    many = 32 // bits
    parts = values.long().movedim(dim, -1).unflatten(-1, (-1, many))
    words = (parts << (bits * torch.arange(many))).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int().movedim(-1, dim)


def _groups(weight: Any) -> Any:
    return weight.unflatten(1, (-1, _GROUP))


def _four_bits(weight: Any) -> tuple[Any, Any]:
    """Numbers around 8 [N, K] and their scales [N, K / group]."""
    groups = _groups(weight)
    scale = groups.abs().amax(-1, keepdim=True) / 7
    return ((groups / scale).round() + 8).flatten(1), scale[..., 0]


def _int8(weight: Any) -> dict[str, Any]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {"weight": (weight / scale).round().char(), "weight_scale": scale}


def _fp8(weight: Any) -> dict[str, Any]:
    import torch  # noqa: PLC0415

    blocks = weight.unflatten(1, (-1, _BLOCK)).unflatten(0, (-1, _BLOCK))
    scale = blocks.abs().amax((1, 3), keepdim=True) / _FP8_MAX
    rounded = (blocks / scale).to(torch.float8_e4m3fn)
    return {"weight": rounded.reshape(weight.shape), "weight_scale_inv": scale[:, 0, :, 0]}


def _gptq(weight: Any) -> dict[str, Any]:
    import torch  # noqa: PLC0415

    values, scale = _four_bits(weight)
    outputs, inputs = weight.shape
    return {
        "qweight": _packed(values.t(), 0),
        "scales": scale.t().half(),
        # By tradition one less than what is meant.
        "qzeros": torch.full((inputs // _GROUP, outputs // 8), 0x77777777, dtype=torch.int32),
        "g_idx": torch.arange(inputs, dtype=torch.int32) // _GROUP,
    }


def _awq(weight: Any) -> dict[str, Any]:
    groups = _groups(weight)
    least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (most - least) / 15
    zero = (-least / scale).round().clamp(0, 15)
    values = ((groups / scale).round() + zero).clamp(0, 15).flatten(1)

    def packed(part: Any) -> Any:
        return _packed(part.t().unflatten(1, (-1, 8))[..., _AWQ_ORDER].flatten(1), 1)

    return {
        "qweight": packed(values),
        "scales": scale[..., 0].t().half(),
        "qzeros": packed(zero[..., 0]),
    }


def _w4a16(weight: Any) -> dict[str, Any]:
    import torch  # noqa: PLC0415

    values, scale = _four_bits(weight)
    return {
        "weight_packed": _packed(values, 1),
        "weight_scale": scale.bfloat16(),
        "weight_shape": torch.tensor(weight.shape),
    }


def _compressed(form: str, weights: dict[str, Any], **activations: Any) -> dict[str, Any]:
    """A configuration of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": {"symmetric": True, "dynamic": False} | weights}
    if activations:
        group["input_activations"] = {"symmetric": True, "dynamic": True} | activations
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


_INT8_OF_ROWS = {"num_bits": 8, "type": "int", "strategy": "channel"}
_INT4_OF_GROUPS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": _GROUP}

KINDS: dict[str, Kind] = {
    "int8": Kind(
        _compressed("int-quantized", _INT8_OF_ROWS, num_bits=8, type="int", strategy="token"),
        _int8,
    ),
    "w4a16": Kind(_compressed("pack-quantized", _INT4_OF_GROUPS), _w4a16),
    "gptq": Kind(
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": _GROUP,
            "desc_act": False,
            "sym": True,
            "lm_head": False,
        },
        _gptq,
    ),
    "awq": Kind(
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": _GROUP,
            "zero_point": True,
            "version": "gemm",
        },
        _awq,
    ),
    "fp8": Kind(
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [_BLOCK, _BLOCK],
        },
        _fp8,
    ),
}


def save_quantized_checkpoint(source: Path, directory: Path, name: str) -> Path:
    """Quantize the linear layers of a checkpoint in one file.

    Args:
        source: its folder.
        directory: a new folder.
        name: of `KINDS`.
    """
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    kind, tensors = KINDS[name], {}
    for full_name, tensor in load_file(source / "model.safetensors").items():
        if not full_name.endswith("_proj.weight"):
            tensors[full_name] = tensor
            continue
        for end, part in kind.quantize(tensor.float()).items():
            tensors[full_name.removesuffix("weight") + end] = part.contiguous()
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    path = directory / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": dict(kind.config)}
    path.write_text(json.dumps(config, indent=2))
    return directory


def main() -> None:
    """Make one at the command line."""
    options = argparse.ArgumentParser(
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument(
        "source", type=Path, help="folder of a checkpoint with one model.safetensors"
    )
    options.add_argument("kind", choices=KINDS)
    options.add_argument("directory", type=Path, help="folder to make")
    args = options.parse_args()
    if not (args.source / "model.safetensors").is_file():
        options.error(f"{args.source} has no model.safetensors")
    if args.directory.exists():
        options.error(f"{args.directory} exists")
    print(save_quantized_checkpoint(args.source, args.directory, args.kind))


if __name__ == "__main__":
    main()
