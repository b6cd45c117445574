// Scores of one-bit codes by look-up in tables of bytes: half the work of tables of floats, for
// scores that only rank tokens.
//
// Factors are rounded to whole units, a unit being 1/253 of the largest table's range, and half of
// what rounding left over is added back (a bit is set half of the time). For 128 random channels
// the error is 0.8% of the scores' standard deviation, where codes of one bit are wrong by half of
// it.
#pragma once

namespace tailorkv::TAILORKV_ISA {
namespace {

// Cache lines that 16 channels of a group of 64 tokens take: 128 bytes of codes, 64 of scales and
// zeros.
constexpr int64_t kLinesPerStep = 3;

// score[t] = sum over c of factor[c] * (bit t of row c) + offset, for 64 tokens.
//   factors: [padded(n)], n a multiple of 8, 0 beyond; bytes: [n/8, 64]; scores: [64]
//   ahead: asked for some lines between look-ups
inline void score_by_bytes(const uint8_t* bytes, int64_t n, const float* factors, float offset,
                           Ahead& ahead, float* scores) {
  F range = splat(0), total = splat(0);
  for (int64_t c = 0; c < n; c += W) {
    F x = load(factors + c);
    total = total + x;
    F y = abs(x);
    y = y + _mm512_permute_ps(y, 0xB1);
    range = max(range, y + _mm512_permute_ps(y, 0x4E));
  }
  float widest = largest(range);
  F inverse = splat(widest > 0 ? 253.0f / widest : 0.0f);
  float unit = widest / 253.0f;

  // Modulo 256 the tables are sums of bytes: each starts at the sum of its negative factors'
  // magnitudes, so that no entry is negative or above 255.
  const __m512i byte =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  const __m512i table_start = _mm512_inserti64x4(
      _mm512_castsi256_si512(_mm256_setr_m128i(_mm_setzero_si128(), _mm_set1_epi8(4))),
      _mm256_setr_m128i(_mm_set1_epi8(8), _mm_set1_epi8(12)), 1);
  __m512i pick[4];
  for (int j = 0; j < 4; ++j) {
    __mmask64 set = _mm512_test_epi8_mask(byte, _mm512_set1_epi8(static_cast<char>(1 << j)));
    pick[j] = _mm512_mask_add_epi8(_mm512_set1_epi8(static_cast<char>(0x80)), set, table_start,
                                   _mm512_set1_epi8(static_cast<char>(j)));
  }
  const __m512i nibble = _mm512_set1_epi8(15);
  __m512i sums = _mm512_setzero_si512(), high_sums = sums, whole = sums, base = sums;
  alignas(64) uint8_t tables[64];
  auto add = [&](__m512i looked_up) {
    sums = _mm512_add_epi16(sums, looked_up);
    high_sums = _mm512_add_epi16(high_sums, _mm512_srli_epi16(looked_up, 8));
  };
  for (int64_t c = 0; c < n; c += W) {
    ahead.ask(kLinesPerStep);
    __m512i x = _mm512_cvtps_epi32(load(factors + c) * inverse);
    __m512i negative =
        _mm512_max_epi32(_mm512_sub_epi32(_mm512_setzero_si512(), x), _mm512_setzero_si512());
    whole = _mm512_add_epi32(whole, x);
    base = _mm512_add_epi32(base, negative);
    __m512i factor = _mm512_broadcast_i32x4(_mm512_cvtepi32_epi8(x));
    __m128i start =
        _mm_dpbusd_epi32(_mm_setzero_si128(), _mm512_cvtepi32_epi8(negative), _mm_set1_epi8(1));
    __m512i table = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(start), table_start);
    for (int j = 0; j < 4; ++j) {
      table = _mm512_add_epi8(table, _mm512_shuffle_epi8(factor, pick[j]));
    }
    _mm512_store_si512(tables, table);
    for (int half = 0; half < 2 && c + 8 * half < n; ++half) {
      __m512i code = _mm512_loadu_si512(bytes + (c / 8 + half) * kPlaces);
      const auto* pair = reinterpret_cast<const __m128i*>(tables + 32 * half);
      __m512i low = _mm512_and_si512(code, nibble);
      __m512i high = _mm512_and_si512(_mm512_srli_epi16(code, 4), nibble);
      add(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(pair[0]), low));
      add(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(pair[1]), high));
    }
  }
  // Tokens of even and odd places, as whole numbers.
  __m512i even = _mm512_sub_epi16(sums, _mm512_slli_epi16(high_sums, 8));
  float whole_sum = static_cast<float>(_mm512_reduce_add_epi32(whole));
  float base_sum = static_cast<float>(_mm512_reduce_add_epi32(base));
  float left_over = sum(total) - unit * whole_sum;
  F shift = splat(offset - unit * base_sum + 0.5f * left_over);
  // Interleave them: a quarter of a register holds 8 + 8 tokens of 16.
  __m512i near = _mm512_unpacklo_epi16(even, high_sums);
  __m512i far = _mm512_unpackhi_epi16(even, high_sums);
  const __m512i front = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i back = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  const __m512i halves[2] = {_mm512_permutex2var_epi64(near, front, far),
                             _mm512_permutex2var_epi64(near, back, far)};
  for (int j = 0; j < 2; ++j) {
    __m512i first = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(halves[j]));
    __m512i second = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(halves[j], 1));
    store(scores + 32 * j, fma(_mm512_cvtepi32_ps(first), splat(unit), shift));
    store(scores + 32 * j + W, fma(_mm512_cvtepi32_ps(second), splat(unit), shift));
  }
}

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
