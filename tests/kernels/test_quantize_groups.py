"""Records agree with the reference to the bit; the reference agrees with the formula."""

from functools import lru_cache

import pytest
import torch

from vllm_tailorkv.kernels import ops, reference, triton
from vllm_tailorkv.layout import DerivedKind, KeyLayout

CASES = [
    # dtype, layout, head_size, block_size, group_size
    (torch.bfloat16, KeyLayout.CHANNEL_MAJOR, 128, 128, 64),
    (torch.float16, KeyLayout.CHANNEL_MAJOR, 80, 128, 64),
    (torch.float32, KeyLayout.CHANNEL_MAJOR, 64, 128, 32),
    (torch.bfloat16, KeyLayout.TOKEN_MAJOR, 96, 128, 128),
    (torch.float32, KeyLayout.TOKEN_MAJOR, 256, 64, 64),
    (torch.bfloat16, KeyLayout.CHANNEL_MAJOR, 72, 64, 64),
]
KINDS = [
    (DerivedKind.DENSE, 1),
    (DerivedKind.DENSE, 2),
    (DerivedKind.DENSE, 4),
    (DerivedKind.ONEBIT, 1),
    (DerivedKind.CHANNELS, 1),
]


def fill(cache) -> None:
    """Random K and V of very different ranges, with constants and extremes among them."""
    generator = torch.Generator().manual_seed(3)
    for pages in (cache.host.key, cache.host.value):
        x = torch.randn(pages.shape, generator=generator)
        x *= 10.0 ** torch.randint(-6, 4, (1, 1, 1, pages.shape[3]), generator=generator)
        x[1] = x[1].round()  # many ties
        x[2, :, :, ::7] = 0.25  # a scale of zero
        x[2, :, :, 1::7] = 0.0
        x[3, :, ::5] *= 30000.0  # beyond float16
        pages.copy_(x.clamp(-60000, 60000) if pages.dtype == torch.float16 else x)


@lru_cache(maxsize=64)
def quantized(build_cache, fit, groups, **options):
    """Pages of random K and V, and the same with the records of the reference."""
    cache = build_cache(num_blocks=5, **options)
    fill(cache)
    expected = cache.clone()
    host = expected.host
    reference.quantize_groups(torch.tensor(groups), host.key, host.value, expected.derived, fit)
    return cache, expected


@pytest.mark.interpreted
@pytest.mark.parametrize("fit", [False, True])
@pytest.mark.parametrize(("kind", "bits"), KINDS)
@pytest.mark.parametrize(("dtype", "key_layout", "head_size", "block_size", "group_size"), CASES)
def test_equals_reference(
    fast, build_cache, kind, bits, fit, dtype, key_layout, head_size, block_size, group_size
):
    options = {
        "kind": kind,
        "bits": bits,
        "head_size": head_size,
        "block_size": block_size,
        "group_size": group_size,
        "dtype": dtype,
        "key_layout": key_layout,
    }
    per_block = block_size // group_size
    generator = torch.Generator().manual_seed(head_size)
    groups = torch.randperm(4 * per_block, generator=generator)  # the last block stays as it is
    filled, expected = quantized(build_cache, fit, tuple(groups.tolist()), **options)
    cache = filled.clone()
    fast.quantize_groups(groups, cache.host.key, cache.host.value, cache.derived, fit)
    if not torch.equal(cache.raw, expected.raw):
        # Only the sign of a zero may differ, and bytes decide nothing else.
        assert torch.equal(untied(cache), untied(expected))


def untied(cache) -> torch.Tensor:
    """The raw pages with -0.0 zeros as 0.0."""
    copy = cache.clone()
    if copy.layout.kind is DerivedKind.CHANNELS:
        copy.derived.extremes.add_(0.0)
        return copy.raw
    for codes in copy.derived:
        codes.zero.add_(0.0)
    return copy.raw


@pytest.mark.parametrize("fit", [False, True])
def test_a_large_channel_of_values_keeps_its_mean(fast, build_cache, fit):
    """What a layer that attends to everything needs of V: no bias over the tokens."""
    cache = build_cache(bits=2, num_blocks=1, dtype=torch.float32)
    cache.host.value.copy_(torch.randn(cache.host.value.shape))
    cache.host.value[..., 5] += 8
    groups = torch.arange(cache.layout.groups_per_block)
    fast.quantize_groups(groups, cache.host.key, cache.host.value, cache.derived, fit)
    size = cache.layout.head_size
    value = reference.dequantize_values(cache.derived.value, 0, 64, 2, size)
    bias = (value - cache.host.value[0]).mean(1)
    assert bias[:, 5].abs().max() < 0.3


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_reference_against_formula(build_cache, bits):
    cache = build_cache(bits=bits, num_blocks=2, dtype=torch.float32)
    fill_with = torch.randn(2, 2, 128, 64)
    cache.host.key.copy_(fill_with)
    cache.host.value.copy_(fill_with)
    host = cache.host
    reference.quantize_groups(torch.tensor([1]), host.key, host.value, cache.derived, False)
    group = fill_with[0, :, 64:].double()
    for codes, axis in ((cache.derived.key, 1), (cache.derived.value, 2)):
        low, high = group.amin(axis, keepdim=True), group.amax(axis, keepdim=True)
        step = (high - low) / (2**bits - 1)
        if axis == 1:
            back = reference.dequantize_keys(codes, 0, 64)[:, 64:].double()
        else:
            back = reference.dequantize_values(codes, 0, 64, bits, 64)[:, 64:].double()
        # Half a step, and what float16 does to scale and zero.
        assert ((back - group).abs() <= step * 0.51 + 4e-3).all()


