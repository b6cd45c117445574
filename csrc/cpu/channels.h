// The channels of K that matter most to a query (section 3.3 of the paper).
#pragma once

#include "attention.h"
#include "topk.h"

namespace tailorkv::TAILORKV_ISA {
namespace {

inline const int32_t* table_of(const ScoreTokens& op, int64_t row) {
  return op.block_table.data + row * op.block_table.stride;
}

// Groups that tell how far a channel spreads over a context, see `ops.score_tokens`.
constexpr int64_t kSpreadGroups = 256;
// Groups whose extremes are asked for ahead of the one at work.
constexpr int64_t kExtremesAhead = 2;

// Stretch low and high [padded(d)] by the extremes of one group.
//   extremes: [2, d], rows item apart
template <class T>
void stretch(const T* extremes, int64_t item, int64_t d, float* low, float* high) {
  for (int64_t c = 0; c < d; c += W) {
    const int n = static_cast<int>(smaller(W, d - c));
    const T *least = extremes + c, *most = extremes + item + c;
    store(low + c, min(load(low + c), n == W ? load(least) : load(least, n)));
    store(high + c, max(load(high + c), n == W ? load(most) : load(most, n)));
  }
}

// Pick the critical channels of every row and KV head.
//   channels: [R, Hk, count], ascending
template <class T>
void find_channels(const ScoreChannels& op, int64_t count, int32_t* channels) {
  const ScoreTokens& score = op.score;
  const int64_t d = score.shape.head_size, g = score.grouping.group_size, pitch = padded(d);
  const int64_t per_block = score.grouping.groups_per_block, heads = score.shape.kv_heads;
  // A row without a middle has no task, and whatever channels.
  __builtin_memset(channels, 0, static_cast<size_t>(score.rows * heads * count) * 4);
  auto groups_of = [&](int64_t row) { return larger(0, ceil_div(score.tail_start[row], g)); };
  auto step_of = [&](int64_t row) { return larger(1, ceil_div(groups_of(row), kSpreadGroups)); };
  // A block's heads lie side by side, so a task takes them all, group by group.
  Tasks tasks = cut(score.rows, 1, ceil_div(64, heads), INT32_MAX,
                    [&](int32_t row) { return ceil_div(groups_of(row), step_of(row)); });
  constexpr int64_t kLine = 64 / sizeof(T);
  float* partial = take<float>(tasks.count * heads * 2 * pitch);
  parallel_for(tasks.count, [&](int64_t i) {
    const Task& task = tasks.data[i];
    float* widest = partial + i * heads * 2 * pitch;
    for (int64_t j = 0; j < heads * 2 * pitch; j += W) {
      store(widest + j, splat(j / pitch % 2 == 0 ? kInfinity : -kInfinity));
    }
    const int32_t* table = table_of(score, task.row);
    const int64_t step = step_of(task.row);
    auto extremes_of = [&](int64_t unit, int64_t head) {
      const int64_t group = unit * step;
      return at<T>(op.extremes, table[group / per_block], head, group % per_block);
    };
    for (int64_t unit = task.begin; unit < task.end; ++unit) {
      const int64_t next = smaller(unit + kExtremesAhead, task.end - 1);
      for (int64_t head = 0; head < heads; ++head) {
        const T* ahead = extremes_of(next, head);
        for (int64_t c = 0; c < d; c += kLine) {
          __builtin_prefetch(ahead + c, 0, 2);
          __builtin_prefetch(ahead + op.extremes.item + c, 0, 2);
        }
        float* low = widest + head * 2 * pitch;
        stretch(extremes_of(unit, head), op.extremes.item, d, low, low + pitch);
      }
    }
  });
  float* weight = take<float>(pitch);
  Ranked ranked = take_ranked(d);
  for (int64_t i = 0; i < tasks.count;) {
    const int64_t row = tasks.data[i].row, first = i;
    while (i < tasks.count && tasks.data[i].row == row) ++i;
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t pair = row * heads + head;
      const float* query = score.query + pair * score.queries * d;
      float* low = partial + (first * heads + head) * 2 * pitch;
      float* high = low + pitch;
      for (int64_t j = first + 1; j < i; ++j) {
        stretch(partial + (j * heads + head) * 2 * pitch, pitch, pitch, low, high);
      }
      for (int64_t c = 0; c < d; ++c) {
        float largest_query = 0;
        for (int32_t q = 0; q < score.queries; ++q) {
          const float magnitude = __builtin_fabsf(query[q * d + c]);
          largest_query = magnitude > largest_query ? magnitude : largest_query;
        }
        weight[c] = (high[c] - low[c]) * largest_query;
      }
      choose_channels(weight, d, count, ranked, channels + pair * count);
    }
  }
}

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
