// Products with codes of one or two bits by look-up, for processors with byte shuffles across a
// register and bit-matrix products (AVX-512 VBMI and GFNI).
//
// A row of codes is a row of bits, its *places* (a code of two bits takes two neighbours). Rows are
// transposed eight at a time, so that a byte holds the bits of eight rows at one place. Each half
// of it then indexes a table of the 16 sums of four rows' factors: one permutation and one addition
// do the work of four masked additions for 32 places. The places of a code are put together last.
//
// Factors are rounded to whole units, a unit being 1/32,000 or so of the sum of their magnitudes,
// so that every sum fits 16 bits. For 128 random channels the error is 0.1% of the sums' standard
// deviation.
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

namespace tailorkv::TAILORKV_ISA {
namespace {

// Places of a row that one pass covers.
constexpr int kPlaces = 64;

// Codes of a row that one pass covers; 0 where multiplying them is as fast.
template <int B>
constexpr int64_t kCovered = B <= 2 ? kPlaces / B : 0;

// Bytes of n transposed rows of 64 places.
inline int64_t index_bytes(int64_t n) { return n / 8 * kPlaces; }

// Where byte i of rows 7 .. 0 lies, for i = 0 .. 7; the rows are `Pitch` bytes apart, and those
// from `Second` on begin in another register.
template <int Pitch, int Second>
struct Steps {
  alignas(64) uint8_t data[64];
  constexpr Steps() : data{} {
    for (int i = 0; i < 64; ++i) {
      const int row = 7 - i % 8;
      data[i] =
          static_cast<uint8_t>(i / 8 + (row < Second ? row * Pitch : 64 + (row - Second) * Pitch));
    }
  }
};

// Transpose 8 rows of 64 bits: bit r of byte i of the result is bit i of row r.
//   rows: 8 rows of 8 bytes, pitch apart
inline __m512i transpose_rows(const uint8_t* rows, int64_t pitch) {
  static constexpr Steps<8, 8> kSteps8;
  static constexpr Steps<16, 4> kSteps16;
  static constexpr Steps<8, 4> kSteps32;
  __m512i squares;
  if (pitch == 8) {
    squares = _mm512_permutexvar_epi8(_mm512_load_si512(kSteps8.data), _mm512_loadu_si512(rows));
  } else if (pitch == 16) {
    // Masked, or the load would reach 8 bytes beyond the rows.
    __m512i high = _mm512_maskz_loadu_epi64(0x7F, rows + 64);
    squares =
        _mm512_permutex2var_epi8(_mm512_loadu_si512(rows), _mm512_load_si512(kSteps16.data), high);
  } else if (pitch == 32) {
    const __m512i pick = _mm512_setr_epi64(0, 4, 8, 12, 0, 4, 8, 12);
    __m512i last = _mm512_maskz_loadu_epi64(0x1F, rows + 192);
    __m512i low =
        _mm512_permutex2var_epi64(_mm512_loadu_si512(rows), pick, _mm512_loadu_si512(rows + 64));
    __m512i high = _mm512_permutex2var_epi64(_mm512_loadu_si512(rows + 128), pick, last);
    squares = _mm512_permutex2var_epi8(low, _mm512_load_si512(kSteps32.data), high);
  } else {
    const __m512i number = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
    __m512i gathered =
        _mm512_i64gather_epi64(_mm512_mullo_epi64(number, _mm512_set1_epi64(pitch)), rows, 1);
    squares = _mm512_permutexvar_epi8(_mm512_load_si512(kSteps8.data), gathered);
  }
  const __m512i identity = _mm512_set1_epi64(static_cast<int64_t>(0x8040201008040201u));
  return _mm512_gf2p8affine_epi64_epi8(identity, squares, 0);
}

// Transpose n rows (a multiple of 8) of 64 bits.
//   bytes: [n/8, 64]
inline void transpose_all(const uint8_t* rows, int64_t pitch, int64_t n, uint8_t* bytes) {
  for (int64_t i = 0; i < n / 8; ++i) {
    _mm512_store_si512(bytes + i * kPlaces, transpose_rows(rows + 8 * i * pitch, pitch));
  }
}

// Round factors to whole units and build the 16 sums of every four consecutive ones.
//   factors: [n], n a multiple of 16; magnitude: the sum of their magnitudes
//   tables: [n/8] pairs of tables, [2, 16] each, `step` apart
// Returns the unit.
inline float build_tables(const float* factors, int64_t n, float magnitude, int16_t* tables,
                          int64_t step) {
  const float limit = 32767.0f - 0.5f * static_cast<float>(n);
  const F inverse = splat(magnitude > 0 ? limit / magnitude : 0.0f);
  // Of two factors a and b: the words 0, a, b, a and 0, 0, 0, b.
  const __m512i first_words =
      _mm512_broadcast_i32x4(_mm_setr_epi8(-1, -1, 0, 1, 4, 5, 0, 1, -1, -1, 8, 9, 12, 13, 8, 9));
  const __m512i last_words = _mm512_broadcast_i32x4(
      _mm_setr_epi8(-1, -1, -1, -1, -1, -1, 4, 5, -1, -1, -1, -1, -1, -1, 12, 13));
  // Entry e of a table is the low pair's sum of e % 4 and the high pair's of e / 4.
  const __m512i low_pairs = _mm512_setr_epi64(0, 0, 0, 0, 2, 2, 2, 2);
  alignas(64) static constexpr uint16_t kHighPairs[32] = {
      4,  4,  4,  4,  5,  5,  5,  5,  6,  6,  6,  6,  7,  7,  7,  7,
      12, 12, 12, 12, 13, 13, 13, 13, 14, 14, 14, 14, 15, 15, 15, 15};
  const __m512i high_pairs = _mm512_load_si512(kHighPairs);
  for (int64_t i = 0; i < n; i += 16) {
    __m512i x = _mm512_cvtps_epi32(load(factors + i) * inverse);
    __m512i sums =
        _mm512_add_epi16(_mm512_shuffle_epi8(x, first_words), _mm512_shuffle_epi8(x, last_words));
    for (int j = 0; j < 2; ++j) {
      __m512i low =
          _mm512_permutexvar_epi64(_mm512_add_epi64(low_pairs, _mm512_set1_epi64(4 * j)), sums);
      __m512i high = _mm512_permutexvar_epi16(
          _mm512_add_epi16(high_pairs, _mm512_set1_epi16(static_cast<int16_t>(16 * j))), sums);
      _mm512_store_si512(tables + (i / 8 + j) * step, _mm512_add_epi16(low, high));
    }
  }
  return magnitude / limit;
}

// Sums of the factors of n rows at 64 places, for N heads.
//   bytes: [n/8, 64]; tables: [n/8, N, 2, 16]
//   even, odd: the sums at places 0, 2, .. and 1, 3, ..
template <int N>
inline void look_up(const uint8_t* bytes, int64_t n, const int16_t* tables, Ahead& ahead,
                    __m512i (&even)[N], __m512i (&odd)[N]) {
  for (int h = 0; h < N; ++h) even[h] = odd[h] = _mm512_setzero_si512();
  const __m512i nibble = _mm512_set1_epi16(15), second = _mm512_set1_epi16(16);
  for (int64_t i = 0; i < n / 8; ++i) {
    ahead.ask(1);
    // An index has five bits: the fifth is the table of the two.
    __m512i word = _mm512_load_si512(bytes + i * kPlaces);
    __m512i even_low = _mm512_and_si512(word, nibble);
    __m512i even_high = _mm512_ternarylogic_epi64(_mm512_srli_epi16(word, 4), nibble, second, 0xEA);
    __m512i odd_low = _mm512_and_si512(_mm512_srli_epi16(word, 8), nibble);
    __m512i odd_high = _mm512_or_si512(_mm512_srli_epi16(word, 12), second);
    for (int h = 0; h < N; ++h) {
      __m512i table = _mm512_load_si512(tables + (i * N + h) * 32);
      even[h] = _mm512_add_epi16(even[h], _mm512_permutexvar_epi16(even_low, table));
      odd[h] = _mm512_add_epi16(odd[h], _mm512_permutexvar_epi16(odd_low, table));
      even[h] = _mm512_add_epi16(even[h], _mm512_permutexvar_epi16(even_high, table));
      odd[h] = _mm512_add_epi16(odd[h], _mm512_permutexvar_epi16(odd_high, table));
    }
  }
}

// Put the 64/B codes of 64 places together: value[i] = code sum i * unit + offset.
//   values: [64/B], added to if Add
template <int B, bool Add>
inline void finish(__m512i even, __m512i odd, float unit, float offset, float* values) {
  static_assert(B == 1 || B == 2);
  __m512i near = _mm512_unpacklo_epi16(even, odd), far = _mm512_unpackhi_epi16(even, odd);
  auto put = [&](int at, __m512i whole) {
    F x = fma(_mm512_cvtepi32_ps(whole), splat(unit), splat(offset));
    store(values + at, Add ? load(values + at) + x : x);
  };
  // Each quarter of `near` and `far` holds 8 neighbouring places.
  const __m512i front = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i back = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  if constexpr (B == 2) {
    const __m512i places = _mm512_set1_epi32(0x00020001);
    near = _mm512_madd_epi16(near, places);
    far = _mm512_madd_epi16(far, places);
  }
  const __m512i halves[2] = {_mm512_permutex2var_epi64(near, front, far),
                             _mm512_permutex2var_epi64(near, back, far)};
  for (int j = 0; j < 2; ++j) {
    if constexpr (B == 2) {
      put(j * W, halves[j]);
    } else {
      put(2 * j * W, _mm512_cvtepi16_epi32(_mm512_castsi512_si256(halves[j])));
      put(2 * j * W + W, _mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(halves[j], 1)));
    }
  }
}

// values[h][i] = sum over rows r of factor[h][r] * code[r][i] + offset[h], or += if Add.
//   codes: n rows of count codes of B bits, pitch apart; n a multiple of 8, count of 64/B
//   factors: [N, factor_stride], 0 from n to padded(n); magnitude, offset: [N]
//   tables: [padded(n)/8, N, 2, 16]; bytes: [n/8, 64]; values: [N, value_stride]
template <int B, int N, bool Add>
void rounded_products(const uint8_t* codes, int64_t pitch, int64_t n, int64_t count,
                      const float* factors, int64_t factor_stride, const float* magnitude,
                      const float* offset, int16_t* tables, uint8_t* bytes, Ahead& ahead,
                      float* values, int64_t value_stride) {
  float unit[N];
  for (int h = 0; h < N; ++h) {
    unit[h] =
        build_tables(factors + h * factor_stride, padded(n), magnitude[h], tables + h * 32, N * 32);
  }
  for (int64_t i = 0; i < count; i += kPlaces / B) {
    transpose_all(codes + i * B / 8, pitch, n, bytes);
    __m512i even[N], odd[N];
    look_up<N>(bytes, n, tables, ahead, even, odd);
    for (int h = 0; h < N; ++h) {
      finish<B, Add>(even[h], odd[h], unit[h], offset[h], values + h * value_stride + i);
    }
  }
}

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
