"""Device functions for products with low-bit codes on tensor cores.

The float operand is split into two bf16 parts whose sum has 16 bits of mantissa. They ride
in the rows of one product, which has 16 rows at the least and 8 query heads to fill them.
"""

import triton
import triton.language as tl

from vllm_tailorkv.kernels.triton.attend import dot


@triton.jit
def expand_codes(words, BITS: tl.constexpr, WORD_BITS: tl.constexpr):
    """Codes [A, W * WORD_BITS / BITS] in bf16, from words [A, W], the lowest bits first."""
    PER_WORD: tl.constexpr = WORD_BITS // BITS
    shifts = (tl.arange(0, PER_WORD) * BITS)[None, None, :]
    codes = (words.to(tl.int32)[:, :, None] >> shifts) & (2**BITS - 1)
    if BITS == 1:
        values = tl.where(codes != 0, 1.0, 0.0)
    else:
        # 2^23 with the code in its low bits; an integer conversion is four times slower.
        values = (codes | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    return tl.reshape(values.to(tl.bfloat16), (words.shape[0], words.shape[1] * PER_WORD))


@triton.jit
def split_rows(x):
    """[A, M, N] in float32 as [A, 2 * M, N] in bf16: the rounded rows, then what is left."""
    rounded = x.to(tl.bfloat16)
    rest = (x - rounded.to(tl.float32)).to(tl.bfloat16)
    upper = (tl.arange(0, 2) == 0)[None, :, None, None]
    both = tl.where(upper, rounded[:, None, :, :], rest[:, None, :, :])
    return tl.reshape(both, (x.shape[0], 2 * x.shape[1], x.shape[2]))


@triton.jit
def join_rows(x):
    """[A, 2 * M, N] as [A, M, N]: the sums of the rows that `split_rows` made two of."""
    return tl.sum(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2, x.shape[2])), 1)


@triton.jit
def dot_key_codes(query, words, scale, zero, BITS: tl.constexpr, WORD_BITS: tl.constexpr):
    """q.k of one group of tokens from K's codes.

    query float32 [M, d], words [d, W], scale and zero float32 [d]; float32 [M, tokens].
    """
    scaled = split_rows((query * scale[None, :])[None, :, :])
    rows = tl.reshape(scaled, (scaled.shape[1], scaled.shape[2]))
    products = dot(rows, expand_codes(words, BITS, WORD_BITS))
    joined = join_rows(products[None, :, :])
    joined = tl.reshape(joined, (joined.shape[1], joined.shape[2]))
    return joined + tl.sum(query * zero[None, :], 1)[:, None]
