"""K and V land in the addressed slots, bit for bit, and nothing else changes."""

import pytest
import torch

from vllm_tailorkv.kernels import ops, reference
from vllm_tailorkv.layout import KeyLayout

CASES = [
    # dtype, layout, heads, head_size, block_size
    (torch.bfloat16, KeyLayout.CHANNEL_MAJOR, 2, 128, 128),
    (torch.float16, KeyLayout.CHANNEL_MAJOR, 8, 80, 64),
    (torch.float32, KeyLayout.CHANNEL_MAJOR, 1, 256, 128),
    (torch.bfloat16, KeyLayout.TOKEN_MAJOR, 2, 96, 128),
    (torch.float32, KeyLayout.TOKEN_MAJOR, 3, 64, 64),
]


def slots_of(name: str, count: int, capacity: int) -> torch.Tensor:
    if name == "consecutive":
        return torch.arange(count) + 100
    slots = torch.randperm(capacity, generator=torch.Generator().manual_seed(1))[:count]
    if name == "padded":
        slots[::3] = -1
    return slots


@pytest.mark.parametrize("slots", ["consecutive", "scattered", "padded"])
@pytest.mark.parametrize(("dtype", "key_layout", "heads", "head_size", "block_size"), CASES)
@pytest.mark.parametrize("tokens", [0, 1, 300])
def test_equals_reference(
    fast, build_cache, dtype, key_layout, heads, head_size, block_size, slots, tokens
):
    cache = build_cache(
        heads=heads,
        head_size=head_size,
        block_size=block_size,
        dtype=dtype,
        key_layout=key_layout,
    )
    expected = cache.clone()
    # Heads of a fused projection lie apart: only channels are contiguous.
    fused = torch.randn(tokens, 3 * heads, head_size).to(dtype)
    key, value = fused[:, heads : 2 * heads], fused[:, 2 * heads :]
    mapping = slots_of(slots, tokens, 8 * block_size)
    mapping = torch.cat([mapping, torch.full((5,), 7)])  # longer than the tokens: ignored
    reference.write_kv(key, value, expected.host.key, expected.host.value, mapping)
    fast.write_kv(key, value, cache.host.key, cache.host.value, mapping)
    assert torch.equal(cache.raw, expected.raw)


def test_reference_against_loops(build_cache):
    cache = build_cache(block_size=64)
    key, value = torch.randn(2, 20, 2, 64).bfloat16()
    slots = slots_of("padded", 20, 8 * 64)
    reference.write_kv(key, value, cache.host.key, cache.host.value, slots)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            assert torch.equal(cache.host.key[slot // 64, :, slot % 64], key[token])
            assert torch.equal(cache.host.value[slot // 64, :, slot % 64], value[token])
    written = 2 * 64 * int((slots >= 0).sum())
    assert int((~cache.host.value.isnan()).sum()) == written


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("slots", ["consecutive", "scattered", "padded"])
def test_key_rows(fast, build_cache, dtype, slots):
    """K lands in both places, V in one, and nothing else changes."""
    cache = build_cache(dtype=dtype, key_rows=True)
    expected = cache.clone()
    key, value = torch.randn(2, 300, 2, 64).to(dtype)
    mapping = slots_of(slots, 300, 8 * 128)
    host = expected.host
    reference.write_kv(key, value, host.key, host.value, mapping, host.key_rows)
    host = cache.host
    fast.write_kv(key, value, host.key, host.value, mapping, host.key_rows)
    assert torch.equal(cache.raw, expected.raw)
    assert torch.equal(host.key.nan_to_num(), host.key_rows.nan_to_num())
    assert int((~host.key_rows.isnan()).sum()) == 2 * 64 * int((mapping >= 0).sum())


def test_arguments(build_cache):
    cache = build_cache()
    key = torch.zeros(3, 2, 64, dtype=torch.bfloat16)
    slots = torch.arange(3)
    pages = (cache.host.key, cache.host.value)
    with pytest.raises(RuntimeError, match="key must be"):
        ops.write_kv(key[:, :1], key, *pages, slots)
    with pytest.raises(RuntimeError, match="key must be bfloat16, is float32"):
        ops.write_kv(key.float(), key, *pages, slots)
    with pytest.raises(RuntimeError, match="shorter"):
        ops.write_kv(key, key, *pages, slots[:2])
    with pytest.raises(RuntimeError, match="int64"):
        ops.write_kv(key, key, *pages, slots.int())
    with pytest.raises(RuntimeError, match="key_rows"):
        ops.write_kv(key, key, *pages, slots, pages[0][:1])
