// The torch library `vllm_tailorkv`: checks what the kernels rely on for memory safety, then passes
// pointers and strides. Contracts are checked in `kernels/checks.py`.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "kernels.h"

namespace {

using tailorkv::kernels;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define REQUIRE(condition, name, what) \
  STD_TORCH_CHECK(condition, "vllm_tailorkv: ", name, " must be ", what)

tailorkv::Dtype float_dtype(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return tailorkv::Dtype::kFloat32;
    case ScalarType::Half:
      return tailorkv::Dtype::kFloat16;
    case ScalarType::BFloat16:
      return tailorkv::Dtype::kBfloat16;
    default:
      REQUIRE(false, name, "float32, float16 or bfloat16");
  }
  return tailorkv::Dtype::kFloat32;
}

void require(const Tensor& tensor, const char* name, int64_t dim, ScalarType dtype) {
  REQUIRE(tensor.is_cpu(), name, "on the CPU");
  REQUIRE(tensor.dim() == dim, name, "of the rank of its contract");
  REQUIRE(tensor.scalar_type() == dtype, name, "of the dtype of its contract");
}

void require_contiguous(const Tensor& tensor, const char* name, int64_t dim, ScalarType dtype) {
  require(tensor, name, dim, dtype);
  REQUIRE(tensor.is_contiguous(), name, "contiguous");
}

int32_t size(const Tensor& tensor, int64_t axis) { return static_cast<int32_t>(tensor.size(axis)); }

tailorkv::Cache cache(const Tensor& tensor, const char* name, ScalarType dtype) {
  require(tensor, name, 4, dtype);
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2),
          tensor.stride(3)};
}

tailorkv::Shape shape_of(const Tensor& key_cache) {
  REQUIRE(key_cache.dim() == 4, "key_cache", "[NB, Hk, bs, d]");
  REQUIRE(key_cache.size(3) % 8 == 0, "head_size", "a multiple of 8");
  return {size(key_cache, 1), size(key_cache, 2), size(key_cache, 3)};
}

// Records whose arrays have 5 axes ([NB, Hk, G, n, m]) or 4 ([NB, Hk, G, n]).
template <class T>
tailorkv::Records<T> records(const Tensor& tensor, const char* name, int64_t dim,
                             ScalarType dtype) {
  require(tensor, name, dim, dtype);
  REQUIRE(tensor.size(dim - 1) <= 1 || tensor.stride(dim - 1) == 1, name,
          "contiguous in its last axis");
  return {static_cast<T*>(tensor.data_ptr()), tensor.stride(0), tensor.stride(1), tensor.stride(2),
          dim == 5 ? tensor.stride(3) : 1};
}

tailorkv::Codes codes_of(const Tensor& codes, const Tensor& scale, const Tensor& zero,
                         int64_t scale_dim) {
  return {records<uint8_t>(codes, "codes", 5, ScalarType::Byte),
          records<uint16_t>(scale, "scale", scale_dim, ScalarType::Half),
          records<uint16_t>(zero, "zero", scale_dim, ScalarType::Half)};
}

tailorkv::Grouping grouping_of(const tailorkv::Shape& shape, int64_t groups, int64_t run_bytes) {
  REQUIRE(groups > 0 && shape.block_size % groups == 0, "block_size", "a multiple of group_size");
  const int32_t group_size = shape.block_size / static_cast<int32_t>(groups);
  REQUIRE(group_size % 32 == 0, "group_size", "a multiple of 32");
  return {group_size, static_cast<int32_t>(groups),
          static_cast<int32_t>(run_bytes * 8 / group_size)};
}

tailorkv::Grouping code_grouping(const tailorkv::Shape& shape, const Tensor& key_codes) {
  auto grouping = grouping_of(shape, key_codes.size(2), key_codes.size(4));
  REQUIRE(grouping.bits == 1 || grouping.bits == 2 || grouping.bits == 4, "bits", "1, 2 or 4");
  return grouping;
}

