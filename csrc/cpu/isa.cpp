// Which instruction set runs.
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

namespace avx512_bf16 {
void exact_attention(const ExactAttention&);
}
namespace amx {
void exact_attention(const ExactAttention&);
}
#endif

namespace {

struct Candidate {
  const Kernels* kernels;
  bool (*supported)();
  bool (*preferred)() = nullptr;  // always, if null
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

bool has_avx512_bf16() { return has_avx512_gfni() && __builtin_cpu_supports("avx512bf16"); }

// gcc 12 cannot ask for AMX by name.
bool has_amx() {
#if defined(__linux__)
  uint32_t a, b, c, d;
  if (!has_avx512_bf16() || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  constexpr uint32_t kBf16 = 1u << 22, kTiles = 1u << 24;
  if ((d & kBf16) == 0 || (d & kTiles) == 0) return false;
  // The kernel gives tiles to processes that ask for them.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Intel's multiply bfloat16 slower than floats, but in AMX.
bool is_amd() { return __builtin_cpu_is("amd"); }

// Those of avx512_gfni, with another multiplication of bfloat16.
Kernels with_bf16(const char* name, void (*exact_attention)(const ExactAttention&)) {
  Kernels kernels = kernels_avx512_gfni;
  kernels.name = name;
  kernels.exact_attention = exact_attention;
  return kernels;
}

const Kernels kernels_avx512_bf16 = with_bf16("avx512_bf16", avx512_bf16::exact_attention);
const Kernels kernels_amx = with_bf16("amx", amx::exact_attention);

bool has_avx2() {
  // Every processor with AVX2 and FMA has F16C, which gcc 12 cannot ask for by name.
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#endif

// Best first.
const Candidate kCandidates[] = {
#if defined(__x86_64__)
    {&kernels_amx, has_amx},
    {&kernels_avx512_bf16, has_avx512_bf16, is_amd},
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
    if (candidate.preferred != nullptr && !candidate.preferred()) continue;
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
