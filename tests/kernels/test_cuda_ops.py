"""The CUDA kernels against the reference: on the host always, on the device where there is one."""

import ctypes
import math

import pytest
import sanitize
import torch
from cuda_device import Device
from cuda_emulator import (
    Codes,
    Emulated,
    GatherRows,
    Pages,
    ReduceChannels,
    SelectTopk,
    build,
    guarded,
)

from vllm_tailorkv.kernels import cuda, reference
from vllm_tailorkv.layout import DerivedKind, KeyLayout

RUNS = ["emulated", *(["device"] if torch.cuda.is_available() else [])]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return build(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def emulated(library):
    return Emulated(library)


@pytest.fixture(params=RUNS)
def run(request, library):
    if request.param == "emulated":
        return Emulated(library)
    assert cuda.unavailable() is None, cuda.unavailable()
    return Device()


# select_topk


def select(function, scores, tail_start, k, sink_tokens, *rest):
    indices = torch.full((*scores.shape[:2], k), 12345, dtype=torch.int32)
    function(indices, scores, torch.tensor(tail_start, dtype=torch.int32), sink_tokens, *rest)
    return indices


def make_scores(name: str, shape: tuple[int, ...], seed: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(shape, generator=generator)
    if name == "ties":
        scores = (scores * 2).round()  # -0.0 among them
    elif name == "rising":
        scores = torch.arange(scores.numel()).float().view(shape)
    elif name == "falling":
        scores = -torch.arange(scores.numel()).float().view(shape)
    elif name == "equal":
        scores = torch.zeros(shape)
    elif name == "infinite":
        scores = torch.where(scores > 2, float("inf"), scores)
        scores = torch.where(scores < 0.5, -float("inf"), scores)
    elif name == "minus_infinity":
        scores = torch.full(shape, -float("inf"))
    elif name == "close":
        # All digits but the last are the same.
        scores = 1 + torch.randint(0, 300, shape, generator=generator) * 2.0**-23
    elif name == "bits":
        bits = torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)
        scores = bits.view(torch.float32).nan_to_num(1.5, float("inf"), -float("inf"))
    return scores


KINDS = [
    "normal",
    "ties",
    "rising",
    "falling",
    "equal",
    "infinite",
    "minus_infinity",
    "close",
    "bits",
]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("k", [1, 128, 3000])
def test_select_topk(run, name, k):
    tail_start = [0, 8, 9, 136, 137, 2500]
    scores = make_scores(name, (6, 2, 2500))
    expected = select(reference.select_topk, scores, tail_start, k, 8)
    for row, end in enumerate(tail_start):
        scores[row, :, :8] = float("nan")
        scores[row, :, end:] = float("nan")
    assert torch.equal(select(run.select_topk, scores, tail_start, k, 8), expected)


@pytest.mark.parametrize("parts", [1, 2, 7, 40])
@pytest.mark.parametrize("name", ["normal", "ties", "equal", "close"])
def test_select_topk_in_parts(emulated, name, parts):
    scores = make_scores(name, (2, 1, 3001))
    for k in (1, 200, 2990, 3100):
        expected = select(reference.select_topk, scores, [3001, 77], k, 3)
        assert torch.equal(select(emulated.select_topk, scores, [3001, 77], k, 3, parts), expected)


def test_select_topk_with_the_threads_of_the_device(emulated):
    scores = make_scores("ties", (1, 1, 9000))
    expected = select(reference.select_topk, scores, [9000], 500, 8)
    assert torch.equal(select(emulated.select_topk, scores, [9000], 500, 8, 2, 512), expected)


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_select_topk_from_any_address(run, offset):
    scores = make_scores("ties", (3, 4, 610))[:, 1:3, offset : offset + 555]
    for sink_tokens in (0, 1, 2, 3, 64):
        expected = select(reference.select_topk, scores, [555, 70, 65], 64, sink_tokens)
        actual = select(run.select_topk, scores, [555, 70, 65], 64, sink_tokens)
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("seed", range(60))
def test_select_topk_random(emulated, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    length, rows, heads = draw(1, 400), draw(1, 3), draw(1, 3)
    scores = make_scores(KINDS[draw(0, len(KINDS) - 1)], (rows, heads, length), seed)
    tail_start = [draw(0, length) for _ in range(rows)]
    arguments = scores, tail_start, draw(1, length + 2), draw(0, 10)
    expected = select(reference.select_topk, *arguments)
    assert torch.equal(select(emulated.select_topk, *arguments, draw(1, 5)), expected)


def test_select_topk_with_nan(run):
    scores = make_scores("normal", (2, 2, 3000))
    scores[:, :, ::3] = float("nan")
    scores[:, :, 1::9] = -float("nan")
    indices = select(run.select_topk, scores, [3000, 3000], 128, 8)
    assert ((indices >= 8) & (indices < 3000)).all()
    assert (indices.diff() > 0).all()


@pytest.mark.parametrize("shape", [(0, 2, 100), (2, 2, 100), (2, 0, 100)])
def test_select_topk_of_nothing(run, shape):
    assert select(run.select_topk, torch.zeros(shape), [100] * shape[0], 0, 8).numel() == 0


def test_keys_order_as_scores(library):
    scores = [-math.inf, -3e38, -1.0, -1e-45, 0.0, 1e-45, 1e-38, 1.0, 3e38, math.inf]
    keys = [library.key_of(score) for score in scores]
    assert keys == sorted(set(keys))
    assert library.key_of(-0.0) == library.key_of(0.0)


def test_digits_make_the_key(library):
    for score in (-math.inf, -7.25, 0.0, 1.1, math.inf):
        key = library.key_of(score)
        digits = [library.digit_of(key, i) for i in range(3)]
        assert digits[0] << 21 | digits[1] << 10 | digits[2] == key
        prefixes = [library.prefix_of(key, i) for i in range(3)]
        assert prefixes == [0, digits[0], digits[0] << 11 | digits[1]]


# gather_rows


def expected_rows(cache, indices, block_table):
    rows, heads, k = indices.shape
    expected = torch.zeros(rows, heads, k, cache.shape[3], dtype=cache.dtype)
    for row in range(rows):
        for head in range(heads):
            for j, token in enumerate(indices[row, head].tolist()):
                if token >= 0:
                    block = int(block_table[row, token // cache.shape[2]])
                    expected[row, head, j] = cache[block, head, token % cache.shape[2]]
    return expected


def same_bits(actual, expected):
    return torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
def test_gather_rows(run, build_context, dtype, head_size):
    context = build_context(
        [300, 70, 1],
        dtype=dtype,
        head_size=head_size,
        kind=DerivedKind.CHANNELS,
        key_layout=KeyLayout.TOKEN_MAJOR,
    )
    generator = torch.Generator().manual_seed(1)
    indices = torch.full((3, 2, 70), -1, dtype=torch.int32)
    for row, length in enumerate(context.seq_lens.tolist()):
        for head in range(2):
            count = min(length, 61)
            chosen = torch.randperm(length, generator=generator)[:count].sort().values
            indices[row, head, :count] = chosen
    host = context.cache.host
    shape = (*indices.shape, head_size)
    rows = [torch.full(shape, float("nan"), dtype=dtype) for _ in range(2)]
    run.gather_rows(*rows, host.key, host.value, indices, context.block_table)
    assert same_bits(rows[0], expected_rows(host.key, indices, context.block_table))
    assert same_bits(rows[1], expected_rows(host.value, indices, context.block_table))


def test_gather_from_wide_block_table(run, build_context):
    context = build_context(
        [300], kind=DerivedKind.CHANNELS, key_layout=KeyLayout.TOKEN_MAJOR, block_size=64
    )
    table = context.block_table.repeat(2, 3)[::2, :6]
    indices = torch.tensor([[[299, -1, 0], [5, 64, 63]]], dtype=torch.int32)
    rows = [torch.full((1, 2, 3, 64), float("nan"), dtype=torch.bfloat16) for _ in range(2)]
    run.gather_rows(*rows, context.cache.host.key, context.cache.host.value, indices, table)
    assert same_bits(rows[0], expected_rows(context.cache.host.key, indices, table))


def test_addresses_beyond_32_bits(library):
    strides = (8 * 2 * 128 * 128 * 2, 2 * 128 * 128 * 2, 128 * 2, 2)
    pages = Pages(None, *strides)
    for block, head, token in [(0, 0, 0), (1, 7, 127), (2**24, 3, 5), (2**31 - 1, 7, 127)]:
        expected = block * strides[0] + head * strides[1] + token * strides[2]
        assert library.bytes_to(ctypes.byref(pages), block, head, token) == expected


# pack_codes, unpack_codes


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 7, 8, 16, 64, 72, 100, 128, 4096])
def test_pack_and_unpack(run, bits, length):
    generator = torch.Generator().manual_seed(length)
    codes = torch.randint(0, 2**bits, (5, 3, length), generator=generator).to(torch.uint8)
    packed = run.pack_codes(codes, bits)
    assert torch.equal(packed, reference.pack_codes(codes, bits))
    assert torch.equal(run.unpack_codes(packed, bits, length), codes)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_pack_from_any_address(run, bits):
    memory = torch.randint(0, 2**bits, (3 * 64 + 5,), dtype=torch.uint8)
    codes = memory[5:].view(3, 64)
    assert torch.equal(run.pack_codes(codes, bits), reference.pack_codes(codes, bits))
    packed = torch.randint(0, 256, (2 * 8 + 3,), dtype=torch.uint8)[3:].view(2, 8)
    length = 64 // bits
    expected = reference.unpack_codes(packed, bits, length)
    assert torch.equal(run.unpack_codes(packed, bits, length), expected)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0)])
