// sparse_decode_attention
#pragma once

#include "attention.h"

namespace tailorkv::TAILORKV_ISA {
namespace {

template <class T>
void sparse_decode(const SparseDecode& op) {
  const Decode& decode = op.decode;
  const int64_t d = decode.shape.head_size, k = op.k;
  const int64_t group_heads = decode.query_heads / decode.shape.kv_heads;
  const int64_t size = partial_size(group_heads, d);
  auto sinks = [&](int64_t row) { return smaller(op.sink_tokens, decode.seq_lens[row]); };
  auto tail = [&](int64_t row) { return larger(op.tail_start[row], sinks(row)); };
  // A unit is a token of the list: sinks, then the k places for selected ones, then the tail.
  Tasks tasks = cut(decode.rows, decode.shape.kv_heads, 64, INT32_MAX, [&](int32_t row) {
    return sinks(row) + k + larger(0, decode.seq_lens[row] - tail(row));
  });
  const float* queries = take_queries<T>(decode);
  float* partials = take<float>(size * tasks.count);
  const int threads = num_threads();
  auto* exact_scratch = take<ExactScratch>(threads);
  for (int i = 0; i < threads; ++i) exact_scratch[i] = take_exact_scratch(decode);
  parallel_for(tasks.count, [&](int64_t i) {
    const Task& task = tasks.data[i];
    const ExactScratch& exact = exact_scratch[omp_get_thread_num()];
    HeadView view = head_view(decode, queries, task);
    Partial partial = partial_at(partials + i * size, group_heads);
    clear(partial, group_heads, d);
    const int64_t pair = static_cast<int64_t>(task.row) * decode.shape.kv_heads + task.head;
    const int32_t* chosen = op.indices + pair * k;
    const int64_t before = sinks(task.row), after = tail(task.row) - before - k;
    int64_t n = 0;
    for (int64_t unit = task.begin; unit < task.end; ++unit) {
      int64_t position = unit < before       ? unit
                         : unit < before + k ? chosen[unit - before]
                                             : unit + after;
      if (position < 0) continue;
      exact.positions[n++] = static_cast<int32_t>(position);
      if (n == kBatch) {
        attend_exact<T>(view, exact, n, partial);
        n = 0;
      }
    }
    attend_exact<T>(view, exact, n, partial);
  });
  merge<T>(decode, tasks, partials);
}

void sparse_decode_attention(const SparseDecode& op) {
  scratch_reset();
  visit(op.decode.dtype, [&](auto element) { sparse_decode<decltype(element)>(op); });
}

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
