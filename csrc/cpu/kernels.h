// The CPU ops without torch: arguments as pointers and strides, one table of entry points for each
// instruction set. The contracts are those of `kernels/ops.py`; symbols are those of
// `kernels/types.py`. Strides are in elements.
#pragma once

#include <cstdint>

namespace tailorkv {

enum class Dtype : int32_t { kFloat32, kFloat16, kBfloat16 };

// Logical [NB, Hk, bs, d]: element (b, h, t, c) lies at `data + b*block + h*head + t*token +
// c*channel`.
struct Cache {
  void* data;
  int64_t block, head, token, channel;
};

// One array of group records, logical [NB, Hk, G, n, m], its last axis contiguous: element (b, h,
// i, j, l) lies at `data + b*block + h*head + i*group + j*item + l`.
template <class T>
struct Records {
  T* data;
  int64_t block, head, group, item;
};

// Codes of K ([.., d, g*b/8], scales [.., d]: item is 1) or of V ([.., g, ceil(d*b/8)], scales [..,
// g, Vg]); scales and zeros are float16 bits.
struct Codes {
  Records<uint8_t> codes;
  Records<uint16_t> scale, zero;
};

struct Shape {
  int32_t kv_heads, block_size, head_size;
};

// Codes exist for `bits` of 1, 2 or 4; groups_per_block * group_size = block_size.
struct Grouping {
  int32_t group_size, groups_per_block, bits;
};

// int32 [R, max_blocks], rows `stride` apart.
struct BlockTable {
  const int32_t* data;
  int64_t stride;
};

struct WriteKv {
  Dtype dtype;
  Shape shape;
  int64_t tokens;
  const void *key, *value;  // [T, Hk, d], channels contiguous
  int64_t key_token, key_head, value_token, value_head;
  Cache key_cache, value_cache;
  const int64_t* slots;  // [T]
  Cache key_rows;        // K once more; none without data
};

struct StageRows {
  Dtype dtype;
  Shape shape;
  int32_t rows;
  void *key_rows, *value_rows;  // [places, Hk, d]
  int64_t places;
  Cache key_cache, value_cache;
  BlockTable block_table;
  const int32_t* context_start;  // [rows + 1]
  int32_t first_token;
};

// Query token i of a row, of q, attends to the first seq_len - (q - 1 - i) tokens.
struct ExactAttention {
  Dtype dtype;
  Shape shape;
  int32_t rows, query_heads;  // R, H
  void* output;               // [T, H, d], channels contiguous
  int64_t output_token, output_head;
  const void* query;  // [T, H, d], channels contiguous
  int64_t query_token, query_head;
  Cache key_cache, value_cache;
  BlockTable block_table;
  const int32_t *query_start, *query_lens, *seq_lens;  // [R]
  float scale, softcap;
  const float* sink_logits;  // [H], or null
};

enum class Derive : int32_t { kDense, kOnebit, kChannels };

struct QuantizeGroups {
  Dtype dtype;
  Shape shape;
  Grouping grouping;
  Derive derive;
  bool fit;  // scales by least squares, with kDense and kOnebit
  int64_t num_groups;
  const int64_t* groups;  // [N]
  Cache key_cache, value_cache;
  Codes key, value;        // value with kDense, key with kDense and kOnebit
  Records<void> extremes;  // [NB, Hk, G, 2, d] of the caches' dtype, with kChannels
};

// What both decode attentions share.
struct Decode {
  Dtype dtype;
  Shape shape;
  int32_t rows, query_heads;  // R, H
  void* output;               // [R, H, d]
  const void* query;          // [R, H, d]
  Cache key_cache, value_cache;
  BlockTable block_table;
  const int32_t* seq_lens;  // [R]
  float scale, softcap;
  const float* sink_logits;  // [H], or null
};

struct QuantizedDecode {
  Decode decode;
  Grouping grouping;
  Codes key, value;
  const int32_t* tail_start;  // [R]
};

struct SparseDecode {
  Decode decode;
  const int32_t* indices;  // [R, Hk, k]
  int32_t k, sink_tokens;
  const int32_t* tail_start;  // [R]
};

struct LogMass {
  Decode decode;  // without output and V
  float* mass;    // [R, H]
  int32_t sink_tokens;
  const int32_t* tail_start;  // [R]
};

struct ScoreTokens {
  Shape shape;
  Grouping grouping;
  int32_t rows, queries;  // R, Q
  float* scores;          // [R, Hk, S]
  int64_t scores_row, scores_head;
  const float* query;   // [R, Hk, Q, d]
  const float* offset;  // [R, Hk, Q]
  BlockTable block_table;
  const int32_t* tail_start;  // [R]
  int32_t sink_tokens;
};

struct ScoreOnebit {
  ScoreTokens score;
  Codes key;
};

struct ScoreChannels {
  ScoreTokens score;
  Dtype dtype;
  Records<void> extremes;  // [NB, Hk, G, 2, d]
  Cache key_cache;
  int32_t critical_channels;
};

// score_tokens, and select_topk of what it would write; scores of `score` are not used.
struct ProposeOnebit {
  ScoreOnebit score;
  int32_t* indices;  // [R, Hk, k]
  int32_t k;
};

struct ProposeChannels {
  ScoreChannels score;
  int32_t* indices;  // [R, Hk, k]
  int32_t k;
};

struct SelectTopk {
  int32_t rows, kv_heads, k;
  int32_t* indices;     // [R, Hk, k]
  const float* scores;  // [R, Hk, S]
  int64_t scores_row, scores_head;
  const int32_t* tail_start;  // [R]
  int32_t sink_tokens;
};

struct RerankTopk {
  Dtype dtype;
  Shape shape;
  int32_t rows, query_heads, k, candidate_count;  // R, H, k, C
  int32_t* indices;                               // [R, Hk, k]
  const int32_t* candidates;                      // [R, Hk, C]
  const void* query;                              // [R, H, d]
  Cache key_cache;
  BlockTable block_table;
  const float* mass;  // [R, H]
  int32_t channels;
  float scale, softcap;
};

// All steps of retrieve_attention with a onebit index. Of what `index` and `rerank` have, the
// queries, their offsets, candidates, indices and masses are not used: they never leave a thread.
struct RetrieveAttention {
  LogMass log_mass;
  ScoreOnebit index;
  RerankTopk rerank;
  bool by_head;
};

struct DensePreference {
  Dtype dtype;
  int32_t queries, query_heads, kv_heads, head_size;  // n, H, Hk, d
  int64_t length;                                     // L
  const void* query;                                  // [n, H, d]
  const void* key;                                    // [L, Hk, d]
  int64_t kept;                                       // weights summed for a query
  float scale;
  float softcap;             // 0: none
  const float* sink_logits;  // [H], or null
  float* result;             // [H]
};

// The ops of one instruction set.
struct Kernels {
  const char* name;
  void (*write_kv)(const WriteKv&);
  void (*quantize_groups)(const QuantizeGroups&);
  void (*quantized_decode_attention)(const QuantizedDecode&);
  void (*log_mass)(const LogMass&);
  void (*score_onebit)(const ScoreOnebit&);
  void (*score_channels)(const ScoreChannels&);
  void (*select_topk)(const SelectTopk&);
  void (*propose_onebit)(const ProposeOnebit&);
  void (*propose_channels)(const ProposeChannels&);
  void (*rerank_topk)(const RerankTopk&);
  void (*sparse_decode_attention)(const SparseDecode&);
  void (*retrieve_attention)(const RetrieveAttention&);
  void (*dense_preference)(const DensePreference&);
  void (*stage_rows)(const StageRows&);
  void (*exact_attention)(const ExactAttention&);
};

// The table in use: the best for this processor, or what VLLM_TAILORKV_CPU_ISA or `set_kernels`
// asked for.
const Kernels& kernels();

// Use another instruction set from now on. Throws std::runtime_error if `name` is unknown or the
// processor lacks it.
void set_kernels(const char* name);

}  // namespace tailorkv