const int32_t* row_values(const Tensor& tensor, const char* name, int64_t rows) {
  require_contiguous(tensor, name, 1, ScalarType::Int);
  REQUIRE(tensor.size(0) == rows, name, "one value for every row");
  return static_cast<const int32_t*>(tensor.data_ptr());
}

tailorkv::BlockTable block_table_of(const Tensor& tensor, int64_t rows) {
  require(tensor, "block_table", 2, ScalarType::Int);
  REQUIRE(tensor.size(0) == rows && (tensor.size(1) <= 1 || tensor.stride(1) == 1), "block_table",
          "[R, max_blocks] with contiguous rows");
  return {static_cast<const int32_t*>(tensor.data_ptr()), tensor.stride(0)};
}

tailorkv::Decode decode_of(const Tensor& output, const Tensor& query, const Tensor& key_cache,
                           const Tensor& value_cache, const Tensor& block_table,
                           const Tensor& seq_lens, double scale, double softcap) {
  const auto dtype = key_cache.scalar_type();
  require_contiguous(query, "query", 3, dtype);
  require_contiguous(output, "output", 3, dtype);
  const auto shape = shape_of(key_cache);
  const int64_t rows = query.size(0);
  REQUIRE(query.size(1) % shape.kv_heads == 0 && query.size(2) == shape.head_size, "query",
          "[R, H, d]");
  return {float_dtype(key_cache, "key_cache"),
          shape,
          size(query, 0),
          size(query, 1),
          output.data_ptr(),
          query.data_ptr(),
          cache(key_cache, "key_cache", dtype),
          cache(value_cache, "value_cache", dtype),
          block_table_of(block_table, rows),
          row_values(seq_lens, "seq_lens", rows),
          static_cast<float>(scale),
          static_cast<float>(softcap)};
}

void log_mass(const Tensor& mass, const Tensor& query, const Tensor& key_cache,
              const Tensor& block_table, const Tensor& seq_lens, const Tensor& tail_start,
              int64_t sink_tokens, double scale, double softcap) {
  auto decode =
      decode_of(query, query, key_cache, key_cache, block_table, seq_lens, scale, softcap);
  require_contiguous(mass, "mass", 2, ScalarType::Float);
  REQUIRE(mass.size(0) == decode.rows && mass.size(1) == decode.query_heads, "mass", "[R, H]");
  kernels().log_mass({decode, static_cast<float*>(mass.data_ptr()),
                      static_cast<int32_t>(sink_tokens),
                      row_values(tail_start, "tail_start", decode.rows)});
}

tailorkv::ScoreTokens score_of(const Tensor& query, const tailorkv::Shape& shape,
                               const tailorkv::Grouping& grouping, const Tensor& block_table,
                               const Tensor& tail_start, const Tensor& offset,
                               int64_t sink_tokens) {
  require_contiguous(query, "query", 4, ScalarType::Float);
  require_contiguous(offset, "offset", 3, ScalarType::Float);
  const int64_t rows = query.size(0);
  REQUIRE(
      offset.size(0) == rows && offset.size(1) == query.size(1) && offset.size(2) == query.size(2),
      "offset", "[R, Hk, Q]");
  return {shape,
          grouping,
          size(query, 0),
          size(query, 2),
          nullptr,
          0,
          0,
          static_cast<const float*>(query.data_ptr()),
          static_cast<const float*>(offset.data_ptr()),
          block_table_of(block_table, rows),
          row_values(tail_start, "tail_start", rows),
          static_cast<int32_t>(sink_tokens)};
}

void write_kv(const Tensor& key, const Tensor& value, const Tensor& key_cache,
              const Tensor& value_cache, const Tensor& slot_mapping,
              const std::optional<Tensor>& key_rows) {
  const auto dtype = key_cache.scalar_type();
  require(key, "key", 3, dtype);
  require(value, "value", 3, dtype);
  REQUIRE(key.stride(2) == 1 && value.stride(2) == 1, "key and value", "contiguous in channels");
  require_contiguous(slot_mapping, "slot_mapping", 1, ScalarType::Long);
  kernels().write_kv({float_dtype(key_cache, "key_cache"), shape_of(key_cache), key.size(0),
                      key.data_ptr(), value.data_ptr(), key.stride(0), key.stride(1),
                      value.stride(0), value.stride(1), cache(key_cache, "key_cache", dtype),
                      cache(value_cache, "value_cache", dtype),
                      static_cast<const int64_t*>(slot_mapping.data_ptr()),
                      key_rows ? cache(*key_rows, "key_rows", dtype) : tailorkv::Cache{}});
}

