// reduce_channels: the smallest and the largest K of each channel over a group of tokens.
//
// An element's bits, those below the sign inverted where it is set, order as signed integers: the
// result is exact in every dtype, and a NaN, beyond all others on its side, stays.
#pragma once

#include "addressing.cuh"
#include "ops.h"
#include "portable.cuh"

namespace tailorkv::cuda {

constexpr int kReduceThreads = 256;
constexpr int kReduceBytes = 16;
constexpr int kWords = kReduceBytes / 4;

// The elements of a word, of 2 or 4 bytes each, as integers in their order; and back again.
template <int ItemBytes>
TAILORKV_HD uint32_t in_order(uint32_t word) {
  if constexpr (ItemBytes == 4) return word ^ (word >> 31) * 0x7FFFFFFFu;
  return word ^ (word >> 15 & 0x00010001u) * 0x7FFFu;
}

// The smaller (or larger) of the elements of two words in order.
template <int ItemBytes, bool Larger>
TAILORKV_HD uint32_t choose(uint32_t a, uint32_t b) {
  if constexpr (ItemBytes == 4) {
    return (static_cast<int32_t>(a) < static_cast<int32_t>(b)) == Larger ? b : a;
  }
#if defined(__CUDA_ARCH__)
  return Larger ? __vmaxs2(a, b) : __vmins2(a, b);
#else
  // Comparing in the upper half, where the sign is.
  auto half = [](uint32_t x, uint32_t y) {
    return (static_cast<int32_t>(x) < static_cast<int32_t>(y)) == Larger ? y : x;
  };
  return half(a << 16, b << 16) >> 16 | half(a & 0xFFFF0000u, b & 0xFFFF0000u);
#endif
}

// The extremes so far of the elements of some words in order.
template <int ItemBytes>
struct Extremes {
  uint32_t low, high;

  TAILORKV_HD void clear() {
    low = ItemBytes == 2 ? 0x7FFF7FFFu : 0x7FFFFFFFu;
    high = ~low;
  }
  TAILORKV_HD void take(uint32_t least, uint32_t most) {
    low = choose<ItemBytes, false>(low, least);
    high = choose<ItemBytes, true>(high, most);
  }
  // Of both elements of a word of 2 bytes each.
  TAILORKV_HD void join_halves() {
    if constexpr (ItemBytes == 2) take(low >> 16 | low << 16, high >> 16 | high << 16);
  }
};

template <int ItemBytes>
__device__ __forceinline__ void take_words(Extremes<ItemBytes> (&found)[kWords], const void* from) {
  const uint4 read = __ldcs(static_cast<const uint4*>(from));
  const uint32_t words[kWords] = {in_order<ItemBytes>(read.x), in_order<ItemBytes>(read.y),
                                  in_order<ItemBytes>(read.z), in_order<ItemBytes>(read.w)};
#pragma unroll
  for (int i = 0; i < kWords; ++i) found[i].take(words[i], words[i]);
}

// Where one block reads and writes: one group of one KV head.
struct ReduceTask {
  bool exists;
  const char* key;  // first token of the group
  char* extremes;   // [2, d]
};

TAILORKV_HD ReduceTask reduce_task(const ReduceChannels& op, int64_t index) {
  const int64_t head = index % op.kv_heads, item = op.groups[index / op.kv_heads];
  if (item < 0) return {false, nullptr, nullptr};
  const BlockSlot where = group_slot(item, op.groups_per_block);
  const int64_t to = where.block * op.extremes_block + head * op.extremes_head +
                     static_cast<int64_t>(where.offset) * op.extremes_group;
  return {true,
          token_address(op.key_cache, where.block, head,
                        static_cast<int64_t>(where.offset) * op.group_size),
          static_cast<char*>(op.extremes) + to * op.item_bytes};
}

// The rows of tokens are contiguous: a thread follows 16 bytes of channels over some of the tokens.
template <int ItemBytes, int Threads>
__global__ void __launch_bounds__(Threads) reduce_token_major(ReduceChannels op) {
  __shared__ uint32_t lows[Threads * kWords], highs[Threads * kWords];
  const ReduceTask task = reduce_task(op, blockIdx.x);
  if (!task.exists) return;
  const int columns = op.head_size * ItemBytes / kReduceBytes, slices = Threads / columns;
  const int column = threadIdx.x % columns, slice = threadIdx.x / columns;
  Extremes<ItemBytes> found[kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i) found[i].clear();
  if (slice < slices) {
#pragma unroll 4
    for (int token = slice; token < op.group_size; token += slices) {
      take_words<ItemBytes>(found, task.key + token * op.key_cache.token + column * kReduceBytes);
    }
  }
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    lows[threadIdx.x * kWords + i] = found[i].low;
    highs[threadIdx.x * kWords + i] = found[i].high;
  }
  __syncthreads();
  const int words = columns * kWords;
  uint32_t* to = reinterpret_cast<uint32_t*>(task.extremes);
  for (int word = threadIdx.x; word < words; word += Threads) {
    Extremes<ItemBytes> all;
    all.clear();
    for (int i = 0; i < slices; ++i) all.take(lows[i * words + word], highs[i * words + word]);
    to[word] = in_order<ItemBytes>(all.low);
    to[words + word] = in_order<ItemBytes>(all.high);
  }
}

