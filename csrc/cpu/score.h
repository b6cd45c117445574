// score_tokens, with either index. Scores go, a few tokens at a time, to a `Taker`, which has
//   prepare(tasks, heads)   before all tasks; a task scores that many heads
//   open(i), close(i)       around task i, on its thread
//   give(i, task, head, position, scores, n)   n scores of tokens from `position` on, ascending
#pragma once

#include "ahead.h"
#include "attention.h"
#include "channels.h"
#include "codes.h"
#if TAILORKV_TABLES == 512
#include "byte_lut.h"
#elif TAILORKV_TABLES == 256
#include "byte_lut_256.h"
#endif

namespace tailorkv::TAILORKV_ISA {
namespace {

// Keeps all of them.
struct ToScores {
  const ScoreTokens& op;
  void prepare(const Tasks&, int64_t) {}
  void open(int64_t) {}
  void close(int64_t) {}
  void give(int64_t, const Task& task, int64_t head, int64_t position, const float* scores,
            int64_t n) {
    float* to = op.scores + task.row * op.scores_row + head * op.scores_head + position;
    __builtin_memcpy(to, scores, static_cast<size_t>(n) * 4);
  }
};

// Units of `size` tokens that a row's middle overlaps, from unit `sink_tokens / size` on.
inline int64_t middle_units(const ScoreTokens& op, int32_t row, int64_t size) {
  const int64_t tail = op.tail_start[row];
  return tail > op.sink_tokens ? ceil_div(tail, size) - op.sink_tokens / size : 0;
}

//   query: [R, Hk, Q, d] to [R, Hk, Q, padded(d)]
inline float* take_score_queries(const ScoreTokens& op) {
  const int64_t d = op.shape.head_size;
  const int64_t count = static_cast<int64_t>(op.rows) * op.shape.kv_heads * op.queries;
  float* queries = take<float>(count * padded(d));
  for (int64_t i = 0; i < count; ++i) copy_row(queries + i * padded(d), op.query + i * d, d);
  return queries;
}

// Scratch of one thread for groups of the onebit index.
//   scale, zero: [padded(d)]; bytes: [g / 64, index_bytes(d)]; scores: [4, g]; best: [g]
struct ScoreScratch {
  float *scale, *zero;
  uint8_t* bytes;
  float *scores, *best;
  ProductScratch product;
};

inline ScoreScratch take_score_scratch(int64_t d, int64_t g) {
  return ScoreScratch{
      take<float>(padded(d)), take<float>(padded(d)), take<uint8_t>(padded(d) * g / 4),
      take<float>(4 * g),     take<float>(g),         take_product_scratch(d, g)};
}

// Add what is to be added to the scores of a query, keep the largest of each token.
//   scores, best: [count]; first: whether nothing was kept yet
inline void keep_best(const float* scores, float extra, bool first, int64_t count, float* best) {
  for (int64_t t = 0; t < count; t += W) {
    F x = load(scores + t) + splat(extra);
    store(best + t, first ? x : max(x, load(best + t)));
  }
}

#if TAILORKV_TABLES
// Scores of P * 64 tokens of a group for queries q .. q + N - 1, from codes transposed.
template <int N, int P>
void score_places(int64_t d, const float* query, const float* extra, int64_t q,
                  const ScoreScratch& scratch, Ahead& ahead, float* best) {
  float offset[N];
  F offsets[N];
  for (int h = 0; h < N; ++h) {
    offsets[h] = splat(0);
    for (int64_t c = 0; c < padded(d); c += W) {
      F x = load(query + (q + h) * padded(d) + c);
      store(scratch.product.scaled + h * padded(d) + c, x * load(scratch.scale + c));
      offsets[h] = fma(x, load(scratch.zero + c), offsets[h]);
    }
  }
  sums(offsets, offset);
  score_by_bytes<N, P>(scratch.bytes, d, scratch.product.scaled, offset, scratch.product.tables,
                       ahead, scratch.scores);
  for (int h = 0; h < N; ++h) {
    keep_best(scratch.scores + h * P * kPlaces, extra[q + h], q + h == 0, P * kPlaces, best);
  }
}

// The same for all queries.
template <int P>
void score_places(const uint8_t* codes, int64_t pitch, int64_t d, int32_t queries,
                  const float* query, const float* extra, const ScoreScratch& scratch, Ahead& ahead,
                  float* best) {
  for (int p = 0; p < P; ++p) {
    transpose_all(codes + p * kPlaces / 8, pitch, d, scratch.bytes + p * index_bytes(d));
  }
  int64_t q = 0;
  for (; q + 2 <= queries; q += 2) {
    score_places<2, P>(d, query, extra, q, scratch, ahead, best);
  }
  if (q < queries) score_places<1, P>(d, query, extra, q, scratch, ahead, best);
}
#endif

// Scores of a group for all queries, the largest of each token.
//   codes: [d, g/8], rows pitch apart; query: [Q, padded(d)]; extra: [Q], added; best: [g]
//   ahead: asked for its lines between look-ups, or first where there are no tables
inline void score_group(const uint8_t* codes, int64_t pitch, int64_t d, int64_t g, int32_t queries,
                        const float* query, const float* extra, const ScoreScratch& scratch,
                        Ahead& ahead, float* best) {
#if TAILORKV_TABLES
  if (g % kPlaces == 0) {
    int64_t t = 0;
    for (; t + 2 * kPlaces <= g; t += 2 * kPlaces) {
      score_places<2>(codes + t / 8, pitch, d, queries, query, extra, scratch, ahead, best + t);
    }
    if (t < g) {
      score_places<1>(codes + t / 8, pitch, d, queries, query, extra, scratch, ahead, best + t);
    }
    return;
  }
#endif
  ahead.ask_part(1);
  for_heads(queries, [&](int q, auto heads) {
    constexpr int N = decltype(heads)::value;
    score_codes<1, N, false>(codes, pitch, d, g, scratch.scale, scratch.zero, query + q * padded(d),
                             scratch.product, ahead, scratch.scores, g);
    for (int j = 0; j < N; ++j)
      keep_best(scratch.scores + j * g, extra[q + j], q + j == 0, g, best);
  });
}

// Groups, of one head, between the one at work and the one asked for: two, since the lines of the
// next one would come too late.
constexpr int64_t kGroupsAhead = 2;

// Scores of the groups of one task, given a group at a time to `give(position, scores, n)`.
//   query: [Q, padded(d)]; extra: [Q], added
template <class Give>
void score_groups(const ScoreOnebit& op, const Task& task, const float* query, const float* extra,
                  const ScoreScratch& scratch, Give give) {
  const ScoreTokens& score = op.score;
  const int64_t d = score.shape.head_size, g = score.grouping.group_size;
  const int64_t per_block = score.grouping.groups_per_block;
  const int64_t first_unit = score.sink_tokens / g;
  const int32_t* table = table_of(score, task.row);
  for (int64_t unit = task.begin + first_unit; unit < task.end + first_unit; ++unit) {
    const int64_t block = table[unit / per_block], group = unit % per_block;
    read_key_scales(op.key, block, task.head, group, d, scratch.scale, scratch.zero);
    Ahead ahead;
    if (const int64_t next = unit + kGroupsAhead; next < task.end + first_unit) {
      add_key_lines(op.key, table[next / per_block], task.head, next % per_block, d, ahead);
    }
    score_group(at(op.key.codes, block, task.head, group), op.key.codes.item, d, g, score.queries,
                query, extra, scratch, ahead, scratch.best);
    const int64_t begin = larger(unit * g, score.sink_tokens);
    const int64_t end = smaller((unit + 1) * g, score.tail_start[task.row]);
    give(begin, scratch.best + begin - unit * g, end - begin);
  }
}

template <class Taker>
void score_onebit(const ScoreOnebit& op, Taker& taker) {
  const ScoreTokens& score = op.score;
  const int64_t d = score.shape.head_size, g = score.grouping.group_size;
  Tasks tasks = cut(score.rows, score.shape.kv_heads, 8, INT32_MAX,
                    [&](int32_t row) { return middle_units(score, row, g); });
  taker.prepare(tasks, 1);
  const float* queries = take_score_queries(score);
  const int threads = num_threads();
  auto* scratches = take<ScoreScratch>(threads);
  for (int i = 0; i < threads; ++i) scratches[i] = take_score_scratch(d, g);
  parallel_for(tasks.count, [&](int64_t i) {
    const Task& task = tasks.data[i];
    const int64_t pair = static_cast<int64_t>(task.row) * score.shape.kv_heads + task.head;
    taker.open(i);
    score_groups(op, task, queries + pair * score.queries * padded(d),
                 score.offset + pair * score.queries, scratches[omp_get_thread_num()],
                 [&](int64_t position, const float* scores, int64_t n) {
                   taker.give(i, task, task.head, position, scores, n);
                 });
    taker.close(i);
  });
}

// Blocks, of one head each, between the one at work and the one asked for.
constexpr int64_t kKeysAhead = 4;

// K of one head of a block, and the channels that matter to it.
template <class T>
struct CriticalKey {
  const T* data;
  const int32_t* channels;
};

// Scores of tokens [begin, end) of one block.
//   next: a block, of any head, that will be read soon
//   query: [Q, count], the values of the critical channels; extra: [Q], added
//   scores: [end - begin]
template <class T>
void score_block(const ScoreChannels& op, CriticalKey<T> block, CriticalKey<T> next, int64_t count,
                 const float* query, const float* extra, int64_t begin, int64_t end,
                 float* scores) {
  const Cache& cache = op.key_cache;
  const T* key = block.data;
  const int32_t* channels = block.channels;
  const int32_t queries = op.score.queries;
  constexpr int64_t kLine = 64 / sizeof(T);
  if (cache.token == 1) {
    for_heads(queries, [&](int q, auto heads) {
      constexpr int N = decltype(heads)::value;
      constexpr int V = 4 / N;
      auto keep_best = [&](int64_t t, F most, int n) {
        float* to = scores + t - begin;
        if (n == W) return store(to, q > 0 ? max(most, load(to)) : most);
        store(to, q > 0 ? max(most, load(to, n)) : most, n);
      };
      int64_t t = begin;
      for (; t + V * W <= end; t += V * W) {
        F totals[N][V];
        for (int h = 0; h < N; ++h) {
          for (int j = 0; j < V; ++j) totals[h][j] = splat(extra[q + h]);
        }
        for (int64_t i = 0; i < count; ++i) {
          const T* from = key + channels[i] * cache.channel + t;
          if (q == 0) {
            // The same stretch, a few lines at a time: the runs are too short, and lie too far
            // apart, for the processor to foresee them. Into the second-level cache: more
            // requests can wait there.
            const T* ahead = next.data + next.channels[i] * cache.channel + t;
            for (int64_t line = 0; line < V * W; line += kLine) {
              __builtin_prefetch(ahead + line, 0, 2);
            }
          }
          for (int h = 0; h < N; ++h) {
            F x = splat(query[(q + h) * count + i]);
            for (int j = 0; j < V; ++j) totals[h][j] = fma(load(from + j * W), x, totals[h][j]);
          }
        }
        for (int j = 0; j < V; ++j) {
          F most = totals[0][j];
          for (int h = 1; h < N; ++h) most = max(most, totals[h][j]);
          keep_best(t + j * W, most, W);
        }
      }
      for (; t < end; t += W) {
        const int n = static_cast<int>(smaller(W, end - t));
        F totals[N];
        score_columns<N>(key + t, cache.channel, channels, count, query + q * count, count, n,
                         totals);
        F most = totals[0] + splat(extra[q]);
        for (int h = 1; h < N; ++h) most = max(most, totals[h] + splat(extra[q + h]));
        keep_best(t, most, n);
      }
    });
    return;
  }
  for (int64_t t = begin; t < end; ++t) {
    float most = -kInfinity;
    for (int32_t q = 0; q < queries; ++q) {
      float total = extra[q];
      for (int64_t i = 0; i < count; ++i) {
        total +=
            to_float(key[t * cache.token + channels[i] * cache.channel]) * query[q * count + i];
      }
      most = total > most ? total : most;
    }
    scores[t - begin] = most;
  }
}

template <class T, class Taker>
void score_critical(const ScoreChannels& op, Taker& taker) {
  const ScoreTokens& score = op.score;
  const int64_t d = score.shape.head_size, bs = score.shape.block_size;
  const int64_t heads = score.shape.kv_heads, pairs = score.rows * heads;
  const int64_t count = smaller(op.critical_channels, d);
  int32_t* channels = take<int32_t>(pairs * count);
  find_channels<T>(op, count, channels);
  const int64_t pair_size = score.queries * count;
  float* queries = take<float>(pairs * pair_size);
  for (int64_t i = 0; i < pairs * score.queries; ++i) {
    const int32_t* chosen = channels + i / score.queries * count;
    for (int64_t j = 0; j < count; ++j) queries[i * count + j] = score.query[i * d + chosen[j]];
  }
  float* scores = take<float>(num_threads() * padded(bs));
  // A block's heads lie side by side, so a task takes them all, block by block.
  const int64_t first_block = score.sink_tokens / bs;
  Tasks tasks = cut(score.rows, 1, ceil_div(4, heads), INT32_MAX,
                    [&](int32_t row) { return middle_units(score, row, bs); });
  taker.prepare(tasks, heads);
  parallel_for(tasks.count, [&](int64_t i) {
    const Task& task = tasks.data[i];
    const int32_t* table = table_of(score, task.row) + first_block;
    const int64_t end_unit = task.end * heads;
    auto key_of = [&](int64_t unit) {
      return CriticalKey<T>{at<T>(op.key_cache, table[unit / heads], unit % heads, 0, 0),
                            channels + (task.row * heads + unit % heads) * count};
    };
    float* best = scores + omp_get_thread_num() * padded(bs);
    taker.open(i);
    for (int64_t unit = task.begin * heads; unit < end_unit; ++unit) {
      const int64_t head = unit % heads, first_token = (first_block + unit / heads) * bs;
      const int64_t begin = larger(first_token, score.sink_tokens);
      const int64_t end = smaller(first_token + bs, score.tail_start[task.row]);
      score_block<T>(op, key_of(unit), key_of(smaller(unit + kKeysAhead, end_unit - 1)), count,
                     queries + (task.row * heads + head) * pair_size,
                     score.offset + (task.row * heads + head) * score.queries, begin - first_token,
                     end - first_token, best);
      taker.give(i, task, head, begin, best, end - begin);
    }
    taker.close(i);
  });
}

template <class Taker>
void score_channels(const ScoreChannels& op, Taker& taker) {
  visit(op.dtype, [&](auto element) { score_critical<decltype(element)>(op, taker); });
}

void score_onebit(const ScoreOnebit& op) {
  scratch_reset();
  ToScores taker{op.score};
  score_onebit(op, taker);
}

void score_channels(const ScoreChannels& op) {
  scratch_reset();
  ToScores taker{op.score};
  score_channels(op, taker);
}

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
