// Products with codes of one bit by look-up, for processors with byte shuffles within 128 bits
// (AVX2). The arithmetic is that of lut.h: the same units, the same sums of whole numbers.
//
// Sixteen rows of 64 places are a *square*. Of four rows, one bit each makes an index into the 16
// sums of their factors. Indices come from swapping bits between registers, so that a byte of them
// stands for another place than its neighbours do; places are put in order when all sums are known.
// A shuffle looks up bytes, so that sums of 16 bits are looked up in halves.
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

namespace tailorkv::TAILORKV_ISA {
namespace {

// Places of a row that one pass covers.
constexpr int kPlaces = 64;
constexpr int64_t kSquareRows = 16;
// Vectors of indices that stand for places 0, 4, 8, ..., for 1, 5, 9, ..., and so on.
constexpr int kPhases = 4;
// Bytes of the indices of one phase of a square: of rows 0 .. 3 and 8 .. 11, then of the others.
constexpr int64_t kPhaseBytes = 64;
// Bytes of the tables of 16 rows: the low halves of entries, as indices lie, then the high halves.
constexpr int64_t kTableBytes = 128;

inline int64_t squares_of(int64_t n) { return ceil_div(n, kSquareRows); }

// Bytes of the indices of n rows of 64 places.
inline int64_t index_bytes(int64_t n) { return squares_of(n) * kPhases * kPhaseBytes; }

inline __m256i load_256(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
inline void store_256(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }

inline float sum_floats(__m256 x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}

// Rows first and first + 4 beside each other, as 8 bytes of each.
inline __m128i load_rows(const uint8_t* rows, int64_t pitch, int64_t first) {
  const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(rows + first * pitch));
  return _mm_castpd_si128(_mm_loadh_pd(
      _mm_castsi128_pd(low), reinterpret_cast<const double*>(rows + (first + 4) * pitch)));
}

// Swap bits of a and b: those of a in `Mask << Shift` with those of b in Mask.
template <int Shift>
inline void swap_bits(__m256i mask, __m256i& a, __m256i& b) {
  const __m256i differ = _mm256_and_si256(_mm256_xor_si256(_mm256_srli_epi16(a, Shift), b), mask);
  b = _mm256_xor_si256(b, differ);
  a = _mm256_xor_si256(a, _mm256_slli_epi16(differ, Shift));
}

// Indices of 16 rows of 64 places; of eight if `half`, the others being 0.
//   rows: 16 rows of 8 bytes, pitch apart; to: kPhases runs of kPhaseBytes, step apart
inline void index_square(const uint8_t* rows, int64_t pitch, bool half, uint8_t* to, int64_t step) {
  __m256i bits[4];
  for (int j = 0; j < 4; ++j) {
    const __m128i high = half ? _mm_setzero_si128() : load_rows(rows, pitch, 8 + j);
    bits[j] = _mm256_setr_m128i(load_rows(rows, pitch, j), high);
  }
  const __m256i odd = _mm256_set1_epi8(0x55), pairs = _mm256_set1_epi8(0x33);
  swap_bits<1>(odd, bits[0], bits[1]);
  swap_bits<1>(odd, bits[2], bits[3]);
  swap_bits<2>(pairs, bits[0], bits[2]);
  swap_bits<2>(pairs, bits[1], bits[3]);
  const __m256i nibble = _mm256_set1_epi8(15);
  for (int k = 0; k < kPhases; ++k) {
    const __m256i low = _mm256_and_si256(bits[k], nibble);
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bits[k], 4), nibble);
    store_256(to + k * step, _mm256_unpacklo_epi64(low, high));
    store_256(to + k * step + 32, _mm256_unpackhi_epi64(low, high));
  }
}

// Indices of n rows, a multiple of 8, of 64 places.
//   indices: [kPhases, squares, kPhaseBytes]
inline void transpose_all(const uint8_t* rows, int64_t pitch, int64_t n, uint8_t* indices) {
  const int64_t squares = squares_of(n);
  for (int64_t s = 0; s < squares; ++s) {
    index_square(rows + s * kSquareRows * pitch, pitch, (s + 1) * kSquareRows > n,
                 indices + s * kPhaseBytes, squares * kPhaseBytes);
  }
}

