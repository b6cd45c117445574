// What the ops share: dispatch on dtypes, loops over threads, exponentials.
#pragma once

#include "vec.h"

namespace tailorkv::TAILORKV_ISA {
namespace {

// Padding of rows of floats in scratch memory: whole vectors in every instruction set.
constexpr int kPad = 16;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t padded(int64_t n) { return ceil_div(n, kPad) * kPad; }

template <class T>
T* take(int64_t n) {
  return static_cast<T*>(scratch_take(static_cast<size_t>(n) * sizeof(T)));
}

inline void from_float(float* to, float x) { *to = x; }
inline void from_float(Half* to, float x) { to->bits = half_bits(x); }
inline void from_float(Bf16* to, float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) {
    to->bits = 0x7FC0;
    return;
  }
  to->bits = static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// Call f with a value of the storage type.
template <class Function>
void visit(Dtype dtype, Function f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(float{});
    case Dtype::kFloat16:
      return f(Half{});
    case Dtype::kBfloat16:
      return f(Bf16{});
  }
}

// A constant that a lambda can use as a template argument.
template <int N>
struct Constant {
  static constexpr int value = N;
};

template <class Function>
void visit_bits(int bits, Function f) {
  if (bits == 1) return f(Constant<1>{});
  if (bits == 2) return f(Constant<2>{});
  return f(Constant<4>{});
}

// Call f(first, Constant<count>) for blocks of at most four heads.
template <class Function>
void for_heads(int heads, Function f) {
  int head = 0;
  for (; head + 4 <= heads; head += 4) f(head, Constant<4>{});
  if (heads - head == 3) f(head, Constant<3>{});
  if (heads - head == 2) f(head, Constant<2>{});
  if (heads - head == 1) f(head, Constant<1>{});
}

inline int num_threads() { return omp_get_max_threads(); }

template <class Function>
void parallel_for(int64_t n, Function f) {
#pragma omp parallel for schedule(dynamic, 1) if (n > 1)
  for (int64_t i = 0; i < n; ++i) f(i);
}

template <class T>
T* at(const Cache& cache, int64_t block, int64_t head, int64_t token, int64_t channel) {
  return static_cast<T*>(cache.data) + block * cache.block + head * cache.head +
         token * cache.token + channel * cache.channel;
}

template <class T>
T* at(const Records<T>& records, int64_t block, int64_t head, int64_t group) {
  return records.data + block * records.block + head * records.head + group * records.group;
}

template <class T>
T* at(const Records<void>& records, int64_t block, int64_t head, int64_t group) {
  return static_cast<T*>(records.data) + block * records.block + head * records.head +
         group * records.group;
}

// The sums of N vectors.
template <int N>
void sums(const F (&x)[N], float (&result)[N]) {
  for (int i = 0; i < N; ++i) result[i] = sum(x[i]);
}

// Copy n elements as floats, then zeros up to a whole number of pads.
template <class T>
void copy_row(float* to, const T* from, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(from + i));
  if (i < n) {
    store(to + i, load(from + i, static_cast<int>(n - i)));
    i += W;
  }
  for (; i < padded(n); ++i) to[i] = 0;
}

// e^x within 2e-7 for x <= 88; below -87 it stays at the smallest normal number.
inline F exponential(F x) {
  x = max(splat(-87.33f), x);
  F n = round_even(x * splat(1.44269504f));
  F r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  F p = splat(1.0f / 720);
  p = fma(p, r, splat(1.0f / 120));
  p = fma(p, r, splat(1.0f / 24));
  p = fma(p, r, splat(1.0f / 6));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  return p * pow2(n);
}

// softcap * tanh(x / softcap)
inline F cap(F x, float softcap) {
  F y = min(max(x * splat(2.0f / softcap), splat(-80.0f)), splat(80.0f));
  return splat(softcap) - splat(2 * softcap) / (exponential(y) + splat(1.0f));
}

// A stretch of one row's context for one KV head, the unit of work of a thread.
struct Task {
  int32_t row, head;
  int64_t begin, end;
};

// All of a row and KV head, whatever its length.
inline Task task_of(int64_t pair, int64_t kv_heads) {
  return Task{static_cast<int32_t>(pair / kv_heads), static_cast<int32_t>(pair % kv_heads), 0, 0};
}

struct Tasks {
  Task* data;
  int64_t count;
};

// Cut `units(row)` units of every row and KV head into stretches: about four for each thread in
// all, none shorter than `smallest` units and none longer than `largest`.
template <class Units>
Tasks cut(int32_t rows, int32_t kv_heads, int64_t smallest_cut, int64_t largest_cut, Units units) {
  int64_t total = 0;
  for (int32_t row = 0; row < rows; ++row) total += units(row) * kv_heads;
  int64_t length = ceil_div(total, 4 * num_threads());
  length = smaller(larger(length, smallest_cut), largest_cut);
  int64_t count = 0;
  for (int32_t row = 0; row < rows; ++row) count += ceil_div(units(row), length) * kv_heads;
  Task* tasks = take<Task>(count);
  count = 0;
  for (int32_t row = 0; row < rows; ++row) {
    int64_t parts = ceil_div(units(row), length);
    for (int32_t head = 0; head < kv_heads; ++head) {
      for (int64_t part = 0; part < parts; ++part) {
        tasks[count++] =
            Task{row, head, units(row) * part / parts, units(row) * (part + 1) / parts};
      }
    }
  }
  return Tasks{tasks, count};
}

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