def test_pack_nothing(run, shape):
    assert run.pack_codes(torch.zeros(shape, dtype=torch.uint8), 1).numel() == 0
    assert run.unpack_codes(torch.zeros(shape[0], 0, dtype=torch.uint8), 1, 0).numel() == 0


# reduce_channels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("key_layout", list(KeyLayout))
@pytest.mark.parametrize(("block_size", "group_size"), [(128, 64), (96, 96), (128, 32)])
def test_reduce_channels(run, build_context, dtype, head_size, key_layout, block_size, group_size):
    context = build_context(
        [2 * block_size + 5, block_size],
        dtype=dtype,
        head_size=head_size,
        kind=DerivedKind.CHANNELS,
        key_layout=key_layout,
        block_size=block_size,
        group_size=group_size,
    )
    cache = context.cache
    blocks = [int(context.block_table[0, 1]), int(context.block_table[1, 0])]
    per_block = cache.layout.groups_per_block
    items = [block * per_block + group for block in blocks for group in range(per_block)]
    groups = torch.tensor([-1, *items, -(2**63)])  # the negative ones are none
    for block in blocks:
        cache.derived.extremes[block] = float("nan")
    # A negative extreme, an infinite one and -0.0.
    cache.host.key[blocks[0], 0, 3, 5] = -100
    cache.host.key[blocks[0], 1, 31, 0] = -float("inf")
    cache.host.key[blocks[1], 0, :, 1] = -0.0
    expected = cache.clone()
    reference.quantize_groups(groups, expected.host.key, expected.host.value, expected.derived)
    run.reduce_channels(groups, cache.host.key, cache.derived)
    assert torch.equal(cache.raw, expected.raw)


