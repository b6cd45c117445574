"""A GGUF file's weights in another encoding, so that systems can be compared with equal ones."""

from pathlib import Path
from typing import Any

from gguf import GGUFReader, GGUFValueType, GGUFWriter, dequantize, quantize
from gguf.constants import GGMLQuantizationType, Keys

ENCODINGS = {"bf16": GGMLQuantizationType.BF16, "q8_0": GGMLQuantizationType.Q8_0}
"""By the names that llama.cpp has for them."""

_NOT_COPIED = (Keys.General.ARCHITECTURE, Keys.General.FILE_TYPE)


def encode(source: Path, target: Path, encoding: str) -> Path:
    """Write the matrices of `source` to `target`, encoded anew; all else as it is.

    Args:
        encoding: one of `ENCODINGS`.

    Returns:
        `target`, which is left alone if it is there.
    """
    if target.is_file():
        return target
    reader = GGUFReader(source)
    unfinished = target.with_suffix(".tmp")
    writer = GGUFWriter(unfinished, _text(reader, Keys.General.ARCHITECTURE))
    for field in reader.fields.values():
        if field.name in _NOT_COPIED or field.name.startswith("GGUF."):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
            continue
        to = ENCODINGS[encoding]
        writer.add_tensor(tensor.name, quantize(values, to), raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return unfinished.rename(target)


def _text(reader: GGUFReader, key: str) -> str:
    field: Any = reader.get_field(key)
    return str(field.contents())
