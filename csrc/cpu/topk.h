// select_topk: one pass over the scores with a rising threshold. Few scores pass it, so that the
// pass runs at the speed of memory; those that do wait in a buffer, which is cut to the k best
// whenever it is full and then raises the threshold. Buffers stay in ascending order of position,
// so nothing is ever sorted: the cut looks for the k-th best key by bisection, whose counts are
// loops over vectors without a branch.
#pragma once

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
  int32_t equal = 0;
  for (int64_t i = 0; i < n; ++i) equal += keys[i] == threshold;
  int64_t places = equal - (reaching - k), kept = 0;
  // Without a branch, as none could be foreseen.
  for (int64_t i = 0; i < n; ++i) {
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

// The min(k, end - begin) best scores of [begin, end), in ascending order of position.
//   scores: [S]; ranked: [buffer_size(k)]
// Returns how many there are.
int64_t find_best(Ranked ranked, const float* scores, int64_t begin, int64_t end, int64_t k) {
  const int64_t capacity = buffer_size(k) - 2 * kUnrolled;
  int64_t count = smaller(end - begin, capacity), i = begin + count;
  if (count > 0) __builtin_memcpy(ranked.keys, scores + begin, static_cast<size_t>(count) * 4);
  for (int64_t j = 0; j < count; ++j) ranked.positions[j] = static_cast<int32_t>(begin + j);
  // Keys of the buffer that are no longer plain bits of scores.
  int64_t converted = 0;
  float threshold = 0;
  auto shrink = [&] {
    for (int64_t j = converted; j < count; ++j) ranked.keys[j] = rank_key(ranked.keys[j]);
    converted = count;
    if (count <= k) return;
    threshold = key_score(keep_best(ranked, count, k));
    converted = count = k;
  };
  if (i < end) shrink();
  // A score that equals the threshold stands behind those that are in: they came earlier.
  for (; i + kUnrolled <= end; i += kUnrolled) {
    F limit = splat(threshold);
    uint32_t passing[4];
    for (int j = 0; j < 4; ++j) passing[j] = greater(load(scores + i + j * W), limit);
    if ((passing[0] | passing[1] | passing[2] | passing[3]) == 0) continue;
    for (int j = 0; j < 4; ++j) {
      count += pack(load(scores + i + j * W), static_cast<int32_t>(i + j * W), passing[j],
                    ranked.keys + count, ranked.positions + count);
    }
    if (count > capacity) shrink();
  }
  for (; i < end; ++i) {
    if (!(scores[i] > threshold)) continue;
    __builtin_memcpy(ranked.keys + count, scores + i, 4);
    ranked.positions[count++] = static_cast<int32_t>(i);
  }
  shrink();
  return count;
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
  // The best of a pair's ranges one after the other, so that they ascend as a whole too.
  Ranked best = take_ranked(pairs * parts * k);
  int64_t* counts = take<int64_t>(pairs * parts);
  Ranked buffers = take_ranked(size * num_threads());
  parallel_for(pairs * parts, [&](int64_t i) {
    const int64_t pair = i / parts, part = i % parts;
    const int64_t row = pair / op.kv_heads, head = pair % op.kv_heads;
    const int64_t start = op.sink_tokens;
    const int64_t middle = larger(0, op.tail_start[row] - start);
    const float* scores = op.scores + row * op.scores_row + head * op.scores_head;
    Ranked buffer = buffers + size * omp_get_thread_num();
    counts[i] = find_best(buffer, scores, start + middle * part / parts,
                          start + middle * (part + 1) / parts, k);
    for (int64_t j = 0; j < counts[i]; ++j) {
      best.keys[i * k + j] = buffer.keys[j];
      best.positions[i * k + j] = buffer.positions[j];
    }
  });
  parallel_for(pairs, [&](int64_t pair) {
    Ranked candidates = best + pair * parts * k;
    int64_t count = counts[pair * parts];
    for (int64_t part = 1; part < parts; ++part) {
      for (int64_t j = 0; j < counts[pair * parts + part]; ++j, ++count) {
        candidates.keys[count] = candidates.keys[part * k + j];
        candidates.positions[count] = candidates.positions[part * k + j];
      }
    }
    if (count > k) {
      keep_best(candidates, count, k);
      count = k;
    }
    int32_t* indices = op.indices + pair * k;
    for (int64_t j = 0; j < count; ++j) indices[j] = candidates.positions[j];
    for (int64_t j = count; j < k; ++j) indices[j] = -1;
  });
}

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
