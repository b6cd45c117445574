// select_topk: one pass over the scores with a rising limit. Few scores pass it, so that the
// pass runs at the speed of memory; those that do wait in a buffer, which is cut to the k best
// whenever it is full and then raises the limit. Buffers stay in ascending order of position,
// so nothing is ever sorted: the cut looks for the k-th best key by bisection, whose counts are
// loops over vectors without a branch.
#pragma once

#include "common.h"

namespace tailorkv::TAILORKV_ISA {
namespace {

// Scores as integers in the same order, and their positions, ascending.
struct Ranked {
  int32_t *keys, *positions;
};

inline int32_t rank_key(int32_t bits) {
  float score;
  __builtin_memcpy(&score, &bits, 4);
  score += 0.0f;  // -0.0 equals 0.0
  __builtin_memcpy(&bits, &score, 4);
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}
inline float key_score(int32_t key) {
  key ^= (key >> 31) & 0x7FFFFFFF;
  float score;
  __builtin_memcpy(&score, &key, 4);
  return score;
}

constexpr int64_t kUnrolled = 4 * W;

// Places of a buffer of `Ranked` for k.
// Beyond the capacity there is room for one more round, and for what `pack` writes behind it.
inline int64_t buffer_size(int64_t k) { return k + larger(k, 512) + 2 * kUnrolled; }

inline Ranked take_ranked(int64_t n) { return Ranked{take<int32_t>(n), take<int32_t>(n)}; }
inline Ranked operator+(Ranked ranked, int64_t n) {
  return Ranked{ranked.keys + n, ranked.positions + n};
}

// Keep the k best of n > k entries, those at the front first among equals.
// Returns a key that all those reach; a later entry that does not exceed it cannot be among the
// best.
inline int32_t keep_best(Ranked ranked, int64_t n, int64_t k) {
  int32_t* keys = ranked.keys;
  int32_t lowest = keys[0], highest = keys[0];
  for (int64_t i = 0; i < n; ++i) {
    lowest = keys[i] < lowest ? keys[i] : lowest;
    highest = keys[i] > highest ? keys[i] : highest;
  }
  // At least k keys reach `low`, fewer reach `high`.
  int64_t low = lowest, high = static_cast<int64_t>(highest) + 1;
  int64_t reaching = n;
  while (reaching != k && high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    const auto limit = static_cast<int32_t>(middle);
    int32_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += keys[i] >= limit;
    if (count >= k) {
      low = middle;
      reaching = count;
    } else {
      high = middle;
    }
  }
  const auto threshold = static_cast<int32_t>(low);
  // Where more than k reach it, it is the k-th best key itself, and the last of its equals go.
  int64_t kept = 0, i = 0;
  if (reaching == k) {
    for (; i + W <= n; i += W) {
      kept +=
          compact(keys + i, ranked.positions + i, threshold, keys + kept, ranked.positions + kept);
    }
  }
  int32_t equal = 0;
  for (int64_t j = i; j < n; ++j) equal += keys[j] == threshold;
  int64_t places = equal - (reaching - k);
  // Without a branch, as none could be foreseen.
  for (; i < n; ++i) {
    const int32_t key = keys[i];
    const int tied = key == threshold;
    keys[kept] = key;
    ranked.positions[kept] = ranked.positions[i];
    kept += (key >= threshold) & ((tied ^ 1) | (places > 0));
    places -= tied;
  }
  return threshold;
}

// The channels with the largest weights, ascending; the lower one is taken among equals.
//   weight: [d]; ranked: [d]; channels: [count], count <= d
inline void choose_channels(const float* weight, int64_t d, int64_t count, Ranked ranked,
                            int32_t* channels) {
  __builtin_memcpy(ranked.keys, weight, static_cast<size_t>(d) * 4);
  for (int64_t c = 0; c < d; ++c) {
    ranked.keys[c] = rank_key(ranked.keys[c]);
    ranked.positions[c] = static_cast<int32_t>(c);
  }
  if (count < d) keep_best(ranked, d, count);
  __builtin_memcpy(channels, ranked.positions, static_cast<size_t>(count) * 4);
}

// No score is known to be among the best of a row: the key of -infinity.
constexpr int32_t kNoFloor = -2139095041;

// A number that every score exceeds whose key is at least `floor`, and few others.
inline float below(int32_t floor) {
  // Wider around zero: processors may take the smallest numbers for it.
  constexpr int32_t kSmallest = 0x800001;
  if (floor >= -kSmallest && floor <= kSmallest) floor = -kSmallest;
  return key_score(floor - 1);
}

// The k best of the scores that it is offered, in ascending order of position.
//
// Several of them may look through parts of one row at the same time. They share a floor, a key
// that k scores of the row are known to reach: what lies below it cannot be among the best.
class Best {
 public:
  // ranked: [buffer_size(k)]; floor: null where nothing is shared
  Best(Ranked ranked, int64_t k, int32_t* floor)
      : ranked_(ranked), k_(k), capacity_(buffer_size(k) - 2 * kUnrolled), floor_(floor) {
    heed_floor();
  }

