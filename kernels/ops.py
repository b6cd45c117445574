"""The public ops: one function each, its contract, and nothing else.

Symbols are those of `types.py`. Outputs are written in place into tensors the caller
owns. Index tensors are int32 (`block_table`, `seq_lens`, ...) or int64 (`slot_mapping`,
`groups`), contiguous and on the device of the caches. Every function raises `RuntimeError` for
shapes, dtypes or strides that break its contract, and on CPUs for lengths beyond what a block
table has room for. Other values (a block that does not exist) are left to the caller, as vLLM's
ops do, unless VLLM_TAILORKV_CHECK_VALUES=1: then the C++ ops check them all.

Positions: a row with `seq_len = L` tokens in context, this step's token included, has
*sinks* `[0, sink_tokens)`, a *middle* `[sink_tokens, tail_start)` and an exact *tail*
`[tail_start, L)`. Every group that overlaps the middle is complete.

`sink_logits`, float32 [H], contiguous and finite, is what models call attention sinks: each query
head has a logit of its own that takes part in its softmax, and no value. Neither `scale` nor a soft
cap applies to it. Sinks without that word are tokens.
"""

import torch

from vllm_tailorkv.kernels.dispatch import implementation
from vllm_tailorkv.kernels.types import DenseCodes, DerivedPages, HotRows, TokenIndex


def _beside(hot: HotRows | None) -> dict[str, HotRows]:
    """The argument of those who know rows on the device."""
    return {} if hot is None else {"hot": hot}


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    key_rows: torch.Tensor | None = None,
    hot: HotRows | None = None,
) -> None:
    """Write K and V of new tokens into host pages.

    Args:
        key, value: [T, Hk, d], the caches' dtype; the last axis contiguous.
        key_cache, value_cache: [NB, Hk, bs, d].
        slot_mapping: int64 [>= T]; token i goes to block `slot // bs`, offset `slot % bs`;
            a negative slot is skipped.
        key_rows: like key_cache; K is written there too.
        hot: rows on the device, of which those that are written are forgotten; Triton alone.
    """
    implementation("write_kv", key_cache)(
        key, value, key_cache, value_cache, slot_mapping, key_rows, **_beside(hot)
    )


def quantize_groups(
    groups: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    derived: DerivedPages,
    fit: bool = True,
) -> None:
    """Derive the records of completed groups from the host pages (section 3.2 of the paper).

    `code = clamp(round_half_even((x - zero) / scale), 0, 2^b - 1)` in float32; 0 where the scale
    is 0. Scale and zero are float16, saturated to its range, and those that codes are made with:

    - without `fit`, as published, they span the extremes of the group:
      `scale = (max - min) / (2^b - 1)`, `zero = min`;
    - with `fit`, for K at one and two bits and V at one, they are the least squares line from rough
      codes to x, which leaves half the error:
      `u = round_half_even((x - min) / ((max - min) / 1023))`; the rough code is how many of 512
      (one bit), or of 239, 512 and 785 (two bits: four fifths of the range), u reaches. The line is
      that from rough codes to u, so all its sums are integers and exact. Where the step between
      extremes is 0 or beyond float16, they are spanned. V at two bits is spanned: fitted, it would
      cut off channels that are large in every token, a bias that no number of tokens averages away.

    All implementations agree to the bit. An index of channels gets the smallest and the largest K
    of each channel, exactly.

    Args:
        groups: int64 [N], `block * G + group within the block`, each complete; a negative one is
            none and skipped, so that N may be fixed.
        key_cache, value_cache: [NB, Hk, bs, d].
        derived: the records to write; their shapes tell g and b.
        fit: see above; no matter at four bits and to an index of channels.
    """
    implementation("quantize_groups", key_cache)(groups, key_cache, value_cache, derived, fit)


