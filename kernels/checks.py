"""Argument checks of the ops, shared by all implementations.

Each raises `ValueError` with the argument's name; none reads a tensor's values.
"""

import torch

from vllm_tailorkv.kernels.types import ChannelIndex, DenseCodes, DerivedPages, TokenIndex

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_caches(key_cache: torch.Tensor, value_cache: torch.Tensor) -> None:
    _require(key_cache.dim() == 4, "key_cache must be [NB, Hk, bs, d]")
    _require(key_cache.shape == value_cache.shape, "value_cache must have key_cache's shape")
    _require(key_cache.dtype in FLOATS, f"key_cache has dtype {key_cache.dtype}")
    _require(key_cache.dtype == value_cache.dtype, "value_cache must have key_cache's dtype")


def check_rows(name: str, tensor: torch.Tensor, rows: int) -> None:
    """An int32 tensor with one entry a row."""
    _require(tensor.dtype == torch.int32, f"{name} must be int32")
    _require(tensor.dim() == 1 and tensor.shape[0] == rows, f"{name} must have {rows} rows")
    _require(tensor.is_contiguous(), f"{name} must be contiguous")


def _check_block_table(block_table: torch.Tensor, rows: int) -> None:
    _require(block_table.dtype == torch.int32, "block_table must be int32")
    _require(
        block_table.dim() == 2 and block_table.shape[0] == rows,
        f"block_table must have {rows} rows",
    )
    _require(block_table.stride(1) == 1, "block_table rows must be contiguous")


def check_write(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    key_rows: torch.Tensor | None,
) -> None:
    """Arguments of `write_kv`."""
    _check_caches(key_cache, value_cache)
    if key_rows is not None:
        _require(
            key_rows.shape == key_cache.shape and key_rows.dtype == key_cache.dtype,
            "key_rows must be like key_cache",
        )
    _, heads, _, size = key_cache.shape
    for name, tensor in (("key", key), ("value", value)):
        _require(
            tensor.dim() == 3 and tensor.shape[1:] == (heads, size),
            f"{name} must be [T, {heads}, {size}], is {tuple(tensor.shape)}",
        )
        _require(tensor.dtype == key_cache.dtype, f"{name} must have the caches' dtype")
        _require(tensor.stride(2) == 1, f"{name} must have a contiguous last axis")
    _require(key.shape[0] == value.shape[0], "key and value differ in tokens")
    _require(slot_mapping.dtype == torch.int64, "slot_mapping must be int64")
    _require(slot_mapping.is_contiguous(), "slot_mapping must be contiguous")
    _require(slot_mapping.shape[0] >= key.shape[0], "slot_mapping is shorter than key")


