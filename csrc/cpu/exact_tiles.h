// exact_attention of bfloat16 by AMX: tiles of 16 rows times 32 elements.
#pragma once

#include "exact_bf16.h"

namespace tailorkv::TAILORKV_ISA {
namespace {

struct Tiles : PairsOfBf16 {
  static constexpr int64_t kChannels = 32;

  // Tell the processor the tiles' shape, all the same: 16 rows of 64 bytes.
  static void begin() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    static_assert(sizeof(shape) == 64);
    // The compiler's headers do not say that it is read, nor that tiles are.
    __asm__ volatile("" ::: "memory");
    _tile_loadconfig(&shape);
  }
  static void end() { _tile_release(); }

  // Two tiles of rows times one or two of queries at once.
  template <bool Add>
  static void multiply(const Bf16* a, int64_t row, int64_t, int64_t rows, int64_t steps,
                       const uint32_t* const* b, int together, float* const* out) {
    constexpr int64_t kRows = 16, kSteps = 16, kLine = 64;
    __asm__ volatile("" ::: "memory");
    const int64_t pitch = row * static_cast<int64_t>(sizeof(Bf16));
    for (int64_t r = 0; r < rows; r += 2 * kRows) {
      float *first = out[0] + r * kLanes, *second = out[together - 1] + r * kLanes;
      if (Add) {
        _tile_loadd(0, first, kLine);
        _tile_loadd(1, first + kRows * kLanes, kLine);
        if (together == 2) {
          _tile_loadd(2, second, kLine);
          _tile_loadd(3, second + kRows * kLanes, kLine);
        }
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      const Bf16* from = a + r * row;
      for (int64_t s = 0; s < steps; s += kSteps) {
        _tile_loadd(4, from + s * kPair, pitch);
        _tile_loadd(5, from + kRows * row + s * kPair, pitch);
        _tile_loadd(6, b[0] + s * kLanes, kLine);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (together == 2) {
          _tile_loadd(7, b[1] + s * kLanes, kLine);
          _tile_dpbf16ps(2, 4, 7);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
      _tile_stored(0, first, kLine);
      _tile_stored(1, first + kRows * kLanes, kLine);
      if (together == 2) {
        _tile_stored(2, second, kLine);
        _tile_stored(3, second + kRows * kLanes, kLine);
      }
    }
  }
};

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