def append_tokens(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    groups: torch.Tensor,
    derived: DerivedPages,
    fit: bool = True,
    hot: HotRows | None = None,
) -> None:
    """`write_kv`, then `quantize_groups`, of one token a row: where it can be done, at once.

    Args:
        key, value, key_cache, value_cache, slot_mapping, hot: as of `write_kv`.
        groups: int64 [T]; the group that token i completes, whose last it is, or a negative one.
        derived, fit: as of `quantize_groups`.
    """
    implementation("append_tokens", key_cache)(
        key, value, key_cache, value_cache, slot_mapping, groups, derived, fit, **_beside(hot)
    )


def quantized_decode_attention(
    output: torch.Tensor,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    codes: DenseCodes,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    tail_start: torch.Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
) -> None:
    """Attention of a dense layer: codes before, exact host rows after, one softmax.

    With caches of 16 bits an implementation may round the factors of a group's codes to
    1/32,000 or so of the sum of their magnitudes: about 0.1% of the sums' standard deviation.

    Args:
        output, query: [R, H, d], the caches' dtype.
        key_cache, value_cache: [NB, Hk, bs, d].
        codes: K and V codes of the same blocks.
        block_table: int32 [R, max_blocks].
        seq_lens: int32 [R]; tokens in context; 0 for a row of padding, whose output is 0.
        tail_start: int32 [R], a multiple of g, at most `seq_lens`: tokens
            `[0, tail_start)` are read from codes, the rest from the host.
        scale: factor on q.k before the softmax.
        softcap: if positive, scores become `softcap * tanh(score / softcap)`.
        sink_logits: see the module.
    """
    implementation("quantized_decode_attention", key_cache)(
        output,
        query,
        key_cache,
        value_cache,
        codes,
        block_table,
        seq_lens,
        tail_start,
        scale,
        softcap,
        sink_logits,
    )


def log_mass(
    mass: torch.Tensor,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    tail_start: torch.Tensor,
    *,
    sink_tokens: int,
    scale: float,
    softcap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
) -> None:
    """What each head pays to sinks, tail and sink logit: log of the sum of `exp(score)`.

    Scores of heads have different levels. Less this, they can be compared: `score_tokens`.

    Args:
        mass: float32 [R, H]; 0 for a row with neither sinks nor tail nor `sink_logits`, and for a
            row without a middle (`tail_start <= sink_tokens`), of which nothing is read: it has
            nothing to compare, and its tail may be a whole context.
        query: [R, H, d], the cache's dtype.
        key_cache: [NB, Hk, bs, d].
        block_table: int32 [R, max_blocks].
        seq_lens: int32 [R].
        tail_start: int32 [R]; sinks and tail may overlap, a token counts once.
        sink_tokens: tokens always kept at the start.
        scale: factor on q.k.
        softcap: if positive, scores become `softcap * tanh(score / softcap)`.
        sink_logits: see the module; counted in the mass.
    """
    implementation("log_mass", key_cache)(
        mass,
        query,
        key_cache,
        block_table,
        seq_lens,
        tail_start,
        sink_tokens,
        scale,
        softcap,
        sink_logits,
    )


def score_tokens(
    scores: torch.Tensor,
    query: torch.Tensor,
    index: TokenIndex,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    tail_start: torch.Tensor,
    *,
    offset: torch.Tensor,
    sink_tokens: int,
    critical_channels: int,
) -> None:
    """Approximate scores `q.k` of the middle tokens of sparse layers (section 3.3).

    With a `OnebitIndex`, K is what its codes say, and an implementation may round each query,
    times the codes' scales, to bytes. A score is then off by about 1% of the largest magnitude
    where channels are alike (tested with random K: at most 1.5%, over the rows of a call). Where
    one channel is ten times as large as the others or more, it may be off by several percent. Both
    lie below the error of one bit itself.

    With a `ChannelIndex`, only the `critical_channels` channels with the largest `max_i
    |q_i| * (max_t K[t] - min_t K[t])` count (the lower channel first among equals), and they are
    read from the host pages. The extremes are those of every s-th of the n groups that overlap
    `[0, tail_start)`, from the first one on, `s = ceil(n / SPREAD_GROUPS)`: a channel that is large
    and constant, as a bias of K makes it, tells no token from another.

    Args:
        scores: float32 [R, Hk, S], S >= max(tail_start); entry t is written for
            `sink_tokens <= t < tail_start[r]`, the others are unspecified.
        query: float32 [R, Hk, Q, d]; a token's score is the largest of its Q scores.
        offset: float32 [R, Hk, Q]; is added to the scores of each query.
        index: the derived pages.
        key_cache: [NB, Hk, bs, d], read with a `ChannelIndex` only.
        block_table: int32 [R, max_blocks].
        tail_start: int32 [R].
        sink_tokens: first token of the middle.
        critical_channels: channels scored with a `ChannelIndex`.
    """
    implementation("score_tokens", key_cache)(
        scores,
        query,
        index,
        key_cache,
        block_table,
        tail_start,
        offset,
        sink_tokens,
        critical_channels,
    )


