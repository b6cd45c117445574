// Products with codes of one bit by look-up, for processors with byte shuffles across a register
// and bit-matrix products (AVX-512 VBMI and GFNI).
//
// Rows of bits (a channel's tokens for K, a token's channels for V) are transposed eight rows at a
// time, so that a byte holds the bits of eight rows at one place. Each half of it then indexes a
// table of the 16 sums of four rows' factors: one permutation and one addition do the work of four
// masked additions. (Codes of two bits, as two such bits, were slower than multiplications.)
#pragma once

namespace tailorkv::TAILORKV_ISA {
namespace {

// Places of a row that one pass covers.
constexpr int kPlaces = 64;

// Transpose 8 rows of 64 bits: bit r of byte i of the result is bit i of row r.
//   rows: 8 rows of 8 bytes, pitch apart
inline __m512i transpose_rows(const uint8_t* rows, int64_t pitch) {
  // The bit-matrix product below wants the rows of each 8x8 square in reverse order.
  alignas(64) static constexpr uint8_t kNear[64] = {
      56, 48, 40, 32, 24, 16, 8,  0,  57, 49, 41, 33, 25, 17, 9,  1,  58, 50, 42, 34, 26, 18,
      10, 2,  59, 51, 43, 35, 27, 19, 11, 3,  60, 52, 44, 36, 28, 20, 12, 4,  61, 53, 45, 37,
      29, 21, 13, 5,  62, 54, 46, 38, 30, 22, 14, 6,  63, 55, 47, 39, 31, 23, 15, 7};
  __m512i bytes;
  if (pitch == 8) {
    bytes = _mm512_loadu_si512(rows);
  } else if (pitch == 16) {
    // The last load would reach 8 bytes beyond the rows: read 120 bytes only.
    const __m512i even = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
    __m512i low = _mm512_loadu_si512(rows);
    __m512i high = _mm512_maskz_loadu_epi64(0x7F, rows + 64);
    bytes = _mm512_permutex2var_epi64(low, even, high);
  } else {
    const __m512i steps = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
    bytes = _mm512_i64gather_epi64(_mm512_mullo_epi64(steps, _mm512_set1_epi64(pitch)), rows, 1);
  }
  const __m512i identity = _mm512_set1_epi64(static_cast<int64_t>(0x8040201008040201u));
  __m512i squares = _mm512_permutexvar_epi8(_mm512_load_si512(kNear), bytes);
  return _mm512_gf2p8affine_epi64_epi8(identity, squares, 0);
}

// Where entry e of a table of the two factors `at` and `at + 1` stands: 1 and 2 are the factors, 3
// is their sum, in the second register.
inline __m512i pair_entry(__m512i e, int at) {
  __m512i index = _mm512_add_epi32(e, _mm512_set1_epi32(at - 1));
  return _mm512_mask_mov_epi32(index, _mm512_cmpeq_epi32_mask(e, _mm512_set1_epi32(3)),
                               _mm512_set1_epi32(16 + at));
}

// The 16 sums of every four consecutive factors.
//   factors: [n], n a multiple of 16; tables: [n/4, 16]
inline void build_tables(const float* factors, int64_t n, float* tables) {
  const __m512i number = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i low = _mm512_and_si512(number, _mm512_set1_epi32(3));
  const __m512i high = _mm512_srli_epi32(number, 2);
  const __mmask16 some_low = _mm512_test_epi32_mask(low, low);
  const __mmask16 some_high = _mm512_test_epi32_mask(high, high);
  __m512i low_index[4], high_index[4];
  for (int t = 0; t < 4; ++t) {
    low_index[t] = pair_entry(low, 4 * t);
    high_index[t] = pair_entry(high, 4 * t + 2);
  }
  for (int64_t i = 0; i < n; i += 16) {
    F x = load(factors + i);
    F pairs = _mm512_add_ps(x, _mm512_permute_ps(x, 0xB1));
    for (int t = 0; t < 4; ++t) {
      F a = _mm512_maskz_permutex2var_ps(some_low, x, low_index[t], pairs);
      F b = _mm512_maskz_permutex2var_ps(some_high, x, high_index[t], pairs);
      store(tables + (i / 4 + t) * 16, a + b);
    }
  }
}

// Transpose n rows (a multiple of 8) of 64 bits.
//   bytes: [n/8, 64]
inline void transpose_all(const uint8_t* rows, int64_t pitch, int64_t n, uint8_t* bytes) {
  for (int64_t i = 0; i < n / 8; ++i) {
    _mm512_storeu_si512(bytes + i * kPlaces, transpose_rows(rows + 8 * i * pitch, pitch));
  }
}

// totals[h][i] = sum over rows r of factor[h][r] * (bit i of row r).
//   bytes: [n/8, 64]; tables: [N, n/4, 16]
template <int N>
void look_up(const uint8_t* bytes, int64_t n, const float* tables, F (&totals)[N][4]) {
  for (int h = 0; h < N; ++h) {
    for (int j = 0; j < 4; ++j) totals[h][j] = splat(0);
  }
  for (int64_t i = 0; i < n / 8; ++i) {
    F even[N], odd[N];
    for (int h = 0; h < N; ++h) {
      even[h] = load(tables + (h * (n / 4) + 2 * i) * 16);
      odd[h] = load(tables + (h * (n / 4) + 2 * i + 1) * 16);
    }
    for (int j = 0; j < 4; ++j) {
      // A permutation reads the low four bits of its index.
      __m512i low = _mm512_cvtepu8_epi32(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + i * kPlaces + 16 * j)));
      __m512i high = _mm512_srli_epi32(low, 4);
      for (int h = 0; h < N; ++h) {
        totals[h][j] = totals[h][j] + _mm512_permutexvar_ps(low, even[h]);
        totals[h][j] = totals[h][j] + _mm512_permutexvar_ps(high, odd[h]);
      }
    }
  }
}

// values[h][i] += sum over rows r of factor[h][r] * code[r][i] + offset[h], for codes of one bit.
//   codes: n rows of count bits, pitch apart; n a multiple of 16, count of
//   kPlaces factors: [N, factor_stride]; tables: [N, n/4, 16]; bytes: [n/8,
//   64]; values: [N, value_stride]
template <int N>
void add_by_table(const uint8_t* codes, int64_t pitch, int64_t n, int64_t count,
                  const float* factors, int64_t factor_stride, const float* offset, float* tables,
                  uint8_t* bytes, float* values, int64_t value_stride) {
  if (count == 0) return;
  for (int h = 0; h < N; ++h) build_tables(factors + h * factor_stride, n, tables + h * n * 4);
  for (int64_t i = 0; i < count; i += kPlaces) {
    transpose_all(codes + i / 8, pitch, n, bytes);
    F totals[N][4];
    look_up<N>(bytes, n, tables, totals);
    for (int h = 0; h < N; ++h) {
      for (int j = 0; j < 4; ++j) {
        float* to = values + h * value_stride + i + j * W;
        store(to, load(to) + totals[h][j] + splat(offset[h]));
      }
    }
  }
}

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
