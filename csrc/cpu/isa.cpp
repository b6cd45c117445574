// Which instruction set runs.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace tailorkv {

extern const Kernels kernels_portable;
#if defined(__x86_64__)
extern const Kernels kernels_avx512_gfni;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx2;
#endif

namespace {

struct Candidate {
  const Kernels* kernels;
  bool (*supported)();
};

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_gfni() {
  return has_avx512() && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("gfni");
}

bool has_avx2() {
  // Every processor with AVX2 and FMA has F16C, which gcc 12 cannot ask for by name.
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#endif

// Best first.
const Candidate kCandidates[] = {
#if defined(__x86_64__)
    {&kernels_avx512_gfni, has_avx512_gfni},
    {&kernels_avx512, has_avx512},
    {&kernels_avx2, has_avx2},
#endif
    {&kernels_portable, [] { return true; }},
};

const Kernels* find(const std::string& name) {
  std::string known;
  for (const Candidate& candidate : kCandidates) {
    if (name == candidate.kernels->name) {
      if (candidate.supported()) return candidate.kernels;
      throw std::runtime_error("this processor lacks " + name + "; unset VLLM_TAILORKV_CPU_ISA");
    }
    known += (known.empty() ? "" : ", ") + std::string(candidate.kernels->name);
  }
  throw std::runtime_error("VLLM_TAILORKV_CPU_ISA=" + name + " is unknown; choose one of " + known);
}

const Kernels* initial() {
  const char* wanted = std::getenv("VLLM_TAILORKV_CPU_ISA");
  if (wanted != nullptr && *wanted != '\0') return find(wanted);
  for (const Candidate& candidate : kCandidates) {
    if (candidate.supported()) return candidate.kernels;
  }
  return &kernels_portable;
}

std::atomic<const Kernels*> current{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* chosen = current.load(std::memory_order_acquire);
  if (chosen == nullptr) {
    chosen = initial();
    current.store(chosen, std::memory_order_release);
  }
  return *chosen;
}

void set_kernels(const char* name) { current.store(find(name), std::memory_order_release); }

}  // namespace tailorkv
