#if defined(__x86_64__)
#include <immintrin.h>
#include <omp.h>

#include "kernels.h"
#include "support.h"

// From here on the code needs these instructions; the headers above do not.
#pragma GCC target("avx2,fma,f16c")

#define TAILORKV_ISA avx2
#define TAILORKV_TABLES 256
#include "vec_avx2.h"
//
#include "ops.h"

namespace tailorkv {

extern const Kernels kernels_avx2;
const Kernels kernels_avx2 = TAILORKV_KERNELS;

}  // namespace tailorkv
#endif