def select_topk(
    indices: torch.Tensor,
    scores: torch.Tensor,
    tail_start: torch.Tensor,
    *,
    sink_tokens: int,
) -> None:
    """The k best middle tokens of each row and KV head.

    Args:
        indices: int32 [R, Hk, k]; positions in ascending order, then -1 where the middle
            has fewer than k tokens. Among equal scores the lower position is taken.
        scores: float32 [R, Hk, S], without NaN.
        tail_start: int32 [R].
        sink_tokens: first token of the middle.
    """
    implementation("select_topk", scores)(indices, scores, tail_start, sink_tokens)


def propose_topk(
    indices: torch.Tensor,
    query: torch.Tensor,
    index: TokenIndex,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    tail_start: torch.Tensor,
    *,
    offset: torch.Tensor,
    sink_tokens: int,
    critical_channels: int,
    max_tail_start: int,
) -> None:
    """The k middle tokens that score best: `select_topk` of what `score_tokens` writes.

    Where the implementation can do both at once, scores never reach memory.

    Args:
        indices: int32 [R, Hk, k], as of `select_topk`.
        query, index, key_cache, block_table, tail_start, offset, sink_tokens, critical_channels:
            as of `score_tokens`.
        max_tail_start: at least the largest of `tail_start`.
    """
    implementation("propose_topk", key_cache)(
        indices,
        query,
        index,
        key_cache,
        block_table,
        tail_start,
        offset,
        sink_tokens,
        critical_channels,
        max_tail_start,
    )


def rerank_topk(
    indices: torch.Tensor,
    candidates: torch.Tensor,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    mass: torch.Tensor,
    *,
    channels: int,
    scale: float,
    softcap: float = 0.0,
) -> None:
    """The k candidates that truly weigh most: what a rough index ranked, ranked again exactly.

    A candidate's weight is its share of what a head pays to the candidates and elsewhere (softmax
    of `q.k * scale` with K in full precision, and of `mass`), summed over the query heads of the KV
    head: a head that pays nearly all elsewhere has little to say. Only the
    `channels` channels with the largest `max over heads |q_c| * (max K_c[s] - min K_c[s])` are read
    (the lower channel first among equals), where s are 16 candidates spread evenly: candidates
    `i * n // m` for i < m = min(16, n), n being how many there are.

    Args:
        indices: int32 [R, Hk, k]; positions in ascending order, then -1 where there are fewer
            than k candidates. Among equal weights the lower position is taken.
        candidates: int32 [R, Hk, C] as `select_topk` leaves them.
        query: [R, H, d], the cache's dtype.
        key_cache: [NB, Hk, bs, d].
        block_table: int32 [R, max_blocks].
        mass: float32 [R, H], contiguous; as `log_mass` leaves it, or -inf for nothing elsewhere.
        channels: how many channels of K are read, at most d.
        scale: factor on q.k before the softmax.
        softcap: if positive, scores become `softcap * tanh(score / softcap)`.
    """
    implementation("rerank_topk", key_cache)(
        indices, candidates, query, key_cache, block_table, mass, channels, scale, softcap
    )


