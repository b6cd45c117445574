// rerank_topk: the candidates of a rough selection weighed by their true attention.
#pragma once

#include "attention.h"
#include "channels.h"
#include "topk.h"

namespace tailorkv::TAILORKV_ISA {
namespace {

// Candidates asked for ahead of the one at work, where their channels lie side by side; into the
// second-level cache, where more requests can wait.
constexpr int64_t kCandidatesAhead = 8;
// A tile of candidates tells which channels count.
static_assert(kTile == 16, "the contract says how many");

// What one row and KV head need.
//   candidates: [C], ascending, the first `found` of them positions
//   channels: [count], ascending; query: [G, padded(count)], its values at them
struct Reranked {
  const int32_t *candidates, *table;
  int32_t head;
  int64_t found, count;
  int32_t* channels;
  float* query;
};

template <class T>
const T* candidate_key(const RerankTopk& op, const Reranked& reranked, int64_t i) {
  const int64_t position = reranked.candidates[i], block_size = op.shape.block_size;
  return at<T>(op.key_cache, reranked.table[position / block_size], reranked.head,
               position % block_size, 0);
}

// Scratch of one thread.
//   weight: [padded(d)]; ranked: [d]; keys: [C + kTile + kTogether]; tile: [d, kTile], of any dtype
//   tile_scores: [G, kTile]; offsets: [d]
struct RerankScratch {
  float* weight;
  Ranked ranked;
  const void** keys;
  float *tile, *tile_scores;
  int64_t* offsets;
};

inline RerankScratch take_rerank_scratch(const RerankTopk& op) {
  const int64_t d = padded(op.shape.head_size);
  return RerankScratch{take<float>(d),
                       take_ranked(d),
                       take<const void*>(op.candidate_count + kTile + kTogether),
                       take<float>(d * kTile),
                       take<float>(op.query_heads / op.shape.kv_heads * kTile),
                       take<int64_t>(d)};
}

// Choose the channels, take the query's values there.
//   query: [G, d]
template <class T>
void prepare(const RerankTopk& op, const T* query, const RerankScratch& scratch,
             const Reranked& reranked) {
  float* weight = scratch.weight;
  const int64_t d = op.shape.head_size, group_heads = op.query_heads / op.shape.kv_heads;
  const int64_t pitch = padded(reranked.count);
  if (reranked.count == d) {
    for (int64_t c = 0; c < d; ++c) reranked.channels[c] = static_cast<int32_t>(c);
  } else {
    const int64_t samples = smaller(kTile, reranked.found);
    auto** keys = reinterpret_cast<const T**>(scratch.keys);
    for (int64_t i = 0; i < kTile + kTogether; ++i) {
      keys[i] = candidate_key<T>(op, reranked, smaller(i, samples - 1) * reranked.found / samples);
    }
    for (int64_t c = 0; c < d; ++c) scratch.offsets[c] = c * op.key_cache.channel;
    T* tile = reinterpret_cast<T*>(scratch.tile);
    gather_tile(keys, scratch.offsets, d, tile);
    for (int64_t c = 0; c < d; ++c) {
      F low = load(tile + c * kTile), high = low;
      for (int64_t v = W; v < kTile; v += W) {
        low = min(low, load(tile + c * kTile + v));
        high = max(high, load(tile + c * kTile + v));
      }
      weight[c] = largest(high) - smallest(low);
    }
    for (int64_t c = 0; c < d; ++c) {
      float most = 0;
      for (int64_t h = 0; h < group_heads; ++h) {
        float magnitude = __builtin_fabsf(to_float(query[h * d + c]));
        most = magnitude > most ? magnitude : most;
      }
      weight[c] *= most;
    }
    choose_channels(weight, d, reranked.count, scratch.ranked, reranked.channels);
  }
  for (int64_t h = 0; h < group_heads; ++h) {
    float* to = reranked.query + h * pitch;
    for (int64_t i = 0; i < reranked.count; ++i)
      to[i] = to_float(query[h * d + reranked.channels[i]]);
    for (int64_t i = reranked.count; i < pitch; ++i) to[i] = 0;
  }
}

// Scores of candidates [begin, end), all channels of which lie side by side.
//   scores: [G, padded(C)]
template <class T>
void score_candidate_rows(const RerankTopk& op, const Reranked& reranked, int64_t begin,
                          int64_t end, float* scores) {
  const int64_t stride = padded(op.candidate_count), pitch = padded(reranked.count);
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = begin; i < end; ++i) {
    if (i + kCandidatesAhead < end) {
      const T* next = candidate_key<T>(op, reranked, i + kCandidatesAhead);
      for (int64_t c = 0; c < reranked.count; c += kLine) __builtin_prefetch(next + c, 0, 2);
    }
    const T* key = candidate_key<T>(op, reranked, i);
    for_heads(op.query_heads / op.shape.kv_heads, [&](int h, auto heads) {
      constexpr int N = decltype(heads)::value;
      score_row<N>(key, reranked.count, reranked.query + h * pitch, scores + h * stride + i,
                   stride);
    });
  }
}

// Scores of candidates [begin, end) of one row and KV head, by all its G query heads.
//   scores: [G, padded(C)]
template <class T>
void score_candidates(const RerankTopk& op, const Reranked& reranked, int64_t begin, int64_t end,
                      const RerankScratch& scratch, float* scores) {
  if (begin >= end) return;
  if (op.key_cache.channel == 1 && reranked.count == op.shape.head_size) {
    return score_candidate_rows<T>(op, reranked, begin, end, scores);
  }
  const int64_t stride = padded(op.candidate_count), n = end - begin;
  const int group_heads = op.query_heads / op.shape.kv_heads;
  auto** keys = reinterpret_cast<const T**>(scratch.keys);
  for (int64_t i = 0; i < n; ++i) keys[i] = candidate_key<T>(op, reranked, begin + i);
  for (int64_t i = 0; i < kTile + kTogether; ++i) keys[n + i] = keys[n - 1];
  for (int64_t i = 0; i < reranked.count; ++i) {
    scratch.offsets[i] = reranked.channels[i] * op.key_cache.channel;
  }
  T* tile = reinterpret_cast<T*>(scratch.tile);
  for (int64_t first = 0; first < n; first += kTile) {
    gather_tile(keys + first, scratch.offsets, reranked.count, tile);
    score_tile(tile, reranked.count, reranked.query, padded(reranked.count), group_heads,
               scratch.tile_scores);
    const int64_t count = smaller(kTile, n - first);
    for (int h = 0; h < group_heads; ++h) {
      __builtin_memcpy(scores + h * stride + begin + first, scratch.tile_scores + h * kTile,
                       static_cast<size_t>(count) * sizeof(float));
    }
  }
}

// The attention weights of n candidates, summed over the query heads.
//   scores: [G, padded(C)], overwritten; the first row receives the sums
//   mass: [G], log of what each head pays elsewhere
inline void sum_weights(const RerankTopk& op, const float* mass, float* scores, int64_t n) {
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
    const float highest = largest(max(most, splat(mass[h])));
    F total = splat(0);
    for (int64_t i = 0; i < end; i += W) {
      F x = exponential(load(row + i) - splat(highest));
      store(row + i, x);
      total = total + x;
    }
    const float elsewhere = largest(exponential(splat(mass[h] - highest)));
    const F inverse = splat(1.0f / (sum(total) + elsewhere));
    for (int64_t i = 0; i < end; i += W) {
      F x = load(row + i) * inverse;
      store(scores + i, h == 0 ? x : x + load(scores + i));
    }
  }
}