// Sixteen factors as whole units, in words: the first and the last eight in a half each.
inline __m256i whole_units(const float* factors, float inverse) {
  const __m256 scale = _mm256_set1_ps(inverse);
  const __m256i first = _mm256_cvtps_epi32(_mm256_loadu_ps(factors) * scale);
  const __m256i last = _mm256_cvtps_epi32(_mm256_loadu_ps(factors + 8) * scale);
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(first, last), 0xD8);
}

// Round factors to whole units and build the 16 sums of every four consecutive ones.
//   factors: [n], n a multiple of 16; magnitude: the sum of their magnitudes
//   tables: [n/16, kTableBytes]
// Returns the unit.
inline float build_tables(const float* factors, int64_t n, float magnitude, uint8_t* tables) {
  const float limit = 32767.0f - 0.5f * static_cast<float>(n);
  const float inverse = magnitude > 0 ? limit / magnitude : 0.0f;
  // Of factors a, b, c, d, which are words: a b a+b c a+c ..., as three numbers to be added; d.
  const __m256i picks[3] = {
      _mm256_broadcastsi128_si256(_mm_setr_epi8(-1, -1, 0, 1, 2, 3, 0, 1, 4, 5, 0, 1, 2, 3, 0, 1)),
      _mm256_broadcastsi128_si256(
          _mm_setr_epi8(-1, -1, -1, -1, -1, -1, 2, 3, -1, -1, 4, 5, 4, 5, 2, 3)),
      _mm256_broadcastsi128_si256(
          _mm_setr_epi8(-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 4, 5))};
  const __m256i last = _mm256_set1_epi16(0x0706), low_byte = _mm256_set1_epi16(255);
  for (int64_t i = 0; i < n; i += kSquareRows, tables += kTableBytes) {
    __m256i x = whole_units(factors + i, inverse);
    for (int j = 0; j < 2; ++j) {
      const __m256i under = _mm256_add_epi16(
          _mm256_add_epi16(_mm256_shuffle_epi8(x, picks[0]), _mm256_shuffle_epi8(x, picks[1])),
          _mm256_shuffle_epi8(x, picks[2]));
      const __m256i over = _mm256_add_epi16(under, _mm256_shuffle_epi8(x, last));
      store_256(tables + 32 * j, _mm256_packus_epi16(_mm256_and_si256(under, low_byte),
                                                     _mm256_and_si256(over, low_byte)));
      store_256(tables + 64 + 32 * j,
                _mm256_packus_epi16(_mm256_srli_epi16(under, 8), _mm256_srli_epi16(over, 8)));
      x = _mm256_srli_si256(x, 8);
    }
  }
  return magnitude / limit;
}

// Sums of one phase, a word each: of bytes 0, 2, .. of its indices, and of bytes 1, 3, ..
struct PhaseSums {
  __m128i even, odd;
};

// The sum of the halves of words, modulo 2^16.
inline __m128i add_halves(__m256i x) {
  return _mm_add_epi16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
}

// Sums of the factors of n rows at phases first and first + 1.
//   indices: as transpose_all gives them; tables: [squares, kTableBytes]
//   ask: asked before every step, with its number
template <class Ask>
inline void look_up(const uint8_t* indices, int64_t squares, const uint8_t* tables, int first,
                    Ask ask, PhaseSums (&sums)[kPhases]) {
  constexpr int K = 2;
  // Low halves as words, those of odd bytes; high halves as bytes, which count modulo 256. As many
  // as there are registers for.
  __m256i all[K], odd[K], high[K];
  for (int k = 0; k < K; ++k) all[k] = odd[k] = high[k] = _mm256_setzero_si256();
  const uint8_t* from = indices + first * squares * kPhaseBytes;
  for (int64_t s = 0; s < squares; ++s, tables += kTableBytes, from += kPhaseBytes) {
    ask(s);
    for (int j = 0; j < 2; ++j) {
      const __m256i low_table = load_256(tables + 32 * j);
      const __m256i high_table = load_256(tables + 64 + 32 * j);
      for (int k = 0; k < K; ++k) {
        const __m256i index = load_256(from + k * squares * kPhaseBytes + 32 * j);
        const __m256i low = _mm256_shuffle_epi8(low_table, index);
        all[k] = _mm256_add_epi16(all[k], low);
        odd[k] = _mm256_add_epi16(odd[k], _mm256_srli_epi16(low, 8));
        high[k] = _mm256_add_epi8(high[k], _mm256_shuffle_epi8(high_table, index));
      }
    }
  }
  const __m256i high_byte = _mm256_set1_epi16(static_cast<int16_t>(0xFF00));
  for (int k = 0; k < K; ++k) {
    const __m256i above = _mm256_slli_epi16(_mm256_sub_epi16(high[k], odd[k]), 8);
    sums[first + k] =
        PhaseSums{add_halves(_mm256_add_epi16(all[k], above)),
                  add_halves(_mm256_add_epi16(odd[k], _mm256_and_si256(high[k], high_byte)))};
  }
}

