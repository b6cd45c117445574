// write_kv
#pragma once

#include "common.h"

namespace tailorkv::TAILORKV_ISA {
namespace {

// Consecutive slots of one block.
struct Run {
  int64_t token, count, block, offset;
};

// Copy a run of rows of one head into a block. Channel-major blocks are written in tiles, so that
// both sides stay in the first-level cache.
//   from: [count, d], rows from_token apart
template <class T>
void write_run(const Cache& cache, const Run& run, int head, int head_size, const T* from,
               int64_t from_token) {
  T* to = at<T>(cache, run.block, head, run.offset, 0);
  if (cache.channel == 1) {
    for (int64_t t = 0; t < run.count; ++t) {
      __builtin_memcpy(to + t * cache.token, from + t * from_token,
                       static_cast<size_t>(head_size) * sizeof(T));
    }
    return;
  }
  constexpr int64_t kTile = 32;
  for (int64_t start = 0; start < run.count; start += kTile) {
    int64_t end = smaller(start + kTile, run.count);
    for (int c = 0; c < head_size; ++c) {
      T* channel = to + c * cache.channel;
      for (int64_t t = start; t < end; ++t) channel[t * cache.token] = from[t * from_token + c];
    }
  }
}

template <class T>
void write_all(const WriteKv& op, const Run* runs, int64_t num_runs) {
  const int heads = op.shape.kv_heads;
  const auto *key = static_cast<const T*>(op.key), *value = static_cast<const T*>(op.value);
  parallel_for(num_runs * heads, [&](int64_t i) {
    const Run& run = runs[i / heads];
    int head = static_cast<int>(i % heads);
    write_run(op.key_cache, run, head, op.shape.head_size,
              key + run.token * op.key_token + head * op.key_head, op.key_token);
    write_run(op.value_cache, run, head, op.shape.head_size,
              value + run.token * op.value_token + head * op.value_head, op.value_token);
    if (op.key_rows.data != nullptr) {
      write_run(op.key_rows, run, head, op.shape.head_size,
                key + run.token * op.key_token + head * op.key_head, op.key_token);
    }
  });
}

void write_kv(const WriteKv& op) {
  scratch_reset();
  Run* runs = take<Run>(op.tokens);
  int64_t num_runs = 0;
  const int64_t block_size = op.shape.block_size;
  for (int64_t i = 0; i < op.tokens; ++i) {
    int64_t slot = op.slots[i];
    if (slot < 0) continue;
    if (num_runs > 0) {
      Run& last = runs[num_runs - 1];
      if (last.token + last.count == i && slot == op.slots[i - 1] + 1 && slot % block_size != 0) {
        ++last.count;
        continue;
      }
    }
    runs[num_runs++] = Run{i, 1, slot / block_size, slot % block_size};
  }
  // The bits are moved as they are: only the element's size counts.
  if (op.dtype == Dtype::kFloat32) {
    write_all<uint32_t>(op, runs, num_runs);
  } else {
    write_all<uint16_t>(op, runs, num_runs);
  }
}

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
