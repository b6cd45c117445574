// select_topk: one pass over the scores with a rising threshold. Few scores pass it, so that the
// pass runs at the speed of memory; those that do wait in a buffer, which is cut to the k best
// whenever it is full and then raises the threshold.
#pragma once

namespace tailorkv::TAILORKV_ISA {
namespace {

// Orders first by score, then lower positions first.
inline uint64_t sort_key(float score, int64_t position) {
  score += 0.0f;  // -0.0 equals 0.0
  uint32_t bits;
  __builtin_memcpy(&bits, &score, 4);
  bits ^= bits >> 31 ? 0xFFFFFFFFu : 0x80000000u;
  return static_cast<uint64_t>(bits) << 32 | (0xFFFFFFFFu - static_cast<uint32_t>(position));
}
inline float key_score(uint64_t key) {
  uint32_t bits = static_cast<uint32_t>(key >> 32);
  bits ^= bits >> 31 ? 0x80000000u : 0xFFFFFFFFu;
  float score;
  __builtin_memcpy(&score, &bits, 4);
  return score;
}
inline int32_t key_position(uint64_t key) {
  return static_cast<int32_t>(0xFFFFFFFFu - static_cast<uint32_t>(key));
}

constexpr int64_t kUnrolled = 4 * W;

inline int64_t buffer_size(int64_t k) { return k + larger(k, 512) + kUnrolled; }

// The keys of the min(k, end - begin) best scores of [begin, end), in any order.
//   scores: [S]
//   keys: [buffer_size(k)]
// Returns how many there are.
int64_t best_keys(uint64_t* keys, const float* scores, int64_t begin, int64_t end, int64_t k) {
  const int64_t capacity = buffer_size(k) - kUnrolled;
  int64_t i = begin, count = 0;
  for (; i < end && count < capacity; ++i) keys[count++] = sort_key(scores[i], i);
  float threshold = 0;
  auto shrink = [&] {
    if (count <= k) return;
    keep_largest(keys, count, k);
    count = k;
    // The k-th best is the last one that keep_largest leaves.
    threshold = key_score(keys[k - 1]);
  };
  if (i < end) shrink();
  // A score that equals the threshold stands behind those that are in: they came earlier.
  for (; i + kUnrolled <= end; i += kUnrolled) {
    F limit = splat(threshold);
    uint64_t passing = 0;
    for (int j = 0; j < 4; ++j) {
      passing |= static_cast<uint64_t>(greater(load(scores + i + j * W), limit)) << (j * W);
    }
    for (; passing != 0; passing &= passing - 1) {
      int64_t position = i + __builtin_ctzll(passing);
      keys[count++] = sort_key(scores[position], position);
    }
    if (count > capacity) shrink();
  }
  for (; i < end; ++i) {
    if (scores[i] > threshold) keys[count++] = sort_key(scores[i], i);
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
  uint64_t* keys = take<uint64_t>(pairs * parts * k);
  int64_t* counts = take<int64_t>(pairs * parts);
  uint64_t* buffers = take<uint64_t>(size * num_threads());
  parallel_for(pairs * parts, [&](int64_t i) {
    const int64_t pair = i / parts, part = i % parts;
    const int64_t row = pair / op.kv_heads, head = pair % op.kv_heads;
    const int64_t start = op.sink_tokens;
    const int64_t middle = larger(0, op.tail_start[row] - start);
    const float* scores = op.scores + row * op.scores_row + head * op.scores_head;
    uint64_t* buffer = buffers + size * omp_get_thread_num();
    counts[i] = best_keys(buffer, scores, start + middle * part / parts,
                          start + middle * (part + 1) / parts, k);
    for (int64_t j = 0; j < counts[i]; ++j) keys[i * k + j] = buffer[j];
  });
  parallel_for(pairs, [&](int64_t pair) {
    uint64_t* candidates = keys + pair * parts * k;
    int64_t count = counts[pair * parts];
    for (int64_t part = 1; part < parts; ++part) {
      for (int64_t j = 0; j < counts[pair * parts + part]; ++j) {
        candidates[count++] = candidates[part * k + j];
      }
    }
    if (count > k) {
      keep_largest(candidates, count, k);
      count = k;
    }
    int32_t* indices = op.indices + pair * k;
    for (int64_t j = 0; j < count; ++j) indices[j] = key_position(candidates[j]);
    sort_positions(indices, count);
    for (int64_t j = count; j < k; ++j) indices[j] = -1;
  });
}

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
