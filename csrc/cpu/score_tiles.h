// Scores of one-bit codes by AMX: bits become bytes, factors whole numbers, and a tile multiplies
// 64 channels of 16 tokens by up to 16 queries at once.
//
// Factors are rounded to whole units, a unit being 1/127 of a query's largest, and half of what
// rounding left over is added back, as by `score_by_bytes`, whose units are no smaller.
#pragma once

#include "tiles.h"
//
#include "ahead.h"
#include "byte_lut.h"
#include "lut.h"

namespace tailorkv::TAILORKV_ISA {
namespace {

constexpr int64_t kTileRows = 16, kTileBytes = 64;
// Queries of a tile, tokens of a tile, and tiles that a run of 64 tokens has.
constexpr int kTileQueries = 16, kTileTokens16 = 16, kPieces = kPlaces / kTileTokens16;

// Scratch of one thread.
//   factors: [tiles, kTileRows, kTileBytes], whole numbers, 0 behind the channels
//   codes: [kPieces, tiles, kTileRows, kTileBytes], a row of four channels of 16 tokens
//   sums: [kPieces, kTileRows, kTileTokens16]; unit, shift: [kTileQueries]
struct TileScratch {
  int8_t* factors;
  uint8_t* codes;
  int32_t* sums;
  float *unit, *shift;
};

inline int64_t tiles_of(int64_t d) { return ceil_div(d, kTileBytes); }

inline TileScratch take_tile_scratch(int64_t d) {
  const int64_t bytes = tiles_of(d) * kTileRows * kTileBytes;
  const TileScratch scratch{take<int8_t>(bytes), take<uint8_t>(kPieces * bytes),
                            take<int32_t>(kPieces * kTileRows * kTileTokens16),
                            take<float>(kTileQueries), take<float>(kTileQueries)};
  __builtin_memset(scratch.factors, 0, static_cast<size_t>(bytes));
  return scratch;
}

// The factors of one query as whole numbers; how they and what is added become scores.
//   query, scale, zero: [padded(d)]; scaled: [padded(d)], scratch
inline void round_factors(const float* query, const float* scale, const float* zero, float extra,
                          int64_t d, int row, float* scaled, const TileScratch& scratch) {
  F offset = splat(0), range = splat(0), total = splat(0);
  for (int64_t c = 0; c < padded(d); c += W) {
    const F x = load(query + c), y = x * load(scale + c);
    offset = fma(x, load(zero + c), offset);
    range = max(range, abs(y));
    total = total + y;
    store(scaled + c, y);
  }
  const float most = largest(range), unit = most / 127.0f;
  const F inverse = splat(most > 0 ? 127.0f / most : 0.0f);
  __m512i whole = _mm512_setzero_si512();
  for (int64_t c = 0; c < padded(d); c += W) {
    const __m512i x = _mm512_cvtps_epi32(load(scaled + c) * inverse);
    whole = _mm512_add_epi32(whole, x);
    int8_t* to = scratch.factors + (c / kTileBytes * kTileRows + row) * kTileBytes + c % kTileBytes;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(x));
  }
  const float left_over = sum(total) - unit * static_cast<float>(_mm512_reduce_add_epi32(whole));
  scratch.unit[row] = unit;
  scratch.shift[row] = sum(offset) + 0.5f * left_over + extra;
}

// Bits of 64 tokens as bytes, as tiles take them.
//   bytes: [d/8, 64]
inline void spread_codes(const uint8_t* bytes, int64_t d, Ahead& ahead,
                         const TileScratch& scratch) {
  // Of a pair of 32-bit numbers: bits 0 to 3 of each, and 4 to 7, to the lowest of a byte.
  const __m512i low = _mm512_set1_epi64(0x2322212003020100), one = _mm512_set1_epi8(1);
  const __m512i high = _mm512_set1_epi64(0x2726252407060504);
  const int64_t size = tiles_of(d) * kTileRows * kTileBytes;
  for (int64_t i = 0; i < d / 8; ++i) {
    if (i % 2 == 0) ahead.ask(kLinesPerStep);
    uint8_t* to = scratch.codes + 2 * i * kTileBytes;
    for (int piece = 0; piece < kPieces; ++piece, to += size) {
      const auto* from =
          reinterpret_cast<const __m128i*>(bytes + i * kPlaces + piece * kTileTokens16);
      const __m512i wide = _mm512_cvtepu8_epi32(_mm_load_si128(from));
      _mm512_store_si512(to, _mm512_and_si512(_mm512_multishift_epi64_epi8(low, wide), one));
      _mm512_store_si512(to + kTileBytes,
                         _mm512_and_si512(_mm512_multishift_epi64_epi8(high, wide), one));
    }
  }
}

// The products of all factors with the codes of 64 tokens. Wants `TileShape(queries, 5)`.
inline void multiply_codes(int64_t d, const TileScratch& scratch) {
  const int64_t size = tiles_of(d) * kTileRows * kTileBytes;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < size; i += kTileRows * kTileBytes) {
    const uint8_t* codes = scratch.codes + i;
    _tile_loadd(4, scratch.factors + i, kTileBytes);
    _tile_loadd(5, codes, kTileBytes);
    _tile_dpbsud(0, 4, 5);
    _tile_loadd(6, codes + size, kTileBytes);
    _tile_dpbsud(1, 4, 6);
    _tile_loadd(7, codes + 2 * size, kTileBytes);
    _tile_dpbsud(2, 4, 7);
    _tile_loadd(5, codes + 3 * size, kTileBytes);
    _tile_dpbsud(3, 4, 5);
  }
  constexpr int64_t kSums = kTileRows * kTileTokens16;
  _tile_stored(0, scratch.sums, kTileBytes);
  _tile_stored(1, scratch.sums + kSums, kTileBytes);
  _tile_stored(2, scratch.sums + 2 * kSums, kTileBytes);
  _tile_stored(3, scratch.sums + 3 * kSums, kTileBytes);
}

