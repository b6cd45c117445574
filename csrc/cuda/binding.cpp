// The ops of the torch library `vllm_tailorkv` on CUDA devices: first the contract, by shapes and
// strides alone, which is all that the `Meta` variant does, then pointers, then the kernel. It
// needs no CUDA library to load: the current stream is looked up in torch's when the first op runs.
#include <Python.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "../contract.h"
#include "ops.h"

namespace tailorkv {
namespace {

// The CUDA device that an op runs on, that of its first output.
int32_t device_of(const Contract& contract, const Tensor& tensor, const char* name) {
  contract.require(tensor.is_cuda(), name, " must be on a CUDA device");
  return tensor.get_device_index();
}

template <class T>
T* data(const Contract& contract, const Tensor& tensor, const char* name, int32_t device) {
  contract.require(tensor.is_cuda() && tensor.get_device_index() == device, name,
                   " must be on the CUDA device of the first output");
  return static_cast<T*>(tensor.data_ptr());
}

int32_t size(const Tensor& tensor, int64_t axis) { return static_cast<int32_t>(tensor.size(axis)); }

int32_t item_bytes(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Float ? 4 : 2;
}

bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// Pages are read 16 bytes at a time: all but the unit stride are multiples of that.
void check_pages(const Contract& contract, const Tensor& tensor, const char* name) {
  const int64_t bytes = item_bytes(tensor);
  for (int64_t axis = 0; axis < 4; ++axis) {
    const int64_t stride = tensor.stride(axis) * bytes;
    contract.require(stride % 16 == 0 || (axis >= 2 && stride == bytes), name,
                     " must be aligned to 16 bytes in each stride but the last");
  }
}

// Pages on the device, or in host memory that it can read.
cuda::Pages pages_of(const Contract& contract, const Tensor& tensor, const char* name,
                     int32_t device) {
  const int64_t bytes = item_bytes(tensor);
  cuda::Pages pages{tensor.data_ptr(), tensor.stride(0) * bytes, tensor.stride(1) * bytes,
                    tensor.stride(2) * bytes, tensor.stride(3) * bytes};
  if (tensor.numel() == 0) return pages;
  if (tensor.is_cuda()) {
    data<void>(contract, tensor, name, device);
  } else {
    pages.data = cuda::device_address(pages.data);
    contract.require(pages.data != nullptr, name, " must be on the device or in pinned memory");
  }
  contract.require(is_aligned(pages.data), name, " must be aligned to 16 bytes");
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
  STD_TORCH_CHECK(function != nullptr, "vllm_tailorkv: this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return stream;
}

void require_launched(const char* error, const char* op) {
  STD_TORCH_CHECK(error == nullptr, "vllm_tailorkv::", op, " could not be launched: ", error);
}

void select_topk(const Tensor& indices, const Tensor& scores, const Tensor& tail_start,
                 int64_t sink_tokens) {
  const Contract contract("select_topk");
  check_select_topk(contract, indices, scores, tail_start, sink_tokens);
  const int32_t device = device_of(contract, indices, "indices");
  const cuda::SelectTopk op{size(indices, 0),
                            size(indices, 1),
                            size(indices, 2),
                            size(scores, 2),
                            static_cast<int32_t>(sink_tokens),
                            data<int32_t>(contract, indices, "indices", device),
                            data<const float>(contract, scores, "scores", device),
                            scores.stride(0),
                            scores.stride(1),
                            data<const int32_t>(contract, tail_start, "tail_start", device)};
  if (indices.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(device);
  int32_t parts = 0;
  require_launched(cuda::topk_parts(op, device, &parts), "select_topk");
  const Tensor workspace =
      torch::stable::new_empty(indices, {cuda::topk_workspace_bytes(op, parts)}, ScalarType::Byte);
  require_launched(cuda::select_topk(op, workspace.data_ptr(), parts, current_stream(device)),
                   "select_topk");
}

template <bool Run>
void gather_rows(const Tensor& key_rows, const Tensor& value_rows, const Tensor& key_cache,
                 const Tensor& value_cache, const Tensor& indices, const Tensor& block_table) {
  const Contract contract("gather_rows");
  Axis NB{"NB"}, Hk{"Hk"}, bs{"bs"}, d{"d"}, R{"R"}, k{"k"}, max_blocks{"max_blocks"};
  const auto dtype = key_cache.scalar_type();
  contract.floating(key_cache, "key_cache");
  contract.tensor(key_cache, "key_cache", dtype, Strides::kAny, {NB, Hk, bs, d});
  contract.tensor(value_cache, "value_cache", dtype, Strides::kAny, {NB, Hk, bs, d});
  contract.tensor(indices, "indices", ScalarType::Int, Strides::kContiguous, {R, Hk, k});
  contract.tensor(key_rows, "key_rows", dtype, Strides::kContiguous, {R, Hk, k, d});
  contract.tensor(value_rows, "value_rows", dtype, Strides::kContiguous, {R, Hk, k, d});
  contract.tensor(block_table, "block_table", ScalarType::Int, Strides::kRows, {R, max_blocks});
  const int64_t row_bytes = d.size * item_bytes(key_cache);
  contract.require(key_cache.stride(3) == 1,
                   "key_cache must be token-major: a row of a token contiguous");
  contract.require(value_cache.stride(3) == 1,
                   "value_cache must be token-major: a row of a token contiguous");
  contract.require(row_bytes > 0 && row_bytes % 16 == 0 && row_bytes <= 4096,
                   "head_size must be a multiple of 16 bytes, at most 4096");
  check_pages(contract, key_cache, "key_cache");
  check_pages(contract, value_cache, "value_cache");
  if (!Run) return;
  const int32_t device = device_of(contract, key_rows, "key_rows");
  auto* keys = data<void>(contract, key_rows, "key_rows", device);
  auto* values = data<void>(contract, value_rows, "value_rows", device);
  contract.require(is_aligned(keys) && is_aligned(values),
                   "key_rows and value_rows must be aligned to 16 bytes");
  const auto* tokens = data<const int32_t>(contract, indices, "indices", device);
  const auto* table = data<const int32_t>(contract, block_table, "block_table", device);
  if (key_rows.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(device);
  require_launched(cuda::gather_rows({size(indices, 0), size(indices, 1), size(indices, 2),
                                      size(key_cache, 2), static_cast<int32_t>(row_bytes), keys,
                                      values, pages_of(contract, key_cache, "key_cache", device),
                                      pages_of(contract, value_cache, "value_cache", device),
                                      tokens, table, block_table.stride(0)},
                                     current_stream(device)),
                   "gather_rows");
}

void check_codes(const Contract& contract, const Tensor& codes, const Tensor& packed,
                 int64_t bits) {
  contract.require(bits == 1 || bits == 2 || bits == 4, "bits must be 1, 2 or 4, is ", bits);
  Axis rows{"rows"}, length{"length"};
  contract.tensor(codes, "codes", ScalarType::Byte, Strides::kContiguous, {rows, length});
  contract.tensor(packed, "packed", ScalarType::Byte, Strides::kContiguous,
                  {rows, (length.size * bits + 7) / 8});
}

cuda::Codes codes_of(const Contract& contract, const Tensor& codes, const Tensor& packed,
                     int64_t bits, int32_t device) {
  return {static_cast<int32_t>(bits), codes.size(0), codes.size(1),
          data<uint8_t>(contract, codes, "codes", device),
          data<uint8_t>(contract, packed, "packed", device)};
}

template <bool Run>
void pack_codes(const Tensor& packed, const Tensor& codes, int64_t bits) {
  const Contract contract("pack_codes");
  check_codes(contract, codes, packed, bits);
  if (!Run) return;
  const int32_t device = device_of(contract, packed, "packed");
  const auto op = codes_of(contract, codes, packed, bits, device);
  const torch::stable::accelerator::DeviceGuard guard(device);
  require_launched(cuda::pack_codes(op, current_stream(device)), "pack_codes");
}

template <bool Run>
void unpack_codes(const Tensor& codes, const Tensor& packed, int64_t bits) {
  const Contract contract("unpack_codes");
  check_codes(contract, codes, packed, bits);
  if (!Run) return;
  const int32_t device = device_of(contract, codes, "codes");
  const auto op = codes_of(contract, codes, packed, bits, device);
  const torch::stable::accelerator::DeviceGuard guard(device);
  require_launched(cuda::unpack_codes(op, current_stream(device)), "unpack_codes");
}

template <bool Run>
void reduce_channels(const Tensor& groups, const Tensor& key_cache, const Tensor& extremes) {
  const Contract contract("reduce_channels");
  Axis N{"N"}, NB{"NB"}, Hk{"Hk"}, bs{"bs"}, d{"d"}, G{"G"};
  const auto dtype = key_cache.scalar_type();
  contract.floating(key_cache, "key_cache");
  contract.tensor(groups, "groups", ScalarType::Long, Strides::kContiguous, {N});
  contract.tensor(key_cache, "key_cache", dtype, Strides::kAny, {NB, Hk, bs, d});
  contract.tensor(extremes, "extremes", dtype, Strides::kRows, {NB, Hk, G, 2, d});
  contract.require(key_cache.stride(3) == 1 || key_cache.stride(2) == 1,
                   "key_cache must be contiguous in its tokens or in its channels");
  contract.require(G.size > 0 && bs.size % G.size == 0,
                   "block_size must be a multiple of group_size");
  const int64_t group_size = bs.size / G.size, bytes = item_bytes(key_cache);
  contract.require(group_size % 32 == 0 && group_size <= 1024,
                   "group_size must be a multiple of 32 up to 1024");
  contract.require(d.size > 0 && d.size % 8 == 0 && d.size <= 1024,
                   "head_size must be a multiple of 8 up to 1024");
  contract.require(extremes.stride(3) == d.size, "extremes must have contiguous last axes");
  // Of two channels a thread writes both at once.
  for (int64_t axis = 0; axis < 3; ++axis) {
    contract.require(extremes.stride(axis) * bytes % 4 == 0,
                     "extremes must be aligned to 4 bytes in each stride");
  }
  check_pages(contract, key_cache, "key_cache");
  if (!Run) return;
  const int32_t device = device_of(contract, extremes, "extremes");
  const auto* which = data<const int64_t>(contract, groups, "groups", device);
  contract.require(reinterpret_cast<uintptr_t>(extremes.data_ptr()) % 4 == 0,
                   "extremes must be aligned to 4 bytes");
  if (groups.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(device);
  require_launched(cuda::reduce_channels(
                       {static_cast<int32_t>(bytes), size(key_cache, 1), size(key_cache, 3),
                        static_cast<int32_t>(group_size), size(extremes, 2), groups.size(0), which,
                        pages_of(contract, key_cache, "key_cache", device), extremes.data_ptr(),
                        extremes.stride(0), extremes.stride(1), extremes.stride(2)},
                       current_stream(device)),
                   "reduce_channels");
}

std::string cuda_archs() { return cuda::architectures(); }

}  // namespace
}  // namespace tailorkv

#define TAILORKV_IMPLEMENT(run)                                    \
  m.impl("gather_rows", TORCH_BOX(&tailorkv::gather_rows<run>));   \
  m.impl("pack_codes", TORCH_BOX(&tailorkv::pack_codes<run>));     \
  m.impl("unpack_codes", TORCH_BOX(&tailorkv::unpack_codes<run>)); \
  m.impl("reduce_channels", TORCH_BOX(&tailorkv::reduce_channels<run>))

// The fake of `select_topk` is with its CPU variant.
STABLE_TORCH_LIBRARY_IMPL(vllm_tailorkv, CUDA, m) {
  m.impl("select_topk", TORCH_BOX(&tailorkv::select_topk));
  TAILORKV_IMPLEMENT(true);
}

STABLE_TORCH_LIBRARY_IMPL(vllm_tailorkv, Meta, m) { TAILORKV_IMPLEMENT(false); }

STABLE_TORCH_LIBRARY_IMPL(vllm_tailorkv, CompositeExplicitAutograd, m) {
  m.impl("cuda_archs", TORCH_BOX(&tailorkv::cuda_archs));
}

// Importing the module registers its ops; it holds nothing else. Their schemas come with `_cpu`.
PyMODINIT_FUNC PyInit__cuda() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
