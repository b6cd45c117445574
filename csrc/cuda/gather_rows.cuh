// gather_rows: K and V rows of selected tokens, read in place from pinned host memory.
//
// A read over PCIe takes microseconds, so what counts is how many are under way: each thread asks
// for 16 bytes of K and of V of several tokens before it stores the first.
#pragma once

#include "addressing.cuh"
#include "ops.h"
#include "portable.cuh"

namespace tailorkv::cuda {

constexpr int kGatherThreads = 256;
constexpr int kGatherTokens = 4;  // of one thread: 8 reads of 16 bytes under way
constexpr int kGatherBytes = 16;

// Which rows a block copies: `slots` at a time, each by `columns` threads.
struct GatherShape {
  int32_t columns, slots;
  int32_t tokens;            // of a block
  int32_t blocks_of_a_pair;  // for all k tokens of a row and KV head
};

TAILORKV_HD GatherShape gather_shape(const GatherRows& op, int32_t threads) {
  GatherShape shape;
  shape.columns = op.row_bytes / kGatherBytes;
  shape.slots = threads / shape.columns;
  shape.tokens = shape.slots * kGatherTokens;
  shape.blocks_of_a_pair = ceil_div(op.k, shape.tokens);
  return shape;
}

template <int Threads>
__global__ void __launch_bounds__(Threads) copy_rows(GatherRows op) {
  const GatherShape shape = gather_shape(op, Threads);
  const int32_t column = static_cast<int32_t>(threadIdx.x) % shape.columns;
  const int32_t slot = static_cast<int32_t>(threadIdx.x) / shape.columns;
  if (slot >= shape.slots) return;
  const int64_t pair = blockIdx.x / shape.blocks_of_a_pair;
  const int32_t first =
      static_cast<int32_t>(blockIdx.x % shape.blocks_of_a_pair) * shape.tokens + slot;
  const int64_t row = pair / op.kv_heads, head = pair % op.kv_heads;
  const int32_t* indices = op.indices + pair * op.k;
  const int32_t* blocks = op.block_table + row * op.block_table_row;
  const int64_t offset = static_cast<int64_t>(column) * kGatherBytes;

  uint4 key[kGatherTokens], value[kGatherTokens];
#pragma unroll
  for (int i = 0; i < kGatherTokens; ++i) {
    const int32_t j = first + i * shape.slots;
    const int32_t token = j < op.k ? indices[j] : -1;
    key[i] = value[i] = make_uint4(0, 0, 0, 0);
    if (token < 0) continue;
    const BlockSlot where = token_slot(token, op.block_size);
    const int64_t block = blocks[where.block];
    key[i] = __ldcs(reinterpret_cast<const uint4*>(
        token_address(op.key_cache, block, head, where.offset) + offset));
    value[i] = __ldcs(reinterpret_cast<const uint4*>(
        token_address(op.value_cache, block, head, where.offset) + offset));
  }
#pragma unroll
  for (int i = 0; i < kGatherTokens; ++i) {
    const int32_t j = first + i * shape.slots;
    if (j >= op.k) continue;
    const int64_t to = (pair * op.k + j) * op.row_bytes + offset;
    *reinterpret_cast<uint4*>(static_cast<char*>(op.key_rows) + to) = key[i];
    *reinterpret_cast<uint4*>(static_cast<char*>(op.value_rows) + to) = value[i];
  }
}

template <int Threads, class Launch>
void run_gather_rows(Launch& launch, const GatherRows& op) {
  const int64_t pairs = static_cast<int64_t>(op.rows) * op.kv_heads;
  if (pairs == 0 || op.k == 0) return;
  launch(copy_rows<Threads>, pairs * gather_shape(op, Threads).blocks_of_a_pair, Threads, op);
}

}  // namespace tailorkv::cuda
