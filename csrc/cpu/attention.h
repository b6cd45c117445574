// What both decode attentions share: softmax over stretches of a context that are merged at the end
// (as in flash decoding), and attention over exact rows of the host pages.
#pragma once

#include "common.h"

namespace tailorkv::TAILORKV_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();

// Exact tokens scored before their weights are used.
constexpr int kBatch = 256;

// Softmax so far of the G query heads of one KV head over one stretch.
//   highest, total: [G]; values: [G, padded(d)], weighted with exp(score - highest)
struct Partial {
  float *highest, *total, *values;
};

inline int64_t partial_size(int64_t group_heads, int64_t head_size) {
  return padded(2 * group_heads) + group_heads * padded(head_size);
}

inline Partial partial_at(float* memory, int64_t group_heads) {
  return Partial{memory, memory + group_heads, memory + padded(2 * group_heads)};
}

inline void clear(const Partial& partial, int64_t group_heads, int64_t head_size) {
  for (int64_t i = 0; i < group_heads; ++i) {
    partial.highest[i] = -kInfinity;
    partial.total[i] = 0;
  }
  __builtin_memset(partial.values, 0,
                   static_cast<size_t>(group_heads * padded(head_size)) * sizeof(float));
}

// Turn scores of n tokens of one head into weights, and weigh down what came before if a new
// maximum appears.
//   scores: [padded(n)]
//   values: [padded(d)]
void softmax_step(float* scores, int64_t n, float scale, float softcap, float* highest,
                  float* total, float* values, int64_t head_size) {
  const int64_t end = padded(n);
  for (int64_t i = n; i < end; ++i) scores[i] = scores[n - 1];
  F most = splat(-kInfinity);
  for (int64_t i = 0; i < end; i += W) {
    F x = load(scores + i) * splat(scale);
    if (softcap > 0) x = cap(x, softcap);
    store(scores + i, x);
    most = max(most, x);
  }
  for (int64_t i = n; i < end; ++i) scores[i] = -kInfinity;
  float now = largest(most);
  if (now > *highest) {
    float factor = __builtin_expf(*highest - now);
    *highest = now;
    *total *= factor;
    for (int64_t c = 0; c < padded(head_size); c += W) {
      store(values + c, load(values + c) * splat(factor));
    }
  }
  F weights = splat(0);
  for (int64_t i = 0; i < end; i += W) {
    F x = exponential(load(scores + i) - splat(*highest));
    store(scores + i, x);
    weights = weights + x;
  }
  *total += sum(weights);
}

// q.k of N heads with one row of K.
//   key: [d]; query: [N, padded(d)]; scores: N values, score_stride apart
template <int N, class T>
void score_row(const T* key, int64_t head_size, const float* query, float* scores,
               int64_t score_stride) {
  F total[N];
  for (int h = 0; h < N; ++h) total[h] = splat(0);
  const int64_t pitch = padded(head_size);
  int64_t c = 0;
  for (; c + W <= head_size; c += W) {
    F k = load(key + c);
    for (int h = 0; h < N; ++h) total[h] = fma(k, load(query + h * pitch + c), total[h]);
  }
  if (c < head_size) {
    F k = load(key + c, static_cast<int>(head_size - c));
    for (int h = 0; h < N; ++h) total[h] = fma(k, load(query + h * pitch + c), total[h]);
  }
  for (int h = 0; h < N; ++h) scores[h * score_stride] = sum(total[h]);
}

// q.k of N heads with n <= W consecutive tokens of a channel-major block.
//   key: [channels, n], rows channel_stride apart; the channels are
//   `channels[i]`, or all if null query: [N, pitch], one value for each channel used
template <int N, class T>
void score_columns(const T* key, int64_t channel_stride, const int32_t* channels, int64_t count,
                   const float* query, int64_t pitch, int n, F* totals) {
  for (int h = 0; h < N; ++h) totals[h] = splat(0);
  for (int64_t i = 0; i < count; ++i) {
    const T* from = key + (channels == nullptr ? i : channels[i]) * channel_stride;
    F k = n == W ? load(from) : load(from, n);
    for (int h = 0; h < N; ++h) totals[h] = fma(k, splat(query[h * pitch + i]), totals[h]);
  }
}

