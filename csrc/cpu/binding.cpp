// The ops of the torch library `vllm_tailorkv` on CPUs. Each is one function: first the contract,
// by shapes alone, which is all that the `Meta` variant does (what torch calls a fake, and what
// implementations in Python are checked by), then pointers, then the kernel.
#include <Python.h>
#include <omp.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "../schema.h"
#include "arguments.h"
#include "kernels.h"

namespace tailorkv {
namespace {

// Tokens that the blocks of one row have room for.
int64_t room(const Axes& axes) { return axes.max_blocks.size * axes.bs.size; }

template <bool Run>
void write_kv(const Tensor& key, const Tensor& value, const Tensor& key_cache,
              const Tensor& value_cache, const Tensor& slot_mapping,
              const std::optional<Tensor>& key_rows) {
  const Contract contract("write_kv");
  Axes axes;
  Axis T{"T"}, slots{"slots"};
  const auto dtype = key_cache.scalar_type();
  check_caches(contract, key_cache, value_cache, axes);
  if (key_rows) check_cache(contract, *key_rows, "key_rows", dtype, axes);
  contract.tensor(key, "key", dtype, Strides::kRows, {T, axes.Hk, axes.d});
  contract.tensor(value, "value", dtype, Strides::kRows, {T, axes.Hk, axes.d});
  contract.tensor(slot_mapping, "slot_mapping", ScalarType::Long, Strides::kContiguous, {slots});
  contract.require(slots.size >= T.size, "slot_mapping is shorter than key");
  if (!Run) return;
  const auto* slot = data<const int64_t>(contract, slot_mapping, "slot_mapping");
  check_values(contract, slot, T.size, "slot_mapping", INT64_MIN, axes.NB.size * axes.bs.size);
  kernels().write_kv({dtype_of(key_cache), shape_of(axes), T.size,
                      data<const void>(contract, key, "key"),
                      data<const void>(contract, value, "value"), key.stride(0), key.stride(1),
                      value.stride(0), value.stride(1), cache_of(contract, key_cache, "key_cache"),
                      cache_of(contract, value_cache, "value_cache"), slot,
                      key_rows ? cache_of(contract, *key_rows, "key_rows") : Cache{}});
}

template <bool Run>
void quantize_groups(const Tensor& groups, const Tensor& key_cache, const Tensor& value_cache,
                     const std::vector<Tensor>& derived, bool fit) {
  const Contract contract("quantize_groups");
  Axes axes;
  Axis N{"N"};
  contract.tensor(groups, "groups", ScalarType::Long, Strides::kContiguous, {N});
  check_caches(contract, key_cache, value_cache, axes);
  QuantizeGroups op{};
  if (derived.size() == 1) {
    op.derive = Derive::kChannels;
    op.grouping = check_extremes(contract, derived[0], key_cache.scalar_type(), axes);
  } else if (derived.size() == 3) {
    op.derive = Derive::kOnebit;
    op.grouping = check_onebit(contract, derived, axes);
  } else {
    op.derive = Derive::kDense;
    op.grouping = check_dense(contract, derived, axes);
  }
  if (!Run) return;
  op.dtype = dtype_of(key_cache);
  op.shape = shape_of(axes);
  op.fit = fit;
  op.num_groups = N.size;
  op.groups = data<const int64_t>(contract, groups, "groups");
  check_values(contract, op.groups, N.size, "groups", INT64_MIN,
               axes.NB.size * op.grouping.groups_per_block);
  op.key_cache = cache_of(contract, key_cache, "key_cache");
  op.value_cache = cache_of(contract, value_cache, "value_cache");
  if (op.derive == Derive::kChannels) {
    op.extremes = records_of<void>(contract, derived[0], "extremes");
  } else {
    op.key = codes_of(contract, derived, 0);
    if (op.derive == Derive::kDense) op.value = codes_of(contract, derived, 3);
  }
  kernels().quantize_groups(op);
}

// What the decode ops share. V and output are those of K and query where an op has none.
void check_decode(const Contract& contract, const Tensor& query, const Tensor& key_cache,
                  const Tensor& value_cache, const Tensor& block_table, const Tensor& seq_lens,
                  Axes& axes) {
  check_caches(contract, key_cache, value_cache, axes);
  check_query(contract, query, key_cache.scalar_type(), axes);
  check_block_table(contract, block_table, axes);
  check_row_values(contract, seq_lens, "seq_lens", axes);
}

void check_output(const Contract& contract, const Tensor& output, ScalarType dtype, Axes& axes) {
  contract.tensor(output, "output", dtype, Strides::kContiguous, {axes.R, axes.H, axes.d});
}

// One for each query head.
void check_sinks(const Contract& contract, const std::optional<Tensor>& sink_logits, Axis& H) {
  if (!sink_logits) return;
  contract.tensor(*sink_logits, "sink_logits", ScalarType::Float, Strides::kContiguous, {H});
}

const float* sinks_of(const Contract& contract, const std::optional<Tensor>& sink_logits) {
  return sink_logits ? data<const float>(contract, *sink_logits, "sink_logits") : nullptr;
}

Decode decode_of(const Contract& contract, const Axes& axes, const Tensor& output,
                 const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                 const Tensor& block_table, const Tensor& seq_lens, double scale, double softcap,
                 const std::optional<Tensor>& sink_logits) {
  const Decode decode{dtype_of(key_cache),
                      shape_of(axes),
                      static_cast<int32_t>(axes.R.size),
                      static_cast<int32_t>(axes.H.size),
                      data<void>(contract, output, "output"),
                      data<const void>(contract, query, "query"),
                      cache_of(contract, key_cache, "key_cache"),
                      cache_of(contract, value_cache, "value_cache"),
                      block_table_of(contract, block_table),
                      row_values_of(contract, seq_lens, "seq_lens", room(axes), 0),
                      static_cast<float>(scale),
                      static_cast<float>(softcap),
                      sinks_of(contract, sink_logits)};
  check_blocks(contract, axes, decode.block_table, decode.seq_lens);
  return decode;
}

template <bool Run>
void quantized_decode_attention(const Tensor& output, const Tensor& query, const Tensor& key_cache,
                                const Tensor& value_cache, const std::vector<Tensor>& codes,
                                const Tensor& block_table, const Tensor& seq_lens,
                                const Tensor& tail_start, double scale, double softcap,
                                const std::optional<Tensor>& sink_logits) {
  const Contract contract("quantized_decode_attention");
  Axes axes;
  check_decode(contract, query, key_cache, value_cache, block_table, seq_lens, axes);
  check_output(contract, output, key_cache.scalar_type(), axes);
  const Grouping grouping = check_dense(contract, codes, axes);
  check_row_values(contract, tail_start, "tail_start", axes);
  check_sinks(contract, sink_logits, axes.H);
  if (!Run) return;
  const Decode decode = decode_of(contract, axes, output, query, key_cache, value_cache,
                                  block_table, seq_lens, scale, softcap, sink_logits);
  kernels().quantized_decode_attention(
      {decode, grouping, codes_of(contract, codes, 0), codes_of(contract, codes, 3),
       row_values_of(contract, tail_start, "tail_start", room(axes), 0)});
}

template <bool Run>
void log_mass(const Tensor& mass, const Tensor& query, const Tensor& key_cache,
              const Tensor& block_table, const Tensor& seq_lens, const Tensor& tail_start,
              int64_t sink_tokens, double scale, double softcap,
              const std::optional<Tensor>& sink_logits) {
  const Contract contract("log_mass");
  Axes axes;
  check_decode(contract, query, key_cache, key_cache, block_table, seq_lens, axes);
  contract.tensor(mass, "mass", ScalarType::Float, Strides::kContiguous, {axes.R, axes.H});
  check_row_values(contract, tail_start, "tail_start", axes);
  const int32_t sinks = contract.within(sink_tokens, "sink_tokens", 0);
  check_sinks(contract, sink_logits, axes.H);
  if (!Run) return;
  const Decode decode = decode_of(contract, axes, query, query, key_cache, key_cache, block_table,
                                  seq_lens, scale, softcap, sink_logits);
  kernels().log_mass({decode, data<float>(contract, mass, "mass"), sinks,
                      row_values_of(contract, tail_start, "tail_start", room(axes))});
}

// The index of a sparse layer, and what its tokens are scored with.
struct Scored {
  Axes axes;
  Axis Q{"Q"};
  Grouping grouping;
};

bool is_onebit(const std::vector<Tensor>& index) { return index.size() == 3; }

void check_index(const Contract& contract, const std::vector<Tensor>& index,
                 const Tensor& key_cache, int64_t critical_channels, Scored& scored) {
  contract.require(index.size() == 3 || index.size() == 1, "an index is three tensors or one");
  if (is_onebit(index)) {
    scored.grouping = check_onebit(contract, index, scored.axes);
  } else {
    contract.within(critical_channels, "critical_channels", 1, scored.axes.d.size);
    scored.grouping = check_extremes(contract, index[0], key_cache.scalar_type(), scored.axes);
  }
}

Scored check_scored(const Contract& contract, const Tensor& query, const std::vector<Tensor>& index,
                    const Tensor& key_cache, const Tensor& block_table, const Tensor& tail_start,
                    const Tensor& offset, int64_t sink_tokens, int64_t critical_channels) {
  Scored scored;
  Axes& axes = scored.axes;
  contract.floating(key_cache, "key_cache");
  check_cache(contract, key_cache, "key_cache", key_cache.scalar_type(), axes);
  contract.tensor(query, "query", ScalarType::Float, Strides::kContiguous,
                  {axes.R, axes.Hk, scored.Q, axes.d});
  contract.require(scored.Q.size > 0, "query must have queries");
  contract.tensor(offset, "offset", ScalarType::Float, Strides::kContiguous,
                  {axes.R, axes.Hk, scored.Q});
  check_block_table(contract, block_table, axes);
  check_row_values(contract, tail_start, "tail_start", axes);
  contract.within(sink_tokens, "sink_tokens", 0);
  check_index(contract, index, key_cache, critical_channels, scored);
  return scored;
}

ScoreTokens score_of(const Contract& contract, const Scored& scored, const float* query,
                     const float* offset, const BlockTable& block_table, const int32_t* tail_start,
                     int64_t sink_tokens) {
  const ScoreTokens score{shape_of(scored.axes),
                          scored.grouping,
                          static_cast<int32_t>(scored.axes.R.size),
                          static_cast<int32_t>(scored.Q.size),
                          nullptr,
                          0,
                          0,
                          query,
                          offset,
                          block_table,
                          tail_start,
                          static_cast<int32_t>(sink_tokens)};
  check_blocks(contract, scored.axes, score.block_table, score.tail_start);
  return score;
}

ScoreOnebit onebit_of(const Contract& contract, const ScoreTokens& score,
                      const std::vector<Tensor>& index) {
  return {score, codes_of(contract, index, 0)};
}

ScoreChannels channels_of(const Contract& contract, const ScoreTokens& score,
                          const std::vector<Tensor>& index, const Tensor& key_cache,
                          int64_t critical_channels) {
  return {score, dtype_of(key_cache), records_of<void>(contract, index[0], "extremes"),
          cache_of(contract, key_cache, "key_cache"), static_cast<int32_t>(critical_channels)};
}

template <bool Run>
void score_tokens(const Tensor& scores, const Tensor& query, const std::vector<Tensor>& index,
                  const Tensor& key_cache, const Tensor& block_table, const Tensor& tail_start,
                  const Tensor& offset, int64_t sink_tokens, int64_t critical_channels) {
  const Contract contract("score_tokens");
  Scored scored = check_scored(contract, query, index, key_cache, block_table, tail_start, offset,
                               sink_tokens, critical_channels);
  Axis S{"S"};
  contract.tensor(scores, "scores", ScalarType::Float, Strides::kRows,
                  {scored.axes.R, scored.axes.Hk, S});
  if (!Run) return;
  ScoreTokens score = score_of(
      contract, scored, data<const float>(contract, query, "query"),
      data<const float>(contract, offset, "offset"), block_table_of(contract, block_table),
      row_values_of(contract, tail_start, "tail_start", std::min(S.size, room(scored.axes))),
      sink_tokens);
  score.scores = data<float>(contract, scores, "scores");
  score.scores_row = scores.stride(0);
  score.scores_head = scores.stride(1);
  if (is_onebit(index)) {
    kernels().score_onebit(onebit_of(contract, score, index));
  } else {
    kernels().score_channels(channels_of(contract, score, index, key_cache, critical_channels));
  }
}

void propose(const Contract& contract, const ScoreTokens& score, const std::vector<Tensor>& index,
             const Tensor& key_cache, int64_t critical_channels, int32_t* indices, int64_t k) {
  const auto count = static_cast<int32_t>(k);
  if (is_onebit(index)) {
    kernels().propose_onebit({onebit_of(contract, score, index), indices, count});
  } else {
    kernels().propose_channels(
        {channels_of(contract, score, index, key_cache, critical_channels), indices, count});
  }
}

template <bool Run>
void propose_topk(const Tensor& indices, const Tensor& query, const std::vector<Tensor>& index,
                  const Tensor& key_cache, const Tensor& block_table, const Tensor& tail_start,
                  const Tensor& offset, int64_t sink_tokens, int64_t critical_channels,
                  int64_t max_tail_start) {
  const Contract contract("propose_topk");
  Scored scored = check_scored(contract, query, index, key_cache, block_table, tail_start, offset,
                               sink_tokens, critical_channels);
  Axis k{"k"};
  check_indices(contract, indices, "indices", scored.axes, k);
  contract.within(max_tail_start, "max_tail_start", 0);
  if (!Run) return;
  const ScoreTokens score =
      score_of(contract, scored, data<const float>(contract, query, "query"),
               data<const float>(contract, offset, "offset"), block_table_of(contract, block_table),
               row_values_of(contract, tail_start, "tail_start",
                             std::min(max_tail_start, room(scored.axes))),
               sink_tokens);
  propose(contract, score, index, key_cache, critical_channels,
          data<int32_t>(contract, indices, "indices"), k.size);
}

template <bool Run>
void select_topk(const Tensor& indices, const Tensor& scores, const Tensor& tail_start,
                 int64_t sink_tokens) {
  const Contract contract("select_topk");
  check_select_topk(contract, indices, scores, tail_start, sink_tokens);
  if (!Run) return;
  kernels().select_topk(
      {static_cast<int32_t>(indices.size(0)), static_cast<int32_t>(indices.size(1)),
       static_cast<int32_t>(indices.size(2)), data<int32_t>(contract, indices, "indices"),
       data<const float>(contract, scores, "scores"), scores.stride(0), scores.stride(1),
       row_values_of(contract, tail_start, "tail_start", scores.size(2)),
       static_cast<int32_t>(sink_tokens)});
}

template <bool Run>
void rerank_topk(const Tensor& indices, const Tensor& candidates, const Tensor& query,
                 const Tensor& key_cache, const Tensor& block_table, const Tensor& mass,
                 int64_t channels, double scale, double softcap) {
  const Contract contract("rerank_topk");
  Axes axes;
  Axis k{"k"}, C{"C"};
  contract.floating(key_cache, "key_cache");
  check_cache(contract, key_cache, "key_cache", key_cache.scalar_type(), axes);
  check_query(contract, query, key_cache.scalar_type(), axes);
  check_indices(contract, indices, "indices", axes, k);
  check_indices(contract, candidates, "candidates", axes, C);
  contract.tensor(mass, "mass", ScalarType::Float, Strides::kContiguous, {axes.R, axes.H});
  check_block_table(contract, block_table, axes);
  contract.within(channels, "channels", 1, axes.d.size);
  if (!Run) return;
  const BlockTable table = block_table_of(contract, block_table);
  const auto* proposed = data<const int32_t>(contract, candidates, "candidates");
  check_tokens(contract, axes, proposed, C.size, "candidates", table);
  kernels().rerank_topk({dtype_of(key_cache), shape_of(axes), static_cast<int32_t>(axes.R.size),
                         static_cast<int32_t>(axes.H.size), static_cast<int32_t>(k.size),
                         static_cast<int32_t>(C.size), data<int32_t>(contract, indices, "indices"),
                         proposed, data<const void>(contract, query, "query"),
                         cache_of(contract, key_cache, "key_cache"), table,
                         data<const float>(contract, mass, "mass"), static_cast<int32_t>(channels),
                         static_cast<float>(scale), static_cast<float>(softcap)});
}

// A query as floats, times a factor.
float element(const void* from, Dtype dtype, int64_t i) {
  if (dtype == Dtype::kFloat32) return static_cast<const float*>(from)[i];
  const uint16_t bits = static_cast<const uint16_t*>(from)[i];
  if (dtype == Dtype::kBfloat16) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float result;
    __builtin_memcpy(&result, &wide, 4);
    return result;
  }
  return static_cast<float>(reinterpret_cast<const torch::headeronly::Half&>(bits));
}

// The queries that tokens are scored with, and what is added to their scores: every head's,
// measured against what it pays elsewhere, or the mean of the heads.
//   queries: [R, Hk, Q, d]; offsets: [R, Hk, Q]; mass: [R, H]
void scored_queries(const void* query, Dtype dtype, const Axes& axes, bool every_head, float scale,
                    const float* mass, float* queries, float* offsets) {
  const int64_t d = axes.d.size, group = axes.H.size / axes.Hk.size;
  const int64_t pairs = axes.R.size * axes.Hk.size;
  if (every_head) {
    for (int64_t i = 0; i < pairs * group; ++i) {
      for (int64_t c = 0; c < d; ++c) queries[i * d + c] = element(query, dtype, i * d + c) * scale;
      offsets[i] = -mass[i];
    }
    return;
  }
  for (int64_t pair = 0; pair < pairs; ++pair) {
    offsets[pair] = 0;
    for (int64_t c = 0; c < d; ++c) {
      float sum = 0;
      for (int64_t h = 0; h < group; ++h) sum += element(query, dtype, (pair * group + h) * d + c);
      queries[pair * d + c] = sum / static_cast<float>(group);
    }
  }
}

// What the ops that find tokens are called with.
struct Retrieval {
  const Tensor& query;
  const std::vector<Tensor>& index;
  const Tensor &key_cache, &gathered_key, &block_table, &seq_lens, &tail_start;
  int64_t sink_tokens, critical_channels, candidates, channels;
  bool every_head;
  int64_t max_tail_start;
};

// Everything but `candidates`.
Scored check_retrieval(const Contract& contract, const Retrieval& call) {
  Scored scored;
  Axes& axes = scored.axes;
  check_decode(contract, call.query, call.key_cache, call.key_cache, call.block_table,
               call.seq_lens, axes);
  check_cache(contract, call.gathered_key, "gathered_key", call.key_cache.scalar_type(), axes);
  check_row_values(contract, call.tail_start, "tail_start", axes);
  contract.within(call.sink_tokens, "sink_tokens", 0);
  contract.within(call.channels, "channels", 1, axes.d.size);
  contract.within(call.max_tail_start, "max_tail_start", 0);
  check_index(contract, call.index, call.key_cache, call.critical_channels, scored);
  return scored;
}

const int32_t* starts_of(const Contract& contract, const Retrieval& call, const Axes& axes) {
  return row_values_of(contract, call.tail_start, "tail_start",
                       std::min(call.max_tail_start, room(axes)));
}

// No row has more tokens between sinks and tail.
int64_t longest_middle(const Retrieval& call, const Axes& axes) {
  return std::max<int64_t>(0, std::min(call.max_tail_start, room(axes)) - call.sink_tokens);
}

// There may be no room for as many tokens as a caller would have proposed.
int64_t proposed_of(const Retrieval& call, const Axes& axes, int64_t k) {
  return k == 0 ? 0 : std::max(k, std::min(call.candidates, longest_middle(call, axes)));
}

bool by_head(const Retrieval& call, const Axes& axes) {
  return call.every_head && axes.H.size > axes.Hk.size;
}

RerankTopk rerank_of(const Retrieval& call, const Decode& decode, int64_t k, int64_t proposed,
                     int32_t* indices, const int32_t* candidates, const float* mass) {
  return {decode.dtype,
          decode.shape,
          decode.rows,
          decode.query_heads,
          static_cast<int32_t>(k),
          static_cast<int32_t>(proposed),
          indices,
          candidates,
          decode.query,
          decode.key_cache,
          decode.block_table,
          mass,
          static_cast<int32_t>(call.channels),
          decode.scale,
          decode.softcap};
}

// The k best middle tokens of every row and KV head.
//   decode: its K is that which is gathered; starts: [R]; indices: [R, Hk, k]
void retrieve(const Contract& contract, const Retrieval& call, Scored& scored, const Decode& decode,
              const int32_t* starts, int32_t* indices, int64_t k) {
  const Axes& axes = scored.axes;
  const auto sinks = static_cast<int32_t>(call.sink_tokens);
  const int64_t proposed = proposed_of(call, axes, k);
  const int64_t group = axes.H.size / axes.Hk.size;
  const bool each = by_head(call, axes), reranked = proposed > k;
  scored.Q.size = each ? group : 1;
  // One allocation for all that lies between the steps.
  const int64_t pairs = axes.R.size * axes.Hk.size, count = pairs * scored.Q.size;
  const int64_t masses = axes.R.size * axes.H.size, floats = masses + count * (axes.d.size + 1);
  const Tensor scratch = torch::stable::new_empty(
      call.query, {floats + (reranked ? pairs * proposed : 0)}, ScalarType::Float);
  auto* mass = static_cast<float*>(scratch.data_ptr());
  float* queries = mass + masses;
  float* offsets = queries + count * axes.d.size;
  auto* found = reranked ? reinterpret_cast<int32_t*>(mass + floats) : indices;
  if (group > 1 && (each || reranked)) {
    kernels().log_mass({decode, mass, sinks, starts});
  } else {
    for (int64_t i = 0; i < masses; ++i) mass[i] = -INFINITY;
  }
  scored_queries(decode.query, decode.dtype, axes, each, decode.scale, mass, queries, offsets);
  propose(contract, score_of(contract, scored, queries, offsets, decode.block_table, starts, sinks),
          call.index, call.key_cache, call.critical_channels, found, proposed);
  if (reranked) {
    kernels().rerank_topk(rerank_of(call, decode, k, proposed, indices, found, mass));
  }
}

// Whether threads end at about the same time if none shares a row and KV head with another, each
// taking the next one as it is done: the last to end works at most a quarter longer than all would
// if work could be cut anywhere. Waiting for each other after every step costs as much.
bool is_even(const Decode& decode) {
  const int64_t threads = omp_get_max_threads(), heads = decode.shape.kv_heads;
  int64_t total = 0, longest = 0;
  for (int32_t row = 0; row < decode.rows; ++row) {
    total += heads * decode.seq_lens[row];
    longest = std::max<int64_t>(longest, decode.seq_lens[row]);
  }
  if (4 * threads * longest <= total) return true;
  // With so many, one row is far longer than the others.
  if (decode.rows * heads > 8 * threads) return false;
  std::vector<int64_t> work(static_cast<size_t>(threads));
  for (int64_t pair = 0; pair < decode.rows * heads; ++pair) {
    *std::min_element(work.begin(), work.end()) += decode.seq_lens[pair / heads];
  }
  return 4 * threads * *std::max_element(work.begin(), work.end()) <= 5 * total;
}

template <bool Run>
void retrieve_topk(const Tensor& indices, const Tensor& query, const std::vector<Tensor>& index,
                   const Tensor& key_cache, const Tensor& gathered_key, const Tensor& block_table,
                   const Tensor& seq_lens, const Tensor& tail_start, int64_t sink_tokens,
                   int64_t critical_channels, int64_t candidates, int64_t channels, bool every_head,
                   double scale, double softcap, int64_t max_tail_start,
                   const std::optional<Tensor>& sink_logits) {
  const Contract contract("retrieve_topk");
  const Retrieval call{query,    index,      key_cache,     gathered_key,      block_table,
                       seq_lens, tail_start, sink_tokens,   critical_channels, candidates,
                       channels, every_head, max_tail_start};
  Scored scored = check_retrieval(contract, call);
  Axis k{"k"};
  check_indices(contract, indices, "indices", scored.axes, k);
  contract.within(candidates, "candidates", k.size);
  check_sinks(contract, sink_logits, scored.axes.H);
  if (!Run) return;
  const Decode decode = decode_of(contract, scored.axes, query, query, gathered_key, gathered_key,
                                  block_table, seq_lens, scale, softcap, sink_logits);
  retrieve(contract, call, scored, decode, starts_of(contract, call, scored.axes),
           data<int32_t>(contract, indices, "indices"), k.size);
}

template <bool Run>
void sparse_decode_attention(const Tensor& output, const Tensor& query, const Tensor& key_cache,
                             const Tensor& value_cache, const Tensor& indices,
                             const Tensor& block_table, const Tensor& seq_lens,
                             const Tensor& tail_start, int64_t sink_tokens, double scale,
                             double softcap, const std::optional<Tensor>& sink_logits) {
  const Contract contract("sparse_decode_attention");
  Axes axes;
  Axis k{"k"};
  check_decode(contract, query, key_cache, value_cache, block_table, seq_lens, axes);
  check_output(contract, output, key_cache.scalar_type(), axes);
  check_indices(contract, indices, "indices", axes, k);
  check_row_values(contract, tail_start, "tail_start", axes);
  const int32_t sinks = contract.within(sink_tokens, "sink_tokens", 0);
  check_sinks(contract, sink_logits, axes.H);
  if (!Run) return;
  const Decode decode = decode_of(contract, axes, output, query, key_cache, value_cache,
                                  block_table, seq_lens, scale, softcap, sink_logits);
  const auto* chosen = data<const int32_t>(contract, indices, "indices");
  check_tokens(contract, axes, chosen, k.size, "indices", decode.block_table);
  kernels().sparse_decode_attention(
      {decode, chosen, static_cast<int32_t>(k.size), sinks,
       row_values_of(contract, tail_start, "tail_start", room(axes))});
}

// Each context lies in the buffer, and in the blocks of its row.
void check_contexts(const Contract& contract, const Axes& axes, const StageRows& op,
                    int64_t max_tokens) {
  for (int64_t row = 0; row < op.rows; ++row) {
    const int64_t start = op.context_start[row], count = op.context_start[row + 1] - start;
    contract.require(start >= 0 && count >= 0 && count <= max_tokens && start + count <= op.places,
                     "context_start holds ", start, ", ", start + count, " at place ", row,
                     ", with ", max_tokens, " tokens a row at the most and ", op.places, " places");
    contract.require(op.first_token + count <= room(axes), "row ", row, " ends at token ",
                     op.first_token + count, ", but there is room for ", room(axes));
    if (!checks_values()) continue;
    for (int64_t i = op.first_token / axes.bs.size; i * axes.bs.size < op.first_token + count;
         ++i) {
      const int32_t block = op.block_table.data[row * op.block_table.stride + i];
      contract.require(block >= 0 && block < axes.NB.size, "block_table[", row, ", ", i, "] is ",
                       block, ", but there are ", axes.NB.size, " blocks");
    }
  }
}

template <bool Run>
void stage_rows(const Tensor& key_rows, const Tensor& value_rows, const Tensor& key_cache,
                const Tensor& value_cache, const Tensor& block_table, const Tensor& context_start,
                int64_t first_token, int64_t max_tokens) {
  const Contract contract("stage_rows");
  Axes axes;
  Axis C{"C"}, starts{"R + 1"};
  const auto dtype = key_cache.scalar_type();
  check_caches(contract, key_cache, value_cache, axes);
  contract.tensor(key_rows, "key_rows", dtype, Strides::kContiguous, {C, axes.Hk, axes.d});
  contract.tensor(value_rows, "value_rows", dtype, Strides::kContiguous, {C, axes.Hk, axes.d});
  check_block_table(contract, block_table, axes);
  contract.tensor(context_start, "context_start", ScalarType::Int, Strides::kContiguous, {starts});
  contract.require(starts.size == axes.R.size + 1,
                   "context_start must have R + 1=", axes.R.size + 1, " values, has ", starts.size);
  const int32_t first = contract.within(first_token, "first_token", 0);
  contract.within(max_tokens, "max_tokens", 0);
  if (!Run) return;
  const StageRows op{dtype_of(key_cache),
                     shape_of(axes),
                     static_cast<int32_t>(axes.R.size),
                     data<void>(contract, key_rows, "key_rows"),
                     data<void>(contract, value_rows, "value_rows"),
                     C.size,
                     cache_of(contract, key_cache, "key_cache"),
                     cache_of(contract, value_cache, "value_cache"),
                     block_table_of(contract, block_table),
                     data<const int32_t>(contract, context_start, "context_start"),
                     first};
  check_contexts(contract, axes, op, max_tokens);
  if (op.rows && max_tokens) kernels().stage_rows(op);
}

template <bool Run>
void retrieve_attention(const Tensor& output, const Tensor& query, const std::vector<Tensor>& index,
                        const Tensor& key_cache, const Tensor& gathered_key,
                        const Tensor& value_cache, const Tensor& block_table,
                        const Tensor& seq_lens, const Tensor& tail_start, int64_t sink_tokens,
                        int64_t critical_channels, int64_t topk, int64_t candidates,
                        int64_t channels, bool every_head, double scale, double softcap,
                        int64_t max_tail_start, const std::optional<Tensor>& sink_logits) {
  const Contract contract("retrieve_attention");
  const Retrieval call{query,    index,      key_cache,     gathered_key,      block_table,
                       seq_lens, tail_start, sink_tokens,   critical_channels, candidates,
                       channels, every_head, max_tail_start};
  Scored scored = check_retrieval(contract, call);
  Axes& axes = scored.axes;
  check_cache(contract, value_cache, "value_cache", key_cache.scalar_type(), axes);
  check_output(contract, output, key_cache.scalar_type(), axes);
  contract.within(topk, "topk", 0);
  contract.within(candidates, "candidates", topk);
  check_sinks(contract, sink_logits, axes.H);
  if (!Run) return;
  const Decode decode = decode_of(contract, axes, output, query, gathered_key, value_cache,
                                  block_table, seq_lens, scale, softcap, sink_logits);
  const int32_t* starts = starts_of(contract, call, axes);
  const int64_t k = std::min(topk, longest_middle(call, axes));
  const auto sinks = static_cast<int32_t>(sink_tokens);
  if (is_onebit(index) && is_even(decode)) {
    const bool each = by_head(call, axes);
    scored.Q.size = each ? axes.H.size / axes.Hk.size : 1;
    kernels().retrieve_attention(
        {{decode, nullptr, sinks, starts},
         onebit_of(contract,
                   score_of(contract, scored, nullptr, nullptr, decode.block_table, starts, sinks),
                   index),
         rerank_of(call, decode, k, proposed_of(call, axes, k), nullptr, nullptr, nullptr),
         each});
    return;
  }
  const Tensor found =
      torch::stable::new_empty(query, {axes.R.size, axes.Hk.size, k}, ScalarType::Int);
  auto* indices = static_cast<int32_t*>(found.data_ptr());
  retrieve(contract, call, scored, decode, starts, indices, k);
  kernels().sparse_decode_attention({decode, indices, static_cast<int32_t>(k), sinks, starts});
}

// Each row's queries lie in the batch, and are the last tokens of its context.
void check_queries(const Contract& contract, const ExactAttention& op, int64_t tokens) {
  for (int64_t row = 0; row < op.rows; ++row) {
    const int64_t start = op.query_start[row], count = op.query_lens[row];
    contract.require(start >= 0 && count >= 0 && start + count <= tokens, "row ", row, " has ",
                     count, " queries from ", start, " on, of ", tokens, " tokens");
    contract.require(count <= op.seq_lens[row], "row ", row, " has ", count,
                     " queries, but seq_lens[", row, "] is ", op.seq_lens[row]);
  }
}

template <bool Run>
void exact_attention(const Tensor& output, const Tensor& query, const Tensor& key_cache,
                     const Tensor& value_cache, const Tensor& block_table,
                     const Tensor& query_start, const Tensor& query_lens, const Tensor& seq_lens,
                     double scale, double softcap, const std::optional<Tensor>& sink_logits) {
  const Contract contract("exact_attention");
  Axes axes;
  Axis T{"T"};
  const auto dtype = key_cache.scalar_type();
  check_caches(contract, key_cache, value_cache, axes);
  contract.require(axes.bs.size % 32 == 0, "block_size must be a multiple of 32");
  contract.tensor(query, "query", dtype, Strides::kRows, {T, axes.H, axes.d});
  contract.require(axes.H.size > 0 && axes.H.size % axes.Hk.size == 0, "query has ", axes.H.size,
                   " heads for ", axes.Hk.size, " KV heads");
  contract.tensor(output, "output", dtype, Strides::kRows, {T, axes.H, axes.d});
  check_block_table(contract, block_table, axes);
  check_row_values(contract, query_start, "query_start", axes);
  check_row_values(contract, query_lens, "query_lens", axes);
  check_row_values(contract, seq_lens, "seq_lens", axes);
  contract.require(scale > 0, "scale must be positive, is ", scale);
  check_sinks(contract, sink_logits, axes.H);
  if (!Run) return;
  const ExactAttention op{dtype_of(key_cache),
                          shape_of(axes),
                          static_cast<int32_t>(axes.R.size),
                          static_cast<int32_t>(axes.H.size),
                          data<void>(contract, output, "output"),
                          output.stride(0),
                          output.stride(1),
                          data<const void>(contract, query, "query"),
                          query.stride(0),
                          query.stride(1),
                          cache_of(contract, key_cache, "key_cache"),
                          cache_of(contract, value_cache, "value_cache"),
                          block_table_of(contract, block_table),
                          data<const int32_t>(contract, query_start, "query_start"),
                          data<const int32_t>(contract, query_lens, "query_lens"),
                          row_values_of(contract, seq_lens, "seq_lens", room(axes), 0),
                          static_cast<float>(scale),
                          static_cast<float>(softcap),
                          sinks_of(contract, sink_logits)};
  check_queries(contract, op, T.size);
  check_blocks(contract, axes, op.block_table, op.seq_lens);
  kernels().exact_attention(op);
}

template <bool Run>
Tensor dense_preference(const Tensor& query, const Tensor& key, double alpha, double scale,
                        double softcap, const std::optional<Tensor>& sink_logits) {
  const Contract contract("dense_preference");
  Axis n{"n"}, H{"H"}, L{"L"}, Hk{"Hk"}, d{"d"};
  contract.floating(key, "key");
  contract.tensor(query, "query", key.scalar_type(), Strides::kContiguous, {n, H, d});
  contract.tensor(key, "key", key.scalar_type(), Strides::kContiguous, {L, Hk, d});
  contract.require(Hk.size > 0 && H.size % Hk.size == 0, "query has ", H.size, " heads for ",
                   Hk.size, " KV heads");
  contract.require(n.size > 0 && n.size <= L.size, "query must have from 1 to L=", L.size,
                   " queries, has ", n.size);
  contract.require(alpha > 0 && alpha <= 1, "alpha must lie in (0, 1], is ", alpha);
  check_sinks(contract, sink_logits, H);
  const Tensor result = torch::stable::new_empty(query, {H.size}, ScalarType::Float);
  if (!Run) return result;
  const auto kept = static_cast<int64_t>(std::floor(alpha * static_cast<double>(L.size)));
  kernels().dense_preference(
      {dtype_of(key), static_cast<int32_t>(n.size), static_cast<int32_t>(H.size),
       static_cast<int32_t>(Hk.size), static_cast<int32_t>(d.size), L.size,
       data<const void>(contract, query, "query"), data<const void>(contract, key, "key"),
       std::max<int64_t>(1, kept), static_cast<float>(scale), static_cast<float>(softcap),
       sinks_of(contract, sink_logits), data<float>(contract, result, "result")});
  return result;
}

std::string isa() { return kernels().name; }

void set_isa(std::string name) { set_kernels(name.c_str()); }

}  // namespace
}  // namespace tailorkv

