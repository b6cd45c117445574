// exact_attention of bfloat16 by AVX512-BF16: each lane multiplies two pairs and adds both.
#pragma once

#include "exact_bf16.h"

namespace tailorkv::TAILORKV_ISA {
namespace {

struct Pairs : PairsOfBf16 {
  static constexpr int64_t kChannels = 16;

  static void begin() {}
  static void end() {}

  template <bool Add>
  static void multiply(const Bf16* a, int64_t row, int64_t, int64_t rows, int64_t steps,
                       const uint32_t* const* b, int together, float* const* out) {
    constexpr int kRows = 8;
    for (int64_t r = 0; r < rows; r += kRows) {
      if (together == 2) {
        block<Add, kRows, 2>(a + r * row, row, steps, b, out, r * kLanes);
      } else {
        block<Add, kRows, 1>(a + r * row, row, steps, b, out, r * kLanes);
      }
    }
  }

 private:
  template <bool Add, int Rows, int Groups>
  static void block(const Bf16* a, int64_t row, int64_t steps, const uint32_t* const* b,
                    float* const* out, int64_t at) {
    F sums[Rows][Groups];
    for (int r = 0; r < Rows; ++r) {
      for (int g = 0; g < Groups; ++g) sums[r][g] = Add ? load(out[g] + at + r * kLanes) : splat(0);
    }
    for (int64_t s = 0; s < steps; ++s) {
      __m512bh operands[Groups];
      for (int g = 0; g < Groups; ++g) {
        operands[g] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b[g] + s * kLanes));
      }
      for (int r = 0; r < Rows; ++r) {
        int32_t pair;
        __builtin_memcpy(&pair, a + r * row + s * kPair, sizeof(pair));
        const auto factor = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
        for (int g = 0; g < Groups; ++g) {
          sums[r][g] = _mm512_dpbf16_ps(sums[r][g], operands[g], factor);
        }
      }
    }
    for (int r = 0; r < Rows; ++r) {
      for (int g = 0; g < Groups; ++g) store(out[g] + at + r * kLanes, sums[r][g]);
    }
  }
};

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
