// refine_topk: the candidates of a rough selection weighed by their true attention.
#pragma once

namespace tailorkv::TAILORKV_ISA {
namespace {

// Candidates asked for ahead of the one at work.
constexpr int64_t kCandidatesAhead = 3;

// Scores of candidates [begin, end) of one row and KV head, by all its G query heads.
//   candidates: [C], ascending; query: [G, padded(d)]; row: scratch [padded(d)]
//   scores: [G, padded(C)]
template <class T>
void score_candidates(const RefineTopk& op, const int32_t* table, int32_t head,
                      const int32_t* candidates, int64_t begin, int64_t end, const float* query,
                      float* row, float* scores) {
  const Cache& cache = op.key_cache;
  const int64_t d = op.shape.head_size, block_size = op.shape.block_size;
  const int64_t pitch = padded(d), stride = padded(op.candidate_count);
  constexpr int64_t kLine = 64 / sizeof(T);
  auto key_of = [&](int64_t i) {
    return at<T>(cache, table[candidates[i] / block_size], head, candidates[i] % block_size, 0);
  };
  auto ask = [&](int64_t i) {
    if (i >= end) return;
    const T* key = key_of(i);
    const int64_t step = cache.channel == 1 ? kLine : 1;
    for (int64_t c = 0; c < d; c += step) __builtin_prefetch(key + c * cache.channel);
  };
  for (int64_t i = begin; i < begin + kCandidatesAhead; ++i) ask(i);
  for (int64_t i = begin; i < end; ++i) {
    ask(i + kCandidatesAhead);
    const T* key = key_of(i);
    if (cache.channel != 1) {
      for (int64_t c = 0; c < d; ++c) row[c] = to_float(key[c * cache.channel]);
    }
    for_heads(op.query_heads / op.shape.kv_heads, [&](int h, auto heads) {
      constexpr int N = decltype(heads)::value;
      float* to = scores + h * stride + i;
      if (cache.channel == 1) {
        score_row<N>(key, d, query + h * pitch, to, stride);
      } else {
        score_row<N>(static_cast<const float*>(row), d, query + h * pitch, to, stride);
      }
    });
  }
}

// The attention weights of n candidates, summed over the query heads.
//   scores: [G, padded(C)], overwritten; the first row receives the sums
inline void sum_weights(const RefineTopk& op, float* scores, int64_t n) {
  const int64_t stride = padded(op.candidate_count), end = padded(n);
  const int64_t group_heads = op.query_heads / op.shape.kv_heads;
  for (int64_t h = 0; h < group_heads; ++h) {
    float* row = scores + h * stride;
    F most = splat(-kInfinity);
    for (int64_t i = n; i < end; ++i) row[i] = row[n - 1];
    for (int64_t i = 0; i < end; i += W) {
      F x = load(row + i) * splat(op.scale);
      if (op.softcap > 0) x = cap(x, op.softcap);
      store(row + i, x);
      most = max(most, x);
    }
    for (int64_t i = n; i < end; ++i) row[i] = -kInfinity;
    // One head's order is that of its scores, also where weights vanish.
    if (group_heads == 1) return;
    const float highest = largest(most);
    F total = splat(0);
    for (int64_t i = 0; i < end; i += W) {
      F x = exponential(load(row + i) - splat(highest));
      store(row + i, x);
      total = total + x;
    }
    const F inverse = splat(1.0f / sum(total));
    for (int64_t i = 0; i < end; i += W) {
      F x = load(row + i) * inverse;
      store(scores + i, h == 0 ? x : x + load(scores + i));
    }
  }
}

template <class T>
void refine(const RefineTopk& op) {
  const int64_t d = op.shape.head_size, kv_heads = op.shape.kv_heads, pitch = padded(d);
  const int64_t pairs = op.rows * kv_heads, count = op.candidate_count, k = op.k;
  const int64_t group_heads = op.query_heads / kv_heads, size = group_heads * padded(count);
  float* queries = take<float>(pairs * group_heads * pitch);
  for (int64_t i = 0; i < pairs * group_heads; ++i) {
    copy_row(queries + i * pitch, static_cast<const T*>(op.query) + i * d, d);
  }
  float* scores = take<float>(pairs * size);
  int64_t* found = take<int64_t>(pairs);
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const int32_t* candidates = op.candidates + pair * count;
    found[pair] = count;
    while (found[pair] > 0 && candidates[found[pair] - 1] < 0) --found[pair];
  }
  Tasks tasks = cut(op.rows, op.shape.kv_heads, 32, INT32_MAX, [&](int32_t) { return count; });
  float* rows = take<float>(pitch * num_threads());
  __builtin_memset(rows, 0, static_cast<size_t>(pitch * num_threads()) * sizeof(float));
  parallel_for(tasks.count, [&](int64_t i) {
    const Task& task = tasks.data[i];
    const int64_t pair = task.row * kv_heads + task.head;
    score_candidates<T>(op, op.block_table.data + task.row * op.block_table.stride, task.head,
                        op.candidates + pair * count, task.begin, smaller(task.end, found[pair]),
                        queries + pair * group_heads * pitch, rows + pitch * omp_get_thread_num(),
                        scores + pair * size);
  });
  uint64_t* buffers = take<uint64_t>(buffer_size(k) * num_threads());
  parallel_for(pairs, [&](int64_t pair) {
    int32_t* indices = op.indices + pair * k;
    const int32_t* candidates = op.candidates + pair * count;
    int64_t kept = 0;
    if (found[pair] > 0) {
      float* weights = scores + pair * size;
      sum_weights(op, weights, found[pair]);
      uint64_t* keys = buffers + buffer_size(k) * omp_get_thread_num();
      kept = best_keys(keys, weights, 0, found[pair], k);
      for (int64_t j = 0; j < kept; ++j) indices[j] = candidates[key_position(keys[j])];
      sort_positions(indices, kept);
    }
    for (int64_t j = kept; j < k; ++j) indices[j] = -1;
  });
}

void refine_topk(const RefineTopk& op) {
  scratch_reset();
  if (op.k == 0 || op.rows == 0 || op.shape.kv_heads == 0) return;
  visit(op.dtype, [&](auto element) { refine<decltype(element)>(op); });
}

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