tailorkv::QuantizeGroups quantize_of(tailorkv::Derive derive, const Tensor& groups,
                                     const Tensor& key_cache, const Tensor& value_cache) {
  require_contiguous(groups, "groups", 1, ScalarType::Long);
  const auto dtype = key_cache.scalar_type();
  tailorkv::QuantizeGroups op{};
  op.dtype = float_dtype(key_cache, "key_cache");
  op.shape = shape_of(key_cache);
  op.derive = derive;
  op.num_groups = groups.size(0);
  op.groups = static_cast<const int64_t*>(groups.data_ptr());
  op.key_cache = cache(key_cache, "key_cache", dtype);
  op.value_cache = cache(value_cache, "value_cache", dtype);
  return op;
}

void quantize_dense(const Tensor& groups, const Tensor& key_cache, const Tensor& value_cache,
                    const Tensor& key_codes, const Tensor& key_scale, const Tensor& key_zero,
                    const Tensor& value_codes, const Tensor& value_scale, const Tensor& value_zero,
                    bool fit) {
  auto op = quantize_of(tailorkv::Derive::kDense, groups, key_cache, value_cache);
  op.fit = fit;
  op.key = codes_of(key_codes, key_scale, key_zero, 4);
  op.value = codes_of(value_codes, value_scale, value_zero, 5);
  op.grouping = code_grouping(op.shape, key_codes);
  kernels().quantize_groups(op);
}

void quantize_onebit(const Tensor& groups, const Tensor& key_cache, const Tensor& key_codes,
                     const Tensor& key_scale, const Tensor& key_zero, bool fit) {
  auto op = quantize_of(tailorkv::Derive::kOnebit, groups, key_cache, key_cache);
  op.fit = fit;
  op.key = codes_of(key_codes, key_scale, key_zero, 4);
  op.grouping = code_grouping(op.shape, key_codes);
  kernels().quantize_groups(op);
}

void reduce_channels(const Tensor& groups, const Tensor& key_cache, const Tensor& extremes) {
  auto op = quantize_of(tailorkv::Derive::kChannels, groups, key_cache, key_cache);
  op.extremes = records<void>(extremes, "extremes", 5, key_cache.scalar_type());
  op.grouping = grouping_of(op.shape, extremes.size(2), 0);
  kernels().quantize_groups(op);
}

void quantized_decode_attention(const Tensor& output, const Tensor& query, const Tensor& key_cache,
                                const Tensor& value_cache, const Tensor& key_codes,
                                const Tensor& key_scale, const Tensor& key_zero,
                                const Tensor& value_codes, const Tensor& value_scale,
                                const Tensor& value_zero, const Tensor& block_table,
                                const Tensor& seq_lens, const Tensor& num_quantized, double scale,
                                double softcap) {
  auto decode =
      decode_of(output, query, key_cache, value_cache, block_table, seq_lens, scale, softcap);
  kernels().quantized_decode_attention({decode, code_grouping(decode.shape, key_codes),
                                        codes_of(key_codes, key_scale, key_zero, 4),
                                        codes_of(value_codes, value_scale, value_zero, 5),
                                        row_values(num_quantized, "num_quantized", decode.rows)});
}

