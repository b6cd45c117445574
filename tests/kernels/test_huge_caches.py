"""The last blocks of a cache of more than 2^31 elements are served like those of a small one."""

import pytest
import torch

from vllm_tailorkv.cache.views import derived_pages, host_pages
from vllm_tailorkv.layout import DerivedKind

SINKS = 8
LENGTH = 320


def huge(context):
    """The same context in the last blocks of a huge cache; what nothing touches takes no memory."""
    small = context.cache
    layout, dtype, pages = small.layout, small.host.key.dtype, small.raw
    num_blocks = (1 << 31) // small.host.key.stride(0) + 1 + len(pages)
    raw = torch.empty(num_blocks, pages.shape[1], dtype=torch.uint8)
    raw[-len(pages) :] = pages
    host = host_pages(raw[:, : layout.host_bytes], layout, dtype)
    derived = derived_pages(raw[:, layout.host_bytes :], layout, dtype)
    cache = type(small)(layout, raw, host, derived)
    offset = num_blocks - len(pages)
    return type(context)(cache, context.block_table + offset, context.seq_lens)


def results(cpu, context):
    """Write a group of K and V, derive its records, and attend: the output, and the pages used."""
    cache, table, lengths = context.cache, context.block_table, context.seq_lens
    host, derived, size = cache.host, cache.derived, cache.layout.block_size
    generator = torch.Generator().manual_seed(1)
    query, key, value = torch.randn(3, 64, 2, 64, generator=generator).bfloat16()
    # The third block of the only row has the last group.
    first = int(table[0, 2]) * size
    cpu.write_kv(key, value, host.key, host.value, torch.arange(64) + first, None)
    group = torch.tensor([first // cache.layout.group_size])
    cpu.quantize_groups(group, host.key, host.value, derived, True)
    query, scale = query[:1].repeat(1, 2, 1), 0.125
    output = torch.full_like(query, float("nan"))
    pages = (output, query, host.key, host.value)
    tail = torch.full_like(lengths, LENGTH - 64)
    if cache.layout.kind is DerivedKind.DENSE:
        cpu.quantized_decode_attention(*pages, derived, table, lengths, lengths, scale, 0.0)
    else:
        indices = torch.full((1, 2, 100), -1, dtype=torch.int32)
        offset = torch.zeros(1, 2, 2)
        cpu.propose_topk(
            *(indices, query.float().unflatten(1, (2, 2)), derived, host.key, table, tail),
            *(offset, SINKS, 8, LENGTH),
        )
        assert (indices >= SINKS).all()
        cpu.sparse_decode_attention(*pages, indices, table, lengths, tail, SINKS, scale, 0.0)
    return output, cache.raw[table[0, :3].long()]


@pytest.mark.parametrize("kind", DerivedKind)
def test_equals_a_small_cache(cpu, build_context, kind):
    context = build_context([LENGTH], kind=kind)
    expected = results(cpu, huge(context))
    found = results(cpu, context)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
