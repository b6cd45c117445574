// The channels of K that matter most to a query (section 3.3 of the paper).
#pragma once

namespace tailorkv::TAILORKV_ISA {
namespace {

inline const int32_t* table_of(const ScoreTokens& op, int64_t row) {
  return op.block_table.data + row * op.block_table.stride;
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

// Blocks whose magnitudes are asked for ahead of the one at work.
constexpr int64_t kMagnitudesAhead = 2;

// Raise `most` [d] to the magnitudes of two records.
template <class Bits>
void raise(Bits* most, const Bits* a, const Bits* b, int64_t d) {
  for (int64_t c = 0; c < d; ++c) {
    const Bits x = a[c] > b[c] ? a[c] : b[c];
    most[c] = x > most[c] ? x : most[c];
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
  // A block's heads lie side by side, so a task takes them all, block by block.
  Tasks tasks = cut(score.rows, 1, ceil_div(64, per_block * heads), INT32_MAX,
                    [&](int32_t row) { return ceil_div(groups_of(row), per_block); });
  using Bits = typename MagnitudeBits<T>::Type;
  constexpr int64_t kLine = 64 / sizeof(Bits);
  Bits* partial = take<Bits>(tasks.count * heads * pitch);
  parallel_for(tasks.count, [&](int64_t i) {
    const Task& task = tasks.data[i];
    Bits* most = partial + i * heads * pitch;
    __builtin_memset(most, 0, static_cast<size_t>(heads * pitch) * sizeof(Bits));
    const int32_t* table = table_of(score, task.row);
    for (int64_t block = task.begin; block < task.end; ++block) {
      const int64_t groups = smaller(per_block, groups_of(task.row) - block * per_block);
      const int64_t next = table[smaller(block + kMagnitudesAhead, task.end - 1)];
      for (int64_t head = 0; head < heads; ++head) {
        for (int64_t group = 0; group < groups; ++group) {
          const Bits* ahead = at<Bits>(op.absmax, next, head, group);
          for (int64_t c = 0; c < d; c += kLine) __builtin_prefetch(ahead + c, 0, 2);
        }
        for (int64_t group = 0; group < groups; group += 2) {
          // A last one without a partner is taken twice.
          const int64_t other = smaller(group + 1, groups - 1);
          raise(most + head * pitch, at<Bits>(op.absmax, table[block], head, group),
                at<Bits>(op.absmax, table[block], head, other), d);
        }
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
      Bits* most = partial + (first * heads + head) * pitch;
      for (int64_t j = first + 1; j < i; ++j) {
        const Bits* part = partial + (j * heads + head) * pitch;
        raise(most, part, part, d);
      }
      for (int64_t c = 0; c < d; ++c) {
        T element;
        __builtin_memcpy(&element, most + c, sizeof(T));
        float largest_query = 0;
        for (int32_t q = 0; q < score.queries; ++q) {
          const float magnitude = __builtin_fabsf(query[q * d + c]);
          largest_query = magnitude > largest_query ? magnitude : largest_query;
        }
        weight[c] = to_float(element) * largest_query;
      }
      choose_channels(weight, d, count, ranked, channels + pair * count);
    }
  }
}

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
