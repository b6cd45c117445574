// The arguments of the op, without torch and without CUDA: what the binding fills in and the
// kernel takes. Symbols are those of `kernels/types.py`; strides count elements.
#pragma once

#include <cstdint>

namespace tailorkv::cuda {

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

// Launches on `stream` and returns nullptr, or why it could not.
const char* select_topk(const SelectTopk& op, void* workspace, int32_t parts, void* stream);

// Into how many parts a row's scores are cut so that the device is busy; the rest of
// `select_topk`'s scratch memory follows from it.
const char* topk_parts(const SelectTopk& op, int32_t device, int32_t* parts);
int64_t topk_workspace_bytes(const SelectTopk& op, int32_t parts);

// The compute capabilities compiled for, as "80 90".
const char* architectures();

}  // namespace tailorkv::cuda
