// Storage types of caches and conversions of one element.
#pragma once

#include <cstdint>

#ifndef TAILORKV_ISA
#define TAILORKV_ISA portable
#define TAILORKV_TABLES 0
#endif

namespace tailorkv::TAILORKV_ISA {
namespace {

struct Half {
  uint16_t bits;
};
struct Bf16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(Bf16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  __builtin_memcpy(&result, &bits, 4);
  return result;
}

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