// The largest score of each of 64 tokens, of `count` queries; of `best` too, unless first.
//   best: [64]
inline void keep_best_of(int count, bool first, const TileScratch& scratch, float* best) {
  for (int piece = 0; piece < kPieces; ++piece, best += kTileTokens16) {
    const int32_t* sums = scratch.sums + piece * kTileRows * kTileTokens16;
    F most = first ? splat(-__builtin_inff()) : load(best);
    for (int q = 0; q < count; ++q, sums += kTileTokens16) {
      const F x = _mm512_cvtepi32_ps(_mm512_load_si512(sums));
      most = max(most, fma(x, splat(scratch.unit[q]), splat(scratch.shift[q])));
    }
    store(best, most);
  }
}

// Scores of a group of tokens, a multiple of 64, for all queries, the largest of each token.
//   codes: [d, g/8], rows pitch apart; query: [Q, padded(d)]; extra: [Q], added; best: [g]
//   scale, zero, scaled: [padded(d)], the last one scratch; bytes: [d/8, 64], scratch
inline void score_by_tiles(const uint8_t* codes, int64_t pitch, int64_t d, int64_t g,
                           int32_t queries, const float* query, const float* extra,
                           const float* scale, const float* zero, float* scaled, uint8_t* bytes,
                           Ahead& ahead, const TileScratch& scratch, float* best) {
  for (int32_t q = 0; q < queries; q += kTileQueries) {
    const int count = smaller(kTileQueries, queries - q);
    for (int i = 0; i < count; ++i) {
      round_factors(query + (q + i) * padded(d), scale, zero, extra[q + i], d, i, scaled, scratch);
    }
    for (int64_t t = 0; t < g; t += kPlaces) {
      transpose_all(codes + t / 8, pitch, d, bytes);
      spread_codes(bytes, d, ahead, scratch);
      multiply_codes(d, scratch);
      keep_best_of(count, q == 0, scratch, best + t);
    }
  }
}

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