tailorkv::ScoreOnebit onebit_of(const Tensor& query, const Tensor& key_codes,
                                const Tensor& key_scale, const Tensor& key_zero,
                                const Tensor& block_table, const Tensor& tail_start,
                                const Tensor& offset, int64_t sink_tokens, int64_t block_size) {
  REQUIRE(query.dim() == 4, "query", "[R, Hk, Q, d]");
  const tailorkv::Shape shape{size(query, 1), static_cast<int32_t>(block_size), size(query, 3)};
  auto grouping = code_grouping(shape, key_codes);
  REQUIRE(grouping.bits == 1, "the index", "of one bit");
  return {score_of(query, shape, grouping, block_table, tail_start, offset, sink_tokens),
          codes_of(key_codes, key_scale, key_zero, 4)};
}

tailorkv::ScoreChannels channels_of(const Tensor& query, const Tensor& extremes,
                                    const Tensor& key_cache, const Tensor& block_table,
                                    const Tensor& tail_start, const Tensor& offset,
                                    int64_t sink_tokens, int64_t critical_channels) {
  const auto dtype = key_cache.scalar_type();
  const auto shape = shape_of(key_cache);
  REQUIRE(query.dim() == 4 && query.size(1) == shape.kv_heads && query.size(3) == shape.head_size,
          "query", "[R, Hk, Q, d]");
  return {score_of(query, shape, grouping_of(shape, extremes.size(2), 0), block_table, tail_start,
                   offset, sink_tokens),
          float_dtype(key_cache, "key_cache"), records<void>(extremes, "extremes", 5, dtype),
          cache(key_cache, "key_cache", dtype), static_cast<int32_t>(critical_channels)};
}

void give_scores(tailorkv::ScoreTokens& score, const Tensor& scores) {
  require(scores, "scores", 3, ScalarType::Float);
  score.scores = static_cast<float*>(scores.data_ptr());
  score.scores_row = scores.stride(0);
  score.scores_head = scores.stride(1);
}

int32_t* indices_of(const Tensor& indices) {
  require_contiguous(indices, "indices", 3, ScalarType::Int);
  return static_cast<int32_t*>(indices.data_ptr());
}

void score_onebit(const Tensor& scores, const Tensor& query, const Tensor& key_codes,
                  const Tensor& key_scale, const Tensor& key_zero, const Tensor& block_table,
                  const Tensor& tail_start, const Tensor& offset, int64_t sink_tokens,
                  int64_t block_size) {
  auto op = onebit_of(query, key_codes, key_scale, key_zero, block_table, tail_start, offset,
                      sink_tokens, block_size);
  give_scores(op.score, scores);
  kernels().score_onebit(op);
}

void score_channels(const Tensor& scores, const Tensor& query, const Tensor& extremes,
                    const Tensor& key_cache, const Tensor& block_table, const Tensor& tail_start,
                    const Tensor& offset, int64_t sink_tokens, int64_t critical_channels) {
  auto op = channels_of(query, extremes, key_cache, block_table, tail_start, offset, sink_tokens,
                        critical_channels);
  give_scores(op.score, scores);
  kernels().score_channels(op);
}

void propose_onebit(const Tensor& indices, const Tensor& query, const Tensor& key_codes,
                    const Tensor& key_scale, const Tensor& key_zero, const Tensor& block_table,
                    const Tensor& tail_start, const Tensor& offset, int64_t sink_tokens,
                    int64_t block_size) {
  kernels().propose_onebit({onebit_of(query, key_codes, key_scale, key_zero, block_table,
                                      tail_start, offset, sink_tokens, block_size),
                            indices_of(indices), size(indices, 2)});
}

void propose_channels(const Tensor& indices, const Tensor& query, const Tensor& extremes,
                      const Tensor& key_cache, const Tensor& block_table, const Tensor& tail_start,
                      const Tensor& offset, int64_t sink_tokens, int64_t critical_channels) {
  kernels().propose_channels({channels_of(query, extremes, key_cache, block_table, tail_start,
                                          offset, sink_tokens, critical_channels),
                              indices_of(indices), size(indices, 2)});
}

