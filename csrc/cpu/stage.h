// stage_rows
#pragma once

#include <algorithm>

#include "common.h"

namespace tailorkv::TAILORKV_ISA {
namespace {

// `STAGED_PADDING` of kernels/types.py.
constexpr int64_t kStagedPadding = 256;

// One row of K or V, to channels that lie side by side.
template <class T>
void copy_row(const Cache& cache, int64_t block, int head, int64_t offset, int head_size, T* to) {
  const T* from = at<T>(cache, block, head, offset, 0);
  if (cache.channel == 1) {
    __builtin_memcpy(to, from, static_cast<size_t>(head_size) * sizeof(T));
    return;
  }
  for (int c = 0; c < head_size; ++c) to[c] = from[c * cache.channel];
}

template <class T>
void stage_all(const StageRows& op) {
  const int heads = op.shape.kv_heads, d = op.shape.head_size;
  const int64_t block_size = op.shape.block_size;
  const int64_t end = op.context_start[op.rows];
  const int64_t padding = std::min<int64_t>(kStagedPadding, op.places - end);
  for (void* rows : {op.key_rows, op.value_rows}) {
    T* behind = static_cast<T*>(rows) + end * heads * d;
    std::fill_n(behind, padding * heads * d, T{0});
  }
  for (int64_t row = 0; row < op.rows; ++row) {
    const int64_t start = op.context_start[row];
    parallel_for(op.context_start[row + 1] - start, [&](int64_t token) {
      const int64_t position = op.first_token + token;
      const int64_t block =
          op.block_table.data[row * op.block_table.stride + position / block_size];
      for (int head = 0; head < heads; ++head) {
        const int64_t to = ((start + token) * heads + head) * d;
        copy_row(op.key_cache, block, head, position % block_size, d,
                 static_cast<T*>(op.key_rows) + to);
        copy_row(op.value_cache, block, head, position % block_size, d,
                 static_cast<T*>(op.value_rows) + to);
      }
    });
  }
}

void stage_rows(const StageRows& op) {
  // The bits are moved as they are: only the element's size counts.
  if (op.dtype == Dtype::kFloat32) {
    stage_all<uint32_t>(op);
  } else {
    stage_all<uint16_t>(op);
  }
}

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
