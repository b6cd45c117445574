"""The torch library of the CUDA ops, loaded without a GPU: schemas, fakes, argument checks.

`torch.library.opcheck` needs results, so that the reference stands in for the kernels on the
CPU: it shows that schemas name every tensor that is written and no other, that the fake
implementations fit, and that torch.compile traces the ops.
"""

import os
import sys
from collections.abc import Iterator

import pytest
import torch
from build_script import setup_functions
from torch._subclasses import FakeTensorMode
from torch.library import Library, opcheck

from vllm_tailorkv.kernels import cuda, reference
from vllm_tailorkv.kernels.types import ChannelIndex

OPS = torch.ops.vllm_tailorkv


def not_built() -> str | None:
    try:
        cuda.load()
    except ImportError as error:
        return f"the CUDA extension was NOT built: {error}"
    return None


REASON = not_built()


needs_library = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def test_built_where_nvcc_is(monkeypatch):
    """So that the skips below can hide nothing."""
    if os.environ.get("TAILORKV_CUDA") == "0":
        pytest.skip("TAILORKV_CUDA=0 leaves the CUDA extension out")
    if setup_functions(monkeypatch)["find_nvcc"]() is not None:
        assert REASON is None, f"{REASON}; run `pip install --no-build-isolation -e .`"


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def arguments_of(name: str) -> dict[str, object]:
    """Good arguments on the CPU, by name: 2 rows, 2 KV heads, blocks of 64, head_size 64."""
    cache = torch.randn(5, 2, 64, 64, dtype=torch.bfloat16)
    indices = ints(0, 3, -1).expand(2, 2, 3).contiguous()
    return {
        "select_topk": {
            "indices": torch.empty(2, 2, 7, dtype=torch.int32),
            "scores": torch.randn(2, 2, 100),
            "tail_start": ints(100, 11),
            "sink_tokens": 8,
        },
        "gather_rows": {
            "key_rows": torch.empty(2, 2, 3, 64, dtype=torch.bfloat16),
            "value_rows": torch.empty(2, 2, 3, 64, dtype=torch.bfloat16),
            "key_cache": cache,
            "value_cache": cache.clone(),
            "indices": indices,
            "block_table": ints(1, 2, 3, 4).view(2, 2),
        },
        "pack_codes": {
            "packed": torch.empty(3, 25, dtype=torch.uint8),
            "codes": torch.randint(0, 4, (3, 100), dtype=torch.uint8),
            "bits": 2,
        },
        "unpack_codes": {
            "codes": torch.empty(3, 100, dtype=torch.uint8),
            "packed": torch.randint(0, 256, (3, 25), dtype=torch.uint8),
            "bits": 2,
        },
        "reduce_channels": {
            "groups": ints(3, 0, dtype=torch.int64),
            "key_cache": cache,
            "extremes": torch.zeros(5, 2, 1, 2, 64, dtype=torch.bfloat16),
        },
    }[name]


META = torch._C.DispatchKeySet(torch._C.DispatchKey.Meta)
NAMES = ["select_topk", "gather_rows", "pack_codes", "unpack_codes", "reduce_channels"]


