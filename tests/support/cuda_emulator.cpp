// The op of csrc/cuda on the host, for ctypes: the same kernel and grid. It returns nullptr, or why
// the launch failed.
#include "cuda_emulator.h"
//
#include "select_topk.cuh"

namespace {

using namespace tailorkv::cuda;

template <class Run>
const char* emulate(uint32_t seed, Run run) {
  emulator::random_order.seed(seed);
  emulator::failure = nullptr;
  emulator::Launch launch;
  run(launch);
  return emulator::failure;
}

}  // namespace

extern "C" {

const char* emulate_select_topk(uint32_t seed, const SelectTopk* op, int32_t parts, int threads) {
  std::vector<uint4> workspace(topk_bytes(*op, parts) / 16 + 1, uint4{~0u, ~0u, ~0u, ~0u});
  return emulate(seed, [&](emulator::Launch& launch) {
    if (threads == 64) run_select_topk<64>(launch, *op, workspace.data(), parts);
    if (threads == kTopkThreads) {
      run_select_topk<kTopkThreads>(launch, *op, workspace.data(), parts);
    }
  });
}

int32_t parts_on(const SelectTopk* op, int32_t multiprocessors) {
  return parts_for(*op, multiprocessors);
}

// For a check that the structure of the caller is that of ops.h.
int size_of_SelectTopk() { return sizeof(SelectTopk); }

// The arithmetic by itself.
uint32_t key_of(float score) { return sort_key(score); }
uint32_t prefix_of(uint32_t key, int pass) { return key_prefix(key, pass); }
uint32_t digit_of(uint32_t key, int pass) { return key_digit(key, pass); }
}
