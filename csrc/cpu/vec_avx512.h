// Vectors of 16 floats. Every vec_*.h defines the same names; vec_portable.h documents them.
#pragma once

#include <immintrin.h>

#include "kernels.h"
#include "support.h"

#define TAILORKV_VECTORS
#ifndef TAILORKV_ISA
// Opened by itself: a source that is compiled says both first.
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#define TAILORKV_ISA avx512
#define TAILORKV_TABLES 0
#endif
#include "element.h"

namespace tailorkv::TAILORKV_ISA {
namespace {

constexpr int W = 16;
using F = __m512;

inline F splat(float x) { return _mm512_set1_ps(x); }

inline __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }

inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline F load(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline F widen(__m256i bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
}
inline F load(const Bf16* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// W pairs of halves, apart.
inline void load_pairs(const Half* p, F& first, F& second) {
  __m512i both = _mm512_loadu_si512(p);
  first = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(both));
  second = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
}
inline F load(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
inline F load(const Half* p, int n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p));
}
inline F load(const Bf16* p, int n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }

inline void store(float* p, F x) { _mm512_storeu_ps(p, x); }
inline void store(float* p, F x, int n) { _mm512_mask_storeu_ps(p, first(n), x); }

inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline F abs(F x) { return _mm512_abs_ps(x); }
inline F round_even(F x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline F pow2(F n) {
  __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
}
inline F scale_by_power(F x, F n) { return _mm512_scalef_ps(x, n); }
inline F if_greater(F a, F b, F x, F y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), y, x);
}
inline float sum(F x) { return _mm512_reduce_add_ps(x); }
// The sums of four vectors at once: a third of the instructions.
inline void sums(const F (&x)[4], float (&result)[4]) {
  F first = _mm512_unpacklo_ps(x[0], x[1]) + _mm512_unpackhi_ps(x[0], x[1]);
  F last = _mm512_unpacklo_ps(x[2], x[3]) + _mm512_unpackhi_ps(x[2], x[3]);
  F all = _mm512_shuffle_ps(first, last, 0x44) + _mm512_shuffle_ps(first, last, 0xEE);
  __m256 half = _mm512_castps512_ps256(all) + _mm512_extractf32x8_ps(all, 1);
  _mm_storeu_ps(result, _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
}
inline float largest(F x) { return _mm512_reduce_max_ps(x); }
inline float smallest(F x) { return _mm512_reduce_min_ps(x); }
inline uint32_t greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline int pack(F x, int32_t position, uint32_t mask, int32_t* bits, int32_t* positions) {
  const auto lanes = static_cast<__mmask16>(mask);
  const __m512i order = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  // In registers: a compressing store is many times slower on Zen 4.
  _mm512_storeu_si512(bits, _mm512_maskz_compress_epi32(lanes, _mm512_castps_si512(x)));
  __m512i from = _mm512_add_epi32(order, _mm512_set1_epi32(position));
  _mm512_storeu_si512(positions, _mm512_maskz_compress_epi32(lanes, from));
  return __builtin_popcount(mask);
}
inline int compact(const int32_t* keys, const int32_t* positions, int32_t limit, int32_t* to_keys,
                   int32_t* to_positions) {
  const __m512i key = _mm512_loadu_si512(keys), position = _mm512_loadu_si512(positions);
  const __mmask16 kept = _mm512_cmpge_epi32_mask(key, _mm512_set1_epi32(limit));
  _mm512_storeu_si512(to_keys, _mm512_maskz_compress_epi32(kept, key));
  _mm512_storeu_si512(to_positions, _mm512_maskz_compress_epi32(kept, position));
  return __builtin_popcount(kept);
}
inline void store_bytes(uint8_t* p, F x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
}

inline float to_float(Half x) { return _cvtsh_ss(x.bits); }
inline uint16_t half_bits(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }

struct Bits {
  __mmask16 mask;
};
template <int B>
auto load_codes(const uint8_t* p, int64_t i) {
  const uint8_t* at = p + i * B / 8;
  if constexpr (B == 1) {
    uint16_t mask;
    __builtin_memcpy(&mask, at, 2);
    return Bits{mask};
  } else if constexpr (B == 2) {
    int32_t packed;
    __builtin_memcpy(&packed, at, 4);
    const __m512i shifts =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    // A permutation reads four bits of its index: the table repeats, so no mask is needed.
    const F table = _mm512_setr_ps(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_set1_epi32(packed), shifts), table);
  } else {
    int32_t low, high;
    __builtin_memcpy(&low, at, 4);
    __builtin_memcpy(&high, at + 4, 4);
    const __m512i shifts =
        _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    const F table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i packed = _mm512_mask_set1_epi32(_mm512_set1_epi32(low), 0xFF00, high);
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(packed, shifts), table);
  }
}
inline F accumulate(F sum, Bits codes, F x) { return _mm512_mask_add_ps(sum, codes.mask, sum, x); }
inline F accumulate(F sum, F codes, F x) { return _mm512_fmadd_ps(codes, x, sum); }

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