def gather_rows(key_rows, value_rows, key_cache, value_cache, indices, block_table):
    tokens = indices.clamp(min=0).long()
    blocks = block_table.long().gather(1, (tokens // 64).flatten(1)).view(tokens.shape)
    heads = torch.arange(key_cache.shape[1])[:, None]
    for rows, cache in ((key_rows, key_cache), (value_rows, value_cache)):
        rows.copy_(cache[blocks, heads, tokens % 64] * (indices >= 0).unsqueeze(-1))


def pack_codes(packed, codes, bits):
    packed.copy_(reference.pack_codes(codes, bits))


def unpack_codes(codes, packed, bits):
    codes.copy_(reference.unpack_codes(packed, bits, codes.shape[1]))


def reduce_channels(groups, key_cache, extremes):
    reference.quantize_groups(groups, key_cache, key_cache, ChannelIndex(extremes))


@pytest.fixture
def on_cpu() -> Iterator[None]:
    """The reference as the implementation of ops that have none for CPU tensors."""
    library = Library("vllm_tailorkv", "IMPL")
    stand_ins = (gather_rows, pack_codes, unpack_codes, reduce_channels)
    for name, function in zip(NAMES[1:], stand_ins, strict=True):
        library.impl(name, function, "CPU")
    yield
    library._destroy()


@needs_library
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(on_cpu, name):
    opcheck(getattr(OPS, name).default, tuple(arguments_of(name).values()))


@needs_library
@pytest.mark.parametrize("name", NAMES)
def test_compile(on_cpu, name):
    """Traced whole, without a graph break, and with the same effect."""
    torch.manual_seed(0)
    eager = arguments_of(name)
    compiled = {
        key: value.clone() if isinstance(value, torch.Tensor) else value
        for key, value in eager.items()
    }
    op = getattr(OPS, name)
    op(**eager)
    torch.compile(op, backend="aot_eager", fullgraph=True)(**compiled)
    for key, value in eager.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, compiled[key]), key


@needs_library
@pytest.mark.parametrize("name", NAMES)
def test_fake(name):
    """Nothing runs, not even a check of the device."""
    with FakeTensorMode() as mode:
        arguments = {
            key: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for key, value in arguments_of(name).items()
        }
        assert getattr(OPS, name)(**arguments) is None


@needs_library
def test_wrappers_allocate_as_the_reference(on_cpu):
    codes = torch.randint(0, 4, (3, 2, 101), dtype=torch.uint8)
    packed = cuda.pack_codes(codes, 2)
    assert torch.equal(packed, reference.pack_codes(codes, 2))
    assert torch.equal(cuda.unpack_codes(packed, 2, 101), codes)
    with torch.device("meta"):
        meta = torch.empty(3, 2, 101, dtype=torch.uint8)
    assert cuda.pack_codes(meta, 4).shape == (3, 2, 51)


def strided(*shape, dtype=torch.int32):
    """Of this shape, but not contiguous."""
    return torch.zeros(*shape[:-1], shape[-1] * 2, dtype=dtype)[..., ::2]


def floats(*shape, dtype=torch.bfloat16):
    return torch.zeros(shape, dtype=dtype)


def bytes_(*shape):
    return torch.zeros(shape, dtype=torch.uint8)


BAD = [
    ("select_topk", "indices", torch.zeros(2, 2, 7).long(), "indices must be int32"),
    ("select_topk", "indices", torch.zeros(2, 14).int(), r"indices must be \[R, Hk, k\]"),
    ("select_topk", "indices", strided(2, 2, 7), "indices must be contiguous"),
    ("select_topk", "scores", torch.zeros(2, 2, 100).half(), "scores must be float32"),
    ("select_topk", "scores", torch.zeros(2, 3, 100), r"scores must be \[R=2, Hk=2, S"),
    (
        "select_topk",
        "scores",
        strided(2, 2, 100, dtype=torch.float32),
        "scores must be contiguous in its last axis",
    ),
    ("select_topk", "tail_start", ints(1, 2, 3), r"tail_start must be \[R=2\], is \[3\]"),
    ("select_topk", "tail_start", ints(1, 2).long(), "tail_start must be int32"),
    ("select_topk", "sink_tokens", -1, "sink_tokens must be from 0"),
    ("gather_rows", "key_cache", floats(5, 2, 64, 64).double(), "key_cache must be float32"),
    ("gather_rows", "value_cache", floats(5, 2, 64, 64).half(), "value_cache must be bfloat16"),
    ("gather_rows", "value_cache", floats(5, 2, 32, 64), "value_cache must be .NB=5"),
    (
        "gather_rows",
        "key_cache",
        floats(5, 2, 64, 64).transpose(2, 3),
        "key_cache must be token-major",
    ),
    (
        "gather_rows",
        "key_cache",
        floats(5, 2, 64, 65)[..., :64],
        "key_cache must be aligned to 16 bytes",
    ),
    ("gather_rows", "key_rows", floats(2, 2, 4, 64), "key_rows must be .R=2, Hk=2, k=3, d=64"),
    ("gather_rows", "value_rows", floats(2, 2, 3, 32), "value_rows must be .R=2"),
    ("gather_rows", "indices", torch.zeros(2, 2, 3).long(), "indices must be int32"),
    ("gather_rows", "block_table", ints(1, 2).view(1, 2), "block_table must be .R=2, max_blocks"),
    ("gather_rows", "block_table", strided(2, 2), "block_table must be contiguous"),
    ("pack_codes", "bits", 3, "bits must be 1, 2 or 4"),
    ("pack_codes", "packed", bytes_(3, 24), "packed must be .rows=3, 25"),
    ("pack_codes", "packed", bytes_(2, 25), "packed must be .rows=3"),
    ("pack_codes", "codes", torch.zeros(3, 100).int(), "codes must be uint8"),
    ("unpack_codes", "packed", bytes_(3, 26), "packed must be .rows=3, 25"),
    ("unpack_codes", "codes", strided(3, 100, dtype=torch.uint8), "codes must be contiguous"),
    ("unpack_codes", "bits", 8, "bits must be 1, 2 or 4"),
    ("reduce_channels", "groups", ints(1), "groups must be int64"),
    ("reduce_channels", "extremes", floats(5, 2, 3, 2, 64), "block_size must be a multiple"),
    ("reduce_channels", "extremes", floats(5, 2, 4, 2, 64), "group_size must be a multiple of 32"),
    ("reduce_channels", "extremes", floats(5, 2, 1, 2, 32), "extremes must be .NB=5"),
    ("reduce_channels", "extremes", floats(5, 2, 1, 2, 64).half(), "extremes must be bfloat16"),
    (
        "reduce_channels",
        "key_cache",
        strided(5, 2, 64, 64, dtype=torch.bfloat16),
        "key_cache must be contiguous in its tokens or",
    ),
]


@needs_library
@pytest.mark.parametrize(("name", "argument", "value", "message"), BAD)
def test_bad_argument(name, argument, value, message):
    """The contract comes before the device: fakes have it as well."""
    arguments = arguments_of(name) | {argument: value}
    with pytest.raises(RuntimeError, match=f"vllm_tailorkv::{name}: {message}"):
        getattr(OPS, name).default.redispatch(META, *arguments.values())


@needs_library
@pytest.mark.parametrize("name", NAMES[1:])
def test_cpu_tensors_are_refused(name):
    with pytest.raises(NotImplementedError, match=f"'vllm_tailorkv::{name}'.*'CPU' backend"):
        getattr(OPS, name)(**arguments_of(name))


@needs_library
def test_archs():
    assert {"80", "90"} <= set(OPS.cuda_archs().split())


@needs_library
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_unavailable_without_a_device():
    assert cuda.unavailable() == "torch sees no CUDA device"


def test_missing_extension_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm_tailorkv._cuda", None)
    reason = cuda.unavailable()
    assert reason is not None
    assert "TAILORKV_CUDA=1 pip install --no-build-isolation" in reason


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((9, 0), "80 90", True),
        ((8, 6), "80 90", True),
        ((8, 0), "86 90", False),
        ((7, 5), "80 90", False),
        ((12, 0), "80 90", True),
        ((12, 1), "80 120", True),
        ((10, 0), "90 120", False),
        ((10, 3), "90 100 120", True),
    ],
)
def test_which_devices_a_build_runs_on(capability, archs, runs):
    reason = cuda.unsupported(capability, archs)
    assert (reason is None) == runs
    if reason is not None:
        assert f"TAILORKV_CUDA_ARCHS={capability[0]}{capability[1]}" in reason
