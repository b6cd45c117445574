// Codes of 1, 2 or 4 bits in bytes: code i of a row lies in byte `i*b / 8`, at bit `i*b % 8`, least
// significant first.
#pragma once

#include "portable.cuh"

namespace tailorkv::cuda {

// Four codes, one a byte, as 4*B bits.
template <int B>
TAILORKV_HD uint32_t pack_four(uint32_t codes) {
  constexpr uint32_t kPairs = B == 4 ? 0x00FF00FFu : B == 2 ? 0x000F000Fu : 0x00030003u;
  const uint32_t pairs = (codes | codes >> (8 - B)) & kPairs;
  return (pairs | pairs >> (16 - 2 * B)) & ((1ull << 4 * B) - 1);
}

// The inverse of `pack_four`; bits above the lowest 4*B are ignored.
template <int B>
TAILORKV_HD uint32_t unpack_four(uint32_t packed) {
  constexpr uint32_t kPairs = B == 4 ? 0x00FF00FFu : B == 2 ? 0x000F000Fu : 0x00030003u;
  constexpr uint32_t kCodes = ((1u << B) - 1) * 0x01010101u;
  packed &= (1ull << 4 * B) - 1;
  const uint32_t pairs = (packed | packed << (16 - 2 * B)) & kPairs;
  return (pairs | pairs << (8 - B)) & kCodes;
}

TAILORKV_HD int64_t packed_bytes(int64_t length, int32_t bits) {
  return ceil_div<int64_t>(length * bits, 8);
}

// One byte of a packed row; codes beyond its end count as 0.
template <int B>
TAILORKV_HD uint8_t pack_byte(const uint8_t* codes, int64_t length, int64_t byte) {
  uint32_t packed = 0;
  for (int i = 0; i < 8 / B; ++i) {
    const int64_t code = byte * (8 / B) + i;
    if (code < length) packed |= static_cast<uint32_t>(codes[code]) << (i * B);
  }
  return static_cast<uint8_t>(packed);
}

// One code of a packed row.
template <int B>
TAILORKV_HD uint8_t unpack_code(const uint8_t* packed, int64_t code) {
  return static_cast<uint8_t>(packed[code * B / 8] >> (code * B % 8) & ((1 << B) - 1));
}

}  // namespace tailorkv::cuda