// Places in order, eight in each of the eight results.
inline void order_places(const PhaseSums (&sums)[kPhases], __m128i (&places)[8]) {
  const auto put = [&](__m128i a, __m128i b, __m128i c, __m128i d, int first) {
    // The first four of each stand for the first half of eight places.
    const __m128i low_ab = _mm_unpacklo_epi16(a, b), low_cd = _mm_unpacklo_epi16(c, d);
    const __m128i high_ab = _mm_unpackhi_epi16(a, b), high_cd = _mm_unpackhi_epi16(c, d);
    const __m128i low[2] = {_mm_unpacklo_epi32(low_ab, low_cd), _mm_unpackhi_epi32(low_ab, low_cd)};
    const __m128i high[2] = {_mm_unpacklo_epi32(high_ab, high_cd),
                             _mm_unpackhi_epi32(high_ab, high_cd)};
    for (int i = 0; i < 2; ++i) {
      places[first + 4 * i] = _mm_unpacklo_epi64(low[i], high[i]);
      places[first + 4 * i + 2] = _mm_unpackhi_epi64(low[i], high[i]);
    }
  };
  put(sums[0].even, sums[1].even, sums[2].even, sums[3].even, 0);
  put(sums[0].odd, sums[1].odd, sums[2].odd, sums[3].odd, 1);
}

// values[0 .. 7] = whole * unit + offset, or += if Add.
template <bool Add>
inline void put_values(__m256i whole, float unit, float offset, float* values) {
  __m256 x =
      _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), _mm256_set1_ps(unit), _mm256_set1_ps(offset));
  _mm256_storeu_ps(values, Add ? _mm256_loadu_ps(values) + x : x);
}

// values[h][i] = sum over rows r of factor[h][r] * code[r][i] + offset[h], or += if Add.
//   codes: n rows of count codes, pitch apart; n a multiple of 8, count of 64
//   factors: [N, factor_stride], 0 from n to padded(n); magnitude, offset: [N]
//   tables: [N, padded(n)/16, kTableBytes]; bytes: [index_bytes(n)]; values: [N, value_stride]
template <int N, bool Add>
void products_by_table(const uint8_t* codes, int64_t pitch, int64_t n, int64_t count,
                       const float* factors, int64_t factor_stride, const float* magnitude,
                       const float* offset, uint8_t* tables, uint8_t* bytes, Ahead& ahead,
                       float* values, int64_t value_stride) {
  const int64_t squares = squares_of(n), table_bytes = squares * kTableBytes;
  float unit[N];
  for (int h = 0; h < N; ++h) {
    unit[h] = build_tables(factors + h * factor_stride, padded(n), magnitude[h],
                           tables + h * table_bytes);
  }
  for (int64_t i = 0; i < count; i += kPlaces) {
    transpose_all(codes + i / 8, pitch, n, bytes);
    for (int h = 0; h < N; ++h) {
      PhaseSums sums[kPhases];
      for (int k = 0; k < kPhases; k += 2) {
        // A line for every eight rows, whatever the number of heads.
        const auto ask = [&](int64_t step) {
          if ((step + h) % N == 0) ahead.ask(1);
        };
        look_up(bytes, squares, tables + h * table_bytes, k, ask, sums);
      }
      __m128i places[8];
      order_places(sums, places);
      float* to = values + h * value_stride + i;
      for (int j = 0; j < 8; ++j) {
        put_values<Add>(_mm256_cvtepi16_epi32(places[j]), unit[h], offset[h], to + 8 * j);
      }
    }
  }
}

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
