// Products with codes and rounded factors (AVX2): by look-up for one bit, else by multiplication.
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
#include "lut_256.h"
#include "pairs_256.h"

namespace tailorkv::TAILORKV_ISA {
namespace {

// Codes of a row that one pass covers.
template <int B>
constexpr int64_t kCovered = B == 1 ? kPlaces : 8 * kStripBytes / B;

// values[h][i] = sum over rows r of factor[h][r] * code[r][i] + offset[h], or += if Add.
//   codes: n rows of count codes of B bits, pitch apart; n a multiple of 8, count of kCovered<B>
//   factors: [N, factor_stride], 0 from n to padded(n); magnitude, offset: [N]
//   tables, bytes: see ProductScratch; values: [N, value_stride]
template <int B, int N, bool Add>
void rounded_products(const uint8_t* codes, int64_t pitch, int64_t n, int64_t count,
                      const float* factors, int64_t factor_stride, const float* magnitude,
                      const float* offset, int16_t* tables, uint8_t* bytes, Ahead& ahead,
                      float* values, int64_t value_stride) {
  if constexpr (B == 1) {
    products_by_table<N, Add>(codes, pitch, n, count, factors, factor_stride, magnitude, offset,
                              reinterpret_cast<uint8_t*>(tables), bytes, ahead, values,
                              value_stride);
  } else {
    products_by_pairs<B, N, Add>(codes, pitch, n, count, factors, factor_stride, offset, tables,
                                 bytes, ahead, values, value_stride);
  }
}

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
