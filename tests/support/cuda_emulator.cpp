// The ops of csrc/cuda on the host, for ctypes: the same kernels, grids and order of launches. Each
// returns nullptr, or why the launch failed.
#include "cuda_emulator.h"
//
#include "codes.cuh"
#include "gather_rows.cuh"
#include "reduce_channels.cuh"
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

const char* emulate_gather_rows(uint32_t seed, const GatherRows* op) {
  return emulate(seed,
                 [&](emulator::Launch& launch) { run_gather_rows<kGatherThreads>(launch, *op); });
}

const char* emulate_pack_codes(uint32_t seed, const Codes* op) {
  return emulate(seed, [&](emulator::Launch& launch) {
    if (op->bits == 1) run_pack_codes<1, kCodesThreads>(launch, *op);
    if (op->bits == 2) run_pack_codes<2, kCodesThreads>(launch, *op);
    if (op->bits == 4) run_pack_codes<4, kCodesThreads>(launch, *op);
  });
}

const char* emulate_unpack_codes(uint32_t seed, const Codes* op) {
  return emulate(seed, [&](emulator::Launch& launch) {
    if (op->bits == 1) run_unpack_codes<1, kCodesThreads>(launch, *op);
    if (op->bits == 2) run_unpack_codes<2, kCodesThreads>(launch, *op);
    if (op->bits == 4) run_unpack_codes<4, kCodesThreads>(launch, *op);
  });
}

const char* emulate_reduce_channels(uint32_t seed, const ReduceChannels* op) {
  return emulate(seed, [&](emulator::Launch& launch) {
    if (op->item_bytes == 2) run_reduce_channels<2, kReduceThreads>(launch, *op);
    if (op->item_bytes == 4) run_reduce_channels<4, kReduceThreads>(launch, *op);
  });
}

// For a check that the structures of the caller are those of ops.h.
int size_of_SelectTopk() { return sizeof(SelectTopk); }
int size_of_GatherRows() { return sizeof(GatherRows); }
int size_of_Codes() { return sizeof(Codes); }
int size_of_ReduceChannels() { return sizeof(ReduceChannels); }

// The arithmetic by itself.
uint32_t key_of(float score) { return sort_key(score); }
uint32_t prefix_of(uint32_t key, int pass) { return key_prefix(key, pass); }
uint32_t digit_of(uint32_t key, int pass) { return key_digit(key, pass); }
int64_t bytes_to(const Pages* pages, int64_t block, int64_t head, int64_t token) {
  return token_bytes(*pages, block, head, token);
}
}
