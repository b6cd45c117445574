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
//   ahead: asked for its lines between look-ups, or first where there are no tables
inline void score_group(const uint8_t* codes, int64_t pitch, int64_t d, int64_t g, int32_t queries,
                        const float* query, const ScoreScratch& scratch, Ahead& ahead,
                        float* best) {
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
        score_by_bytes(scratch.product.bytes, d, scratch.product.scaled, sum(offset), ahead,
                       scratch.scores);
        keep_best(scratch.scores, t, kPlaces, q == 0);
      }
    }
    return;
  }
#endif
  ahead.ask_part(1);
  for_heads(queries, [&](int q, auto heads) {
    constexpr int N = decltype(heads)::value;
    score_codes<1, N, false>(codes, pitch, d, g, scratch.scale, scratch.zero, query + q * padded(d),
                             scratch.product, ahead, scratch.scores, g);
    for (int j = 0; j < N; ++j) keep_best(scratch.scores + j * g, 0, g, q + j == 0);
  });
}

// Groups, of one head, between the one at work and the one asked for: two, since the lines of the
// next one would come too late.
constexpr int64_t kGroupsAhead = 2;

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
      Ahead ahead;
      if (const int64_t next = unit + kGroupsAhead; next < task.end + first_unit) {
        const int64_t next_block = table_of(score, task.row)[next / per_block];
        add_key_lines(op.key, next_block, task.head, next % per_block, d, ahead);
      }
      const int64_t begin = larger(unit * g, score.sink_tokens);
      const int64_t end = smaller((unit + 1) * g, score.tail_start[task.row]);
      const bool whole = end - begin == g;
      score_group(at(op.key.codes, block, task.head, group), op.key.codes.item, d, g, score.queries,
                  query, scratch, ahead, whole ? out + begin : scratch.best);
      if (whole) continue;
      for (int64_t t = begin; t < end; ++t) out[t] = scratch.best[t - unit * g];
    }
  });
}

// Blocks, of one head each, whose channels are asked for ahead of the one at work.
constexpr int64_t kKeysAhead = 4;

// Scores of tokens [begin, end) of one block.
//   query: [Q, count], the values of the critical channels; scores: [end - begin]
template <class T>
void score_block(const ScoreChannels& op, const T* key, const int32_t* channels, int64_t count,
                 const float* query, int64_t begin, int64_t end, float* scores) {
  const Cache& cache = op.key_cache;
  const int32_t queries = op.score.queries;
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
          for (int j = 0; j < V; ++j) totals[h][j] = splat(0);
        }
        for (int64_t i = 0; i < count; ++i) {
          const T* from = key + channels[i] * cache.channel + t;
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
        F most = totals[0];
        for (int h = 1; h < N; ++h) most = max(most, totals[h]);
        keep_best(t, most, n);
      }
    });
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

// Magnitudes are ordered as the integers of their bits are.
template <class T>
struct MagnitudeBits {
  using Type = uint16_t;
};
template <>
struct MagnitudeBits<float> {
  using Type = uint32_t;
};

// Records of absmax reduced before the maxima go back to memory.
constexpr int64_t kRecords = 4;