// Add weighted rows of V to the values of N heads.
//   rows: n pointers to [d]; weights: [N, weight_stride]; values: [N, padded(d)]
template <int N, class T>
void add_rows(const T* const* rows, int64_t n, const float* weights, int64_t weight_stride,
              int64_t head_size, float* values) {
  const int64_t pitch = padded(head_size);
  constexpr int kVectors = 2;
  constexpr int64_t kLine = 64 / sizeof(T);
  int64_t c = 0;
  // Each stretch of a row is read after the one before of all rows: time enough to fetch it.
  for (; c + kVectors * W <= head_size; c += kVectors * W) {
    F total[N][kVectors];
    for (int h = 0; h < N; ++h) {
      for (int j = 0; j < kVectors; ++j) total[h][j] = load(values + h * pitch + c + j * W);
    }
    for (int64_t t = 0; t < n; ++t) {
      F v[kVectors];
      for (int j = 0; j < kVectors; ++j) v[j] = load(rows[t] + c + j * W);
      for (int64_t line = 0; line < kVectors * W; line += kLine) {
        __builtin_prefetch(rows[t] + c + kVectors * W + line, 0, 2);
      }
      for (int h = 0; h < N; ++h) {
        F weight = splat(weights[h * weight_stride + t]);
        for (int j = 0; j < kVectors; ++j) total[h][j] = fma(v[j], weight, total[h][j]);
      }
    }
    for (int h = 0; h < N; ++h) {
      for (int j = 0; j < kVectors; ++j) store(values + h * pitch + c + j * W, total[h][j]);
    }
  }
  for (; c < head_size; c += W) {
    const int count = static_cast<int>(smaller(W, head_size - c));
    F total[N];
    for (int h = 0; h < N; ++h) total[h] = load(values + h * pitch + c);
    for (int64_t t = 0; t < n; ++t) {
      F v = load(rows[t] + c, count);
      for (int h = 0; h < N; ++h) {
        total[h] = fma(v, splat(weights[h * weight_stride + t]), total[h]);
      }
    }
    for (int h = 0; h < N; ++h) store(values + h * pitch + c, total[h]);
  }
}

// One KV head of one row of a decode step: what a task reads.
//   query: [G, padded(d)] in float32
//   table: the row's blocks
struct HeadView {
  const Decode* op;
  const float* query;
  const int32_t* table;
  int32_t head, group_heads;
};

// Scratch of one thread for exact tokens.
//   scores: [G, kBatch]; positions: [kBatch]; rows: [kBatch]
//   places: [kBatch]; keys: [kBatch + kTile + kTogether], for tokens gathered one by one; tile: [d,
//   kTile], of any dtype; tile_scores: [G, kTile]; offsets: [d], of K's channels
//   gathered: [kBatch, padded(d)], null where V rows are contiguous
struct ExactScratch {
  float* scores;
  int32_t* positions;
  const void** rows;
  int32_t* places;
  const void** keys;
  float *tile, *tile_scores;
  int64_t* offsets;
  float* gathered;
};

// Tokens of a tile, and those among them gathered side by side.
constexpr int64_t kTile = 16, kTogether = 4;

inline ExactScratch take_exact_scratch(const Decode& op) {
  const int64_t d = padded(op.shape.head_size);
  const int64_t group_heads = op.query_heads / op.shape.kv_heads;
  int64_t* offsets = take<int64_t>(d);
  for (int64_t c = 0; c < d; ++c) offsets[c] = c * op.key_cache.channel;
  return ExactScratch{take<float>(group_heads * kBatch),
                      take<int32_t>(kBatch),
                      take<const void*>(kBatch),
                      take<int32_t>(kBatch),
                      take<const void*>(kBatch + kTile + kTogether),
                      take<float>(d * kTile),
                      take<float>(group_heads * kTile),
                      offsets,
                      op.value_cache.channel == 1 ? nullptr : take<float>(kBatch * d)};
}

