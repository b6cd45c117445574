// The arguments of the ops, without torch and without CUDA: what the binding fills in and the
// kernels take. Symbols are those of `kernels/types.py`; strides count elements unless said.
#pragma once

#include <cstdint>

namespace tailorkv::cuda {

// K or V of every block: [NB, Hk, bs, d] with strides in bytes.
struct Pages {
  const void* data;
  int64_t block, head, token, channel;
};

// The k best middle tokens of each row and KV head.
struct SelectTopk {
  int32_t rows, kv_heads;
  int32_t k;
  int32_t capacity;  // S, the most tokens a row can have
  int32_t sink_tokens;
  int32_t* indices;     // [R, Hk, k]
  const float* scores;  // [R, Hk, S]
  int64_t scores_row, scores_head;
  const int32_t* tail_start;  // [R]
};

// K and V rows of selected tokens.
struct GatherRows {
  int32_t rows, kv_heads;
  int32_t k;
  int32_t block_size;
  int32_t row_bytes;  // d times the bytes of an element, a multiple of 16
  void* key_rows;     // [R, Hk, k, d]
  void* value_rows;   // [R, Hk, k, d]
  Pages key_cache, value_cache;
  const int32_t* indices;      // [R, Hk, k]; a negative one gives a row of zeros
  const int32_t* block_table;  // [R, max_blocks]
  int64_t block_table_row;
};

// Rows of codes, one a byte, and the same rows packed.
struct Codes {
  int32_t bits;
  int64_t rows, length;
  uint8_t* codes;   // [rows, length]
  uint8_t* packed;  // [rows, ceil(length * bits / 8)]
};

// The extremes of each channel over groups of tokens.
struct ReduceChannels {
  int32_t item_bytes;  // 2 or 4
  int32_t kv_heads, head_size;
  int32_t group_size, groups_per_block;
  int64_t num_groups;
  const int64_t* groups;  // [N], block * G + group; a negative one is none
  Pages key_cache;        // its tokens or its channels are contiguous
  void* extremes;         // [NB, Hk, G, 2, d]
  int64_t extremes_block, extremes_head, extremes_group;
};

// Each launches on `stream` and returns nullptr, or why it could not.
const char* select_topk(const SelectTopk& op, void* workspace, int32_t parts, void* stream);
const char* gather_rows(const GatherRows& op, void* stream);
const char* pack_codes(const Codes& op, void* stream);
const char* unpack_codes(const Codes& op, void* stream);
const char* reduce_channels(const ReduceChannels& op, void* stream);

// Into how many parts a row's scores are cut so that the device is busy; the rest of
// `select_topk`'s scratch memory follows from it.
const char* topk_parts(const SelectTopk& op, int32_t device, int32_t* parts);
int64_t topk_workspace_bytes(const SelectTopk& op, int32_t parts);

// The address by which the current device reads pinned host memory, or nullptr if it cannot.
const void* device_address(const void* host);

// The compute capabilities compiled for, as "80 90".
const char* architectures();

}  // namespace tailorkv::cuda