  // The scores [n] of the positions from `first` on, all later than those before.
  void offer(const float* scores, int64_t first, int64_t n) {
    int64_t i = 0;
    heed_floor();
    if (!filtering_) {
      i = smaller(n, capacity_ - count_);
      __builtin_memcpy(ranked_.keys + count_, scores, static_cast<size_t>(i) * 4);
      for (int64_t j = 0; j < i; ++j) {
        ranked_.positions[count_ + j] = static_cast<int32_t>(first + j);
      }
      count_ += i;
      if (i == n) return;
      shrink();
    }
    // A score that equals the limit stands behind those that are in: they came earlier.
    for (; i + kUnrolled <= n; i += kUnrolled) {
      F limit = splat(limit_);
      uint32_t passing[4];
      for (int j = 0; j < 4; ++j) passing[j] = greater(load(scores + i + j * W), limit);
      if ((passing[0] | passing[1] | passing[2] | passing[3]) == 0) continue;
      for (int j = 0; j < 4; ++j) {
        count_ += pack(load(scores + i + j * W), static_cast<int32_t>(first + i + j * W),
                       passing[j], ranked_.keys + count_, ranked_.positions + count_);
      }
      if (count_ > capacity_) shrink();
    }
    for (; i < n; ++i) {
      if (!(scores[i] > limit_)) continue;
      __builtin_memcpy(ranked_.keys + count_, scores + i, 4);
      ranked_.positions[count_++] = static_cast<int32_t>(first + i);
    }
    if (count_ > capacity_) shrink();
  }

  // Cut them down to the k best; how many there are.
  int64_t finish() {
    shrink();
    return count_;
  }

 private:
  void heed_floor() {
    if (floor_ == nullptr) return;
    const int32_t floor = __atomic_load_n(floor_, __ATOMIC_RELAXED);
    if (floor <= seen_floor_) return;
    seen_floor_ = floor;
    const float limit = below(floor);
    if (!filtering_ || limit > limit_) limit_ = limit;
    filtering_ = true;
  }

  void shrink() {
    for (int64_t j = converted_; j < count_; ++j) ranked_.keys[j] = rank_key(ranked_.keys[j]);
    converted_ = count_;
    if (count_ <= k_) return;
    const int32_t threshold = keep_best(ranked_, count_, k_);
    converted_ = count_ = k_;
    const float limit = key_score(threshold);
    if (!filtering_ || limit > limit_) limit_ = limit;
    filtering_ = true;
    // Another one's higher floor may be lost to this one: both are true.
    if (floor_ != nullptr && threshold > seen_floor_) {
      seen_floor_ = threshold;
      __atomic_store_n(floor_, threshold, __ATOMIC_RELAXED);
    }
  }