template <class T>
const T* key_at(const HeadView& view, int64_t position) {
  const int64_t block_size = view.op->shape.block_size;
  return at<T>(view.op->key_cache, view.table[position / block_size], view.head,
               position % block_size, 0);
}

template <class T>
const T* value_at(const HeadView& view, int64_t position) {
  const int64_t block_size = view.op->shape.block_size;
  return at<T>(view.op->value_cache, view.table[position / block_size], view.head,
               position % block_size, 0);
}

template <class T>
void gather_row(float* to, const T* from, int64_t stride, int64_t n) {
  for (int64_t c = 0; c < n; ++c) to[c] = to_float(from[c * stride]);
  for (int64_t c = n; c < padded(n); ++c) to[c] = 0;
}

// Ask for the first cache line of a token's V into the second-level cache; `add_rows` asks for the
// others.
template <class T>
void prefetch_value(const HeadView& view, int64_t position) {
  __builtin_prefetch(value_at<T>(view, position), 0, 2);
}

// Gather a tile of tokens whose channels lie apart, and ask for the tokens that follow: every
// element is a cache line of its own.
//   keys: [kTile + kTogether], the next tile's first ones behind; offsets: [count], of the
//   channels; tile: [count, kTile]
template <class T>
void gather_tile(const T* const* keys, const int64_t* offsets, int64_t count, T* tile) {
  static_assert(kTogether == 4 && kTile % kTogether == 0);
  for (int64_t i = 0; i < kTile; i += kTogether) {
    const T *a = keys[i], *b = keys[i + 1], *c = keys[i + 2], *d = keys[i + 3];
    const T* const* next = keys + i + kTogether;
    const T *next_a = next[0], *next_b = next[1], *next_c = next[2], *next_d = next[3];
    for (int64_t j = 0; j < count; ++j) {
      const int64_t offset = offsets[j];
      __builtin_prefetch(next_a + offset);
      __builtin_prefetch(next_b + offset);
      __builtin_prefetch(next_c + offset);
      __builtin_prefetch(next_d + offset);
      T* to = tile + j * kTile + i;
      to[0] = a[offset];
      to[1] = b[offset];
      to[2] = c[offset];
      to[3] = d[offset];
    }
  }
}

// q.k of the tokens of a tile with G heads.
//   tile: [count, kTile]; query: [G, pitch]; scores: [G, kTile]
template <class T>
void score_tile(const T* tile, int64_t count, const float* query, int64_t pitch, int group_heads,
                float* scores) {
  for_heads(group_heads, [&](int h, auto heads) {
    constexpr int N = decltype(heads)::value;
    for (int64_t v = 0; v < kTile; v += W) {
      F totals[N];
      score_columns<N>(tile + v, kTile, nullptr, count, query + h * pitch, pitch, W, totals);
      for (int j = 0; j < N; ++j) store(scores + (h + j) * kTile + v, totals[j]);
    }
  });
}

// Scores of n positions where the channels of a token lie side by side.
template <class T>
void score_rows(const HeadView& view, const ExactScratch& scratch, int64_t n) {
  const int64_t d = view.op->shape.head_size, pitch = padded(d);
  constexpr int64_t kAhead = 2, kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < n; ++i) {
    if (i + kAhead < n) {
      const T* next = key_at<T>(view, scratch.positions[i + kAhead]);
      for (int64_t c = 0; c < d; c += kLine) __builtin_prefetch(next + c);
    }
    prefetch_value<T>(view, scratch.positions[i]);
    const T* key = key_at<T>(view, scratch.positions[i]);
    for_heads(view.group_heads, [&](int h, auto heads) {
      constexpr int N = decltype(heads)::value;
      score_row<N>(key, d, view.query + h * pitch, scratch.scores + h * kBatch + i, kBatch);
    });
  }
}

