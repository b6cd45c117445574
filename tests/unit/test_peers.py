"""What the comparison with other systems makes of a GGUF file, and of its figures."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize
from peers.weights import encode

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A file with two matrices, a vector and what a tokenizer has."""
    path = tmp_path / "small.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_token_list(["a", "b", "c"])
    writer.add_token_types([1, 1, 3])
    writer.add_rope_freq_base(1e4)
    numbers = np.random.default_rng(0)
    for name, shape in (("one.weight", (6, 64)), ("two.weight", (3, 32)), ("norm.weight", (64,))):
        writer.add_tensor(name, numbers.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("encoding", "kind", "error"),
    [("bf16", GGMLQuantizationType.BF16, 2**-8), ("q8_0", GGMLQuantizationType.Q8_0, 0.03)],
)
def test_weights_encoded_anew(
    small: Path, encoding: str, kind: GGMLQuantizationType, error: float
) -> None:
    target = encode(small, small.with_name(f"{encoding}.gguf"), encoding)
    before, after = GGUFReader(small), GGUFReader(target)
    for name, field in before.fields.items():
        if not name.startswith("GGUF."):
            assert after.fields[name].contents() == field.contents()
            assert after.fields[name].types == field.types
    for was, now in zip(before.tensors, after.tensors, strict=True):
        assert (now.name, list(now.shape)) == (was.name, list(was.shape))
        values = dequantize(now.data, now.tensor_type)
        if was.name == "norm.weight":
            assert np.array_equal(values, was.data)
            continue
        assert now.tensor_type == kind
        assert 0 < np.abs(values - was.data).max() <= error * np.abs(was.data).max()


def test_a_file_that_is_there_is_used(small: Path) -> None:
    small.with_name("q8_0.gguf").write_text("this one")
    assert encode(small, small.with_name("q8_0.gguf"), "q8_0").read_text() == "this one"


def test_what_context_costs() -> None:
    def record(context: int, seconds: float) -> dict[str, float]:
        return {"context": context, "seconds_per_token": seconds}

    assert peers_script().slope([record(8000, 0.05), record(2000, 0.02)]) == "5.00"
    assert peers_script().slope([record(2000, 0.02)]) == ""


def peers_script():
    """The command, whose name is also that of its folder."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("peers_command", ROOT / "benchmarks/peers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--peers", "tailorkv,nobody"], "nobody is none of tailorkv, vllm"),
        (["--context", "8192"], "knows 8,192 tokens, answers included"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments: list[str], words: str) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/peers.py", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert words in done.stderr.splitlines()[-1]