void select_topk(const Tensor& indices, const Tensor& scores, const Tensor& tail_start,
                 int64_t sink_tokens) {
  require_contiguous(indices, "indices", 3, ScalarType::Int);
  require(scores, "scores", 3, ScalarType::Float);
  kernels().select_topk({size(indices, 0), size(indices, 1), size(indices, 2),
                         static_cast<int32_t*>(indices.data_ptr()),
                         static_cast<const float*>(scores.data_ptr()), scores.stride(0),
                         scores.stride(1), row_values(tail_start, "tail_start", indices.size(0)),
                         static_cast<int32_t>(sink_tokens)});
}

void refine_topk(const Tensor& indices, const Tensor& candidates, const Tensor& query,
                 const Tensor& key_cache, const Tensor& block_table, const Tensor& mass,
                 int64_t channels, double scale, double softcap) {
  const auto dtype = key_cache.scalar_type();
  const auto shape = shape_of(key_cache);
  require_contiguous(indices, "indices", 3, ScalarType::Int);
  require_contiguous(candidates, "candidates", 3, ScalarType::Int);
  require_contiguous(query, "query", 3, dtype);
  require_contiguous(mass, "mass", 2, ScalarType::Float);
  kernels().refine_topk(
      {float_dtype(key_cache, "key_cache"), shape, size(query, 0), size(query, 1), size(indices, 2),
       size(candidates, 2), static_cast<int32_t*>(indices.data_ptr()),
       static_cast<const int32_t*>(candidates.data_ptr()), query.data_ptr(),
       cache(key_cache, "key_cache", dtype), block_table_of(block_table, query.size(0)),
       static_cast<const float*>(mass.data_ptr()), static_cast<int32_t>(channels),
       static_cast<float>(scale), static_cast<float>(softcap)});
}

void sparse_decode_attention(const Tensor& output, const Tensor& query, const Tensor& key_cache,
                             const Tensor& value_cache, const Tensor& indices,
                             const Tensor& block_table, const Tensor& seq_lens,
                             const Tensor& tail_start, int64_t sink_tokens, double scale,
                             double softcap) {
  require_contiguous(indices, "indices", 3, ScalarType::Int);
  auto decode =
      decode_of(output, query, key_cache, value_cache, block_table, seq_lens, scale, softcap);
  kernels().sparse_decode_attention({decode, static_cast<const int32_t*>(indices.data_ptr()),
                                     size(indices, 2), static_cast<int32_t>(sink_tokens),
                                     row_values(tail_start, "tail_start", decode.rows)});
}

void dense_preference(const Tensor& result, const Tensor& query, const Tensor& key, int64_t kept,
                      double scale, double softcap) {
  const auto dtype = key.scalar_type();
  require_contiguous(query, "query", 3, dtype);
  require_contiguous(key, "key", 3, dtype);
  require_contiguous(result, "result", 1, ScalarType::Float);
  kernels().dense_preference({float_dtype(key, "key"), size(query, 0), size(query, 1), size(key, 1),
                              size(key, 2), key.size(0), query.data_ptr(), key.data_ptr(), kept,
                              static_cast<float>(scale), static_cast<float>(softcap),
                              static_cast<float*>(result.data_ptr())});
}

std::string isa() { return kernels().name; }

void set_isa(std::string name) { tailorkv::set_kernels(name.c_str()); }

}  // namespace

