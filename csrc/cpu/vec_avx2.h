// Vectors of 8 floats. Every vec_*.h defines the same names; vec_portable.h documents them.
#pragma once

#include <immintrin.h>

#include "kernels.h"
#include "support.h"

#define TAILORKV_VECTORS
#ifndef TAILORKV_ISA
// Opened by itself: a source that is compiled says both first.
#pragma GCC target("avx2,fma,f16c")
#define TAILORKV_ISA avx2
#define TAILORKV_TABLES 0
#endif
#include "element.h"

namespace tailorkv::TAILORKV_ISA {
namespace {

constexpr int W = 8;
using F = __m256;

inline F splat(float x) { return _mm256_set1_ps(x); }

inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline F load(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline F load(const Bf16* p) {
  __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline void load_pairs(const Half* p, F& first, F& second) {
  // Whole floats of the pairs' halves would need a shuffle across lanes: convert, then separate.
  F low = load(p), high = load(p + W);
  __m256 even = _mm256_shuffle_ps(low, high, 0x88), odd = _mm256_shuffle_ps(low, high, 0xDD);
  first = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(even), 0xD8));
  second = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(odd), 0xD8));
}
template <class T>
F load(const T* p, int n) {
  T copy[W] = {};
  for (int i = 0; i < n; ++i) copy[i] = p[i];
  return load(copy);
}

inline void store(float* p, F x) { _mm256_storeu_ps(p, x); }
inline void store(float* p, F x, int n) {
  float copy[W];
  store(copy, x);
  for (int i = 0; i < n; ++i) p[i] = copy[i];
}

inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F max(F a, F b) { return _mm256_max_ps(a, b); }
inline F min(F a, F b) { return _mm256_min_ps(a, b); }
inline F abs(F x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
inline F round_even(F x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline F pow2(F n) {
  __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
inline F scale_by_power(F x, F n) { return x * pow2(n); }
inline F if_greater(F a, F b, F x, F y) {
  return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
}
inline float sum(F x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
inline float largest(F x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
inline float smallest(F x) { return -largest(-x); }
inline uint32_t greater(F a, F b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
}
inline int pack(F x, int32_t position, uint32_t mask, int32_t* bits, int32_t* positions) {
  int32_t all[W];
  __builtin_memcpy(all, &x, sizeof(x));
  int count = 0;
  for (; mask != 0; mask &= mask - 1, ++count) {
    const int lane = __builtin_ctz(mask);
    bits[count] = all[lane];
    positions[count] = position + lane;
  }
  return count;
}
inline int compact(const int32_t* keys, const int32_t* positions, int32_t limit, int32_t* to_keys,
                   int32_t* to_positions) {
  int count = 0;
  // Without a branch, as none could be foreseen.
  for (int i = 0; i < W; ++i) {
    const int32_t key = keys[i];
    to_keys[count] = key;
    to_positions[count] = positions[i];
    count += key >= limit;
  }
  return count;
}
inline void store_bytes(uint8_t* p, F x) {
  __m256i words = _mm256_cvtps_epi32(x);
  __m128i packed =
      _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(packed, packed));
}

inline float to_float(Half x) { return _cvtsh_ss(x.bits); }
inline uint16_t half_bits(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }

struct Bits {
  F mask;
};
template <int B>
auto load_codes(const uint8_t* p, int64_t i) {
  const uint8_t* at = p + i * B / 8;
  if constexpr (B == 1) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    __m256i chosen = _mm256_and_si256(_mm256_set1_epi32(*at), bit);
    return Bits{_mm256_castsi256_ps(_mm256_cmpeq_epi32(chosen, bit))};
  } else {
    uint32_t packed = 0;
    __builtin_memcpy(&packed, at, B);
    const __m256i step =
        _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(B));
    __m256i codes = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(packed)), step);
    return _mm256_cvtepi32_ps(_mm256_and_si256(codes, _mm256_set1_epi32((1 << B) - 1)));
  }
}
inline F accumulate(F sum, Bits codes, F x) { return sum + _mm256_and_ps(codes.mask, x); }
inline F accumulate(F sum, F codes, F x) { return _mm256_fmadd_ps(codes, x, sum); }

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