  Ranked ranked_;
  int64_t k_, capacity_, count_ = 0;
  // Keys of the buffer that are no longer plain bits of scores.
  int64_t converted_ = 0;
  float limit_ = 0;
  // From when on scores must exceed the limit.
  bool filtering_ = false;
  int32_t* floor_;
  int32_t seen_floor_ = kNoFloor;
};

// The best of one row and head, found in parts.
struct Found {
  Ranked ranked;
  int64_t count;
};

inline void copy_found(Ranked from, int64_t count, Found* to) {
  to->count = count;
  __builtin_memcpy(to->ranked.keys, from.keys, static_cast<size_t>(count) * 4);
  __builtin_memcpy(to->ranked.positions, from.positions, static_cast<size_t>(count) * 4);
}

inline Found* take_found(int64_t n, int64_t k) {
  auto* found = take<Found>(n);
  for (int64_t i = 0; i < n; ++i) found[i] = Found{take_ranked(k), 0};
  return found;
}

// The k best of all parts, ascending, then -1.
//   part(j): the parts of one row and head, in ascending order of position
//   merged: [parts * k]
template <class Part>
void merge_found(int64_t parts, Part part, Ranked merged, int64_t k, int32_t* indices) {
  int64_t count = 0;
  for (int64_t j = 0; j < parts; ++j) {
    const Found& found = part(j);
    for (int64_t i = 0; i < found.count; ++i, ++count) {
      merged.keys[count] = found.ranked.keys[i];
      merged.positions[count] = found.ranked.positions[i];
    }
  }
  if (count > k) {
    keep_best(merged, count, k);
    count = k;
  }
  for (int64_t i = 0; i < count; ++i) indices[i] = merged.positions[i];
  for (int64_t i = count; i < k; ++i) indices[i] = -1;
}

inline int32_t* take_floors(int64_t n) {
  int32_t* floors = take<int32_t>(n);
  for (int64_t i = 0; i < n; ++i) floors[i] = kNoFloor;
  return floors;
}

void select_topk(const SelectTopk& op) {
  scratch_reset();
  const int64_t k = op.k;
  if (k == 0 || op.rows == 0 || op.kv_heads == 0) return;
  const int64_t pairs = static_cast<int64_t>(op.rows) * op.kv_heads;
  const int64_t size = buffer_size(k);
  int64_t longest = 0;
  for (int64_t row = 0; row < op.rows; ++row) {
    longest = larger(longest, op.tail_start[row] - op.sink_tokens);
  }
  // Ranges of a row only pay when there are too few rows for the threads.
  int64_t parts = pairs >= 2 * num_threads() ? 1 : ceil_div(2 * num_threads(), pairs);
  parts = larger(1, smaller(parts, longest / (2 * size)));
  Found* found = take_found(pairs * parts, k);
  int32_t* floors = take_floors(pairs);
  Ranked buffers = take_ranked(size * num_threads());
  parallel_for(pairs * parts, [&](int64_t i) {
    const int64_t pair = i / parts, part = i % parts;
    const int64_t row = pair / op.kv_heads, head = pair % op.kv_heads;
    const int64_t middle = larger(0, op.tail_start[row] - op.sink_tokens);
    const int64_t begin = op.sink_tokens + middle * part / parts;
    const int64_t end = op.sink_tokens + middle * (part + 1) / parts;
    Ranked buffer = buffers + size * omp_get_thread_num();
    Best best(buffer, k, floors + pair);
    best.offer(op.scores + row * op.scores_row + head * op.scores_head + begin, begin, end - begin);
    copy_found(buffer, best.finish(), found + i);
  });
  Ranked merged = take_ranked(pairs * parts * k);
  parallel_for(pairs, [&](int64_t pair) {
    merge_found(
        parts, [&](int64_t j) -> const Found& { return found[pair * parts + j]; },
        merged + pair * parts * k, k, op.indices + pair * k);
  });
}

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
