// pack_codes and unpack_codes. Where rows are whole vectors of 16 codes, all rows are one long run,
// and a thread moves a vector; elsewhere a thread makes one byte.
#pragma once

#include "ops.h"
#include "packing.cuh"
#include "portable.cuh"

namespace tailorkv::cuda {

constexpr int kCodesThreads = 256;
constexpr int kCodesOfVector = 16;

// 16 packed codes.
template <int B>
struct Packed {
  static constexpr int kWords = B == 4 ? 2 : 1;
  uint32_t words[kWords];
};

template <int B>
TAILORKV_HD Packed<B> pack_vector(const uint32_t (&codes)[4]) {
  Packed<B> packed{};
  for (int i = 0; i < 4; ++i) {
    packed.words[i * 4 * B / 32] |= pack_four<B>(codes[i]) << (i * 4 * B % 32);
  }
  return packed;
}

template <int B>
TAILORKV_HD void unpack_vector(const Packed<B>& packed, uint32_t (&codes)[4]) {
  for (int i = 0; i < 4; ++i) {
    codes[i] = unpack_four<B>(packed.words[i * 4 * B / 32] >> (i * 4 * B % 32));
  }
}

// Store and load exactly the 2*B bytes of 16 codes.
template <int B>
TAILORKV_HD void store_packed(uint8_t* to, const Packed<B>& packed) {
  if constexpr (B == 1) *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(packed.words[0]);
  if constexpr (B == 2) *reinterpret_cast<uint32_t*>(to) = packed.words[0];
  if constexpr (B == 4) {
    *reinterpret_cast<uint64_t*>(to) = packed.words[0] | static_cast<uint64_t>(packed.words[1])
                                                             << 32;
  }
}
template <int B>
TAILORKV_HD Packed<B> load_packed(const uint8_t* from) {
  Packed<B> packed{};
  if constexpr (B == 1) packed.words[0] = *reinterpret_cast<const uint16_t*>(from);
  if constexpr (B == 2) packed.words[0] = *reinterpret_cast<const uint32_t*>(from);
  if constexpr (B == 4) {
    const uint64_t both = *reinterpret_cast<const uint64_t*>(from);
    packed.words[0] = static_cast<uint32_t>(both);
    packed.words[1] = static_cast<uint32_t>(both >> 32);
  }
  return packed;
}

template <int B, int Threads>
__global__ void __launch_bounds__(Threads) pack_vectors(Codes op, int64_t vectors) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * Threads + threadIdx.x;
  if (i >= vectors) return;
  const uint4 read = *reinterpret_cast<const uint4*>(op.codes + i * kCodesOfVector);
  const uint32_t codes[4] = {read.x, read.y, read.z, read.w};
  store_packed<B>(op.packed + i * 2 * B, pack_vector<B>(codes));
}

template <int B, int Threads>
__global__ void __launch_bounds__(Threads) unpack_vectors(Codes op, int64_t vectors) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * Threads + threadIdx.x;
  if (i >= vectors) return;
  uint32_t codes[4];
  unpack_vector<B>(load_packed<B>(op.packed + i * 2 * B), codes);
  *reinterpret_cast<uint4*>(op.codes + i * kCodesOfVector) =
      make_uint4(codes[0], codes[1], codes[2], codes[3]);
}

template <int B, int Threads>
__global__ void __launch_bounds__(Threads) pack_bytes(Codes op, int64_t bytes) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * Threads + threadIdx.x;
  if (i >= bytes) return;
  const int64_t row_bytes = packed_bytes(op.length, B);
  op.packed[i] = pack_byte<B>(op.codes + i / row_bytes * op.length, op.length, i % row_bytes);
}

template <int B, int Threads>
__global__ void __launch_bounds__(Threads) unpack_bytes(Codes op, int64_t codes) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * Threads + threadIdx.x;
  if (i >= codes) return;
  op.codes[i] =
      unpack_code<B>(op.packed + i / op.length * packed_bytes(op.length, B), i % op.length);
}

inline bool whole_vectors(const Codes& op) {
  return op.length % kCodesOfVector == 0 && reinterpret_cast<uintptr_t>(op.codes) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(op.packed) % 8 == 0;
}

template <int B, int Threads, class Launch>
void run_pack_codes(Launch& launch, const Codes& op) {
  if (op.rows * op.length == 0) return;
  const int64_t vectors = op.rows * op.length / kCodesOfVector;
  const int64_t bytes = op.rows * packed_bytes(op.length, B);
  if (whole_vectors(op)) {
    launch(pack_vectors<B, Threads>, ceil_div<int64_t>(vectors, Threads), Threads, op, vectors);
  } else {
    launch(pack_bytes<B, Threads>, ceil_div<int64_t>(bytes, Threads), Threads, op, bytes);
  }
}

template <int B, int Threads, class Launch>
void run_unpack_codes(Launch& launch, const Codes& op) {
  const int64_t codes = op.rows * op.length, vectors = codes / kCodesOfVector;
  if (codes == 0) return;
  if (whole_vectors(op)) {
    launch(unpack_vectors<B, Threads>, ceil_div<int64_t>(vectors, Threads), Threads, op, vectors);
  } else {
    launch(unpack_bytes<B, Threads>, ceil_div<int64_t>(codes, Threads), Threads, op, codes);
  }
}

}  // namespace tailorkv::cuda