STABLE_TORCH_LIBRARY(vllm_tailorkv, m) {
  for (const char* schema : tailorkv::kSchemas) m.def(schema);
}

#define TAILORKV_IMPLEMENT(run)                                                                \
  m.impl("write_kv", TORCH_BOX(&tailorkv::write_kv<run>));                                     \
  m.impl("quantize_groups", TORCH_BOX(&tailorkv::quantize_groups<run>));                       \
  m.impl("quantized_decode_attention", TORCH_BOX(&tailorkv::quantized_decode_attention<run>)); \
  m.impl("log_mass", TORCH_BOX(&tailorkv::log_mass<run>));                                     \
  m.impl("score_tokens", TORCH_BOX(&tailorkv::score_tokens<run>));                             \
  m.impl("propose_topk", TORCH_BOX(&tailorkv::propose_topk<run>));                             \
  m.impl("select_topk", TORCH_BOX(&tailorkv::select_topk<run>));                               \
  m.impl("rerank_topk", TORCH_BOX(&tailorkv::rerank_topk<run>));                               \
  m.impl("retrieve_topk", TORCH_BOX(&tailorkv::retrieve_topk<run>));                           \
  m.impl("sparse_decode_attention", TORCH_BOX(&tailorkv::sparse_decode_attention<run>));       \
  m.impl("stage_rows", TORCH_BOX(&tailorkv::stage_rows<run>));                                 \
  m.impl("retrieve_attention", TORCH_BOX(&tailorkv::retrieve_attention<run>));                 \
  m.impl("exact_attention", TORCH_BOX(&tailorkv::exact_attention<run>));                       \
  m.impl("dense_preference", TORCH_BOX(&tailorkv::dense_preference<run>))

STABLE_TORCH_LIBRARY_IMPL(vllm_tailorkv, CPU, m) { TAILORKV_IMPLEMENT(true); }

STABLE_TORCH_LIBRARY_IMPL(vllm_tailorkv, Meta, m) { TAILORKV_IMPLEMENT(false); }

STABLE_TORCH_LIBRARY_IMPL(vllm_tailorkv, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&tailorkv::isa));
  m.impl("set_isa", TORCH_BOX(&tailorkv::set_isa));
}

// Importing the module registers the library; it holds nothing else.
PyMODINIT_FUNC PyInit__cpu() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
