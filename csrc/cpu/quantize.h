// quantize_groups. Codes, scales and zeros are those of the reference to the bit: IEEE division,
// ties to even, and no contraction of a multiplication and an addition.
#pragma once

#include "common.h"

namespace tailorkv::TAILORKV_ISA {
namespace {

constexpr float kHalfMax = 65504.0f;

// Pack eight codes of one byte each.
template <int B>
uint64_t pack(uint64_t codes) {
  if constexpr (B == 1) return (codes * 0x0102040810204080u) >> 56;
  if constexpr (B == 2) {
    codes = (codes | codes >> 6) & 0x000F000F000F000F;
    codes = (codes | codes >> 12) & 0x000000FF000000FF;
    return (codes | codes >> 24) & 0xFFFF;
  }
  codes = (codes | codes >> 4) & 0x00FF00FF00FF00FF;
  codes = (codes | codes >> 8) & 0x0000FFFF0000FFFF;
  return (codes | codes >> 16) & 0xFFFFFFFF;
}

// The nearest half of x, saturated.
inline uint16_t to_half(float x) {
  const float bounded = x < -kHalfMax ? -kHalfMax : x > kHalfMax ? kHalfMax : x;
  // Adding 0 makes the sign of a zero independent of the order of a minimum.
  return half_bits(bounded + 0.0f);
}

// A line from codes to x: x ~ zero + code * scale.
struct Line {
  float scale, zero;
};

// The least squares line from the rough codes of one group to x; see `ops.quantize_groups`. Every
// sum is one of integers below 2^24, so its order does not matter.
//   x: [padded(n)], between low and low + extent, as quantize_run has it
template <int B>
Line fitted_line(const float* x, int64_t n, float low, float extent) {
  static_assert(B == 1 || B == 2);
  constexpr float kSteps = 1023, kLevels = (1 << B) - 1;
  // Rough codes change every 273 steps, from 512 (one bit) or 239 (two bits) on. Between two
  // steps, so that no quotient is a tie.
  constexpr float kSpacing = 273, kOrigin = B == 1 ? 375.25f : 102.25f;
  const float width = extent / kSteps;
  F total_code = splat(0), total_step = splat(0), squares = splat(0), products = splat(0);
  auto add = [&](F value) {
    // Bounded, so that a NaN is a number, too: the sums become integers.
    F step = min(max(round_even((value - splat(low)) / splat(width)), splat(0)), splat(kSteps));
    F rough = round_even((step - splat(kOrigin)) / splat(kSpacing));
    F code = min(max(rough, splat(0)), splat(kLevels));
    total_code = total_code + code;
    total_step = total_step + step;
    squares = fma(code, code, squares);
    products = fma(code, step, products);
  };
  int64_t i = 0;
  for (; i + W <= n; i += W) add(load(x + i));
  if (i < n) {
    // The lowest value adds nothing to any sum.
    float rest[W];
    for (int j = 0; j < W; ++j) rest[j] = i + j < n ? x[i + j] : low;
    add(load(rest));
  }
  const auto codes = static_cast<int64_t>(sum(total_code));
  const auto steps = static_cast<int64_t>(sum(total_step));
  const int64_t spread = n * static_cast<int64_t>(sum(squares)) - codes * codes;
  const int64_t shared = n * static_cast<int64_t>(sum(products)) - codes * steps;
  const int64_t offset = steps * spread - shared * codes;
  const auto divisor = static_cast<float>(spread);
  return {extent * static_cast<float>(shared) / (kSteps * divisor),
          low + extent * static_cast<float>(offset) / (kSteps * static_cast<float>(n) * divisor)};
}

// Quantize one group.
//   x: [padded(n)], what lies beyond n repeats a value before it; n is a multiple of 8
//   codes: [n*B/8]; scale, zero: one float16 each
template <int B>
void quantize_run(const float* x, int64_t n, bool fit, uint8_t* codes, uint16_t* scale,
                  uint16_t* zero) {
  constexpr float kLevels = (1 << B) - 1;
  F low = load(x), high = low;
  for (int64_t i = W; i < n; i += W) {
    low = min(low, load(x + i));
    high = max(high, load(x + i));
  }
  float smallest_x = smallest(low), range = largest(high) - smallest_x;
  Line line{range / kLevels, smallest_x};
  if constexpr (B <= 2) {
    // Never where the scale is no number.
    const bool fits = line.scale <= kHalfMax && to_float(Half{to_half(line.scale)}) != 0.0f;
    if (fit && fits) line = fitted_line<B>(x, n, smallest_x, range);
  }
  *scale = to_half(line.scale);
  *zero = to_half(line.zero);
  F divisor = splat(to_float(Half{*scale})), offset = splat(to_float(Half{*zero}));
  if (to_float(Half{*scale}) == 0.0f) {
    __builtin_memset(codes, 0, static_cast<size_t>(n * B / 8));
    return;
  }
  alignas(8) uint8_t bytes[kPad];
  for (int64_t i = 0; i < n; i += kPad) {
    for (int j = 0; j < kPad; j += W) {
      F code = round_even((load(x + i + j) - offset) / divisor);
      store_bytes(bytes + j, min(max(code, splat(0)), splat(kLevels)));
    }
    for (int j = 0; j < kPad && i + j < n; j += 8) {
      uint64_t eight;
      __builtin_memcpy(&eight, bytes + j, 8);
      uint64_t packed = pack<B>(eight);
      __builtin_memcpy(codes + (i + j) * B / 8, &packed, B);
    }
  }
}

// K of one group and head as floats, channels first.
//   tile: [d, g]
template <class T>
void read_keys(float* tile, const QuantizeGroups& op, int64_t block, int head, int64_t group) {
  const int64_t g = op.grouping.group_size;
  const T* key = at<T>(op.key_cache, block, head, group * g, 0);
  for (int64_t c = 0; c < op.shape.head_size; ++c) {
    const T* channel = key + c * op.key_cache.channel;
    if (op.key_cache.token == 1) {
      for (int64_t t = 0; t < g; t += W) store(tile + c * g + t, load(channel + t));
    } else {
      for (int64_t t = 0; t < g; ++t) tile[c * g + t] = to_float(channel[t * op.key_cache.token]);
    }
  }
}

template <int B>
void quantize_keys(const QuantizeGroups& op, const float* tile, int64_t block, int head,
                   int64_t group) {
  const int64_t g = op.grouping.group_size;
  uint8_t* codes = at(op.key.codes, block, head, group);
  uint16_t* scale = at(op.key.scale, block, head, group);
  uint16_t* zero = at(op.key.zero, block, head, group);
  for (int64_t c = 0; c < op.shape.head_size; ++c) {
    quantize_run<B>(tile + c * g, g, op.fit, codes + c * op.key.codes.item, scale + c, zero + c);
  }
}

//   row: scratch [padded(d)]
template <class T, int B>
void quantize_values(const QuantizeGroups& op, float* row, int64_t block, int head, int64_t group) {
  const int64_t g = op.grouping.group_size, d = op.shape.head_size;
  uint8_t* codes = at(op.value.codes, block, head, group);
  uint16_t* scale = at(op.value.scale, block, head, group);
  uint16_t* zero = at(op.value.zero, block, head, group);
  for (int64_t t = 0; t < g; ++t) {
    const T* value = at<T>(op.value_cache, block, head, group * g + t, 0);
    if (op.value_cache.channel == 1) {
      copy_row(row, value, d);
    } else {
      for (int64_t c = 0; c < d; ++c) row[c] = to_float(value[c * op.value_cache.channel]);
    }
    for (int64_t c = d; c < padded(d); ++c) row[c] = row[d - 1];
    for (int64_t c = 0, i = 0; c < d; c += g, ++i) {
      quantize_run<B>(row + c, smaller(g, d - c), op.fit && B == 1,
                      codes + t * op.value.codes.item + c * B / 8,
                      scale + t * op.value.scale.item + i, zero + t * op.value.zero.item + i);
    }
  }
}

template <class T>
void reduce_channels(const QuantizeGroups& op, const float* tile, int64_t block, int head,
                     int64_t group) {
  const int64_t g = op.grouping.group_size;
  T* lowest = at<T>(op.extremes, block, head, group);
  T* highest = lowest + op.extremes.item;
  for (int64_t c = 0; c < op.shape.head_size; ++c) {
    F low = load(tile + c * g), high = low;
    for (int64_t t = W; t < g; t += W) {
      F x = load(tile + c * g + t);
      low = min(low, x);
      high = max(high, x);
    }
    from_float(lowest + c, smallest(low));
    from_float(highest + c, largest(high));
  }
}

void quantize_groups(const QuantizeGroups& op) {
  scratch_reset();
  const int64_t d = op.shape.head_size, g = op.grouping.group_size;
  const int64_t per_block = op.grouping.groups_per_block, heads = op.shape.kv_heads;
  const int64_t tile_size = d * g, thread_size = tile_size + padded(d);
  float* scratch = take<float>(thread_size * num_threads());
  visit(op.dtype, [&](auto element) {
    using T = decltype(element);
    parallel_for(op.num_groups * heads, [&](int64_t i) {
      const int64_t item = op.groups[i / heads];
      if (item < 0) return;
      const int64_t block = item / per_block, group = item % per_block;
      const int head = static_cast<int>(i % heads);
      float* tile = scratch + thread_size * omp_get_thread_num();
      read_keys<T>(tile, op, block, head, group);
      if (op.derive == Derive::kChannels) {
        reduce_channels<T>(op, tile, block, head, group);
        return;
      }
      visit_bits(op.grouping.bits, [&](auto bits) {
        constexpr int B = decltype(bits)::value;
        quantize_keys<B>(op, tile, block, head, group);
        if (op.derive == Derive::kDense) {
          quantize_values<T, B>(op, tile + tile_size, block, head, group);
        }
      });
    });
  });
}

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
