// propose_topk: score_tokens and select_topk in one pass, whose scores never leave the first cache.
#pragma once

#include "score.h"
#include "topk.h"

namespace tailorkv::TAILORKV_ISA {
namespace {

// Keeps the k best of every row and head.
struct ToBest {
  int64_t k;
  int32_t kv_heads;
  Tasks tasks;
  int64_t heads;  // of a task
  int32_t* floors;
  Found* found;    // [tasks, heads]
  Best* running;   // [threads, heads]
  Ranked buffers;  // [threads, heads, buffer_size(k)]

  void prepare(const Tasks& all, int64_t heads_of_task) {
    tasks = all;
    heads = heads_of_task;
    int32_t rows = 0;
    for (int64_t i = 0; i < all.count; ++i) rows = all.data[i].row + 1;
    floors = take_floors(static_cast<int64_t>(rows) * kv_heads);
    found = take_found(all.count * heads, k);
    running = take<Best>(num_threads() * heads);
    buffers = take_ranked(num_threads() * heads * buffer_size(k));
  }

  void open(int64_t i) {
    const int64_t first = omp_get_thread_num() * heads;
    const Task& task = tasks.data[i];
    for (int64_t j = 0; j < heads; ++j) {
      int32_t* floor = floors + static_cast<int64_t>(task.row) * kv_heads + task.head + j;
      running[first + j] = Best(buffers + (first + j) * buffer_size(k), k, floor);
    }
  }

  void give(int64_t, const Task& task, int64_t head, int64_t position, const float* scores,
            int64_t n) {
    running[omp_get_thread_num() * heads + head - task.head].offer(scores, position, n);
  }

  void close(int64_t i) {
    const int64_t first = omp_get_thread_num() * heads;
    for (int64_t j = 0; j < heads; ++j) {
      const int64_t count = running[first + j].finish();
      copy_found(buffers + (first + j) * buffer_size(k), count, found + i * heads + j);
    }
  }

  //   indices: [rows, Hk, k]
  void finish(int32_t rows, int32_t* indices) const {
    const int64_t pairs = static_cast<int64_t>(rows) * kv_heads;
    // The tasks of a pair follow each other.
    const int64_t groups = pairs / heads;
    int64_t* starts = take<int64_t>(groups + 1);
    int64_t* offsets = take<int64_t>(groups + 1);
    for (int64_t group = 0, i = 0; group <= groups; ++group) {
      auto group_of = [&](const Task& task) { return (task.row * kv_heads + task.head) / heads; };
      while (i < tasks.count && group_of(tasks.data[i]) < group) ++i;
      starts[group] = i;
      offsets[group] = i * heads * k;
    }
    Ranked merged = take_ranked(tasks.count * heads * k);
    parallel_for(pairs, [&](int64_t pair) {
      const int64_t group = pair / heads, head = pair % heads;
      const int64_t parts = starts[group + 1] - starts[group];
      merge_found(
          parts,
          [&](int64_t j) -> const Found& { return found[(starts[group] + j) * heads + head]; },
          merged + offsets[group] + head * parts * k, k, indices + pair * k);
    });
  }
};

template <class Op, class Score>
void propose(const Op& op, Score score) {
  scratch_reset();
  const ScoreTokens& tokens = op.score.score;
  if (op.k == 0 || tokens.rows == 0 || tokens.shape.kv_heads == 0) return;
  ToBest taker{};
  taker.k = op.k;
  taker.kv_heads = tokens.shape.kv_heads;
  score(taker);
  taker.finish(tokens.rows, op.indices);
}

void propose_onebit(const ProposeOnebit& op) {
  propose(op, [&](ToBest& taker) { score_onebit(op.score, taker); });
}

void propose_channels(const ProposeChannels& op) {
  propose(op, [&](ToBest& taker) { score_channels(op.score, taker); });
}

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
