// Runs CUDA kernels on the host, one thread block after another, each thread a fiber.
//
// Included before csrc/cuda/*.cuh under a host compiler, it gives their CUDA names a meaning.
// Between two barriers one warp after another goes as far as it can, in an order that a seed
// decides, so that a missing barrier shows as a wrong result. A barrier that some threads of a
// block never reach, and an access to memory that the process does not own (tests put guard pages
// around tensors), end the launch.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
// Blocks run one after another and find what the last one left: as undefined as on a device.
#define __shared__ static

struct Index {
  uint32_t x;
};
inline Index threadIdx, blockIdx;

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace emulator {

constexpr size_t kStack = 64 << 10;
constexpr int kWarp = 32;

enum class State { kReady, kAtBarrier, kAtShuffle, kDone };

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStack);
  State state;
  uint32_t shuffled;
};

inline std::vector<Thread> threads;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline std::mt19937 random_order{0};
inline const char* failure = nullptr;
inline sigjmp_buf on_fault;

inline void wait_as(State state) {
  const uint32_t self = threadIdx.x;
  threads[self].state = state;
  swapcontext(&threads[self].context, &scheduler);
  threadIdx.x = self;
}

inline void run_thread() {
  body();
  threads[threadIdx.x].state = State::kDone;
}

// Whether all of threads [begin, end) wait in `state`; then they may go on.
inline bool release(size_t begin, size_t end, State state) {
  for (size_t i = begin; i < end; ++i) {
    if (threads[i].state != state) return false;
  }
  for (size_t i = begin; i < end; ++i) threads[i].state = State::kReady;
  return true;
}

// Run those of threads [begin, end) that can until they wait or end. Returns whether any could.
inline bool run_warp(int begin, int end) {
  std::vector<int> order(end - begin);
  std::iota(order.begin(), order.end(), begin);
  std::shuffle(order.begin(), order.end(), random_order);
  bool ran = false;
  for (int i : order) {
    if (threads[i].state != State::kReady) continue;
    threadIdx.x = static_cast<uint32_t>(i);
    swapcontext(&scheduler, &threads[i].context);
    ran = true;
  }
  return ran;
}

inline bool run_block(int count) {
  for (int i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    getcontext(&thread.context);
    thread.context.uc_stack = {thread.stack.data(), 0, kStack};
    thread.context.uc_link = &scheduler;
    thread.state = State::kReady;
    makecontext(&thread.context, run_thread, 0);
  }
  std::vector<int> warps((count + kWarp - 1) / kWarp);
  std::iota(warps.begin(), warps.end(), 0);
  const auto run_one = [&] {
    for (int warp : warps) {
      const int begin = warp * kWarp, end = std::min(begin + kWarp, count);
      if (!run_warp(begin, end)) continue;
      release(begin, end, State::kAtShuffle);
      return true;
    }
    return false;
  };
  do {
    // Up to the next barrier the first of these goes as far as it can, then the second.
    std::shuffle(warps.begin(), warps.end(), random_order);
    while (run_one()) {
    }
  } while (release(0, count, State::kAtBarrier));
  return std::all_of(threads.begin(), threads.begin() + count,
                     [](const Thread& thread) { return thread.state == State::kDone; });
}

inline void fault(int) { siglongjmp(on_fault, 1); }

// Run `blocks` blocks; after a failure nothing runs.
inline void run_grid(int64_t blocks, int count, std::function<void()> kernel) {
  if (failure != nullptr) return;
  body = std::move(kernel);
  if (threads.size() < static_cast<size_t>(count)) threads.resize(count);
  static std::vector<char> signal_stack(kStack);
  const stack_t stack{signal_stack.data(), 0, kStack};
  stack_t old_stack;
  sigaltstack(&stack, &old_stack);
  struct sigaction action = {}, old_segv, old_bus;
  action.sa_handler = fault;
  action.sa_flags = SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &action, &old_segv);
  sigaction(SIGBUS, &action, &old_bus);
  if (sigsetjmp(on_fault, 1) == 0) {
    std::vector<int64_t> order(blocks);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random_order);
    for (int64_t block : order) {
      blockIdx.x = static_cast<uint32_t>(block);
      if (run_block(count)) continue;
      failure = "a barrier was not reached by all threads";
      break;
    }
  } else {
    failure = "memory outside the tensors was accessed";
  }
  sigaction(SIGSEGV, &old_segv, nullptr);
  sigaction(SIGBUS, &old_bus, nullptr);
  sigaltstack(&old_stack, nullptr);
}

// The emulated stream: see `StreamLaunch` in csrc/cuda/launch.cu.
struct Launch {
  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int count,
                  const Arguments&... arguments) {
    run_grid(blocks, count, [=] { kernel(arguments...); });
  }
};

}  // namespace emulator

inline void __syncthreads() { emulator::wait_as(emulator::State::kAtBarrier); }

inline uint32_t __shfl_up_sync(uint32_t, uint32_t value, int step) {
  const uint32_t self = threadIdx.x;
  emulator::threads[self].shuffled = value;
  emulator::wait_as(emulator::State::kAtShuffle);
  const bool inside = static_cast<int>(self % emulator::kWarp) >= step;
  const uint32_t result = inside ? emulator::threads[self - step].shuffled : value;
  // All have read before anyone writes again.
  emulator::wait_as(emulator::State::kAtShuffle);
  return result;
}

inline uint32_t atomicAdd(uint32_t* to, uint32_t value) {
  const uint32_t before = *to;
  *to = before + value;
  return before;
}

inline uint32_t atomicInc(uint32_t* to, uint32_t limit) {
  const uint32_t before = *to;
  *to = before >= limit ? 0 : before + 1;
  return before;
}

inline void __threadfence() {}

template <class T>
T __ldcg(const T* from) {
  return *from;
}
