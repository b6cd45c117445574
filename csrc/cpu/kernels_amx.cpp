#if defined(__x86_64__)
#include <immintrin.h>
#include <omp.h>

#include "kernels.h"
#include "support.h"

// From here on the code needs these instructions; the headers above do not.
#pragma GCC target( \
    "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,avx512vbmi,avx512vnni,gfni,avx512bf16,amx-tile,amx-bf16,amx-int8")

#define TAILORKV_ISA amx
#define TAILORKV_TABLES 1
#define TAILORKV_TILES 1
#include "vec_avx512.h"
//
#include "exact_tiles.h"
#include "retrieve.h"

namespace tailorkv {

extern const Kernels kernels_avx512_gfni;

namespace amx {
namespace {

void exact_attention(const ExactAttention& op) {
  if (op.dtype != Dtype::kBfloat16) return kernels_avx512_gfni.exact_attention(op);
  scratch_reset();
  Exact<Tiles>(op).run<Bf16>();
}

}  // namespace
}  // namespace amx

void replace_by_amx(Kernels& kernels);
void replace_by_amx(Kernels& kernels) {
  kernels.name = "amx";
  kernels.exact_attention = amx::exact_attention;
  kernels.score_onebit = amx::score_onebit;
  kernels.propose_onebit = amx::propose_onebit;
  kernels.retrieve_attention = amx::retrieve_attention;
}

}  // namespace tailorkv
#endif
