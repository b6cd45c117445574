// The torch library `vllm_tailorkv_cuda`: checks what the kernels rely on for memory safety, then
// passes pointers and strides. It needs no CUDA library to load: the current stream is looked up in
// torch's when the first op runs.
#include <Python.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

#include "ops.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define REQUIRE(condition, name, what) \
  STD_TORCH_CHECK(condition, "vllm_tailorkv_cuda: ", name, " must be ", what)

void require(const Tensor& tensor, const char* name, int64_t dim, ScalarType dtype) {
  REQUIRE(tensor.dim() == dim, name, "of the rank of its contract");
  REQUIRE(tensor.scalar_type() == dtype, name, "of the dtype of its contract");
}

void require_contiguous(const Tensor& tensor, const char* name, int64_t dim, ScalarType dtype) {
  require(tensor, name, dim, dtype);
  REQUIRE(tensor.is_contiguous(), name, "contiguous");
}

void require_on_device(const Tensor& tensor, const char* name, int32_t device) {
  REQUIRE(tensor.is_cuda() && tensor.get_device_index() == device, name,
          "on the CUDA device of the first output");
}

// The CUDA device that an op runs on, that of its first output.
int32_t device_of(const Tensor& tensor, const char* name) {
  REQUIRE(tensor.is_cuda(), name, "on a CUDA device");
  return tensor.get_device_index();
}

int32_t size(const Tensor& tensor, int64_t axis) {
  REQUIRE(tensor.size(axis) <= INT32_MAX, "an axis", "below 2^31");
  return static_cast<int32_t>(tensor.size(axis));
}

int32_t item_bytes(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return 4;
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2;
    default:
      REQUIRE(false, name, "float32, float16 or bfloat16");
  }
  return 0;
}

bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// Pages read 16 bytes at a time: all but the unit stride are multiples of that.
tailorkv::cuda::Pages pages_of(const Tensor& tensor, const char* name, ScalarType dtype) {
  require(tensor, name, 4, dtype);
  const int64_t bytes = item_bytes(tensor, name);
  const tailorkv::cuda::Pages pages{tensor.data_ptr(), tensor.stride(0) * bytes,
                                    tensor.stride(1) * bytes, tensor.stride(2) * bytes,
                                    tensor.stride(3) * bytes};
  REQUIRE(is_aligned(pages.data) && pages.block % 16 == 0 && pages.head % 16 == 0 &&
              (pages.token == bytes || pages.token % 16 == 0) &&
              (pages.channel == bytes || pages.channel % 16 == 0),
          name, "aligned to 16 bytes in each stride but the last");
  return pages;
}

// Pages on the device, or in host memory that it can read.
tailorkv::cuda::Pages readable(tailorkv::cuda::Pages pages, const Tensor& tensor, const char* name,
                               int32_t device) {
  if (tensor.numel() == 0) return pages;
  if (tensor.is_cuda()) {
    require_on_device(tensor, name, device);
    return pages;
  }
  pages.data = tailorkv::cuda::device_address(pages.data);
  REQUIRE(pages.data != nullptr, name, "on the device or in pinned memory");
  return pages;
}

// The stream that torch has made current on a device.
void* current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr
               ? nullptr
               : reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(function != nullptr, "vllm_tailorkv_cuda: this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return stream;
}

void require_launched(const char* error, const char* op) {
  STD_TORCH_CHECK(error == nullptr, "vllm_tailorkv_cuda: ", op, " could not be launched: ", error);
}

void select_topk(const Tensor& indices, const Tensor& scores, const Tensor& tail_start,
                 int64_t sink_tokens) {
  require_contiguous(indices, "indices", 3, ScalarType::Int);
  require(scores, "scores", 3, ScalarType::Float);
  require_contiguous(tail_start, "tail_start", 1, ScalarType::Int);
  REQUIRE(scores.size(0) == indices.size(0) && scores.size(1) == indices.size(1), "scores",
          "[R, Hk, S] for indices [R, Hk, k]");
  REQUIRE(scores.size(2) <= 1 || scores.stride(2) == 1, "scores", "contiguous in its last axis");
  REQUIRE(tail_start.size(0) == indices.size(0), "tail_start", "one value for every row");
  REQUIRE(sink_tokens >= 0 && sink_tokens <= INT32_MAX, "sink_tokens", "from 0 to 2^31 - 1");
  const int32_t device = device_of(indices, "indices");
  require_on_device(scores, "scores", device);
  require_on_device(tail_start, "tail_start", device);
  if (indices.numel() == 0) return;
  const tailorkv::cuda::SelectTopk op{size(indices, 0),
                                      size(indices, 1),
                                      size(indices, 2),
                                      size(scores, 2),
                                      static_cast<int32_t>(sink_tokens),
                                      static_cast<int32_t*>(indices.data_ptr()),
                                      static_cast<const float*>(scores.data_ptr()),
                                      scores.stride(0),
                                      scores.stride(1),
                                      static_cast<const int32_t*>(tail_start.data_ptr())};
  const torch::stable::accelerator::DeviceGuard guard(device);
  int32_t parts = 0;
  require_launched(tailorkv::cuda::topk_parts(op, device, &parts), "select_topk");
  const Tensor workspace = torch::stable::new_empty(
      indices, {tailorkv::cuda::topk_workspace_bytes(op, parts)}, ScalarType::Byte);
  require_launched(
      tailorkv::cuda::select_topk(op, workspace.data_ptr(), parts, current_stream(device)),
      "select_topk");
}

