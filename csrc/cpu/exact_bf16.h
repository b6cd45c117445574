// What both units share that multiply pairs of bfloat16s and add in floats.
#pragma once

#include <immintrin.h>

#ifndef TAILORKV_ISA
// Opened by itself: a source that is compiled says both first.
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,avx512bf16,amx-tile,amx-bf16")
#define TAILORKV_ISA avx512_bf16
#define TAILORKV_TABLES 0
#endif
#include "vec_avx512.h"
//
#include "exact.h"

namespace tailorkv::TAILORKV_ISA {
namespace {

// Transpose 16 vectors of 16 numbers of 32 bits.
inline void transpose(__m512i (&x)[16]) {
  __m512i y[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512i a = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    const __m512i b = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    const __m512i c = _mm512_unpacklo_epi32(x[i + 2], x[i + 3]);
    const __m512i d = _mm512_unpackhi_epi32(x[i + 2], x[i + 3]);
    y[i] = _mm512_unpacklo_epi64(a, c);
    y[i + 1] = _mm512_unpackhi_epi64(a, c);
    y[i + 2] = _mm512_unpacklo_epi64(b, d);
    y[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
  // Now y[4i + j] has, in its 128-bit part k, column 4k + j of rows 4i to 4i + 3.
  for (int j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(y[j], y[4 + j], 0x44);
    const __m512i b = _mm512_shuffle_i32x4(y[j], y[4 + j], 0xEE);
    const __m512i c = _mm512_shuffle_i32x4(y[8 + j], y[12 + j], 0x44);
    const __m512i d = _mm512_shuffle_i32x4(y[8 + j], y[12 + j], 0xEE);
    x[j] = _mm512_shuffle_i32x4(a, c, 0x88);
    x[4 + j] = _mm512_shuffle_i32x4(a, c, 0xDD);
    x[8 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
    x[12 + j] = _mm512_shuffle_i32x4(b, d, 0xDD);
  }
}

struct PairsOfBf16 {
  using Element = Bf16;
  using Operand = uint32_t;
  static constexpr int kPair = 2;

  static void lay_queries(uint32_t* to, const Bf16* const* rows, int64_t size, int64_t steps) {
    for (int64_t s = 0; s < steps; s += 16) {
      __m512i x[16];
      const int there = static_cast<int>(larger(0, smaller(16, size / kPair - s)));
      for (int i = 0; i < 16; ++i)
        x[i] = _mm512_maskz_loadu_epi32(first(there), rows[i] + s * kPair);
      transpose(x);
      const int64_t count = smaller(16, steps - s);
      for (int64_t i = 0; i < count; ++i) _mm512_storeu_si512(to + (s + i) * kLanes, x[i]);
    }
  }

  static void give(Bf16* const* rows, int lanes, const float* values, const float* total,
                   int64_t size) {
    const F weight = splat(1.0f) / load(total);
    for (int64_t c = 0; c < size; c += 16) {
      __m512i x[16];
      // There are values for a multiple of 16 channels: see `kChannels`.
      for (int64_t i = 0; i < 16; ++i) {
        x[i] = _mm512_castps_si512(load(values + (c + i) * kLanes) * weight);
      }
      transpose(x);
      const __mmask16 there = first(static_cast<int>(smaller(16, size - c)));
      for (int i = 0; i < lanes; ++i) {
        const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_castsi512_ps(x[i]));
        _mm256_mask_storeu_epi16(rows[i] + c, there, reinterpret_cast<__m256i>(rounded));
      }
    }
  }

  // 2^x within 2^-13: a weight is rounded to half as many bits.
  static F weight(F x) {
    // What lies above the whole number below, 0 of -infinity.
    const F r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    F p = fma(splat(0.07706754f), r, splat(0.22764445f));
    p = fma(p, r, splat(0.69511691f));
    return _mm512_scalef_ps(fma(p, r, splat(1.0f)), x);
  }

  static void store_weights(uint32_t* to, int64_t t, F first, F second) {
    // Rounded to the nearest, and up from the middle: no weight is negative.
    const __m512i half = _mm512_set1_epi32(0x8000);
    const __m512i low = _mm512_add_epi32(_mm512_castps_si512(first), half);
    const __m512i high = _mm512_add_epi32(_mm512_castps_si512(second), half);
    _mm512_storeu_si512(to + t / kPair * kLanes,
                        _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(low, 16), high));
  }

  static void pack_row(Bf16* to, const Bf16* from, int64_t size) {
    __builtin_memcpy(to, from, static_cast<size_t>(size) * sizeof(Bf16));
  }
  static void pack_one(Bf16* to, Bf16 from) { *to = from; }

  // A run of rows of V, channels and tokens exchanged.
  //   from: [tokens, size]; to: [channels, kRunTokens], rows `pitch` apart
  //   ahead: as many bytes of K and of V, that will be read soon, a cache line at a time
  static void turn(const Bf16* from, int64_t token, int64_t channel, int64_t tokens, int64_t size,
                   Bf16* to, int64_t pitch, int64_t channels, const char* const (&ahead)[2]) {
    static_assert(kRunTokens == 32);
    int64_t line = 0;
    for (int64_t c = 0; c < channels; c += 16) {
      __m512i x[16];
      for (int i = 0; i < 16; ++i, line += 64) {
        __builtin_prefetch(ahead[0] + line, 0, 2);
        __builtin_prefetch(ahead[1] + line, 0, 2);
        __m512i pair = _mm512_setzero_si512();
        for (int half = 0; half < 2; ++half) {
          const int64_t t = 2 * i + half;
          if (t >= tokens || c >= size) break;
          const Bf16* row = from + t * token + c * channel;
          const int count = static_cast<int>(smaller(16, size - c));
          const __m512i wide = _mm512_cvtepu16_epi32(load_bits(row, channel, count));
          pair = _mm512_or_si512(pair, half == 0 ? wide : _mm512_slli_epi32(wide, 16));
        }
        x[i] = pair;
      }
      transpose(x);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + (c + i) * pitch, x[i]);
    }
  }

 private:
  static __m256i load_bits(const Bf16* from, int64_t stride, int count) {
    if (stride == 1) return _mm256_maskz_loadu_epi16(first(count), from);
    uint16_t bits[16] = {};
    for (int i = 0; i < count; ++i) bits[i] = from[i * stride].bits;
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bits));
  }
};

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