// Pick the critical channels of every row and KV head.
//   channels: [R, Hk, count], ascending
template <class T>
void find_channels(const ScoreChannels& op, int64_t count, int32_t* channels) {
  const ScoreTokens& score = op.score;
  const int64_t d = score.shape.head_size, g = score.grouping.group_size, pitch = padded(d);
  const int64_t per_block = score.grouping.groups_per_block, heads = score.shape.kv_heads;
  Tasks tasks = cut(score.rows, score.shape.kv_heads, 64, INT32_MAX,
                    [&](int32_t row) { return larger(0, ceil_div(score.tail_start[row], g)); });
  using Bits = typename MagnitudeBits<T>::Type;
  Bits* partial = take<Bits>(tasks.count * pitch);
  parallel_for(tasks.count, [&](int64_t i) {
    const Task& task = tasks.data[i];
    Bits* most = partial + i * pitch;
    __builtin_memset(most, 0, static_cast<size_t>(pitch) * sizeof(Bits));
    auto record = [&](int64_t unit) {
      return at<Bits>(op.absmax, table_of(score, task.row)[unit / per_block], task.head,
                      unit % per_block);
    };
    auto larger_of = [](Bits x, Bits y) { return x > y ? x : y; };
    for (int64_t unit = task.begin; unit < task.end; unit += kRecords) {
      // The last ones are read again where there are fewer.
      const int64_t last = task.end - 1;
      const Bits* records[kRecords];
      for (int64_t r = 0; r < kRecords; ++r) records[r] = record(smaller(unit + r, last));
      for (int64_t c = 0; c < d; ++c) {
        const Bits x = larger_of(larger_of(records[0][c], records[1][c]),
                                 larger_of(records[2][c], records[3][c]));
        most[c] = larger_of(most[c], x);
      }
    }
  });
  float* weight = take<float>(pitch);
  Ranked ranked = take_ranked(d);
  for (int64_t i = 0; i < tasks.count;) {
    const Task& task = tasks.data[i];
    const int64_t pair = task.row * heads + task.head;
    const float* query = score.query + pair * score.queries * d;
    __builtin_memset(weight, 0, static_cast<size_t>(pitch) * sizeof(float));
    for (; i < tasks.count && tasks.data[i].row == task.row && tasks.data[i].head == task.head;
         ++i) {
      for (int64_t c = 0; c < d; ++c) {
        T element;
        __builtin_memcpy(&element, partial + i * pitch + c, sizeof(T));
        const float magnitude = to_float(element);
        weight[c] = magnitude > weight[c] ? magnitude : weight[c];
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
    choose_channels(weight, d, count, ranked, channels + pair * count);
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
  const int64_t pair_size = score.queries * count;
  float* queries = take<float>(pairs * pair_size);
  for (int64_t i = 0; i < pairs * score.queries; ++i) {
    const int32_t* chosen = channels + i / score.queries * count;
    for (int64_t j = 0; j < count; ++j) queries[i * count + j] = score.query[i * d + chosen[j]];
  }
  // A block's heads lie side by side, so a task takes them all, block by block.
  const int64_t first_block = score.sink_tokens / bs;
  Tasks tasks = cut(score.rows, 1, ceil_div(4, heads), INT32_MAX, [&](int32_t row) {
    return larger(0, ceil_div(score.tail_start[row], bs) - first_block);
  });
  parallel_for(tasks.count, [&](int64_t i) {
    const Task& task = tasks.data[i];
    const int32_t* table = table_of(score, task.row) + first_block;
    const int64_t end_unit = task.end * heads;
    auto key_at = [&](int64_t unit) {
      return at<T>(op.key_cache, table[unit / heads], unit % heads, 0, 0);
    };
    for (int64_t unit = task.begin * heads; unit < end_unit; ++unit) {
      const int64_t head = unit % heads, first_token = (first_block + unit / heads) * bs;
      const int64_t pair = task.row * heads + head;
      if (unit + kKeysAhead < end_unit) {
        prefetch_channels<T>(op, key_at(unit + kKeysAhead),
                             channels + (task.row * heads + (unit + kKeysAhead) % heads) * count,
                             count);
      }
      const int64_t begin = larger(first_token, score.sink_tokens);
      const int64_t end = smaller(first_token + bs, score.tail_start[task.row]);
      score_block<T>(op, key_at(unit), channels + pair * count, count, queries + pair * pair_size,
                     begin - first_token, end - first_token,
                     scores_of(score, task.row, head) + begin);
    }
  });
}

void score_channels(const ScoreChannels& op) {
  scratch_reset();
  visit(op.dtype, [&](auto element) { score_critical<decltype(element)>(op); });
}

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
