"""The CUDA kernel against the reference: on the host always, on the device where there is one."""

import ctypes
import math

import pytest
import sanitize
import torch
from cuda_device import Device
from cuda_emulator import Emulated, SelectTopk, build

from vllm_tailorkv.kernels import cuda, reference

RUNS = ["emulated", *(["device"] if torch.cuda.is_available() else [])]


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


# the emulator itself


def test_emulator_sees_accesses_outside(emulated):
    scores = torch.zeros(1, 1, 4096)
    with pytest.raises(RuntimeError, match="outside the tensors"):
        select(emulated.select_topk, scores, [4097], 8, 0, 1)
    # And goes on afterwards.
    indices = select(emulated.select_topk, scores, [4096], 8, 0, 1)
    assert indices.flatten().tolist() == list(range(8))


@pytest.mark.skipif(not sanitize.active(), reason="runs under sanitizers: `make sanitize`")
def test_sanitizers_see_single_bytes(emulated):
    def read_one_more():
        select(emulated.select_topk, torch.zeros(1, 1, 65), [66], 8, 0, 1)

    assert "use-after-poison" in sanitize.report_of(read_one_more)


def test_structure_fits(library):
    assert ctypes.sizeof(SelectTopk) == library.size_of_SelectTopk()


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