// The k candidates that weigh most.
//   scores: [G, padded(C)], overwritten; ranked: [buffer_size(k)]; indices: [k]
inline void choose_best(const RerankTopk& op, const Reranked& reranked, const float* mass,
                        float* scores, Ranked ranked, int32_t* indices) {
  int64_t kept = 0;
  if (reranked.found > 0) {
    sum_weights(op, mass, scores, reranked.found);
    Best best(ranked, op.k, nullptr);
    best.offer(scores, 0, reranked.found);
    kept = best.finish();
    for (int64_t j = 0; j < kept; ++j) {
      indices[j] = reranked.candidates[ranked.positions[j]];
    }
  }
  for (int64_t j = kept; j < op.k; ++j) indices[j] = -1;
}

template <class T>
void rerank(const RerankTopk& op) {
  const int64_t d = op.shape.head_size, kv_heads = op.shape.kv_heads;
  const int64_t pairs = op.rows * kv_heads, count = op.candidate_count, k = op.k;
  const int64_t group_heads = op.query_heads / kv_heads, size = group_heads * padded(count);
  const int64_t channels = smaller(op.channels, d), query_size = group_heads * padded(channels);
  float* scores = take<float>(pairs * size);
  float* queries = take<float>(pairs * query_size);
  int32_t* chosen = take<int32_t>(pairs * channels);
  auto* reranked = take<Reranked>(pairs);
  auto* scratches = take<RerankScratch>(num_threads());
  for (int i = 0; i < num_threads(); ++i) scratches[i] = take_rerank_scratch(op);
  parallel_for(pairs, [&](int64_t pair) {
    const int64_t row = pair / kv_heads;
    const int32_t* candidates = op.candidates + pair * count;
    int64_t found = count;
    while (found > 0 && candidates[found - 1] < 0) --found;
    reranked[pair] = Reranked{candidates,
                              op.block_table.data + row * op.block_table.stride,
                              static_cast<int32_t>(pair % kv_heads),
                              found,
                              channels,
                              chosen + pair * channels,
                              queries + pair * query_size};
    if (found > 0) {
      prepare<T>(op, static_cast<const T*>(op.query) + pair * group_heads * d,
                 scratches[omp_get_thread_num()], reranked[pair]);
    }
  });
  Tasks tasks = cut(op.rows, op.shape.kv_heads, 32, INT32_MAX, [&](int32_t) { return count; });
  parallel_for(tasks.count, [&](int64_t i) {
    const Task& task = tasks.data[i];
    const int64_t pair = task.row * kv_heads + task.head;
    score_candidates<T>(op, reranked[pair], task.begin, smaller(task.end, reranked[pair].found),
                        scratches[omp_get_thread_num()], scores + pair * size);
  });
  Ranked buffers = take_ranked(buffer_size(k) * num_threads());
  parallel_for(pairs, [&](int64_t pair) {
    choose_best(op, reranked[pair], op.mass + pair * group_heads, scores + pair * size,
                buffers + buffer_size(k) * omp_get_thread_num(), op.indices + pair * k);
  });
}

void rerank_topk(const RerankTopk& op) {
  scratch_reset();
  if (op.k == 0 || op.rows == 0 || op.shape.kv_heads == 0) return;
  visit(op.dtype, [&](auto element) { rerank<decltype(element)>(op); });
}

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