// Scores of n positions in ascending order.
template <class T>
void score_exact(const HeadView& view, const ExactScratch& scratch, int64_t n) {
  const Decode& op = *view.op;
  const Cache& cache = op.key_cache;
  if (cache.channel == 1) return score_rows<T>(view, scratch, n);
  const int32_t* positions = scratch.positions;
  const int64_t d = op.shape.head_size, block_size = op.shape.block_size, pitch = padded(d);
  // Shorter runs are gathered token by token.
  constexpr int64_t kRun = 4;
  auto** keys = reinterpret_cast<const T**>(scratch.keys);
  int64_t single = 0;
  for (int64_t i = 0, run = 1; i < n; i += run) {
    for (run = 1; i + run < n && run < W; ++run) {
      const int32_t next = positions[i + run];
      if (next != positions[i + run - 1] + 1 || next % block_size == 0) break;
    }
    for (int64_t j = i; j < i + run; ++j) prefetch_value<T>(view, positions[j]);
    const T* key = key_at<T>(view, positions[i]);
    if (cache.token != 1 || run < kRun) {
      for (int64_t j = 0; j < run; ++j, ++single) {
        keys[single] = key + j * cache.token;
        scratch.places[single] = static_cast<int32_t>(i + j);
      }
      continue;
    }
    for_heads(view.group_heads, [&](int h, auto heads) {
      constexpr int N = decltype(heads)::value;
      F totals[N];
      score_columns<N>(key, cache.channel, nullptr, d, view.query + h * pitch, pitch,
                       static_cast<int>(run), totals);
      for (int j = 0; j < N; ++j) {
        store(scratch.scores + (h + j) * kBatch + i, totals[j], static_cast<int>(run));
      }
    });
  }
  if (single == 0) return;
  for (int64_t i = 0; i < kTile + kTogether; ++i) keys[single + i] = keys[single - 1];
  T* tile = reinterpret_cast<T*>(scratch.tile);
  for (int64_t first = 0; first < single; first += kTile) {
    gather_tile(keys + first, scratch.offsets, d, tile);
    score_tile(tile, d, view.query, pitch, view.group_heads, scratch.tile_scores);
    const int64_t count = smaller(kTile, single - first);
    for (int h = 0; h < view.group_heads; ++h) {
      for (int64_t i = 0; i < count; ++i) {
        scratch.scores[h * kBatch + scratch.places[first + i]] = scratch.tile_scores[h * kTile + i];
      }
    }
  }
}

// Attend to the first n of scratch.positions, n <= kBatch.
template <class T>
void attend_exact(const HeadView& view, const ExactScratch& scratch, int64_t n,
                  const Partial& partial) {
  if (n == 0) return;
  const Decode& op = *view.op;
  const int64_t d = op.shape.head_size, pitch = padded(d);
  score_exact<T>(view, scratch, n);
  for (int h = 0; h < view.group_heads; ++h) {
    softmax_step(scratch.scores + h * kBatch, n, op.scale, op.softcap, partial.highest + h,
                 partial.total + h, partial.values + h * pitch, d);
  }
  for (int64_t i = 0; i < n; ++i) {
    const T* value = value_at<T>(view, scratch.positions[i]);
    scratch.rows[i] = value;
    if (scratch.gathered != nullptr) {
      gather_row(scratch.gathered + i * pitch, value, op.value_cache.channel, d);
      scratch.rows[i] = scratch.gathered + i * pitch;
    }
  }
  for_heads(view.group_heads, [&](int h, auto heads) {
    constexpr int N = decltype(heads)::value;
    const float* weights = scratch.scores + h * kBatch;
    float* values = partial.values + h * pitch;
    if (scratch.gathered != nullptr) {
      add_rows<N>(reinterpret_cast<const float* const*>(scratch.rows), n, weights, kBatch, d,
                  values);
    } else {
      add_rows<N>(reinterpret_cast<const T* const*>(scratch.rows), n, weights, kBatch, d, values);
    }
  });
}

