#if defined(__x86_64__)
#include <immintrin.h>
#include <omp.h>

#include "kernels.h"
#include "support.h"

// From here on the code needs these instructions; the headers above do not.
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,avx512bf16,amx-tile,amx-bf16")

#define TAILORKV_ISA amx
#define TAILORKV_TABLES 0
#include "vec_avx512.h"
//
#include "exact_tiles.h"

namespace tailorkv {

extern const Kernels kernels_avx512_gfni;

namespace amx {

void exact_attention(const ExactAttention& op);
void exact_attention(const ExactAttention& op) {
  if (op.dtype != Dtype::kBfloat16) return kernels_avx512_gfni.exact_attention(op);
  scratch_reset();
  Exact<Tiles>(op).run<Bf16>();
}

}  // namespace amx
}  // namespace tailorkv
#endif
