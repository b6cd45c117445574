// exact_attention in floats: broadcasts of K and V against vectors of queries and weights.
#pragma once

#include "exact.h"

namespace tailorkv::TAILORKV_ISA {
namespace {

// What every `Units` has:
//   Element           of K and V as they are multiplied
//   Operand           of queries and weights: one for each lane and `kPair` steps
//   kPair             see there
//   kChannels         heads are padded to a multiple of these
//   multiply<Add>     out (+)= a * b; see exact.h. Row r, step s of a is at `a + r*row + s*step`
//   lay_queries       of a group, [steps, kLanes], zeros behind their channels
//   give              what a group's values come to, divided by its totals
//   weight            2^x of a score; store_weights, of tokens t and t + 1
//   pack_row, pack_one  elements, of what caches hold
//   turn              V with `kPair` > 1: [channels, kTileTokens], zeros behind its tokens
//   begin, end        around multiplications
struct Floats {
  using Element = float;
  using Operand = float;
  static constexpr int kPair = 1;
  static constexpr int64_t kChannels = 8;

  static void begin() {}
  static void end() {}

  template <class T>
  static void lay_queries(float* to, const T* const* rows, int64_t size, int64_t) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      for (int64_t c = 0; c < size; ++c) to[c * kLanes + lane] = to_float(rows[lane][c]);
    }
  }

  template <class T>
  static void give(T* const* rows, int lanes, const float* values, const float* total,
                   int64_t size) {
    for (int lane = 0; lane < lanes; ++lane) {
      const float weight = 1.0f / total[lane];
      for (int64_t c = 0; c < size; ++c) {
        from_float(rows[lane] + c, values[c * kLanes + lane] * weight);
      }
    }
  }

  static F weight(F x) { return power(x); }
  static void store_weights(float* to, int64_t t, F first, F second) {
    store(to + t * kLanes, first);
    store(to + (t + 1) * kLanes, second);
  }

  template <class T>
  static void pack_row(float* to, const T* from, int64_t size) {
    static_assert(kChannels % 8 == 0 && (W <= 8 || W == 16));
    int64_t c = 0;
    for (; c + W <= size; c += W) store(to + c, load(from + c));
    if (c < size) {
      const int rest = static_cast<int>(size - c);
      store(to + c, load(from + c, rest), rest);
    }
  }
  template <class T>
  static void pack_one(float* to, T from) {
    *to = to_float(from);
  }

  template <bool Add>
  static void multiply(const float* a, int64_t row, int64_t step, int64_t rows, int64_t steps,
                       const float* const* b, int together, float* const* out) {
    constexpr int kRows = W == 16 ? 8 : 4, kVectors = static_cast<int>(kLanes) / W;
    const int vectors = together * kVectors;
    const auto of = [](auto* const* arrays, int vector) {
      return arrays[vector / kVectors] + vector % kVectors * W;
    };
    for (int64_t r = 0; r < rows; r += kRows) {
      int v = 0;
      for (; v + 2 <= vectors; v += 2) {
        const float* operands[2] = {of(b, v), of(b, v + 1)};
        float* results[2] = {of(out, v) + r * kLanes, of(out, v + 1) + r * kLanes};
        block<Add, kRows, 2>(a + r * row, row, step, steps, operands, results);
      }
      if (v < vectors) {
        const float* operand = of(b, v);
        float* result = of(out, v) + r * kLanes;
        block<Add, kRows, 1>(a + r * row, row, step, steps, &operand, &result);
      }
    }
  }

 private:
  template <bool Add, int Rows, int Vectors>
  static void block(const float* a, int64_t row, int64_t step, int64_t steps, const float* const* b,
                    float* const* out) {
    F sums[Rows][Vectors];
    for (int r = 0; r < Rows; ++r) {
      for (int v = 0; v < Vectors; ++v) sums[r][v] = Add ? load(out[v] + r * kLanes) : splat(0);
    }
    for (int64_t s = 0; s < steps; ++s, a += step) {
      F operands[Vectors];
      for (int v = 0; v < Vectors; ++v) operands[v] = load(b[v] + s * kLanes);
      for (int r = 0; r < Rows; ++r) {
        const F factor = splat(a[r * row]);
        for (int v = 0; v < Vectors; ++v) sums[r][v] = fma(factor, operands[v], sums[r][v]);
      }
    }
    for (int r = 0; r < Rows; ++r) {
      for (int v = 0; v < Vectors; ++v) store(out[v] + r * kLanes, sums[r][v]);
    }
  }
};

void exact_attention(const ExactAttention& op) {
  scratch_reset();
  visit(op.dtype, [&](auto element) { Exact<Floats>(op).template run<decltype(element)>(); });
}

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
