// Products with low-bit codes: nothing is dequantized to memory.
#pragma once

#include "ahead.h"
#include "common.h"
#if TAILORKV_TABLES == 512
#include "lut.h"
#elif TAILORKV_TABLES == 256
#include "rounded_256.h"
#endif

namespace tailorkv::TAILORKV_ISA {
namespace {

// Scratch of one thread for products with codes; `most` is the larger of d and g, padded.
//   scaled: [4, most]; tables: [most/8, 4, 2, 16]; bytes: [index_bytes(most)]
struct ProductScratch {
  float* scaled;
  int16_t* tables;
  uint8_t* bytes;
};

inline ProductScratch take_product_scratch(int64_t head_size, int64_t group_size) {
  const int64_t most = larger(padded(head_size), group_size);
  return ProductScratch{take<float>(4 * most), take<int16_t>(16 * most), take<uint8_t>(16 * most)};
}

// Scales and zeros of the K of one group as floats.
//   scale, zero: [padded(d)]
inline void read_key_scales(const Codes& key, int64_t block, int64_t head, int64_t group,
                            int64_t head_size, float* scale, float* zero) {
  copy_row(scale, reinterpret_cast<const Half*>(at(key.scale, block, head, group)), head_size);
  copy_row(zero, reinterpret_cast<const Half*>(at(key.zero, block, head, group)), head_size);
}

// Add the cache lines of the K of one group, as a record holds them.
inline void add_key_lines(const Codes& key, int64_t block, int64_t head, int64_t group,
                          int64_t head_size, Ahead& ahead) {
  ahead.add(at(key.codes, block, head, group), head_size * key.codes.item);
  ahead.add(at(key.scale, block, head, group), head_size);
  ahead.add(at(key.zero, block, head, group), head_size);
}

// Tokens t .. t + U*W - 1 of score_codes.
template <int B, int N, int U>
void score_codes_part(const uint8_t* codes, int64_t pitch, int64_t head_size, int64_t t,
                      const float* scaled, const float* offset, float* scores,
                      int64_t score_stride) {
  F total[N][U];
  for (int h = 0; h < N; ++h) {
    for (int u = 0; u < U; ++u) total[h][u] = splat(offset[h]);
  }
  for (int64_t c = 0; c < head_size; ++c) {
    for (int u = 0; u < U; ++u) {
      auto code = load_codes<B>(codes + c * pitch, t + u * W);
      for (int h = 0; h < N; ++h) {
        total[h][u] = accumulate(total[h][u], code, splat(scaled[h * padded(head_size) + c]));
      }
    }
  }
  for (int h = 0; h < N; ++h) {
    for (int u = 0; u < U; ++u) store(scores + h * score_stride + t + u * W, total[h][u]);
  }
}

// q.k of N heads with one group: score[t] = sum over c of q*scale[c] * code[c, t] + sum of q*zero.
//   codes: [d, g*B/8], rows pitch apart; scale, zero: [padded(d)]
//   query: [N, padded(d)]; scores: [N, g], rows score_stride apart
//   ahead: asked for some lines between look-ups
template <int B, int N, bool Tables>
void score_codes(const uint8_t* codes, int64_t pitch, int64_t head_size, int64_t group_size,
                 const float* scale, const float* zero, const float* query,
                 const ProductScratch& scratch, Ahead& ahead, float* scores, int64_t score_stride) {
  float* scaled = scratch.scaled;
  F offsets[N], magnitudes[N];
  for (int h = 0; h < N; ++h) offsets[h] = magnitudes[h] = splat(0);
  for (int64_t c = 0; c < padded(head_size); c += W) {
    F channel_scale = load(scale + c), channel_zero = load(zero + c);
    for (int h = 0; h < N; ++h) {
      F q = load(query + h * padded(head_size) + c);
      F x = q * channel_scale;
      store(scaled + h * padded(head_size) + c, x);
      magnitudes[h] = magnitudes[h] + abs(x);
      offsets[h] = fma(q, channel_zero, offsets[h]);
    }
  }
  float offset[N];
  sums(offsets, offset);
#if TAILORKV_TABLES
  if constexpr (Tables && kCovered<B> > 0) {
    if (group_size % kCovered<B> == 0) {
      float magnitude[N];
      sums(magnitudes, magnitude);
      rounded_products<B, N, false>(codes, pitch, head_size, group_size, scaled, padded(head_size),
                                    magnitude, offset, scratch.tables, scratch.bytes, ahead, scores,
                                    score_stride);
      return;
    }
  }
#endif
  // As many accumulators as there are registers for.
  constexpr int U = W == 16 ? 4 : 2;
  int64_t t = 0;
  for (; t + U * W <= group_size; t += U * W) {
    score_codes_part<B, N, U>(codes, pitch, head_size, t, scaled, offset, scores, score_stride);
  }
  for (; t < group_size; t += 2 * W) {
    score_codes_part<B, N, 2>(codes, pitch, head_size, t, scaled, offset, scores, score_stride);
  }
}

// Channels c .. c + U*W - 1 of add_codes; of the last one only `count` where it is partial.
template <int B, int N, int U, bool Partial>
void add_codes_part(const uint8_t* codes, int64_t pitch, int64_t group_size, int64_t c,
                    const float* scaled, const float* offset, int64_t count, float* values,
                    int64_t value_stride) {
  F total[N][U];
  for (int h = 0; h < N; ++h) {
    for (int u = 0; u < U; ++u) {
      total[h][u] = load(values + h * value_stride + c + u * W) + splat(offset[h]);
    }
  }
  for (int64_t t = 0; t < group_size; ++t) {
    const uint8_t* row = codes + t * pitch;
    uint8_t copy[W] = {};
    if constexpr (Partial) {
      __builtin_memcpy(copy, row + c * B / 8, static_cast<size_t>(count * B / 8));
    }
    for (int u = 0; u < U; ++u) {
      auto code = Partial ? load_codes<B>(copy, 0) : load_codes<B>(row, c + u * W);
      for (int h = 0; h < N; ++h) {
        total[h][u] = accumulate(total[h][u], code, splat(scaled[h * group_size + t]));
      }
    }
  }
  for (int h = 0; h < N; ++h) {
    for (int u = 0; u < U; ++u) store(values + h * value_stride + c + u * W, total[h][u]);
  }
}

// Add the weighted V of one group of tokens and channels [begin, end) to the values of N heads:
// value[c] += sum over t of w*scale[t] * code[t, c] + sum of w*zero.
//   codes: [g, ceil(d*B/8)], rows pitch apart; scale, zero: [g]
//   weights: [N, weight_stride]; values: [N, value_stride]
template <int B, int N, bool Tables>
void add_codes(const uint8_t* codes, int64_t pitch, int64_t group_size, int64_t begin, int64_t end,
               const float* scale, const float* zero, const float* weights, int64_t weight_stride,
               const ProductScratch& scratch, Ahead& ahead, float* values, int64_t value_stride) {
  float* scaled = scratch.scaled;
  F offsets[N], magnitudes[N];
  for (int h = 0; h < N; ++h) offsets[h] = magnitudes[h] = splat(0);
  for (int64_t t = 0; t < group_size; t += W) {
    F token_scale = load(scale + t), token_zero = load(zero + t);
    for (int h = 0; h < N; ++h) {
      F w = load(weights + h * weight_stride + t);
      F x = w * token_scale;
      store(scaled + h * group_size + t, x);
      magnitudes[h] = magnitudes[h] + x;
      offsets[h] = fma(w, token_zero, offsets[h]);
    }
  }
  float offset[N];
  sums(offsets, offset);
  // Enough independent sums to hide the latency of an addition.
  constexpr int U = N == 1 ? 4 : 2;
  int64_t c = begin;
#if TAILORKV_TABLES
  if constexpr (Tables && kCovered<B> > 0) {
    const int64_t whole = (end - begin) / kCovered<B> * kCovered<B>;
    if (whole > 0) {
      float magnitude[N];
      sums(magnitudes, magnitude);
      rounded_products<B, N, true>(codes + c * B / 8, pitch, group_size, whole, scaled, group_size,
                                   magnitude, offset, scratch.tables, scratch.bytes, ahead,
                                   values + c, value_stride);
      c += whole;
    }
  }
#endif
  for (; c + U * W <= end; c += U * W) {
    add_codes_part<B, N, U, false>(codes, pitch, group_size, c, scaled, offset, 0, values,
                                   value_stride);
  }
  for (; c + W <= end; c += W) {
    add_codes_part<B, N, 1, false>(codes, pitch, group_size, c, scaled, offset, 0, values,
                                   value_stride);
  }
  if (c < end) {
    add_codes_part<B, N, 1, true>(codes, pitch, group_size, c, scaled, offset, end - c, values,
                                  value_stride);
  }
}

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
