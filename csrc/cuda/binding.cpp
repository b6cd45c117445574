// The op `select_topk` of the torch library `vllm_tailorkv` on CUDA devices: first the contract, by
// shapes and strides alone, then pointers, then the kernel. It needs no CUDA library to load: the
// current stream is looked up in torch's when the op first runs.
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

// The CUDA device that the op runs on, that of its output.
int32_t device_of(const Contract& contract, const Tensor& tensor, const char* name) {
  contract.require(tensor.is_cuda(), name, " must be on a CUDA device");
  return tensor.get_device_index();
}

template <class T>
T* data(const Contract& contract, const Tensor& tensor, const char* name, int32_t device) {
  contract.require(tensor.is_cuda() && tensor.get_device_index() == device, name,
                   " must be on the CUDA device of the output");
  return static_cast<T*>(tensor.data_ptr());
}

int32_t size(const Tensor& tensor, int64_t axis) { return static_cast<int32_t>(tensor.size(axis)); }

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

void require_launched(const char* error) {
  STD_TORCH_CHECK(error == nullptr, "vllm_tailorkv::select_topk could not be launched: ", error);
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
  require_launched(cuda::topk_parts(op, device, &parts));
  const Tensor workspace =
      torch::stable::new_empty(indices, {cuda::topk_workspace_bytes(op, parts)}, ScalarType::Byte);
  require_launched(cuda::select_topk(op, workspace.data_ptr(), parts, current_stream(device)));
}

std::string cuda_archs() { return cuda::architectures(); }

}  // namespace
}  // namespace tailorkv

// The fake of `select_topk` is with its CPU variant.
STABLE_TORCH_LIBRARY_IMPL(vllm_tailorkv, CUDA, m) {
  m.impl("select_topk", TORCH_BOX(&tailorkv::select_topk));
}

STABLE_TORCH_LIBRARY_IMPL(vllm_tailorkv, CompositeExplicitAutograd, m) {
  m.impl("cuda_archs", TORCH_BOX(&tailorkv::cuda_archs));
}

// Importing the module registers its ops; it holds nothing else. Their schemas come with `_cpu`.
PyMODINIT_FUNC PyInit__cuda() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
