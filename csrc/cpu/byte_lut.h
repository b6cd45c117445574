// Scores of one-bit codes by look-up in tables of bytes: half the work of tables of floats, for
// scores that only rank tokens.
//
// Factors are rounded to whole units, a unit being 1/251 of the widest range of eight of them, and
// half of what rounding left over is added back (a bit is set half of the time). For 128 random
// channels the error is 1.2% of the scores' standard deviation, where codes of one bit are wrong by
// half of it.
#pragma once

#include <immintrin.h>

#ifndef TAILORKV_ISA
// Opened by itself: a source that is compiled says both first.
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,avx512vbmi,avx512vnni,gfni")
#define TAILORKV_ISA avx512_gfni
#define TAILORKV_TABLES 512
#endif
#include "vec_avx512.h"
//
#include "ahead.h"
#include "common.h"
#include "lut.h"

namespace tailorkv::TAILORKV_ISA {
namespace {

// Cache lines that 16 channels of a group of 64 tokens take: 128 bytes of codes, 64 of scales and
// zeros.
constexpr int64_t kLinesPerStep = 3;

// The factors of one query as bytes.
struct ByteFactors {
  const float* factors;
  float inverse, unit;
  F total;
  __m512i whole, base;
};

//   factors: [padded(n)], 0 from n on
inline ByteFactors byte_factors(const float* factors, int64_t n) {
  F range = splat(0), total = splat(0);
  for (int64_t c = 0; c < n; c += W) {
    F x = load(factors + c);
    total = total + x;
    F y = abs(x);
    y = y + _mm512_permute_ps(y, 0xB1);
    y = y + _mm512_permute_ps(y, 0x4E);
    range = max(range, y + _mm512_shuffle_f32x4(y, y, 0xB1));
  }
  const float widest = largest(range);
  return ByteFactors{factors,
                     widest > 0 ? 251.0f / widest : 0.0f,
                     widest / 251.0f,
                     total,
                     _mm512_setzero_si512(),
                     _mm512_setzero_si512()};
}

// Builds the tables of 16 channels: four, each of the 16 sums of four factors.
class ByteTables {
 public:
  ByteTables() {
    const __m512i byte =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    start_ = _mm512_inserti64x4(
        _mm512_castsi256_si512(_mm256_setr_m128i(_mm_setzero_si128(), _mm_set1_epi8(4))),
        _mm256_setr_m128i(_mm_set1_epi8(8), _mm_set1_epi8(12)), 1);
    for (int j = 0; j < 4; ++j) {
      __mmask64 set = _mm512_test_epi8_mask(byte, _mm512_set1_epi8(static_cast<char>(1 << j)));
      pick_[j] = _mm512_mask_add_epi8(_mm512_set1_epi8(static_cast<char>(0x80)), set, start_,
                                      _mm512_set1_epi8(static_cast<char>(j)));
    }
  }

  // Those of channels c .. c + 15. Modulo 256 they are sums of bytes: each starts at the sum of its
  // negative factors' magnitudes, so that no entry is negative, and no sum of two above 255.
  __m512i build(ByteFactors& of, int64_t c) const {
    __m512i x = _mm512_cvtps_epi32(load(of.factors + c) * splat(of.inverse));
    __m512i negative =
        _mm512_max_epi32(_mm512_sub_epi32(_mm512_setzero_si512(), x), _mm512_setzero_si512());
    of.whole = _mm512_add_epi32(of.whole, x);
    of.base = _mm512_add_epi32(of.base, negative);
    __m512i factor = _mm512_broadcast_i32x4(_mm512_cvtepi32_epi8(x));
    __m128i start =
        _mm_dpbusd_epi32(_mm_setzero_si128(), _mm512_cvtepi32_epi8(negative), _mm_set1_epi8(1));
    __m512i table = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(start), start_);
    for (int j = 0; j < 4; ++j) {
      table = _mm512_add_epi8(table, _mm512_shuffle_epi8(factor, pick_[j]));
    }
    return table;
  }

