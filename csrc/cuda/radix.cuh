// Scores as integers, and their digits from the highest to the lowest.
#pragma once

#include "ops.h"
#include "portable.cuh"

namespace tailorkv::cuda {

constexpr int kPasses = 3;

// The digit that pass p looks at: 11, 11 and 10 bits.
struct Digit {
  int shift, bits;
};
TAILORKV_HD constexpr Digit digit_of_pass(int pass) {
  return pass == 0 ? Digit{21, 11} : pass == 1 ? Digit{10, 11} : Digit{0, 10};
}
TAILORKV_HD constexpr int bins_of_pass(int pass) { return 1 << digit_of_pass(pass).bits; }

// Orders as the scores do; -0.0 equals 0.0.
TAILORKV_HD uint32_t sort_key(float score) {
  score += 0.0f;
  uint32_t bits;
  __builtin_memcpy(&bits, &score, 4);
  return bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
}

// The digits above the one of this pass; 0 in the first.
TAILORKV_HD uint32_t key_prefix(uint32_t key, int pass) {
  return pass == 0 ? 0 : key >> (digit_of_pass(pass).shift + digit_of_pass(pass).bits);
}
TAILORKV_HD uint32_t key_digit(uint32_t key, int pass) {
  return key >> digit_of_pass(pass).shift & (bins_of_pass(pass) - 1u);
}

// What is known of the k-th best key after some passes: its highest digits, and how many of the
// keys that share them are wanted.
struct Selection {
  uint32_t prefix, wanted;
};

TAILORKV_HD Selection with_digit(Selection selection, int pass, uint32_t digit, uint32_t above) {
  return {selection.prefix << digit_of_pass(pass).bits | digit, selection.wanted - above};
}

// Where the next selected token goes among a row's indices: those above the threshold are all
// taken, of those equal to it the `wanted` first.
TAILORKV_HD int32_t output_slot(uint32_t above, uint32_t equal, uint32_t wanted) {
  return static_cast<int32_t>(above + smaller(equal, wanted));
}

// Scores are read four at a time from addresses that are multiples of 16 bytes.
constexpr int kVector = 4;

// The middle of a row, seen as aligned vectors; the first and the last may reach beyond it.
struct Middle {
  int32_t begin, end;  // tokens
  int32_t first;       // token at the start of vector 0, at most 3 before `begin`
  int32_t num_vectors;
};

TAILORKV_HD Middle middle_of(const float* scores, int32_t sink_tokens, int32_t tail_start) {
  if (tail_start <= sink_tokens) return {0, 0, 0, 0};
  const int32_t misaligned =
      static_cast<int32_t>(reinterpret_cast<uintptr_t>(scores) / 4 % kVector);
  const int32_t first = sink_tokens - (sink_tokens % kVector + misaligned) % kVector;
  return {sink_tokens, tail_start, first, ceil_div(tail_start - first, kVector)};
}

// Vectors [begin, end) of one of `parts` parts of a middle.
struct Vectors {
  int32_t begin, end;
};

TAILORKV_HD Vectors part_of(const Middle& middle, int32_t part, int32_t parts) {
  const int32_t size = ceil_div(middle.num_vectors, parts);
  return {smaller(part * size, middle.num_vectors), smaller((part + 1) * size, middle.num_vectors)};
}

}  // namespace tailorkv::cuda
