// Sums over the threads of a block.
#pragma once

#include "portable.cuh"

namespace tailorkv::cuda {

// Sum of the values of lower threads; `total` becomes the sum of all. Every thread must call it.
template <int Threads>
__device__ __forceinline__ uint32_t exclusive_sum(uint32_t value, uint32_t* total) {
  constexpr int kWarps = Threads / 32;
  static_assert(Threads % 32 == 0 && kWarps <= 32);
  __shared__ uint32_t warp_sums[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t inclusive = value;
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t lower = __shfl_up_sync(0xFFFFFFFFu, inclusive, step);
    if (lane >= step) inclusive += lower;
  }
  if (lane == 31) warp_sums[warp] = inclusive;
  __syncthreads();
  if (warp == 0) {
    uint32_t sum = lane < kWarps ? warp_sums[lane] : 0;
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t lower = __shfl_up_sync(0xFFFFFFFFu, sum, step);
      if (lane >= step) sum += lower;
    }
    if (lane < kWarps) warp_sums[lane] = sum;
  }
  __syncthreads();
  const uint32_t before = warp == 0 ? 0 : warp_sums[warp - 1];
  *total = warp_sums[kWarps - 1];
  // The next call writes `warp_sums` again.
  __syncthreads();
  return before + inclusive - value;
}

}  // namespace tailorkv::cuda