STABLE_TORCH_LIBRARY(vllm_tailorkv, m) {
  m.def(
      "write_kv(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) "
      "value_cache, "
      "Tensor slot_mapping, Tensor(c!)? key_rows) -> ()");
  m.def(
      "quantize_dense(Tensor groups, Tensor key_cache, Tensor value_cache, "
      "Tensor(a!) key_codes, "
      "Tensor(b!) key_scale, Tensor(c!) key_zero, Tensor(d!) value_codes, "
      "Tensor(e!) value_scale, "
      "Tensor(f!) value_zero, bool fit) -> ()");
  m.def(
      "quantize_onebit(Tensor groups, Tensor key_cache, Tensor(a!) key_codes, "
      "Tensor(b!) key_scale, Tensor(c!) key_zero, bool fit) -> ()");
  m.def(
      "reduce_channels(Tensor groups, Tensor key_cache, Tensor(a!) extremes) "
      "-> ()");
  m.def(
      "quantized_decode_attention(Tensor(a!) output, Tensor query, Tensor "
      "key_cache, "
      "Tensor value_cache, Tensor key_codes, Tensor key_scale, Tensor "
      "key_zero, "
      "Tensor value_codes, Tensor value_scale, Tensor value_zero, Tensor "
      "block_table, "
      "Tensor seq_lens, Tensor num_quantized, float scale, float softcap) -> "
      "()");
  m.def(
      "log_mass(Tensor(a!) mass, Tensor query, Tensor key_cache, Tensor block_table, Tensor "
      "seq_lens, Tensor tail_start, int sink_tokens, float scale, float softcap) -> ()");
  m.def(
      "score_onebit(Tensor(a!) scores, Tensor query, Tensor key_codes, "
      "Tensor key_scale, "
      "Tensor key_zero, Tensor block_table, Tensor tail_start, Tensor offset, int "
      "sink_tokens, int block_size) "
      "-> ()");
  m.def(
      "score_channels(Tensor(a!) scores, Tensor query, Tensor extremes, Tensor "
      "key_cache, "
      "Tensor block_table, Tensor tail_start, Tensor offset, int sink_tokens, int "
      "critical_channels) -> ()");
  m.def(
      "propose_onebit(Tensor(a!) indices, Tensor query, Tensor key_codes, Tensor key_scale, "
      "Tensor key_zero, Tensor block_table, Tensor tail_start, Tensor offset, int sink_tokens, int "
      "block_size) "
      "-> ()");
  m.def(
      "propose_channels(Tensor(a!) indices, Tensor query, Tensor extremes, Tensor key_cache, "
      "Tensor block_table, Tensor tail_start, Tensor offset, int sink_tokens, int "
      "critical_channels) -> ()");
  m.def(
      "select_topk(Tensor(a!) indices, Tensor scores, Tensor tail_start, int "
      "sink_tokens) -> ()");
  m.def(
      "refine_topk(Tensor(a!) indices, Tensor candidates, Tensor query, Tensor key_cache, "
      "Tensor block_table, Tensor mass, int channels, float scale, float softcap) -> ()");
  m.def(
      "sparse_decode_attention(Tensor(a!) output, Tensor query, Tensor "
      "key_cache, "
      "Tensor value_cache, Tensor indices, Tensor block_table, Tensor "
      "seq_lens, "
      "Tensor tail_start, int sink_tokens, float scale, float softcap) -> ()");
  m.def(
      "dense_preference(Tensor(a!) result, Tensor query, Tensor key, int "
      "kept, float scale, float softcap) -> ()");
  m.def("isa() -> str");
  m.def("set_isa(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_tailorkv, CPU, m) {
  m.impl("write_kv", TORCH_BOX(&write_kv));
  m.impl("quantize_dense", TORCH_BOX(&quantize_dense));
  m.impl("quantize_onebit", TORCH_BOX(&quantize_onebit));
  m.impl("reduce_channels", TORCH_BOX(&reduce_channels));
  m.impl("quantized_decode_attention", TORCH_BOX(&quantized_decode_attention));
  m.impl("log_mass", TORCH_BOX(&log_mass));
  m.impl("score_onebit", TORCH_BOX(&score_onebit));
  m.impl("score_channels", TORCH_BOX(&score_channels));
  m.impl("propose_onebit", TORCH_BOX(&propose_onebit));
  m.impl("propose_channels", TORCH_BOX(&propose_channels));
  m.impl("select_topk", TORCH_BOX(&select_topk));
  m.impl("refine_topk", TORCH_BOX(&refine_topk));
  m.impl("sparse_decode_attention", TORCH_BOX(&sparse_decode_attention));
  m.impl("dense_preference", TORCH_BOX(&dense_preference));
}

STABLE_TORCH_LIBRARY_IMPL(vllm_tailorkv, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("set_isa", TORCH_BOX(&set_isa));
}

// Importing the module registers the library; it holds nothing else.
PyMODINIT_FUNC PyInit__cpu() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
