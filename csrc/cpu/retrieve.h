// retrieve_attention where there are enough rows and KV heads for the threads: each is one task,
// from weighing to attending, so that no thread waits for another between the steps and what one
// step has read is in its cache for the next.
#pragma once

#include "mass.h"
#include "propose.h"
#include "rerank.h"
#include "sparse.h"

namespace tailorkv::TAILORKV_ISA {
namespace {

// Scratch of one thread.
//   mass, extra: [G]; queries: [Q, padded(d)], what tokens are scored with; indices: [k]
//   candidates: [C]; channels: [channels]; reranked_query: [G, padded(channels)]
//   scores: [G, padded(C)]; partial: [partial_size]; ranked: [buffer_size(C)]
struct RetrieveScratch {
  ExactScratch exact;
  ScoreScratch score;
  RerankScratch rerank;
  float *mass, *extra, *queries, *reranked_query, *scores, *partial;
  int32_t *candidates, *channels, *indices;
  Ranked ranked;
};

inline RetrieveScratch take_retrieve_scratch(const RetrieveAttention& op) {
  const RerankTopk& rerank = op.rerank;
  const int64_t d = op.log_mass.decode.shape.head_size;
  const int64_t heads = rerank.query_heads / rerank.shape.kv_heads;
  const int64_t count = rerank.candidate_count;
  return RetrieveScratch{take_exact_scratch(op.log_mass.decode),
                         take_score_scratch(d, op.index.score.grouping.group_size),
                         take_rerank_scratch(rerank),
                         take<float>(heads),
                         take<float>(heads),
                         take<float>(heads * padded(d)),
                         take<float>(heads * padded(rerank.channels)),
                         take<float>(heads * padded(count)),
                         take<float>(partial_size(heads, d)),
                         take<int32_t>(count),
                         take<int32_t>(rerank.channels),
                         take<int32_t>(rerank.k),
                         take_ranked(buffer_size(count))};
}

// What the tokens of one row and KV head are scored with: see `ops.retrieve_topk`.
inline void prepare_queries(const RetrieveAttention& op, const HeadView& view,
                            const RetrieveScratch& scratch) {
  const int64_t pitch = padded(op.log_mass.decode.shape.head_size), heads = view.group_heads;
  if (op.by_head) {
    const F scale = splat(op.log_mass.decode.scale);
    for (int64_t i = 0; i < heads * pitch; i += W) {
      store(scratch.queries + i, load(view.query + i) * scale);
    }
    for (int64_t h = 0; h < heads; ++h) scratch.extra[h] = -scratch.mass[h];
    return;
  }
  for (int64_t c = 0; c < pitch; c += W) {
    F sum = splat(0);
    for (int64_t h = 0; h < heads; ++h) sum = sum + load(view.query + h * pitch + c);
    store(scratch.queries + c, sum / splat(static_cast<float>(heads)));
  }
  scratch.extra[0] = 0;
}

template <class T>
void retrieve_and_attend(const RetrieveAttention& op) {
  const Decode& decode = op.log_mass.decode;
  const RerankTopk& rerank = op.rerank;
  const int64_t d = decode.shape.head_size, kv_heads = decode.shape.kv_heads;
  const int64_t heads = decode.query_heads / kv_heads, g = op.index.score.grouping.group_size;
  const int64_t k = rerank.k, count = rerank.candidate_count;
  const bool reranked = count > k;
  const float* queries = take_queries<T>(decode);
  auto* scratches = take<RetrieveScratch>(num_threads());
  for (int i = 0; i < num_threads(); ++i) scratches[i] = take_retrieve_scratch(op);
  parallel_for(decode.rows * kv_heads, [&](int64_t pair) {
    const RetrieveScratch& scratch = scratches[omp_get_thread_num()];
    Task task = task_of(pair, kv_heads);
    task.end = middle_units(op.index.score, task.row, g);
    const HeadView view = head_view(decode, queries, task);
    const Partial partial = partial_at(scratch.partial, heads);
    if (heads > 1 && (op.by_head || reranked)) {
      log_mass_of_pair<T>(op.log_mass, view, task.row, scratch.exact, partial, scratch.mass);
    } else {
      for (int64_t h = 0; h < heads; ++h) scratch.mass[h] = -kInfinity;
    }
    int32_t* proposed = reranked ? scratch.candidates : scratch.indices;
    int64_t found = 0;
    if (count > 0) {
      prepare_queries(op, view, scratch);
      Best best(scratch.ranked, count, nullptr);
      score_groups(op.index, task, scratch.queries, scratch.extra, scratch.score,
                   [&](int64_t position, const float* scores, int64_t n) {
                     best.offer(scores, position, n);
                   });
      found = best.finish();
      for (int64_t i = 0; i < found; ++i) proposed[i] = scratch.ranked.positions[i];
      for (int64_t i = found; i < count; ++i) proposed[i] = -1;
    }
    if (reranked) {
      const Reranked one{proposed,
                         view.table,
                         task.head,
                         found,
                         rerank.channels,
                         scratch.channels,
                         scratch.reranked_query};
      if (found > 0) {
        prepare<T>(rerank, static_cast<const T*>(decode.query) + pair * heads * d, scratch.rerank,
                   one);
        score_candidates<T>(rerank, one, 0, found, scratch.rerank, scratch.scores);
      }
      choose_best(rerank, one, scratch.mass, scratch.scores, scratch.ranked, scratch.indices);
    }
    const SparseDecode sparse{decode, nullptr, rerank.k, op.log_mass.sink_tokens,
                              op.log_mass.tail_start};
    const Attended attended = attended_of(sparse, task.row);
    clear(partial, heads, d);
    attend_units<T>(view, attended, scratch.indices, 0, attended.units(), scratch.exact, partial);
    merge_parts<T>(decode, pair, scratch.partial, 1);
  });
}

void retrieve_attention(const RetrieveAttention& op) {
  scratch_reset();
  visit(op.log_mass.decode.dtype,
        [&](auto element) { retrieve_and_attend<decltype(element)>(op); });
}

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