def retrieve_topk(
    indices: torch.Tensor,
    query: torch.Tensor,
    index: TokenIndex,
    key_cache: torch.Tensor,
    gathered_key: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    tail_start: torch.Tensor,
    *,
    sink_tokens: int,
    critical_channels: int,
    candidates: int,
    channels: int,
    every_head: bool,
    scale: float,
    max_tail_start: int,
    softcap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
) -> None:
    """The k middle tokens that a sparse layer reads: proposed by its index, ranked again by K.

    With `every_head` a token counts by the head that it matters most to: it is scored with every
    query head of the KV head, each measured against what that head pays elsewhere (`log_mass`).
    Only that measure heeds a soft cap: rough scores are not capped. Else it is scored once, with
    the mean of the heads. `propose_topk` finds so many candidates; where they are more than k,
    `rerank_topk` takes those that weigh most.

    Args:
        indices: int32 [R, Hk, k], as of `select_topk`.
        query: [R, H, d], the caches' dtype.
        index, sink_tokens, critical_channels, max_tail_start: as of `propose_topk`.
        key_cache, gathered_key: [NB, Hk, bs, d], the same K; candidates are read from the second.
        block_table: int32 [R, max_blocks].
        seq_lens, tail_start: int32 [R].
        candidates: how many tokens are proposed, at least k; all where there are fewer.
        channels, scale, softcap: as of `rerank_topk`.
        every_head: see above; the same to a KV head with one query head.
        sink_logits: see the module; attention paid elsewhere.
    """
    implementation("retrieve_topk", key_cache)(
        indices,
        query,
        index,
        key_cache,
        gathered_key,
        block_table,
        seq_lens,
        tail_start,
        sink_tokens,
        critical_channels,
        candidates,
        channels,
        every_head,
        scale,
        softcap,
        max_tail_start,
        sink_logits,
    )


def sparse_decode_attention(
    output: torch.Tensor,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    indices: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    tail_start: torch.Tensor,
    *,
    sink_tokens: int,
    scale: float,
    softcap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
) -> None:
    """Exact attention over sinks, selected tokens and tail, gathered from the host pages.

    Args:
        output, query: [R, H, d], the caches' dtype.
        key_cache, value_cache: [NB, Hk, bs, d].
        indices: int32 [R, Hk, k] as `select_topk` leaves them; all G heads of a KV head
            attend to the same tokens.
        block_table: int32 [R, max_blocks].
        seq_lens: int32 [R]; tokens in context; 0 for a row of padding, whose output is 0.
        tail_start: int32 [R]; sinks and tail may overlap, a token counts once.
        sink_tokens: tokens always kept at the start.
        scale: factor on q.k before the softmax.
        softcap: if positive, scores become `softcap * tanh(score / softcap)`.
        sink_logits: see the module.
    """
    implementation("sparse_decode_attention", key_cache)(
        output,
        query,
        key_cache,
        value_cache,
        indices,
        block_table,
        seq_lens,
        tail_start,
        sink_tokens,
        scale,
        softcap,
        sink_logits,
    )


def stage_rows(
    key_rows: torch.Tensor,
    value_rows: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_start: torch.Tensor,
    *,
    first_token: int = 0,
    max_tokens: int,
) -> None:
    """Gather K and V of consecutive tokens of several rows, one row after the other.

    Args:
        key_rows, value_rows: [C, Hk, d], the caches' dtype; token `first_token + i` of row r is
            written to place `context_start[r] + i < context_start[r + 1]`. The `STAGED_PADDING`
            places behind the last one become 0: attention ops read whole tiles, and what they
            weigh with 0 must be finite. Other places keep what they hold.
        key_cache, value_cache: [NB, Hk, bs, d].
        block_table: int32 [R, max_blocks].
        context_start: int32 [R + 1], ascending, at most C.
        first_token: where every row starts.
        max_tokens: at least the tokens of the longest row; 0: nothing is written.
    """
    implementation("stage_rows", key_cache)(
        key_rows,
        value_rows,
        key_cache,
        value_cache,
        block_table,
        context_start,
        first_token,
        max_tokens,
    )