void gather_rows(const Tensor& key_rows, const Tensor& value_rows, const Tensor& key_cache,
                 const Tensor& value_cache, const Tensor& indices, const Tensor& block_table) {
  const auto dtype = key_cache.scalar_type();
  auto key_pages = pages_of(key_cache, "key_cache", dtype);
  auto value_pages = pages_of(value_cache, "value_cache", dtype);
  require_contiguous(indices, "indices", 3, ScalarType::Int);
  require_contiguous(key_rows, "key_rows", 4, dtype);
  require_contiguous(value_rows, "value_rows", 4, dtype);
  require(block_table, "block_table", 2, ScalarType::Int);
  const int64_t bytes = item_bytes(key_cache, "key_cache"), row_bytes = key_cache.size(3) * bytes;
  REQUIRE(key_pages.channel == bytes, "key_cache", "token-major: a row of a token contiguous");
  REQUIRE(value_pages.channel == bytes, "value_cache", "token-major: a row of a token contiguous");
  REQUIRE(row_bytes > 0 && row_bytes % 16 == 0 && row_bytes <= 4096, "head_size",
          "a multiple of 16 bytes, at most 4096");
  for (int64_t axis = 0; axis < 4; ++axis) {
    REQUIRE(value_cache.size(axis) == key_cache.size(axis), "value_cache", "of key_cache's shape");
    const int64_t expected = axis < 3 ? indices.size(axis) : key_cache.size(3);
    REQUIRE(key_rows.size(axis) == expected, "key_rows", "[R, Hk, k, d]");
    REQUIRE(value_rows.size(axis) == expected, "value_rows", "[R, Hk, k, d]");
  }
  REQUIRE(indices.size(1) == key_cache.size(1), "indices", "[R, Hk, k]");
  REQUIRE(block_table.size(0) == indices.size(0) &&
              (block_table.size(1) <= 1 || block_table.stride(1) == 1),
          "block_table", "[R, max_blocks] with contiguous rows");
  REQUIRE(is_aligned(key_rows.data_ptr()) && is_aligned(value_rows.data_ptr()),
          "key_rows and value_rows", "aligned to 16 bytes");
  const int32_t device = device_of(key_rows, "key_rows");
  require_on_device(value_rows, "value_rows", device);
  require_on_device(indices, "indices", device);
  require_on_device(block_table, "block_table", device);
  if (key_rows.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(device);
  key_pages = readable(key_pages, key_cache, "key_cache", device);
  value_pages = readable(value_pages, value_cache, "value_cache", device);
  require_launched(tailorkv::cuda::gather_rows(
                       {size(indices, 0), size(indices, 1), size(indices, 2), size(key_cache, 2),
                        static_cast<int32_t>(row_bytes), key_rows.data_ptr(), value_rows.data_ptr(),
                        key_pages, value_pages, static_cast<const int32_t*>(indices.data_ptr()),
                        static_cast<const int32_t*>(block_table.data_ptr()), block_table.stride(0)},
                       current_stream(device)),
                   "gather_rows");
}

tailorkv::cuda::Codes codes_of(const Tensor& codes, const Tensor& packed, int64_t bits) {
  REQUIRE(bits == 1 || bits == 2 || bits == 4, "bits", "1, 2 or 4");
  require_contiguous(codes, "codes", 2, ScalarType::Byte);
  require_contiguous(packed, "packed", 2, ScalarType::Byte);
  REQUIRE(packed.size(0) == codes.size(0), "packed", "as many rows as codes");
  REQUIRE(packed.size(1) == (codes.size(1) * bits + 7) / 8, "packed",
          "[rows, ceil(length * bits / 8)]");
  return {static_cast<int32_t>(bits), codes.size(0), codes.size(1),
          static_cast<uint8_t*>(codes.data_ptr()), static_cast<uint8_t*>(packed.data_ptr())};
}

void pack_codes(const Tensor& packed, const Tensor& codes, int64_t bits) {
  const auto op = codes_of(codes, packed, bits);
  const int32_t device = device_of(packed, "packed");
  require_on_device(codes, "codes", device);
  const torch::stable::accelerator::DeviceGuard guard(device);
  require_launched(tailorkv::cuda::pack_codes(op, current_stream(device)), "pack_codes");
}

void unpack_codes(const Tensor& codes, const Tensor& packed, int64_t bits) {
  const auto op = codes_of(codes, packed, bits);
  const int32_t device = device_of(codes, "codes");
  require_on_device(packed, "packed", device);
  const torch::stable::accelerator::DeviceGuard guard(device);
  require_launched(tailorkv::cuda::unpack_codes(op, current_stream(device)), "unpack_codes");
}

void reduce_channels(const Tensor& groups, const Tensor& key_cache, const Tensor& extremes) {
  const auto dtype = key_cache.scalar_type();
  require_contiguous(groups, "groups", 1, ScalarType::Long);
  auto pages = pages_of(key_cache, "key_cache", dtype);
  require(extremes, "extremes", 5, dtype);
  const int32_t bytes = item_bytes(key_cache, "key_cache");
  REQUIRE(pages.channel == bytes || pages.token == bytes, "key_cache",
          "contiguous in its tokens or in its channels");
  const int32_t groups_per_block = size(extremes, 2);
  REQUIRE(groups_per_block > 0 && key_cache.size(2) % groups_per_block == 0, "block_size",
          "a multiple of group_size");
  const int32_t group_size = size(key_cache, 2) / groups_per_block;
  REQUIRE(group_size % 32 == 0 && group_size <= 1024, "group_size", "a multiple of 32 up to 1024");
  REQUIRE(key_cache.size(3) > 0 && key_cache.size(3) % 8 == 0 && key_cache.size(3) <= 1024,
          "head_size", "a multiple of 8 up to 1024");
  REQUIRE(extremes.size(0) == key_cache.size(0) && extremes.size(1) == key_cache.size(1) &&
              extremes.size(3) == 2 && extremes.size(4) == key_cache.size(3) &&
              extremes.stride(3) == extremes.size(4) && extremes.stride(4) == 1,
          "extremes", "[NB, Hk, G, 2, d] with contiguous last axes");
  // Of two channels a thread writes both at once.
  for (int64_t axis = 0; axis < 3; ++axis) {
    REQUIRE(extremes.stride(axis) * bytes % 4 == 0, "extremes",
            "aligned to 4 bytes in each stride");
  }
  REQUIRE(reinterpret_cast<uintptr_t>(extremes.data_ptr()) % 4 == 0, "extremes",
          "aligned to 4 bytes");
  const int32_t device = device_of(extremes, "extremes");
  require_on_device(groups, "groups", device);
  if (groups.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(device);
  pages = readable(pages, key_cache, "key_cache", device);
  require_launched(
      tailorkv::cuda::reduce_channels(
          {bytes, size(key_cache, 1), size(key_cache, 3), group_size, groups_per_block,
           groups.size(0), static_cast<const int64_t*>(groups.data_ptr()), pages,
           extremes.data_ptr(), extremes.stride(0), extremes.stride(1), extremes.stride(2)},
          current_stream(device)),
      "reduce_channels");
}

std::string archs() { return tailorkv::cuda::architectures(); }

}  // namespace

STABLE_TORCH_LIBRARY(vllm_tailorkv_cuda, m) {
  m.def("select_topk(Tensor(a!) indices, Tensor scores, Tensor tail_start, int sink_tokens) -> ()");
  m.def(
      "gather_rows(Tensor(a!) key_rows, Tensor(b!) value_rows, Tensor key_cache, "
      "Tensor value_cache, Tensor indices, Tensor block_table) -> ()");
  m.def("pack_codes(Tensor(a!) packed, Tensor codes, int bits) -> ()");
  m.def("unpack_codes(Tensor(a!) codes, Tensor packed, int bits) -> ()");
  m.def("reduce_channels(Tensor groups, Tensor key_cache, Tensor(a!) extremes) -> ()");
  m.def("archs() -> str");
}

// For every device, so that tensors elsewhere meet our checks and their messages.
STABLE_TORCH_LIBRARY_IMPL(vllm_tailorkv_cuda, CompositeExplicitAutograd, m) {
  m.impl("select_topk", TORCH_BOX(&select_topk));
  m.impl("gather_rows", TORCH_BOX(&gather_rows));
  m.impl("pack_codes", TORCH_BOX(&pack_codes));
  m.impl("unpack_codes", TORCH_BOX(&unpack_codes));
  m.impl("reduce_channels", TORCH_BOX(&reduce_channels));
  m.impl("archs", TORCH_BOX(&archs));
}

// Importing the module registers the library; it holds nothing else.
PyMODINIT_FUNC PyInit__cuda() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