def test_reduce_keeps_nan(run, build_cache):
    cache = build_cache(kind=DerivedKind.CHANNELS, num_blocks=1)
    cache.host.key.zero_()
    cache.host.key[0, 0, 70, 9] = float("nan")
    run.reduce_channels(torch.tensor([0, 1]), cache.host.key, cache.derived)
    where = cache.derived.extremes.isnan().nonzero()
    assert len(where) > 0
    assert (where[:, [0, 1, 2, 4]] == torch.tensor([0, 0, 1, 9])).all()


def test_reduce_nothing(run, build_cache):
    cache = build_cache(kind=DerivedKind.CHANNELS)
    before = cache.raw.clone()
    run.reduce_channels(torch.zeros(0, dtype=torch.int64), cache.host.key, cache.derived)
    assert torch.equal(cache.raw, before)


# the emulator itself


def test_emulator_sees_accesses_outside(emulated):
    codes = torch.zeros(2, 4096, dtype=torch.uint8)
    packed = torch.zeros(2, 512, dtype=torch.uint8)
    with (
        guarded(codes, at_end=True) as data,
        guarded(packed, at_end=True) as to,
        pytest.raises(RuntimeError, match="outside the tensors"),
    ):
        emulated._run("pack_codes", Codes(1, 3, 4096, data, to))
    # And goes on afterwards.
    assert emulated.pack_codes(codes, 1).eq(0).all()


@pytest.mark.skipif(not sanitize.active(), reason="runs under sanitizers: `make sanitize`")
def test_sanitizers_see_single_bytes(emulated):
    def read_one_more():
        codes = torch.zeros(1, 65, dtype=torch.uint8)
        packed = torch.zeros(1, 9, dtype=torch.uint8)
        with guarded(codes, at_end=True) as data, guarded(packed, at_end=True) as to:
            emulated._run("pack_codes", Codes(1, 1, 66, data, to))

    assert "use-after-poison" in sanitize.report_of(read_one_more)


@pytest.mark.parametrize("structure", [SelectTopk, GatherRows, Codes, ReduceChannels])
def test_structures_fit(library, structure):
    assert ctypes.sizeof(structure) == getattr(library, f"size_of_{structure.__name__}")()


# on a device only: what the host cannot show


@pytest.mark.parametrize("run", [name for name in RUNS if name == "device"], indirect=True)
@pytest.mark.parametrize(("pairs", "length"), [(8, 131072), (1, 524288), (64, 40000)])
def test_select_topk_of_long_contexts(run, pairs, length):
    for name in ("normal", "ties", "equal"):
        scores = make_scores(name, (1, pairs, length))
        expected = select(reference.select_topk, scores, [length - 100], 2048, 8)
        assert torch.equal(select(run.select_topk, scores, [length - 100], 2048, 8), expected)


@pytest.mark.parametrize("run", [name for name in RUNS if name == "device"], indirect=True)
def test_select_topk_in_a_graph(run):
    scores = make_scores("normal", (2, 4, 20000)).cuda()
    tail_start = torch.tensor([20000, 300], dtype=torch.int32, device="cuda")
    indices = torch.empty(2, 4, 256, dtype=torch.int32, device="cuda")
    cuda.select_topk(indices, scores, tail_start, 8)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.select_topk(indices, scores, tail_start, 8)
    for seed, lengths in enumerate([[20000, 300], [9, 0], [7777, 20000]]):
        new = make_scores("ties", (2, 4, 20000), seed)
        scores.copy_(new)
        tail_start.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        expected = select(reference.select_topk, new, lengths, 256, 8)
        assert torch.equal(indices.cpu(), expected)
