// reduce_channels: the largest magnitude of each channel over a group of tokens.
//
// A magnitude is an element without its sign bit, and magnitudes order as unsigned integers: the
// result is exact in every dtype, and NaN, above all others, stays.
#pragma once

#include "addressing.cuh"
#include "ops.h"
#include "portable.cuh"

namespace tailorkv::cuda {

constexpr int kReduceThreads = 256;
constexpr int kReduceBytes = 16;
constexpr int kWords = kReduceBytes / 4;

// Magnitudes of the elements of a word, of 2 or 4 bytes each.
template <int ItemBytes>
TAILORKV_HD uint32_t magnitudes(uint32_t word) {
  return word & (ItemBytes == 2 ? 0x7FFF7FFFu : 0x7FFFFFFFu);
}

// The larger magnitude of each element of two words.
template <int ItemBytes>
TAILORKV_HD uint32_t larger_magnitudes(uint32_t a, uint32_t b) {
  if constexpr (ItemBytes == 4) return larger(a, b);
#if defined(__CUDA_ARCH__)
  return __vmaxu2(a, b);
#else
  return larger(a & 0xFFFFu, b & 0xFFFFu) | larger(a & 0xFFFF0000u, b & 0xFFFF0000u);
#endif
}

// The largest magnitude within a word.
template <int ItemBytes>
TAILORKV_HD uint32_t largest_of_word(uint32_t word) {
  if constexpr (ItemBytes == 4) return word;
  return larger(word & 0xFFFFu, word >> 16);
}

template <int ItemBytes>
__device__ __forceinline__ void take_larger(uint32_t (&most)[kWords], const void* from) {
  const uint4 read = __ldcs(static_cast<const uint4*>(from));
  most[0] = larger_magnitudes<ItemBytes>(most[0], magnitudes<ItemBytes>(read.x));
  most[1] = larger_magnitudes<ItemBytes>(most[1], magnitudes<ItemBytes>(read.y));
  most[2] = larger_magnitudes<ItemBytes>(most[2], magnitudes<ItemBytes>(read.z));
  most[3] = larger_magnitudes<ItemBytes>(most[3], magnitudes<ItemBytes>(read.w));
}

// Where one block reads and writes: one group of one KV head.
struct ReduceTask {
  const char* key;  // first token of the group
  char* absmax;     // [d]
};

TAILORKV_HD ReduceTask reduce_task(const ReduceChannels& op, int64_t index) {
  const int64_t head = index % op.kv_heads;
  const BlockSlot where = group_slot(op.groups[index / op.kv_heads], op.groups_per_block);
  const int64_t to = where.block * op.absmax_block + head * op.absmax_head +
                     static_cast<int64_t>(where.offset) * op.absmax_group;
  return {token_address(op.key_cache, where.block, head,
                        static_cast<int64_t>(where.offset) * op.group_size),
          static_cast<char*>(op.absmax) + to * op.item_bytes};
}

// The rows of tokens are contiguous: a thread follows 16 bytes of channels over some of the tokens.
template <int ItemBytes, int Threads>
__global__ void __launch_bounds__(Threads) reduce_token_major(ReduceChannels op) {
  __shared__ uint32_t partial[Threads * kWords];
  const ReduceTask task = reduce_task(op, blockIdx.x);
  const int columns = op.head_size * ItemBytes / kReduceBytes, slices = Threads / columns;
  const int column = threadIdx.x % columns, slice = threadIdx.x / columns;
  uint32_t most[kWords] = {};
  if (slice < slices) {
#pragma unroll 4
    for (int token = slice; token < op.group_size; token += slices) {
      take_larger<ItemBytes>(most, task.key + token * op.key_cache.token + column * kReduceBytes);
    }
  }
#pragma unroll
  for (int i = 0; i < kWords; ++i) partial[threadIdx.x * kWords + i] = most[i];
  __syncthreads();
  const int words = columns * kWords;
  for (int word = threadIdx.x; word < words; word += Threads) {
    uint32_t result = 0;
    for (int i = 0; i < slices; ++i) {
      result = larger_magnitudes<ItemBytes>(result, partial[i * words + word]);
    }
    reinterpret_cast<uint32_t*>(task.absmax)[word] = result;
  }
}

// The tokens of a channel are contiguous: a few threads read a channel, 16 bytes each.
template <int ItemBytes, int Threads>
__global__ void __launch_bounds__(Threads) reduce_channel_major(ReduceChannels op) {
  __shared__ uint32_t partial[Threads];
  const ReduceTask task = reduce_task(op, blockIdx.x);
  const int columns = op.group_size * ItemBytes / kReduceBytes, channels = Threads / columns;
  const int column = threadIdx.x % columns, slot = threadIdx.x / columns;
  for (int first = 0; first < op.head_size; first += channels) {
    const int channel = first + slot;
    uint32_t most[kWords] = {};
    if (slot < channels && channel < op.head_size) {
      take_larger<ItemBytes>(most,
                             task.key + channel * op.key_cache.channel + column * kReduceBytes);
    }
#pragma unroll
    for (int i = 1; i < kWords; ++i) most[0] = larger_magnitudes<ItemBytes>(most[0], most[i]);
    partial[threadIdx.x] = largest_of_word<ItemBytes>(most[0]);
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < smaller(channels, op.head_size - first)) {
      uint32_t result = 0;
      for (int i = 0; i < columns; ++i) {
        result = larger(result, partial[threadIdx.x * columns + i]);
      }
      const int to = first + static_cast<int>(threadIdx.x);
      if constexpr (ItemBytes == 4) reinterpret_cast<uint32_t*>(task.absmax)[to] = result;
      if constexpr (ItemBytes == 2) {
        reinterpret_cast<uint16_t*>(task.absmax)[to] = static_cast<uint16_t>(result);
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