 private:
  __m512i start_, pick_[4];
};

// score[h, t] = sum over c of factor[h, c] * (bit t of row c) + offset[h], for N queries and P runs
// of 64 tokens: tables serve all runs, codes all queries.
//   factors: [N, padded(n)], n a multiple of 8, 0 beyond; bytes: [P, n/8, 64]; scores: [N, P * 64]
//   ahead: asked for some lines between look-ups
template <int N, int P>
void score_by_bytes(const uint8_t* bytes, int64_t n, const float* factors, const float* offset,
                    int16_t*, Ahead& ahead, float* scores) {
  const ByteTables builder;
  const __m512i nibble = _mm512_set1_epi8(15);
  ByteFactors of[N];
  __m512i sums[N][P], high_sums[N][P];
  for (int h = 0; h < N; ++h) {
    of[h] = byte_factors(factors + h * padded(n), n);
    for (int p = 0; p < P; ++p) sums[h][p] = high_sums[h][p] = _mm512_setzero_si512();
  }
  alignas(64) uint8_t tables[N][64];
  for (int64_t c = 0; c < n; c += W) {
    ahead.ask(kLinesPerStep * P);
    for (int h = 0; h < N; ++h) _mm512_store_si512(tables[h], builder.build(of[h], c));
    for (int half = 0; half < 2 && c + 8 * half < n; ++half) {
      __m512i low[P], high[P];
      for (int p = 0; p < P; ++p) {
        __m512i code = _mm512_loadu_si512(bytes + (p * n / 8 + c / 8 + half) * kPlaces);
        low[p] = _mm512_and_si512(code, nibble);
        high[p] = _mm512_and_si512(_mm512_srli_epi16(code, 4), nibble);
      }
      for (int h = 0; h < N; ++h) {
        const auto* pair = reinterpret_cast<const __m128i*>(tables[h] + 32 * half);
        __m512i first = _mm512_broadcast_i32x4(pair[0]), second = _mm512_broadcast_i32x4(pair[1]);
        for (int p = 0; p < P; ++p) {
          __m512i both = _mm512_add_epi8(_mm512_shuffle_epi8(first, low[p]),
                                         _mm512_shuffle_epi8(second, high[p]));
          sums[h][p] = _mm512_add_epi16(sums[h][p], both);
          high_sums[h][p] = _mm512_add_epi16(high_sums[h][p], _mm512_srli_epi16(both, 8));
        }
      }
    }
  }
  for (int h = 0; h < N; ++h) {
    float whole_sum = static_cast<float>(_mm512_reduce_add_epi32(of[h].whole));
    float base_sum = static_cast<float>(_mm512_reduce_add_epi32(of[h].base));
    float left_over = sum(of[h].total) - of[h].unit * whole_sum;
    F unit = splat(of[h].unit);
    F shift = splat(offset[h] - of[h].unit * base_sum + 0.5f * left_over);
    for (int p = 0; p < P; ++p) {
      // Tokens of even and odd places, as whole numbers; interleaved, a quarter of a register holds
      // 8 + 8 tokens of 16.
      __m512i even = _mm512_sub_epi16(sums[h][p], _mm512_slli_epi16(high_sums[h][p], 8));
      __m512i near = _mm512_unpacklo_epi16(even, high_sums[h][p]);
      __m512i far = _mm512_unpackhi_epi16(even, high_sums[h][p]);
      const __m512i front = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
      const __m512i back = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
      const __m512i halves[2] = {_mm512_permutex2var_epi64(near, front, far),
                                 _mm512_permutex2var_epi64(near, back, far)};
      float* to = scores + (h * P + p) * kPlaces;
      for (int j = 0; j < 2; ++j) {
        __m512i first = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(halves[j]));
        __m512i second = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(halves[j], 1));
        store(to + 32 * j, fma(_mm512_cvtepi32_ps(first), unit, shift));
        store(to + 32 * j + W, fma(_mm512_cvtepi32_ps(second), unit, shift));
      }
    }
  }
}

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
