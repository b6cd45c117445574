#if defined(__x86_64__)
#include <immintrin.h>
#include <omp.h>

#include "kernels.h"
#include "support.h"

// From here on the code needs these instructions; the headers above do not.
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,avx512vbmi,avx512vnni,gfni")

#define TAILORKV_ISA avx512_gfni
#define TAILORKV_TABLES 512
#include "vec_avx512.h"
//
#include "ops.h"

namespace tailorkv {

extern const Kernels kernels_avx512_gfni;
const Kernels kernels_avx512_gfni = TAILORKV_KERNELS;

}  // namespace tailorkv
#endif
