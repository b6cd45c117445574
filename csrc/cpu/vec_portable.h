// Vectors of 4 floats in the vector extension that gcc and clang share: SSE2 on x86, NEON on ARM.
//
// What every vec_*.h defines, for the kernels to be written once:
//   W, F              floats of a vector, and the vector; + - * / work on it
//   splat             one value in every lane
//   load(p[, n])      W (or the first n, then 0) floats, halves or bfloat16s as floats
//   load_pairs        W pairs of halves, the first ones and the second ones
//   store(p, x[, n])  W (or the first n) floats
//   fma, max, min, abs, round_even, pow2 (of whole exponents in [-126, 127])
//   scale_by_power    x * 2^n of such exponents
//   if_greater        x where a > b, else y
//   sum, largest, smallest over the lanes; greater(a, b) one bit a lane
//   pack              the bits of the lanes of a mask and their positions from `position` on; how
//                     many; W are written
//   compact           the keys that reach a limit, and their positions, of W; how many; W are
//                     written, at or before where they are read
//   store_bytes       whole numbers in [0, 255] as W bytes
//   load_codes<B>     codes i .. i+W-1 of a packed run, i a multiple of W
//   accumulate        sum + codes * x
#pragma once

#include <math.h>

#include "element.h"

#define TAILORKV_VECTORS

namespace tailorkv::TAILORKV_ISA {
namespace {

constexpr int W = 4;
typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));

inline F splat(float x) { return F{x, x, x, x}; }

inline float to_float(Half x) {
  uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  uint32_t exponent = (x.bits >> 10) & 31, mantissa = x.bits & 1023;
  float magnitude;
  if (exponent == 0) {
    magnitude = static_cast<float>(mantissa) * 0x1p-24f;
  } else {
    uint32_t bits = (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | mantissa << 13;
    __builtin_memcpy(&magnitude, &bits, 4);
  }
  uint32_t bits;
  __builtin_memcpy(&bits, &magnitude, 4);
  bits |= sign;
  float result;
  __builtin_memcpy(&result, &bits, 4);
  return result;
}
// Round to nearest, ties to even.
inline uint16_t half_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  uint32_t sign = (bits >> 16) & 0x8000, rest = bits & 0x7FFFFFFF;
  if (rest > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);
  if (rest >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);
  if (rest < 0x38800000) {
    // Subnormal: adding 0.5 leaves the result, rounded by the processor, in the low bits.
    float magnitude;
    __builtin_memcpy(&magnitude, &rest, 4);
    magnitude += 0.5f;
    __builtin_memcpy(&rest, &magnitude, 4);
    return static_cast<uint16_t>(sign | (rest - 0x3F000000));
  }
  rest += 0xFFF + ((rest >> 13) & 1);
  return static_cast<uint16_t>(sign | ((rest - 0x38000000) >> 13));
}

inline F load(const float* p) {
  F x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}
inline F load(const Half* p) {
  return F{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
inline F load(const Bf16* p) {
  return F{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
inline void load_pairs(const Half* p, F& first, F& second) {
  for (int i = 0; i < W; ++i) {
    first[i] = to_float(p[2 * i]);
    second[i] = to_float(p[2 * i + 1]);
  }
}
template <class T>
F load(const T* p, int n) {
  T copy[W] = {};
  for (int i = 0; i < n; ++i) copy[i] = p[i];
  return load(copy);
}

inline void store(float* p, F x) { __builtin_memcpy(p, &x, sizeof(x)); }
inline void store(float* p, F x, int n) {
  for (int i = 0; i < n; ++i) p[i] = x[i];
}

inline F fma(F a, F b, F c) { return a * b + c; }
inline F max(F a, F b) { return a > b ? a : b; }
inline F min(F a, F b) { return a < b ? a : b; }
inline F abs(F x) {
  return F{__builtin_fabsf(x[0]), __builtin_fabsf(x[1]), __builtin_fabsf(x[2]),
           __builtin_fabsf(x[3])};
}
inline F round_even(F x) { return F{rintf(x[0]), rintf(x[1]), rintf(x[2]), rintf(x[3])}; }
inline F pow2(F n) {
  I bits = (__builtin_convertvector(n, I) + 127) << 23;
  F x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}
inline F scale_by_power(F x, F n) { return x * pow2(n); }
inline F if_greater(F a, F b, F x, F y) { return a > b ? x : y; }
inline float sum(F x) { return (x[0] + x[2]) + (x[1] + x[3]); }
inline float largest(F x) {
  float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
  return a > b ? a : b;
}
inline float smallest(F x) { return -largest(-x); }
inline uint32_t greater(F a, F b) {
  I c = a > b;
  return static_cast<uint32_t>((c[0] & 1) | (c[1] & 2) | (c[2] & 4) | (c[3] & 8));
}
inline int pack(F x, int32_t position, uint32_t mask, int32_t* bits, int32_t* positions) {
  int32_t all[W];
  __builtin_memcpy(all, &x, sizeof(x));
  int count = 0;
  for (; mask != 0; mask &= mask - 1, ++count) {
    const int lane = __builtin_ctz(mask);
    bits[count] = all[lane];
    positions[count] = position + lane;
  }
  return count;
}
inline int compact(const int32_t* keys, const int32_t* positions, int32_t limit, int32_t* to_keys,
                   int32_t* to_positions) {
  int count = 0;
  // Without a branch, as none could be foreseen.
  for (int i = 0; i < W; ++i) {
    const int32_t key = keys[i];
    to_keys[count] = key;
    to_positions[count] = positions[i];
    count += key >= limit;
  }
  return count;
}
inline void store_bytes(uint8_t* p, F x) {
  for (int i = 0; i < W; ++i) p[i] = static_cast<uint8_t>(x[i]);
}

template <int B>
auto load_codes(const uint8_t* p, int64_t i) {
  constexpr uint32_t kMask = (1 << B) - 1;
  uint32_t packed = p[i * B / 8] >> (i * B % 8);
  if constexpr (B == 4) packed |= static_cast<uint32_t>(p[i * B / 8 + 1]) << 8;
  return F{static_cast<float>(packed & kMask), static_cast<float>((packed >> B) & kMask),
           static_cast<float>((packed >> 2 * B) & kMask),
           static_cast<float>((packed >> 3 * B) & kMask)};
}
inline F accumulate(F sum, F codes, F x) { return codes * x + sum; }

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
