// Code that runs on the device, and on the host in the tests: nvcc compiles it for both, a host
// compiler sees plain C++.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define TAILORKV_HD __host__ __device__ __forceinline__
#else
#define TAILORKV_HD inline
#endif

namespace tailorkv::cuda {

template <class T>
TAILORKV_HD constexpr T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
TAILORKV_HD constexpr T larger(T a, T b) {
  return a > b ? a : b;
}
template <class T>
TAILORKV_HD constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

}  // namespace tailorkv::cuda
