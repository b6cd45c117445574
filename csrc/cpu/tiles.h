// AMX: what the processor must be told of its tiles.
#pragma once

#include <immintrin.h>

#ifndef TAILORKV_ISA
// Opened by itself: a source that is compiled says both first.
#pragma GCC target( \
    "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,avx512vbmi,avx512vnni,gfni,avx512bf16,amx-tile,amx-bf16,amx-int8")
#define TAILORKV_ISA amx
#define TAILORKV_TABLES 1
#define TAILORKV_TILES 1
#endif
#include "vec_avx512.h"
//
#include "common.h"

namespace tailorkv::TAILORKV_ISA {
namespace {

// Tiles 0 to 7 have rows of 64 bytes: `few` of them in those below `from`, else 16. Until the end
// of its life no other may live on the same thread.
class TileShape {
 public:
  explicit TileShape(int few = 16, int from = 0) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    static_assert(sizeof(shape) == 64);
    for (int i = 0; i < from; ++i) shape.rows[i] = static_cast<uint8_t>(few);
    _tile_loadconfig(&shape);
  }
  ~TileShape() { _tile_release(); }
  TileShape(const TileShape&) = delete;
  TileShape& operator=(const TileShape&) = delete;
};

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
