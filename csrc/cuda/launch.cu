// The kernels and their launches: all that nvcc compiles. Nothing here waits for the device.
#include <cuda_runtime.h>

#include "codes.cuh"
#include "gather_rows.cuh"
#include "ops.h"
#include "reduce_channels.cuh"
#include "select_topk.cuh"

#define TAILORKV_STRING_OF(x) #x
#define TAILORKV_STRING(x) TAILORKV_STRING_OF(x)

namespace tailorkv::cuda {
namespace {

// Starts kernels on a stream one after another until one fails.
class StreamLaunch {
 public:
  explicit StreamLaunch(void* stream) : stream_(static_cast<cudaStream_t>(stream)) {}

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads,
                  const Arguments&... arguments) {
    if (error_ != cudaSuccess) return;
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

const char* gather_rows(const GatherRows& op, void* stream) {
  StreamLaunch launch(stream);
  run_gather_rows<kGatherThreads>(launch, op);
  return launch.error();
}

const char* pack_codes(const Codes& op, void* stream) {
  StreamLaunch launch(stream);
  if (op.bits == 1) run_pack_codes<1, kCodesThreads>(launch, op);
  if (op.bits == 2) run_pack_codes<2, kCodesThreads>(launch, op);
  if (op.bits == 4) run_pack_codes<4, kCodesThreads>(launch, op);
  return launch.error();
}

const char* unpack_codes(const Codes& op, void* stream) {
  StreamLaunch launch(stream);
  if (op.bits == 1) run_unpack_codes<1, kCodesThreads>(launch, op);
  if (op.bits == 2) run_unpack_codes<2, kCodesThreads>(launch, op);
  if (op.bits == 4) run_unpack_codes<4, kCodesThreads>(launch, op);
  return launch.error();
}

const char* reduce_channels(const ReduceChannels& op, void* stream) {
  StreamLaunch launch(stream);
  if (op.item_bytes == 2) run_reduce_channels<2, kReduceThreads>(launch, op);
  if (op.item_bytes == 4) run_reduce_channels<4, kReduceThreads>(launch, op);
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

const void* device_address(const void* host) {
  cudaPointerAttributes attributes{};
  if (cudaPointerGetAttributes(&attributes, host) != cudaSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  return attributes.devicePointer;
}

const char* architectures() { return TAILORKV_STRING(TAILORKV_CUDA_ARCHS); }

}  // namespace tailorkv::cuda
