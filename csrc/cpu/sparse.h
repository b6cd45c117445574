// sparse_decode_attention
#pragma once

#include "attention.h"

namespace tailorkv::TAILORKV_ISA {
namespace {

// The tokens that one row and KV head attends to: sinks, then k places for selected ones, then the
// tail.
struct Attended {
  int64_t sinks, k, tail, length;
  int64_t units() const { return sinks + k + larger(0, length - tail); }
};

inline Attended attended_of(const SparseDecode& op, int64_t row) {
  const int64_t length = op.decode.seq_lens[row], sinks = smaller(op.sink_tokens, length);
  return Attended{sinks, op.k, larger(op.tail_start[row], sinks), length};
}

// Attend to those of the units [begin, end).
//   chosen: [k]
template <class T>
void attend_units(const HeadView& view, const Attended& attended, const int32_t* chosen,
                  int64_t begin, int64_t end, const ExactScratch& exact, const Partial& partial) {
  const int64_t before = attended.sinks, k = attended.k, after = attended.tail - before - k;
  int64_t n = 0;
  for (int64_t unit = begin; unit < end; ++unit) {
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
}

template <class T>
void sparse_decode(const SparseDecode& op) {
  const Decode& decode = op.decode;
  const int64_t d = decode.shape.head_size;
  const int64_t group_heads = decode.query_heads / decode.shape.kv_heads;
  const int64_t size = partial_size(group_heads, d);
  Tasks tasks = cut(decode.rows, decode.shape.kv_heads, 64, INT32_MAX,
                    [&](int32_t row) { return attended_of(op, row).units(); });
  const float* queries = take_queries<T>(decode);
  float* partials = take<float>(size * tasks.count);
  const int threads = num_threads();
  auto* exact_scratch = take<ExactScratch>(threads);
  for (int i = 0; i < threads; ++i) exact_scratch[i] = take_exact_scratch(decode);
  parallel_for(tasks.count, [&](int64_t i) {
    const Task& task = tasks.data[i];
    const Partial partial = partial_at(partials + i * size, group_heads);
    clear(partial, group_heads, d);
    const int64_t pair = static_cast<int64_t>(task.row) * decode.shape.kv_heads + task.head;
    attend_units<T>(head_view(decode, queries, task), attended_of(op, task.row),
                    op.indices + pair * op.k, task.begin, task.end,
                    exact_scratch[omp_get_thread_num()], partial);
  });
  merge<T>(decode, tasks, partials);
}

void sparse_decode_attention(const SparseDecode& op) {
  scratch_reset();
  visit(op.decode.dtype, [&](auto element) { sparse_decode<decltype(element)>(op); });
}

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
