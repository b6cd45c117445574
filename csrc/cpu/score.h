// score_tokens, with either index.
#pragma once

namespace tailorkv::TAILORKV_ISA {
namespace {

inline const int32_t* table_of(const ScoreTokens& op, int64_t row) {
  return op.block_table.data + row * op.block_table.stride;
}

inline float* scores_of(const ScoreTokens& op, int64_t row, int64_t head) {
  return op.scores + row * op.scores_row + head * op.scores_head;
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
//   scale, zero: [padded(d)]; scores: [4, g]; best: [g]
struct ScoreScratch {
  float *scale, *zero, *scores, *best;
  ProductScratch product;
};

inline ScoreScratch take_score_scratch(int64_t d, int64_t g) {
  return ScoreScratch{take<float>(padded(d)), take<float>(padded(d)), take<float>(4 * g),
                      take<float>(g), take_product_scratch(d, g)};
}

// Scores of a group for all queries, the largest of each token.
//   codes: [d, g/8], rows pitch apart; query: [Q, padded(d)]; best: [g]
inline void score_group(const uint8_t* codes, int64_t pitch, int64_t d, int64_t g, int32_t queries,
                        const float* query, const ScoreScratch& scratch, float* best) {
  auto keep_best = [&](const float* scores, int64_t begin, int64_t count, bool first_query) {
    for (int64_t t = 0; t < count; t += W) {
      F x = load(scores + t);
      store(best + begin + t, first_query ? x : max(x, load(best + begin + t)));
    }
  };
#if TAILORKV_TABLES
  if (g % kPlaces == 0) {
    for (int64_t t = 0; t < g; t += kPlaces) {
      transpose_all(codes + t / 8, pitch, d, scratch.product.bytes);
      for (int32_t q = 0; q < queries; ++q) {
        F offset = splat(0);
        for (int64_t c = 0; c < padded(d); c += W) {
          F x = load(query + q * padded(d) + c);
          store(scratch.product.scaled + c, x * load(scratch.scale + c));
          offset = fma(x, load(scratch.zero + c), offset);
        }
        score_by_bytes(scratch.product.bytes, d, scratch.product.scaled, sum(offset),
                       scratch.scores);
        keep_best(scratch.scores, t, kPlaces, q == 0);
      }
    }
    return;
  }
#endif
  for_heads(queries, [&](int q, auto heads) {
    constexpr int N = decltype(heads)::value;
    score_codes<1, N>(codes, pitch, d, g, scratch.scale, scratch.zero, query + q * padded(d),
                      scratch.product, scratch.scores, g);
    for (int j = 0; j < N; ++j) keep_best(scratch.scores + j * g, 0, g, q + j == 0);
  });
}

void score_onebit(const ScoreOnebit& op) {
  scratch_reset();
  const ScoreTokens& score = op.score;
  const int64_t d = score.shape.head_size, g = score.grouping.group_size;
  const int64_t per_block = score.grouping.groups_per_block;
  const int64_t first_unit = score.sink_tokens / g;
  Tasks tasks = cut(score.rows, score.shape.kv_heads, 8, INT32_MAX, [&](int32_t row) {
    return larger(0, ceil_div(score.tail_start[row], g) - first_unit);
  });
  const float* queries = take_score_queries(score);
  const int threads = num_threads();
  auto* scratches = take<ScoreScratch>(threads);
  for (int i = 0; i < threads; ++i) scratches[i] = take_score_scratch(d, g);
  parallel_for(tasks.count, [&](int64_t i) {
    const Task& task = tasks.data[i];
    const ScoreScratch& scratch = scratches[omp_get_thread_num()];
    const int64_t pair = static_cast<int64_t>(task.row) * score.shape.kv_heads + task.head;
    const float* query = queries + pair * score.queries * padded(d);
    float* out = scores_of(score, task.row, task.head);
    for (int64_t unit = task.begin + first_unit; unit < task.end + first_unit; ++unit) {
      const int64_t block = table_of(score, task.row)[unit / per_block];
      const int64_t group = unit % per_block;
      read_key_scales(op.key, block, task.head, group, d, scratch.scale, scratch.zero);
      if (unit + 2 < task.end + first_unit) {
        prefetch_record(op.key, table_of(score, task.row)[(unit + 2) / per_block], task.head,
                        (unit + 2) % per_block, d);
      }
      const int64_t begin = larger(unit * g, score.sink_tokens);
      const int64_t end = smaller((unit + 1) * g, score.tail_start[task.row]);
      const bool whole = end - begin == g;
      score_group(at(op.key.codes, block, task.head, group), op.key.codes.item, d, g, score.queries,
                  query, scratch, whole ? out + begin : scratch.best);
      if (whole) continue;
      for (int64_t t = begin; t < end; ++t) out[t] = scratch.best[t - unit * g];
    }
  });
}

// The channels with the largest weights, the lower one first among equals.
//   weight: [d], reduced to -1 where chosen; channels: [count]
inline void choose_channels(float* weight, int64_t d, int64_t count, int32_t* channels) {
  for (int64_t i = 0; i < count; ++i) {
    int64_t best = 0;
    for (int64_t c = 1; c < d; ++c) {
      if (weight[c] > weight[best]) best = c;
    }
    channels[i] = static_cast<int32_t>(best);
    weight[best] = -1;
  }
}

// Blocks whose channels are asked for ahead of the one at work.
constexpr int64_t kBlocksAhead = 4;

// Scores of tokens [begin, end) of one block.
//   query: [Q, count], the values of the critical channels; scores: [end - begin]
template <class T>
void score_block(const ScoreChannels& op, const T* key, const int32_t* channels, int64_t count,
                 const float* query, int64_t begin, int64_t end, float* scores) {
  const Cache& cache = op.key_cache;
  const int32_t queries = op.score.queries;
  if (cache.token == 1) {
    for (int64_t t = begin; t < end; t += W) {
      const int n = static_cast<int>(smaller(W, end - t));
      for_heads(queries, [&](int q, auto heads) {
        constexpr int N = decltype(heads)::value;
        F totals[N];
        score_columns<N>(key + t, cache.channel, channels, count, query + q * count, count, n,
                         totals);
        F most = totals[0];
        for (int j = 1; j < N; ++j) most = max(most, totals[j]);
        if (q > 0) most = max(most, load(scores + t - begin, n));
        store(scores + t - begin, most, n);
      });
    }
    return;
  }
  for (int64_t t = begin; t < end; ++t) {
    float most = -kInfinity;
    for (int32_t q = 0; q < queries; ++q) {
      float total = 0;
      for (int64_t i = 0; i < count; ++i) {
        total +=
            to_float(key[t * cache.token + channels[i] * cache.channel]) * query[q * count + i];
      }
      most = total > most ? total : most;
    }
    scores[t - begin] = most;
  }
}

// Pick the critical channels of every row and KV head.
//   channels: [R, Hk, count]
template <class T>
void find_channels(const ScoreChannels& op, int64_t count, int32_t* channels) {
  const ScoreTokens& score = op.score;
  const int64_t d = score.shape.head_size, g = score.grouping.group_size, pitch = padded(d);
  const int64_t per_block = score.grouping.groups_per_block, heads = score.shape.kv_heads;
  Tasks tasks = cut(score.rows, score.shape.kv_heads, 64, INT32_MAX,
                    [&](int32_t row) { return larger(0, ceil_div(score.tail_start[row], g)); });
  float* partial = take<float>(tasks.count * pitch);
  parallel_for(tasks.count, [&](int64_t i) {
    const Task& task = tasks.data[i];
    float* most = partial + i * pitch;
    __builtin_memset(most, 0, static_cast<size_t>(pitch) * sizeof(float));
    for (int64_t unit = task.begin; unit < task.end; ++unit) {
      const T* absmax = at<T>(op.absmax, table_of(score, task.row)[unit / per_block], task.head,
                              unit % per_block);
      for (int64_t c = 0; c < d; c += W) {
        F x = c + W <= d ? load(absmax + c) : load(absmax + c, static_cast<int>(d - c));
        store(most + c, max(load(most + c), x));
      }
    }
  });
  float* weight = take<float>(pitch);
  for (int64_t i = 0; i < tasks.count;) {
    const Task& task = tasks.data[i];
    const int64_t pair = task.row * heads + task.head;
    const float* query = score.query + pair * score.queries * d;
    __builtin_memset(weight, 0, static_cast<size_t>(pitch) * sizeof(float));
    for (; i < tasks.count && tasks.data[i].row == task.row && tasks.data[i].head == task.head;
         ++i) {
      for (int64_t c = 0; c < pitch; c += W) {
        store(weight + c, max(load(weight + c), load(partial + i * pitch + c)));
      }
    }
    for (int64_t c = 0; c < d; ++c) {
      float most = 0;
      for (int32_t q = 0; q < score.queries; ++q) {
        float magnitude = __builtin_fabsf(query[q * d + c]);
        most = magnitude > most ? magnitude : most;
      }
      weight[c] *= most;
    }
    choose_channels(weight, d, count, channels + pair * count);
  }
}

// Ask for the critical channels of one block: the runs are too short, and lie too far apart, for
// the processor to foresee them. Into the second-level cache: more requests can wait there.
template <class T>
void prefetch_channels(const ScoreChannels& op, const T* key, const int32_t* channels,
                       int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T);
  if (op.key_cache.token != 1) return;
  for (int64_t i = 0; i < count; ++i) {
    const T* run = key + channels[i] * op.key_cache.channel;
    for (int64_t t = 0; t < op.score.shape.block_size; t += kLine)
      __builtin_prefetch(run + t, 0, 2);
  }
}

template <class T>
void score_critical(const ScoreChannels& op) {
  const ScoreTokens& score = op.score;
  const int64_t d = score.shape.head_size, bs = score.shape.block_size;
  const int64_t heads = score.shape.kv_heads, pairs = score.rows * heads;
  const int64_t count = smaller(op.critical_channels, d);
  int32_t* channels = take<int32_t>(pairs * count);
  find_channels<T>(op, count, channels);
  const int64_t first_block = score.sink_tokens / bs;
  Tasks tasks = cut(score.rows, score.shape.kv_heads, 4, INT32_MAX, [&](int32_t row) {
    return larger(0, ceil_div(score.tail_start[row], bs) - first_block);
  });
  const int64_t thread_size = score.queries * count;
  float* scratch = take<float>(thread_size * num_threads());
  parallel_for(tasks.count, [&](int64_t i) {
    const Task& task = tasks.data[i];
    const int64_t pair = task.row * heads + task.head;
    const int32_t* chosen = channels + pair * count;
    float* query = scratch + thread_size * omp_get_thread_num();
    for (int64_t q = 0; q < score.queries; ++q) {
      for (int64_t j = 0; j < count; ++j) {
        query[q * count + j] = score.query[(pair * score.queries + q) * d + chosen[j]];
      }
    }
    const int32_t* table = table_of(score, task.row);
    float* out = scores_of(score, task.row, task.head);
    for (int64_t unit = task.begin + first_block; unit < task.end + first_block; ++unit) {
      const int64_t begin = larger(unit * bs, score.sink_tokens);
      const int64_t end = smaller((unit + 1) * bs, score.tail_start[task.row]);
      const int64_t next = unit + kBlocksAhead;
      if (next < task.end + first_block) {
        prefetch_channels<T>(op, at<T>(op.key_cache, table[next], task.head, 0, 0), chosen, count);
      }
      const T* key = at<T>(op.key_cache, table[unit], task.head, 0, 0);
      score_block<T>(op, key, chosen, count, query, begin - unit * bs, end - unit * bs,
                     out + begin);
    }
  });
}

void score_channels(const ScoreChannels& op) {
  scratch_reset();
  visit(op.dtype, [&](auto element) { score_critical<decltype(element)>(op); });
}

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
