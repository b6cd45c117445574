"""Device functions for products with low-bit codes on tensor cores.

The float operand is split into two bf16 parts whose sum has 16 bits of mantissa. They ride
in the rows of one product, which has 16 rows at the least and 8 query heads to fill them.
"""

import triton
import triton.language as tl

from vllm_tailorkv.kernels.triton.attend import dot


@triton.jit
def code_numbers(COUNT: tl.constexpr, BITS: tl.constexpr, WORD_BITS: tl.constexpr):
    """Which code stands at each of COUNT places of an expanded row, int32 [COUNT]."""
    places = tl.arange(0, COUNT)
    if WORD_BITS == 32:
        PER_HALF: tl.constexpr = 16 // BITS
        within = places % (2 * PER_HALF)
        places += within // 2 + within % 2 * PER_HALF - within
    return places


@triton.jit
def expand_codes(words, BITS: tl.constexpr, WORD_BITS: tl.constexpr):
    """1 + code / 2^BITS in bf16 for every code of words [A, W], in the order `code_numbers`.

    Returns [A, W * WORD_BITS / BITS]. The codes of both halves of a 32-bit word become the
    upper bits of two mantissas at once, and stay neighbours: two instructions for both, and
    no conversion. Joining keeps all codes of a word in one thread, shifted by constants.
    """
    ROWS: tl.constexpr = words.shape[0]
    WORDS: tl.constexpr = words.shape[1]
    HALVES: tl.constexpr = 2 if WORD_BITS == 32 else 1
    PER_HALF: tl.constexpr = WORD_BITS // HALVES // BITS
    MANTISSA: tl.constexpr = (2**BITS - 1) << (7 - BITS)
    x = tl.reshape(words.to(tl.int32), (ROWS, WORDS, 1))
    if PER_HALF >= 16:
        x = tl.reshape(tl.join(x, x >> 8 * BITS), (ROWS, WORDS, PER_HALF // 8))
    if PER_HALF >= 8:
        x = tl.reshape(tl.join(x, x >> 4 * BITS), (ROWS, WORDS, PER_HALF // 4))
    if PER_HALF >= 4:
        x = tl.reshape(tl.join(x, x >> 2 * BITS), (ROWS, WORDS, PER_HALF // 2))
    x = tl.reshape(tl.join(x, x >> BITS), (ROWS, WORDS, PER_HALF))
    x = ((x << (7 - BITS)) & (MANTISSA * 0x00010001)) | 0x3F803F80
    if HALVES == 2:
        x = tl.join(x, x >> 16)
    values = x.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.reshape(values, (ROWS, WORDS * HALVES * PER_HALF))


@triton.jit
def split_rows(x):
    """[A, M, N] in float32 as [A, 2 * M, N] in bf16: the upper halves, then what is left."""
    # Cut, not rounded: single conversions to bf16 are slow.
    upper = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    first = (tl.arange(0, 2) == 0)[None, :, None, None]
    both = tl.where(first, upper[:, None, :, :], (x - upper)[:, None, :, :])
    return tl.reshape(both.to(tl.bfloat16), (x.shape[0], 2 * x.shape[1], x.shape[2]))


@triton.jit
def join_rows(x):
    """[A, 2 * M, N] as [A, M, N]: the sums of the rows that `split_rows` made two of."""
    return tl.sum(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2, x.shape[2])), 1)


@triton.jit
def dot_key_codes(query, words, scale, zero, BITS: tl.constexpr, WORD_BITS: tl.constexpr):
    """q.k of one group of tokens from K's codes, in the order `code_numbers`.

    query float32 [M, d], words [d, W], scale and zero float32 [d]; float32 [M, tokens].
    """
    # zero + code * scale = (zero - steps * scale) + (1 + code / steps) * steps * scale
    steps = scale * 2**BITS
    zero -= steps
    scaled = split_rows((query * steps[None, :])[None, :, :])
    rows = tl.reshape(scaled, (scaled.shape[1], scaled.shape[2]))
    products = dot(rows, expand_codes(words, BITS, WORD_BITS))
    joined = join_rows(products[None, :, :])
    joined = tl.reshape(joined, (joined.shape[1], joined.shape[2]))
    return joined + tl.sum(query * zero[None, :], 1)[:, None]