// The tokens of a channel are contiguous: a few threads read a channel, 16 bytes each.
template <int ItemBytes, int Threads>
__global__ void __launch_bounds__(Threads) reduce_channel_major(ReduceChannels op) {
  __shared__ uint32_t lows[Threads], highs[Threads];
  const ReduceTask task = reduce_task(op, blockIdx.x);
  if (!task.exists) return;
  const int columns = op.group_size * ItemBytes / kReduceBytes, channels = Threads / columns;
  const int column = threadIdx.x % columns, slot = threadIdx.x / columns;
  for (int first = 0; first < op.head_size; first += channels) {
    const int channel = first + slot;
    Extremes<ItemBytes> found[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) found[i].clear();
    if (slot < channels && channel < op.head_size) {
      take_words<ItemBytes>(found,
                            task.key + channel * op.key_cache.channel + column * kReduceBytes);
    }
#pragma unroll
    for (int i = 1; i < kWords; ++i) found[0].take(found[i].low, found[i].high);
    lows[threadIdx.x] = found[0].low;
    highs[threadIdx.x] = found[0].high;
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < smaller(channels, op.head_size - first)) {
      Extremes<ItemBytes> all;
      all.clear();
      for (int i = 0; i < columns; ++i) {
        all.take(lows[threadIdx.x * columns + i], highs[threadIdx.x * columns + i]);
      }
      all.join_halves();
      const int at = first + static_cast<int>(threadIdx.x);
      const uint32_t low = in_order<ItemBytes>(all.low), high = in_order<ItemBytes>(all.high);
      if constexpr (ItemBytes == 4) {
        uint32_t* to = reinterpret_cast<uint32_t*>(task.extremes);
        to[at] = low;
        to[op.head_size + at] = high;
      } else {
        uint16_t* to = reinterpret_cast<uint16_t*>(task.extremes);
        to[at] = static_cast<uint16_t>(low);
        to[op.head_size + at] = static_cast<uint16_t>(high);
      }
    }
    __syncthreads();
  }
}

template <int ItemBytes, int Threads, class Launch>
void run_reduce_channels(Launch& launch, const ReduceChannels& op) {
  const int64_t blocks = op.num_groups * op.kv_heads;
  if (blocks == 0) return;
  if (op.key_cache.channel == ItemBytes) {
    launch(reduce_token_major<ItemBytes, Threads>, blocks, Threads, op);
  } else {
    launch(reduce_channel_major<ItemBytes, Threads>, blocks, Threads, op);
  }
}

}  // namespace tailorkv::cuda