@pytest.mark.parametrize("bits", [1, 2])
def test_fitted_line_is_the_least_squares_line(bits):
    """Against float64 on the values themselves: a step is a thousandth of the range."""
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(50, 64, generator=generator) * 3 + torch.randn(50, 1, generator=generator)
    low, extent = x.amin(1, keepdim=True), x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    # Two bits take four fifths of the range: steps of 0.8 / 3, the first half one from 0.1 on.
    rough = x.new_tensor({1: [1 / 2], 2: [0.7 / 3, 1 / 2, 2.3 / 3]}[bits])
    steps = ((x - low) / extent * 1023).round()
    codes = (steps.unsqueeze(-1) > rough * 1023).sum(-1).double()
    scale, zero = reference.fitted_line(x, bits)
    for i in range(50):
        design = torch.stack((codes[i], torch.ones(64).double()), 1)
        best = torch.linalg.lstsq(design, x[i].double().unsqueeze(1)).solution.squeeze(1)
        line = torch.stack((scale[i], zero[i])).double()
        assert (line - best).abs().max() <= 0.01 * extent[i]


@pytest.mark.parametrize(("bits", "share"), [(1, 0.2), (2, 0.65), (4, 1.0)])
def test_fit_lowers_the_error(bits, share):
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(5))
    errors = []
    for fit in (False, True):
        codes, scale, zero = reference.quantize(x, bits, fit)
        back = codes * scale.float().unsqueeze(1) + zero.float().unsqueeze(1)
        errors.append((back - x).square().mean())
    assert errors[1] <= share * errors[0]
    assert errors[1] > 0.001 * errors[0]


@pytest.mark.parametrize("bits", [1, 2])
def test_a_lone_outlier_keeps_its_value(bits):
    """As the K of a sink token has it: a level of its own, and the others are not pushed aside."""
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(6))
    x[:, 0] += 30
    codes, scale, zero = reference.quantize(x, bits)
    error = codes * scale.float().unsqueeze(1) + zero.float().unsqueeze(1) - x
    assert error[:, 0].abs().max() <= 0.05
    assert error[:, 1:].square().mean().sqrt() <= 1.1


@pytest.mark.parametrize("kind", list(DerivedKind))
def test_negative_groups_are_none(fast, build_cache, kind):
    """So that their number may be fixed: one a row, whether it completes a group or not."""
    cache = build_cache(kind=kind, num_blocks=2)
    for pages in cache.host[:2]:
        pages.normal_()
    some = torch.tensor([-1, 2, -9, 0, -(2**63), -1])
    host = cache.host
    for module in (fast, reference):
        expected, actual = cache.clone(), cache.clone()
        reference.quantize_groups(some[some >= 0], host.key, host.value, expected.derived)
        module.quantize_groups(some, host.key, host.value, actual.derived)
        assert torch.equal(actual.raw, expected.raw)


@pytest.mark.interpreted
@pytest.mark.parametrize(("kind", "bits"), KINDS)
@pytest.mark.parametrize(("dtype", "key_layout", "head_size", "block_size", "group_size"), CASES)
def test_appended_tokens(
    placed, build_cache, kind, bits, dtype, key_layout, head_size, block_size, group_size
):
    """Written and coded at once, as one after the other: the page is not read where it is new."""
    cache = build_cache(
        kind=kind,
        bits=bits,
        head_size=head_size,
        block_size=block_size,
        group_size=group_size,
        dtype=dtype,
        key_layout=key_layout,
        num_blocks=5,
    )
    fill(cache)
    generator = torch.Generator().manual_seed(4)
    key, value = torch.randn(2, 5, 2, head_size, generator=generator).to(dtype)
    per_block = block_size // group_size
    # Within a group, the last of one, none, the last of another, one that ends nothing.
    slots = [3 * block_size + 1, block_size - 1, -1, 2 * block_size + group_size - 1, -1]
    groups = torch.tensor([-1, per_block - 1, -1, 2 * per_block, -1])
    for slot in slots:
        if slot >= 0:
            cache.host.key[slot // block_size, :, slot % block_size] = float("nan")
            cache.host.value[slot // block_size, :, slot % block_size] = float("nan")
    expected = cache.clone()
    slots, host = torch.tensor(slots), expected.host
    reference.write_kv(key, value, host.key, host.value, slots)
    reference.quantize_groups(groups[groups >= 0], host.key, host.value, expected.derived)
    host = cache.host
    placed(triton).append_tokens(
        key, value, host.key, host.value, slots, groups, cache.derived, True
    )
    if not torch.equal(cache.raw, expected.raw):
        assert torch.equal(untied(cache), untied(expected))


@pytest.mark.parametrize("kind", list(DerivedKind))
def test_nothing_to_do(fast, build_cache, kind):
    cache = build_cache(kind=kind)
    before = cache.raw.clone()
    empty = torch.zeros(0, dtype=torch.int64)
    fast.quantize_groups(empty, cache.host.key, cache.host.value, cache.derived)
    assert torch.equal(cache.raw, before)


def test_arguments(build_cache):
    cache, other = build_cache(), build_cache(head_size=128)
    groups = torch.tensor([0])
    with pytest.raises(RuntimeError, match="groups"):
        ops.quantize_groups(groups.int(), cache.host.key, cache.host.value, cache.derived)
    with pytest.raises(RuntimeError, match="K codes must be"):
        ops.quantize_groups(groups, other.host.key, other.host.value, cache.derived)
