// quantize_groups. Codes, scales and zeros are those of the reference to the bit: IEEE division,
// ties to even, and no contraction of a multiplication and an addition.
#pragma once

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

// Quantize one group.
//   x: [padded(n)], what lies beyond n repeats a value before it; n is a
//   multiple of 8 codes: [n*B/8]; scale, zero: one float16 each
template <int B>
void quantize_run(const float* x, int64_t n, uint8_t* codes, uint16_t* scale, uint16_t* zero) {
  constexpr float kLevels = (1 << B) - 1;
  F low = load(x), high = low;
  for (int64_t i = W; i < n; i += W) {
    low = min(low, load(x + i));
    high = max(high, load(x + i));
  }
  float smallest_x = smallest(low), range = largest(high) - smallest_x;
  float step = range / kLevels;
  *scale = half_bits(step > kHalfMax ? kHalfMax : step);
  float clamped = smallest_x < -kHalfMax ? -kHalfMax : smallest_x;
  clamped = clamped > kHalfMax ? kHalfMax : clamped;
  // Adding 0 makes the sign of a zero independent of the order of the minimum.
  *zero = half_bits(clamped + 0.0f);
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
    quantize_run<B>(tile + c * g, g, codes + c * op.key.codes.item, scale + c, zero + c);
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
      quantize_run<B>(row + c, smaller(g, d - c), codes + t * op.value.codes.item + c * B / 8,
                      scale + t * op.value.scale.item + i, zero + t * op.value.zero.item + i);
    }
  }
}

template <class T>
void reduce_channels(const QuantizeGroups& op, const float* tile, int64_t block, int head,
                     int64_t group) {
  const int64_t g = op.grouping.group_size;
  T* absmax = at<T>(op.absmax, block, head, group);
  for (int64_t c = 0; c < op.shape.head_size; ++c) {
    F most = splat(0);
    for (int64_t t = 0; t < g; t += W) most = max(most, abs(load(tile + c * g + t)));
    from_float(absmax + c, largest(most));
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
      const int64_t block = op.groups[i / heads] / per_block;
      const int64_t group = op.groups[i / heads] % per_block;
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