// The queries as float32 rows of whole vectors: [R, H, padded(d)].
template <class T>
float* take_queries(const Decode& op) {
  const int64_t count = static_cast<int64_t>(op.rows) * op.query_heads, d = op.shape.head_size;
  float* queries = take<float>(count * padded(d));
  for (int64_t i = 0; i < count; ++i) {
    copy_row(queries + i * padded(d), static_cast<const T*>(op.query) + i * d, d);
  }
  return queries;
}

inline HeadView head_view(const Decode& op, const float* queries, const Task& task) {
  const int32_t group_heads = op.query_heads / op.shape.kv_heads;
  const int64_t first_head = static_cast<int64_t>(task.row) * op.query_heads +
                             static_cast<int64_t>(task.head) * group_heads;
  return HeadView{&op, queries + first_head * padded(op.shape.head_size),
                  op.block_table.data + task.row * op.block_table.stride, task.head, group_heads};
}

// Merge the partial results of one row and KV head, and the sink logit of each head, into the
// output. Without tokens that is zeros.
//   partials: [parts, partial_size]
template <class T>
void merge_parts(const Decode& op, int64_t pair, float* partials, int64_t parts) {
  const int64_t d = op.shape.head_size, pitch = padded(d);
  const int64_t group_heads = op.query_heads / op.shape.kv_heads;
  const int64_t size = partial_size(group_heads, d);
  const float* sinks =
      op.sink_logits == nullptr ? nullptr : op.sink_logits + pair * group_heads % op.query_heads;
  for (int64_t h = 0; h < group_heads; ++h) {
    T* output = static_cast<T*>(op.output) + (pair * group_heads + h) * d;
    float highest = -kInfinity, total = 0;
    for (int64_t i = 0; i < parts; ++i) {
      Partial partial = partial_at(partials + i * size, group_heads);
      if (partial.highest[h] > highest) highest = partial.highest[h];
    }
    float* values = partial_at(partials, group_heads).values + h * pitch;
    for (int64_t i = 0; i < parts; ++i) {
      Partial partial = partial_at(partials + i * size, group_heads);
      // A stretch may hold no token: its places for selected ones can all be empty.
      float factor = partial.total[h] > 0 ? __builtin_expf(partial.highest[h] - highest) : 0;
      total += factor * partial.total[h];
      const float* from = partial.values + h * pitch;
      F keep = splat(i == 0 ? 0.0f : 1.0f);
      for (int64_t c = 0; c < pitch; c += W) {
        store(values + c, fma(load(from + c), splat(factor), load(values + c) * keep));
      }
    }
    // Beside a sink that outweighs all tokens, infinitely in floats, they are 0.
    if (sinks != nullptr && total > 0) total += __builtin_expf(sinks[h] - highest);
    for (int64_t c = 0; c < d; ++c) {
      from_float(output + c, total > 0 ? values[c] / total : 0.0f);
    }
  }
}

// The same for every row and KV head.
//   partials: [tasks.count, partial_size]
template <class T>
void merge(const Decode& op, const Tasks& tasks, float* partials) {
  const int64_t heads = op.shape.kv_heads, pairs = op.rows * heads;
  const int64_t size = partial_size(op.query_heads / heads, op.shape.head_size);
  int64_t* starts = take<int64_t>(pairs + 1);
  for (int64_t pair = 0, task = 0; pair <= pairs; ++pair) {
    while (task < tasks.count && tasks.data[task].row * heads + tasks.data[task].head < pair) {
      ++task;
    }
    starts[pair] = task;
  }
  parallel_for(pairs, [&](int64_t pair) {
    merge_parts<T>(op, pair, partials + starts[pair] * size, starts[pair + 1] - starts[pair]);
  });
}

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