def retrieve_attention(
    output: torch.Tensor,
    query: torch.Tensor,
    index: TokenIndex,
    key_cache: torch.Tensor,
    gathered_key: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    tail_start: torch.Tensor,
    *,
    sink_tokens: int,
    critical_channels: int,
    topk: int,
    candidates: int,
    channels: int,
    every_head: bool,
    scale: float,
    max_tail_start: int,
    softcap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
    hot: HotRows | None = None,
) -> None:
    """A sparse layer's decode step: `sparse_decode_attention` to what `retrieve_topk` finds.

    Args:
        output, query: [R, H, d], the caches' dtype.
        index, critical_channels, channels, every_head, max_tail_start: as of `retrieve_topk`.
        key_cache, gathered_key, value_cache: [NB, Hk, bs, d]; the first two are the same K, and
            single tokens are read from the second.
        block_table: int32 [R, max_blocks].
        seq_lens, tail_start: int32 [R], as of `sparse_decode_attention`.
        sink_tokens, scale, softcap, sink_logits: as of `sparse_decode_attention`.
        topk: how many middle tokens are attended to, all where there are fewer.
        candidates: how many are proposed, at least `topk`.
        hot: rows on the device, which are read there; those attended to are added to them. Results
            are the same. Triton alone; the last axis of the caches is contiguous.
    """
    implementation("retrieve_attention", key_cache)(
        output,
        query,
        index,
        key_cache,
        gathered_key,
        value_cache,
        block_table,
        seq_lens,
        tail_start,
        sink_tokens,
        critical_channels,
        topk,
        candidates,
        channels,
        every_head,
        scale,
        softcap,
        max_tail_start,
        sink_logits,
        **_beside(hot),
    )


def exact_attention(
    output: torch.Tensor,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    query_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
) -> None:
    """Causal attention of some tokens of each row, its last ones, to all that it has in context.

    What a token gets does not depend on which others come with it, to the bit: a prompt's chunks
    may be cut anywhere. In bfloat16 an implementation may round the weights before V to it.

    Args:
        output, query: [T, H, d], the caches' dtype, the last axis contiguous. Of `output`, tokens
            of no row are left as they are.
        key_cache, value_cache: [NB, Hk, bs, d], with blocks of a multiple of 32 tokens.
        block_table: int32 [R, max_blocks].
        query_start, query_lens: int32 [R]; row r has the tokens from `query_start[r]` on, so many.
        seq_lens: int32 [R]; tokens in context: token i of row r attends to the first
            `seq_lens[r] - (query_lens[r] - 1 - i)` of them.
        scale: factor on q.k before the softmax, positive.
        softcap: if positive, scores become `softcap * tanh(score / softcap)`.
        sink_logits: see the module.
    """
    implementation("exact_attention", key_cache)(
        output,
        query,
        key_cache,
        value_cache,
        block_table,
        query_start,
        query_lens,
        seq_lens,
        scale,
        softcap,
        sink_logits,
    )


def dense_preference(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    alpha: float,
    scale: float,
    softcap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """How much of its attention a layer spreads beyond a few tokens (section 3.1).

    `1 - mean over queries of the sum of the floor(alpha * L) largest weights` (at least
    one), causal: query i of n stands at position `L - n + i`. What a head pays to its sink logit is
    none that a sparse layer could lose: it counts as if it were among the largest.

    Args:
        query: [n, H, d], the last n queries of a prompt.
        key: [L, Hk, d], all keys of the prompt, the query's dtype; L >= n.
        alpha: share of the context counted, in (0, 1].
        scale: factor on q.k before the softmax.
        softcap: if positive, scores become `softcap * tanh(score / softcap)`.
        sink_logits: see the module.

    Returns:
        float32 [H]; the layer's score is its mean.
    """
    return implementation("dense_preference", key)(query, key, alpha, scale, softcap, sink_logits)
