// Scores of one-bit codes by look-up in tables of bytes, for processors with byte shuffles within
// 128 bits (AVX2). The arithmetic is that of byte_lut.h, the layout that of lut_256.h.
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

// Bytes of the tables of 16 channels: of channels 0 .. 3 and 8 .. 11, then of the others.
constexpr int64_t kByteTableBytes = 64;

// What is to be added to the sums of one query, and a unit.
struct ByteScale {
  float unit, shift;
};

// Round factors to units, a unit being 1/251 of the widest sum of eight magnitudes, and build the
// 16 sums of every four consecutive ones.
//   factors: [padded(n)], 0 from n on
//   tables: [padded(n)/16, kByteTableBytes]
inline ByteScale build_byte_tables(const float* factors, int64_t n, float offset, uint8_t* tables) {
  __m256 total = _mm256_setzero_ps();
  __m128 range = _mm_setzero_ps();
  const __m256 sign = _mm256_set1_ps(-0.0f);
  for (int64_t c = 0; c < n; c += kSquareRows) {
    const __m256 first = _mm256_loadu_ps(factors + c), last = _mm256_loadu_ps(factors + c + 8);
    total = total + (first + last);
    __m256 sums = _mm256_hadd_ps(_mm256_andnot_ps(sign, first), _mm256_andnot_ps(sign, last));
    sums = _mm256_hadd_ps(sums, sums);
    range =
        _mm_max_ps(range, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
  }
  const float widest = _mm_cvtss_f32(_mm_max_ss(range, _mm_movehdup_ps(range)));
  const float unit = widest / 251.0f, inverse = widest > 0 ? 251.0f / widest : 0.0f;
  // Modulo 256, entries are sums of bytes: a factor that is not negative counts where its bit is
  // set, another's magnitude where it is not. So no entry is negative, and no sum of two above 255.
  //   of a half of 16 bytes: factors of four channels, of four others, the others' magnitudes
  const __m256i bit = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  __m256i picks[4];
  for (int j = 0; j < 4; ++j) {
    const __m256i one = _mm256_set1_epi8(static_cast<char>(1 << j));
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(bit, one), one);
    picks[j] = _mm256_blendv_epi8(_mm256_set1_epi8(static_cast<char>(8 + j)),
                                  _mm256_set1_epi8(static_cast<char>(j)), set);
  }
  __m256i whole = _mm256_setzero_si256(), base = whole;
  const __m256i zero = whole;
  for (int64_t c = 0; c < n; c += kSquareRows, tables += kByteTableBytes) {
    const __m256i x = whole_units(factors + c, inverse);
    const __m256i negative = _mm256_max_epi16(_mm256_sub_epi16(zero, x), zero);
    whole = _mm256_add_epi16(whole, x);
    base = _mm256_add_epi16(base, negative);
    __m256i magnitudes = _mm256_packus_epi16(_mm256_max_epi16(x, zero), negative);
    for (int j = 0; j < 2; ++j) {
      const __m256i low = _mm256_add_epi8(_mm256_shuffle_epi8(magnitudes, picks[0]),
                                          _mm256_shuffle_epi8(magnitudes, picks[1]));
      const __m256i high = _mm256_add_epi8(_mm256_shuffle_epi8(magnitudes, picks[2]),
                                           _mm256_shuffle_epi8(magnitudes, picks[3]));
      store_256(tables + 32 * j, _mm256_add_epi8(low, high));
      magnitudes = _mm256_srli_epi64(magnitudes, 32);
    }
  }
  const auto sum_words = [](__m256i words) {
    const __m256i pairs = _mm256_madd_epi16(words, _mm256_set1_epi16(1));
    __m128i x = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4E));
    return static_cast<float>(_mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, 0xB1))));
  };
  const float left_over = sum_floats(total) - unit * sum_words(whole);
  return ByteScale{unit, offset - unit * sum_words(base) + 0.5f * left_over};
}

// Sums of one query.
//   indices: as transpose_all gives them; tables: [squares, kByteTableBytes]
//   ahead: asked for a line at each step
inline void look_up_bytes(const uint8_t* indices, int64_t squares, const uint8_t* tables,
                          Ahead& ahead, PhaseSums (&sums)[kPhases]) {
  __m256i all[kPhases], odd[kPhases];
  for (int k = 0; k < kPhases; ++k) all[k] = odd[k] = _mm256_setzero_si256();
  const int64_t phase = squares * kPhaseBytes;
  for (int64_t s = 0; s < squares; ++s, tables += kByteTableBytes, indices += kPhaseBytes) {
    ahead.ask(1);
    const __m256i first = load_256(tables), second = load_256(tables + 32);
    for (int k = 0; k < kPhases; ++k) {
      const uint8_t* index = indices + k * phase;
      const __m256i both = _mm256_add_epi8(_mm256_shuffle_epi8(first, load_256(index)),
                                           _mm256_shuffle_epi8(second, load_256(index + 32)));
      all[k] = _mm256_add_epi16(all[k], both);
      odd[k] = _mm256_add_epi16(odd[k], _mm256_srli_epi16(both, 8));
    }
  }
  for (int k = 0; k < kPhases; ++k) {
    const __m256i even = _mm256_sub_epi16(all[k], _mm256_slli_epi16(odd[k], 8));
    sums[k] = PhaseSums{add_halves(even), add_halves(odd[k])};
  }
}

// score[h, t] = sum over c of factor[h, c] * (bit t of row c) + offset[h], for N queries and P runs
// of 64 tokens: tables serve all runs, codes all queries.
//   factors: [N, padded(n)], n a multiple of 8, 0 beyond; bytes: [P, index_bytes(n)]
//   tables: [padded(n)/16, kByteTableBytes]; scores: [N, P * 64]
//   ahead: asked for some lines between look-ups
template <int N, int P>
void score_by_bytes(const uint8_t* bytes, int64_t n, const float* factors, const float* offset,
                    int16_t* tables, Ahead& ahead, float* scores) {
  auto* entries = reinterpret_cast<uint8_t*>(tables);
  const int64_t squares = squares_of(n);
  for (int h = 0; h < N; ++h) {
    const ByteScale scale = build_byte_tables(factors + h * padded(n), n, offset[h], entries);
    for (int p = 0; p < P; ++p) {
      PhaseSums sums[kPhases];
      look_up_bytes(bytes + p * index_bytes(n), squares, entries, ahead, sums);
      __m128i places[8];
      order_places(sums, places);
      float* to = scores + (h * P + p) * kPlaces;
      for (int i = 0; i < 8; ++i) {
        put_values<false>(_mm256_cvtepu16_epi32(places[i]), scale.unit, scale.shift, to + 8 * i);
      }
    }
  }
}

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
