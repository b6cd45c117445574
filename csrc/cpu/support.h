// Helpers that the kernels of every instruction set call. They are compiled for the baseline
// processor, out of line, because templates of the standard library must never be instantiated in
// code built for a newer one: the linker keeps one copy for all.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tailorkv {

// Scratch memory of the calling thread, kept between calls. Pieces are aligned to 64 bytes and
// valid until the next `scratch_reset` of the same thread.
void scratch_reset();
void* scratch_take(size_t bytes);

// The sum of the k largest of n values, which are reordered; k <= n.
double sum_of_largest(float* values, int64_t n, int64_t k);

}  // namespace tailorkv
