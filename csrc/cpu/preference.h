// dense_preference
#pragma once

#include "attention.h"

namespace tailorkv::TAILORKV_ISA {
namespace {

// The share of its attention that one head of one query gives to its `kept` best tokens, and to its
// sink logit.
//   scores: [padded(n)], destroyed; sink: one logit, or null
inline double best_share(float* scores, int64_t n, int64_t kept, float scale, float softcap,
                         const float* sink) {
  float highest = -kInfinity, total = 0, unused = 0;
  softmax_step(scores, n, scale, softcap, &highest, &total, &unused, 0);
  const double largest = sum_of_largest(scores, n, smaller(kept, n));
  if (sink == nullptr) return largest / total;
  const float now = *sink > highest ? *sink : highest;
  const double factor = __builtin_expf(highest - now), sinks = __builtin_expf(*sink - now);
  return (largest * factor + sinks) / (total * factor + sinks);
}

template <class T>
void preference(const DensePreference& op) {
  const int64_t d = op.head_size, pitch = padded(d), group_heads = op.query_heads / op.kv_heads;
  const int64_t stride = padded(op.length);
  // One query and at most four heads at a time.
  const int64_t thread_size = 4 * stride + group_heads * pitch;
  float* scratch = take<float>(thread_size * num_threads());
  double* shares = take<double>(static_cast<int64_t>(op.queries) * op.query_heads);
  parallel_for(static_cast<int64_t>(op.queries) * op.kv_heads, [&](int64_t i) {
    const int64_t query_index = i / op.kv_heads, head = i % op.kv_heads;
    const int64_t visible = op.length - op.queries + query_index + 1;
    float* scores = scratch + thread_size * omp_get_thread_num();
    float* queries = scores + 4 * stride;
    const int64_t first_head = query_index * op.query_heads + head * group_heads;
    for (int64_t h = 0; h < group_heads; ++h) {
      copy_row(queries + h * pitch, static_cast<const T*>(op.query) + (first_head + h) * d, d);
    }
    for_heads(static_cast<int>(group_heads), [&](int h, auto heads) {
      constexpr int N = decltype(heads)::value;
      for (int64_t t = 0; t < visible; ++t) {
        score_row<N>(static_cast<const T*>(op.key) + (t * op.kv_heads + head) * d, d,
                     queries + h * pitch, scores + t, stride);
      }
      for (int j = 0; j < N; ++j) {
        const int64_t own = head * group_heads + h + j;
        shares[query_index * op.query_heads + own] =
            best_share(scores + j * stride, visible, op.kept, op.scale, op.softcap,
                       op.sink_logits == nullptr ? nullptr : op.sink_logits + own);
      }
    });
  });
  for (int32_t head = 0; head < op.query_heads; ++head) {
    double total = 0;
    for (int32_t i = 0; i < op.queries; ++i) total += shares[i * op.query_heads + head];
    op.result[head] = static_cast<float>(1 - total / op.queries);
  }
}

void dense_preference(const DensePreference& op) {
  scratch_reset();
  visit(op.dtype, [&](auto element) { preference<decltype(element)>(op); });
}

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
