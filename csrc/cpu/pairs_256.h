// Products with codes of two or four bits as whole numbers (AVX2): factors are rounded to words,
// and an instruction multiplies two rows' codes of eight places and adds both.
//
// A unit is 1/32,767 of the largest factor, so that sums are as exact as those of floats.
#pragma once

#include <immintrin.h>

#ifndef TAILORKV_ISA
// Opened by itself: a source that is compiled says both first.
#pragma GCC target("avx2,fma,f16c")
#define TAILORKV_ISA avx2
#define TAILORKV_TABLES 256
#include "vec_avx2.h"
#endif
//
#include "ahead.h"
#include "common.h"
#include "lut_256.h"

namespace tailorkv::TAILORKV_ISA {
namespace {

// Bytes of a row that one pass covers: eight words.
constexpr int64_t kStripBytes = 16;

// Round factors to whole units.
//   factors: [n], n a multiple of 16; units: [n]
// Returns the unit.
inline float round_factors(const float* factors, int64_t n, int16_t* units) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256 most = _mm256_setzero_ps();
  for (int64_t i = 0; i < n; i += 8) {
    most = _mm256_max_ps(most, _mm256_andnot_ps(sign, _mm256_loadu_ps(factors + i)));
  }
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  const float largest = _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  const float inverse = largest > 0 ? 32767.0f / largest : 0.0f;
  for (int64_t i = 0; i < n; i += 16) store_256(units + i, whole_units(factors + i, inverse));
  return largest / 32767.0f;
}

// Words of rows 2 * i and 2 * i + 1 beside each other.
//   words: [n/2, 8] pairs
inline void pair_rows(const uint8_t* codes, int64_t pitch, int64_t n, uint8_t* words) {
  for (int64_t r = 0; r < n; r += 2, codes += 2 * pitch, words += 2 * kStripBytes) {
    const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + pitch));
    store_256(words, _mm256_setr_m128i(_mm_unpacklo_epi16(first, second),
                                       _mm_unpackhi_epi16(first, second)));
  }
}

// Sums of the codes First .. First + K - 1 of every word, for N heads.
//   units: [N, stride]; sums: [N, 16/B, 8]; ahead: asked for a line for every four rows in all
template <int B, int N, int First, int K>
inline void add_pairs(const uint8_t* words, int64_t n, const int16_t* units, int64_t stride,
                      Ahead& ahead, __m256i (*sums)[16 / B]) {
  __m256i total[N][K];
  for (int h = 0; h < N; ++h) {
    for (int k = 0; k < K; ++k) total[h][k] = _mm256_setzero_si256();
  }
  const __m256i code = _mm256_set1_epi16((1 << B) - 1);
  for (int64_t r = 0; r < n; r += 2, words += 2 * kStripBytes) {
    if (r % (4 * 16 / B / K) == 0) ahead.ask(1);
    const __m256i pairs = load_256(words);
    __m256i codes[K];
    for (int k = 0; k < K; ++k) {
      codes[k] = _mm256_and_si256(_mm256_srli_epi16(pairs, (First + k) * B), code);
    }
    for (int h = 0; h < N; ++h) {
      int32_t both;
      __builtin_memcpy(&both, units + h * stride + r, sizeof(both));
      const __m256i factors = _mm256_set1_epi32(both);
      for (int k = 0; k < K; ++k) {
        total[h][k] = _mm256_add_epi32(total[h][k], _mm256_madd_epi16(codes[k], factors));
      }
    }
  }
  for (int h = 0; h < N; ++h) {
    for (int k = 0; k < K; ++k) sums[h][First + k] = total[h][k];
  }
  if constexpr (First + K < 16 / B) {
    add_pairs<B, N, First + K, K>(words - n * kStripBytes, n, units, stride, ahead, sums);
  }
}

// values[i] = sum i * unit + offset, or += if Add.
//   sums: [16/B, 8], of code k of word j; values: [8 * 16/B], in the order of codes
template <int B, bool Add>
inline void put_pairs(const __m256i (&sums)[16 / B], float unit, float offset, float* values) {
  constexpr int kCodes = 16 / B;
  const __m128 scale = _mm_set1_ps(unit), shift = _mm_set1_ps(offset);
  const auto put = [&](float* to, __m128 whole) {
    const __m128 x = _mm_fmadd_ps(whole, scale, shift);
    _mm_storeu_ps(to, Add ? _mm_add_ps(_mm_loadu_ps(to), x) : x);
  };
  for (int k = 0; k < kCodes; k += 4) {
    __m256 x[4];
    for (int i = 0; i < 4; ++i) x[i] = _mm256_cvtepi32_ps(sums[k + i]);
    const __m256 low[2] = {_mm256_unpacklo_ps(x[0], x[1]), _mm256_unpackhi_ps(x[0], x[1])};
    const __m256 high[2] = {_mm256_unpacklo_ps(x[2], x[3]), _mm256_unpackhi_ps(x[2], x[3])};
    for (int i = 0; i < 2; ++i) {
      const __m256 even = _mm256_shuffle_ps(low[i], high[i], 0x44);
      const __m256 odd = _mm256_shuffle_ps(low[i], high[i], 0xEE);
      float* to = values + 2 * i * kCodes + k;
      put(to, _mm256_castps256_ps128(even));
      put(to + kCodes, _mm256_castps256_ps128(odd));
      put(to + 4 * kCodes, _mm256_extractf128_ps(even, 1));
      put(to + 5 * kCodes, _mm256_extractf128_ps(odd, 1));
    }
  }
}

// values[h][i] = sum over rows r of factor[h][r] * code[r][i] + offset[h], or += if Add.
//   codes: n rows of count codes of B bits, pitch apart; n a multiple of 8, count of 128/B
//   factors: [N, factor_stride], 0 from n to padded(n); offset: [N]
//   units: [N, padded(n)]; words: [n/2, 8] pairs of words; values: [N, value_stride]
template <int B, int N, bool Add>
void products_by_pairs(const uint8_t* codes, int64_t pitch, int64_t n, int64_t count,
                       const float* factors, int64_t factor_stride, const float* offset,
                       int16_t* units, uint8_t* words, Ahead& ahead, float* values,
                       int64_t value_stride) {
  float unit[N];
  const int64_t stride = padded(n);
  for (int h = 0; h < N; ++h) {
    unit[h] = round_factors(factors + h * factor_stride, stride, units + h * stride);
  }
  constexpr int64_t kStrip = 8 * kStripBytes / B;
  for (int64_t i = 0; i < count; i += kStrip) {
    pair_rows(codes + i * B / 8, pitch, n, words);
    __m256i sums[N][16 / B];
    // As many sums as there are registers for.
    constexpr int K = N <= 2 ? 4 : 2;
    add_pairs<B, N, 0, K>(words, n, units, stride, ahead, sums);
    for (int h = 0; h < N; ++h) {
      put_pairs<B, Add>(sums[h], unit[h], offset[h], values + h * value_stride + i);
    }
  }
}

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
