#include <math.h>
#include <omp.h>

#include "kernels.h"
#include "support.h"

#define TAILORKV_ISA portable
#define TAILORKV_TABLES 0
#include "vec_portable.h"
//
#include "ops.h"

namespace tailorkv {

extern const Kernels kernels_portable;
const Kernels kernels_portable = TAILORKV_KERNELS;

}  // namespace tailorkv
