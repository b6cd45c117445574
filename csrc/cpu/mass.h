// log_mass
#pragma once

#include "attention.h"

namespace tailorkv::TAILORKV_ISA {
namespace {

// What the heads of one row and KV head pay elsewhere.
//   partial: scratch, without values; mass: [G]
template <class T>
void log_mass_of_pair(const LogMass& op, const HeadView& view, int64_t row,
                      const ExactScratch& scratch, Partial partial, float* mass) {
  const Decode& decode = op.decode;
  const int64_t group_heads = view.group_heads;
  clear(partial, group_heads, 0);
  // Without a middle there is nothing to compare, and the tail may be a whole context.
  const bool compared = op.tail_start[row] > op.sink_tokens;
  const int64_t length = compared ? decode.seq_lens[row] : 0;
  const int64_t sinks = smaller(op.sink_tokens, length);
  const int64_t skipped = smaller(larger(op.tail_start[row], sinks), length) - sinks;
  int64_t n = 0;
  for (int64_t place = 0; place < length - skipped; ++place) {
    scratch.positions[n++] = static_cast<int32_t>(place < sinks ? place : place + skipped);
    if (n < kBatch && place + 1 < length - skipped) continue;
    score_exact<T>(view, scratch, n);
    for (int h = 0; h < group_heads; ++h) {
      softmax_step(scratch.scores + h * kBatch, n, decode.scale, decode.softcap,
                   partial.highest + h, partial.total + h, nullptr, 0);
    }
    n = 0;
  }
  const float* logits = compared && decode.sink_logits != nullptr
                            ? decode.sink_logits + view.head * group_heads
                            : nullptr;
  for (int64_t h = 0; h < group_heads; ++h) {
    float highest = partial.highest[h], sum = partial.total[h];
    if (logits != nullptr) {
      highest = logits[h] > highest ? logits[h] : highest;
      sum =
          sum * __builtin_expf(partial.highest[h] - highest) + __builtin_expf(logits[h] - highest);
    }
    mass[h] = sum > 0 ? highest + __builtin_logf(sum) : 0.0f;
  }
}

template <class T>
void log_mass_of(const LogMass& op) {
  const Decode& decode = op.decode;
  const int64_t kv_heads = decode.shape.kv_heads, group_heads = decode.query_heads / kv_heads;
  const float* queries = take_queries<T>(decode);
  const int threads = num_threads();
  auto* scratches = take<ExactScratch>(threads);
  auto* highest = take<float>(threads * group_heads);
  auto* total = take<float>(threads * group_heads);
  for (int i = 0; i < threads; ++i) scratches[i] = take_exact_scratch(decode);
  parallel_for(decode.rows * kv_heads, [&](int64_t pair) {
    const Task task = task_of(pair, kv_heads);
    const int thread = omp_get_thread_num();
    log_mass_of_pair<T>(
        op, head_view(decode, queries, task), task.row, scratches[thread],
        Partial{highest + thread * group_heads, total + thread * group_heads, nullptr},
        op.mass + pair * group_heads);
  });
}

void log_mass(const LogMass& op) {
  scratch_reset();
  visit(op.decode.dtype, [&](auto element) { log_mass_of<decltype(element)>(op); });
}

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
