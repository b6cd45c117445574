#if defined(__x86_64__)
#include <immintrin.h>
#include <omp.h>

#include "kernels.h"
#include "support.h"

// From here on the code needs these instructions; the headers above do not.
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")

#define TAILORKV_ISA avx512
#define TAILORKV_TABLES 0
#include "vec_avx512.h"
//
#include "ops.h"

namespace tailorkv {

extern const Kernels kernels_avx512;
const Kernels kernels_avx512 = TAILORKV_KERNELS;

}  // namespace tailorkv
#endif
