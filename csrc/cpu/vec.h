// The vectors of the instruction set that is compiled for: the one whose vec_*.h came before, or
// the portable one where a header is opened by itself, as an editor does.
#pragma once

#include <omp.h>

#include "kernels.h"
#include "support.h"

#ifndef TAILORKV_VECTORS
#include "vec_portable.h"
#endif
