// refine_topk: the candidates of a rough selection weighed by their true attention.
#pragma once

namespace tailorkv::TAILORKV_ISA {
namespace {

// Candidates asked for ahead of the one at work.
constexpr int64_t kCandidatesAhead = 3;
// Candidates whose K tells which channels count.
constexpr int64_t kSamples = 16;

// What one row and KV head need.
//   candidates: [C], ascending, the first `found` of them positions
//   channels: [count], ascending; query: [G, padded(count)], its values at them
struct Refined {
  const int32_t *candidates, *table;
  int32_t head;
  int64_t found, count;
  int32_t* channels;
  float* query;
};

template <class T>
const T* candidate_key(const RefineTopk& op, const Refined& refined, int64_t i) {
  const int64_t position = refined.candidates[i], block_size = op.shape.block_size;
  return at<T>(op.key_cache, refined.table[position / block_size], refined.head,
               position % block_size, 0);
}

// Choose the channels, take the query's values there.
//   query: [G, d]; weight: scratch [d]
template <class T>
void prepare(const RefineTopk& op, const T* query, float* weight, const Refined& refined) {
  const int64_t d = op.shape.head_size, group_heads = op.query_heads / op.shape.kv_heads;
  const int64_t pitch = padded(refined.count);
  if (refined.count == d) {
    for (int64_t c = 0; c < d; ++c) refined.channels[c] = static_cast<int32_t>(c);
  } else {
    for (int64_t c = 0; c < d; ++c) weight[c] = 0;
    const int64_t samples = smaller(kSamples, refined.found);
    for (int64_t i = 0; i < samples; ++i) {
      const T* key = candidate_key<T>(op, refined, i * refined.found / samples);
      for (int64_t c = 0; c < d; ++c) {
        float magnitude = __builtin_fabsf(to_float(key[c * op.key_cache.channel]));
        weight[c] = magnitude > weight[c] ? magnitude : weight[c];
      }
    }
    for (int64_t c = 0; c < d; ++c) {
      float most = 0;
      for (int64_t h = 0; h < group_heads; ++h) {
        float magnitude = __builtin_fabsf(to_float(query[h * d + c]));
        most = magnitude > most ? magnitude : most;
      }
      weight[c] *= most;
    }
    choose_channels(weight, d, refined.count, refined.channels);
    sort_positions(refined.channels, refined.count);
  }
  for (int64_t h = 0; h < group_heads; ++h) {
    float* to = refined.query + h * pitch;
    for (int64_t i = 0; i < refined.count; ++i)
      to[i] = to_float(query[h * d + refined.channels[i]]);
    for (int64_t i = refined.count; i < pitch; ++i) to[i] = 0;
  }
}

// Scores of candidates [begin, end) of one row and KV head, by all its G query heads.
//   row: scratch [padded(count)], zeros beyond count; scores: [G, padded(C)]
template <class T>
void score_candidates(const RefineTopk& op, const Refined& refined, int64_t begin, int64_t end,
                      float* row, float* scores) {
  const int64_t stride = padded(op.candidate_count), pitch = padded(refined.count);
  const int64_t channel = op.key_cache.channel;
  const bool whole_rows = channel == 1 && refined.count == op.shape.head_size;
  constexpr int64_t kLine = 64 / sizeof(T);
  auto ask = [&](int64_t i) {
    if (i >= end) return;
    const T* key = candidate_key<T>(op, refined, i);
    if (whole_rows) {
      for (int64_t c = 0; c < refined.count; c += kLine) __builtin_prefetch(key + c);
    } else {
      for (int64_t j = 0; j < refined.count; ++j) {
        __builtin_prefetch(key + refined.channels[j] * channel);
      }
    }
  };
  for (int64_t i = begin; i < begin + kCandidatesAhead; ++i) ask(i);
  for (int64_t i = begin; i < end; ++i) {
    ask(i + kCandidatesAhead);
    const T* key = candidate_key<T>(op, refined, i);
    if (!whole_rows) {
      for (int64_t j = 0; j < refined.count; ++j) {
        row[j] = to_float(key[refined.channels[j] * channel]);
      }
    }
    for_heads(op.query_heads / op.shape.kv_heads, [&](int h, auto heads) {
      constexpr int N = decltype(heads)::value;
      float* to = scores + h * stride + i;
      if (whole_rows) {
        score_row<N>(key, refined.count, refined.query + h * pitch, to, stride);
      } else {
        score_row<N>(static_cast<const float*>(row), refined.count, refined.query + h * pitch, to,
                     stride);
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
  const int64_t channels = smaller(op.channels, d), query_size = group_heads * padded(channels);
  float* scores = take<float>(pairs * size);
  float* queries = take<float>(pairs * query_size);
  int32_t* chosen = take<int32_t>(pairs * channels);
  auto* refined = take<Refined>(pairs);
  float* rows = take<float>(pitch * num_threads());
  parallel_for(pairs, [&](int64_t pair) {
    const int64_t row = pair / kv_heads;
    const int32_t* candidates = op.candidates + pair * count;
    int64_t found = count;
    while (found > 0 && candidates[found - 1] < 0) --found;
    refined[pair] = Refined{candidates,
                            op.block_table.data + row * op.block_table.stride,
                            static_cast<int32_t>(pair % kv_heads),
                            found,
                            channels,
                            chosen + pair * channels,
                            queries + pair * query_size};
    prepare<T>(op, static_cast<const T*>(op.query) + pair * group_heads * d,
               rows + pitch * omp_get_thread_num(), refined[pair]);
  });
  Tasks tasks = cut(op.rows, op.shape.kv_heads, 32, INT32_MAX, [&](int32_t) { return count; });
  __builtin_memset(rows, 0, static_cast<size_t>(pitch * num_threads()) * sizeof(float));
  parallel_for(tasks.count, [&](int64_t i) {
    const Task& task = tasks.data[i];
    const int64_t pair = task.row * kv_heads + task.head;
    score_candidates<T>(op, refined[pair], task.begin, smaller(task.end, refined[pair].found),
                        rows + pitch * omp_get_thread_num(), scores + pair * size);
  });
  Ranked buffers = take_ranked(buffer_size(k) * num_threads());
  parallel_for(pairs, [&](int64_t pair) {
    int32_t* indices = op.indices + pair * k;
    const int32_t* candidates = op.candidates + pair * count;
    int64_t kept = 0;
    if (refined[pair].found > 0) {
      float* weights = scores + pair * size;
      sum_weights(op, weights, refined[pair].found);
      Ranked best = buffers + buffer_size(k) * omp_get_thread_num();
      kept = find_best(best, weights, 0, refined[pair].found, k);
      for (int64_t j = 0; j < kept; ++j) indices[j] = candidates[best.positions[j]];
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
