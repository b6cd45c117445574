// The kernel and its launch: all that nvcc compiles. Nothing here waits for the device.
#include <cuda_runtime.h>

#include "ops.h"
#include "select_topk.cuh"

#define TAILORKV_STRING_OF(x) #x
#define TAILORKV_STRING(x) TAILORKV_STRING_OF(x)

namespace tailorkv::cuda {
namespace {

// Starts a kernel on a stream, and keeps why it could not.
class StreamLaunch {
 public:
  explicit StreamLaunch(void* stream) : stream_(static_cast<cudaStream_t>(stream)) {}

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads,
                  const Arguments&... arguments) {
    if (blocks > INT32_MAX) {
      error_ = cudaErrorInvalidConfiguration;
      return;
    }
    kernel<<<static_cast<uint32_t>(blocks), threads, 0, stream_>>>(arguments...);
    error_ = cudaGetLastError();
  }

  const char* error() const { return error_ == cudaSuccess ? nullptr : cudaGetErrorString(error_); }

 private:
  cudaStream_t stream_;
  cudaError_t error_ = cudaSuccess;
};

}  // namespace

const char* select_topk(const SelectTopk& op, void* workspace, int32_t parts, void* stream) {
  StreamLaunch launch(stream);
  run_select_topk<kTopkThreads>(launch, op, workspace, parts);
  return launch.error();
}

const char* topk_parts(const SelectTopk& op, int32_t device, int32_t* parts) {
  int multiprocessors = 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  *parts = parts_for(op, multiprocessors);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

int64_t topk_workspace_bytes(const SelectTopk& op, int32_t parts) { return topk_bytes(op, parts); }

const char* architectures() { return TAILORKV_STRING(TAILORKV_CUDA_ARCHS); }

}  // namespace tailorkv::cuda