def check_codes(codes: DenseCodes, key_cache: torch.Tensor) -> None:
    """The codes of a dense layer fit its host pages."""
    blocks, heads, block_size, size = key_cache.shape
    groups = codes.key.scale.shape[2]
    group_size = block_size // groups
    bits = codes.key.codes.shape[4] * 8 // group_size
    _require(bits in (1, 2, 4), f"{bits} bits")
    _require(codes.key.codes.shape[:4] == (blocks, heads, groups, size), "key codes' shape")
    row_bytes = -(-size * bits // 8)
    _require(
        codes.value.codes.shape == (blocks, heads, groups, group_size, row_bytes),
        "value codes' shape",
    )
    value_groups = -(-size // group_size)
    _require(
        codes.value.scale.shape == (blocks, heads, groups, group_size, value_groups),
        "value scales' shape",
    )
    for group_codes in codes:
        _require(group_codes.codes.dtype == torch.uint8, "codes must be uint8")
        _require(group_codes.scale.dtype == torch.float16, "scales must be float16")
        _require(group_codes.zero.dtype == torch.float16, "zeros must be float16")
        _require(group_codes.zero.shape == group_codes.scale.shape, "zeros' shape")


def _check_index(index: TokenIndex, key_cache: torch.Tensor) -> None:
    blocks, heads, block_size, size = key_cache.shape
    if isinstance(index, ChannelIndex):
        extremes = index.extremes
        _require(extremes.dtype == key_cache.dtype, "extremes must have the caches' dtype")
        _require(
            extremes.dim() == 5
            and (*extremes.shape[:2], *extremes.shape[3:]) == (blocks, heads, 2, size),
            "extremes must be [NB, Hk, G, 2, d]",
        )
        return
    codes, scale, zero = index.key
    groups = scale.shape[2]
    _require(
        codes.shape == (blocks, heads, groups, size, block_size // groups // 8),
        "the index must hold one bit for every token and channel",
    )
    _require(codes.dtype == torch.uint8, "codes must be uint8")
    _require(scale.dtype == torch.float16 and zero.dtype == torch.float16, "scales' dtype")


def check_quantize(
    groups: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    derived: DerivedPages,
) -> None:
    """Arguments of `quantize_groups`."""
    _check_caches(key_cache, value_cache)
    _require(groups.dtype == torch.int64 and groups.dim() == 1, "groups must be int64 [N]")
    _require(groups.is_contiguous(), "groups must be contiguous")
    if isinstance(derived, DenseCodes):
        check_codes(derived, key_cache)
    else:
        _check_index(derived, key_cache)


def check_decode(
    output: torch.Tensor,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
) -> None:
    """Arguments that both decode attentions share."""
    _check_caches(key_cache, value_cache)
    _, heads, _, size = key_cache.shape
    _require(query.dim() == 3 and query.shape[2] == size, f"query must be [R, H, {size}]")
    _require(query.shape[1] % heads == 0, f"{query.shape[1]} query heads for {heads} KV heads")
    _require(output.shape == query.shape, "output must have query's shape")
    _require(query.dtype == key_cache.dtype, "query must have the caches' dtype")
    _require(output.dtype == key_cache.dtype, "output must have the caches' dtype")
    _require(query.is_contiguous() and output.is_contiguous(), "query, output: contiguous")
    check_rows("seq_lens", seq_lens, query.shape[0])
    _check_block_table(block_table, query.shape[0])


def _check_mass(mass: torch.Tensor, query: torch.Tensor) -> None:
    _require(
        mass.shape == query.shape[:2] and mass.dtype == torch.float32, "mass must be float32 [R, H]"
    )
    _require(mass.is_contiguous(), "mass must be contiguous")


def check_mass(
    mass: torch.Tensor,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    tail_start: torch.Tensor,
) -> None:
    """Arguments of `log_mass`."""
    check_decode(query, query, key_cache, key_cache, block_table, seq_lens)
    _check_mass(mass, query)
    check_rows("tail_start", tail_start, query.shape[0])


def check_score(
    scores: torch.Tensor,
    query: torch.Tensor,
    index: TokenIndex,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    tail_start: torch.Tensor,
    offset: torch.Tensor,
) -> None:
    """Arguments of `score_tokens`."""
    _check_scored(query, index, key_cache, block_table, tail_start, offset)
    _require(scores.dim() == 3 and scores.shape[:2] == query.shape[:2], "scores must be [R, Hk, S]")
    _require(scores.dtype == torch.float32, "scores must be float32")
    _require(scores.stride(2) == 1, "scores must have a contiguous last axis")


def check_propose(
    indices: torch.Tensor,
    query: torch.Tensor,
    index: TokenIndex,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    tail_start: torch.Tensor,
    offset: torch.Tensor,
) -> None:
    """Arguments of `propose_topk`."""
    _check_scored(query, index, key_cache, block_table, tail_start, offset)
    check_indices(indices, key_cache, query.shape[0])


def _check_scored(
    query: torch.Tensor,
    index: TokenIndex,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    tail_start: torch.Tensor,
    offset: torch.Tensor,
) -> None:
    rows, heads, size = query.shape[0], key_cache.shape[1], key_cache.shape[3]
    _require(
        query.dim() == 4 and (query.shape[1], query.shape[3]) == (heads, size),
        f"query must be [R, {heads}, Q, {size}]",
    )
    _require(query.dtype == torch.float32, "query must be float32")
    _require(query.is_contiguous(), "query must be contiguous")
    _require(
        offset.shape == query.shape[:3] and offset.dtype == torch.float32,
        "offset must be float32 [R, Hk, Q]",
    )
    _require(offset.is_contiguous(), "offset must be contiguous")
    check_rows("tail_start", tail_start, rows)
    _check_block_table(block_table, rows)
    _check_index(index, key_cache)


def check_topk(indices: torch.Tensor, scores: torch.Tensor, tail_start: torch.Tensor) -> None:
    """Arguments of `select_topk`."""
    _require(scores.dim() == 3 and scores.dtype == torch.float32, "scores: float32 [R, Hk, S]")
    _require(scores.stride(2) == 1, "scores must have a contiguous last axis")
    _require(indices.dtype == torch.int32, "indices must be int32")
    _require(
        indices.dim() == 3 and indices.shape[:2] == scores.shape[:2], "indices must be [R, Hk, k]"
    )
    _require(indices.is_contiguous(), "indices must be contiguous")
    check_rows("tail_start", tail_start, scores.shape[0])


def check_refine(
    indices: torch.Tensor,
    candidates: torch.Tensor,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    mass: torch.Tensor,
    channels: int,
) -> None:
    """Arguments of `refine_topk`."""
    _require(0 < channels <= key_cache.shape[3], f"channels {channels} of {key_cache.shape[3]}")
    _, heads, _, size = key_cache.shape
    _require(query.dim() == 3 and query.shape[2] == size, f"query must be [R, H, {size}]")
    _require(query.shape[1] % heads == 0, f"{query.shape[1]} query heads for {heads} KV heads")
    _require(query.dtype == key_cache.dtype, "query must have the cache's dtype")
    _require(query.is_contiguous(), "query must be contiguous")
    check_indices(indices, key_cache, query.shape[0])
    check_indices(candidates, key_cache, query.shape[0])
    _check_mass(mass, query)
    _check_block_table(block_table, query.shape[0])


def check_indices(indices: torch.Tensor, key_cache: torch.Tensor, rows: int) -> None:
    """The selected tokens of `sparse_decode_attention`."""
    _require(indices.dtype == torch.int32 and indices.is_contiguous(), "indices: int32")
    _require(
        indices.dim() == 3 and indices.shape[:2] == (rows, key_cache.shape[1]),
        "indices must be [R, Hk, k]",
    )


def check_preference(query: torch.Tensor, key: torch.Tensor, alpha: float) -> None:
    """Arguments of `dense_preference`."""
    _require(query.dim() == 3 and key.dim() == 3, "query [n, H, d] and key [L, Hk, d]")
    _require(query.shape[2] == key.shape[2], "query and key differ in head_size")
    _require(query.shape[1] % key.shape[1] == 0, "H must be a multiple of Hk")
    _require(query.dtype in FLOATS and query.dtype == key.dtype, "query and key: one dtype")
    _require(0 < query.shape[0] <= key.shape[0], "more queries than keys")
    _require(query.is_contiguous() and key.is_contiguous(), "query, key: contiguous")
    _require(0.0 < alpha <= 1.0, f"alpha {alpha} is not in (0, 1]")
