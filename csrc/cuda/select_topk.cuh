// select_topk: a radix selection by the threads of one block, in three counting passes and one that
// writes, and all of it in one kernel.
//
// Pass p counts digit p of the keys whose higher digits are those of the k-th best. After the last
// one the k-th best key is known to the bit: positions come out in order, ties by position,
// whatever the scores. A block selects from one part of one row and KV head (a pair), so that few
// pairs still fill the device. The k best of all are among the k best of each part: the last block
// of a pair selects from those that all have left, part after part, which keeps the order of
// positions.
#pragma once

#include "block_scan.cuh"
#include "ops.h"
#include "portable.cuh"
#include "radix.cuh"

namespace tailorkv::cuda {

constexpr int kTopkThreads = 512;
constexpr int kMostBins = bins_of_pass(0);
constexpr int32_t kMostSplit = 1024;

// How many blocks of a pair are done: 0 before and after each launch, so that none has to clear it.
// Launches that cut pairs into parts must come one after another, as those of one stream do.
static __device__ uint32_t blocks_done[kMostSplit];

// What the parts leave: [pairs, parts, slots_of_part].
struct TopkWorkspace {
  uint32_t* keys;
  int32_t* tokens;
};

inline int64_t num_pairs(const SelectTopk& op) {
  return static_cast<int64_t>(op.rows) * op.kv_heads;
}

// Room for what a part selects, whole vectors.
TAILORKV_HD int32_t slots_of_part(const SelectTopk& op, int32_t parts) {
  const int32_t vectors = ceil_div(ceil_div(op.capacity, kVector) + 1, parts);
  return smaller(ceil_div(op.k, kVector), vectors) * kVector;
}

inline int64_t topk_slots(const SelectTopk& op, int32_t parts) {
  return parts == 1 ? 0 : num_pairs(op) * parts * slots_of_part(op, parts);
}

inline int64_t topk_bytes(const SelectTopk& op, int32_t parts) {
  return topk_slots(op, parts) * static_cast<int64_t>(sizeof(uint32_t) + sizeof(int32_t));
}

inline TopkWorkspace carve_topk(const SelectTopk& op, void* workspace, int32_t parts) {
  auto* keys = static_cast<uint32_t*>(workspace);
  return {keys, reinterpret_cast<int32_t*>(keys + topk_slots(op, parts))};
}

// Three blocks for every multiprocessor, but none with less than one vector for each thread, and no
// more than leave the last block of a pair about twice as much as each had itself.
inline int32_t parts_for(const SelectTopk& op, int32_t multiprocessors) {
  const int64_t pairs = larger<int64_t>(num_pairs(op), 1), wanted = larger(op.k, 1);
  if (pairs > kMostSplit) return 1;
  const int64_t most = ceil_div(op.capacity, kTopkThreads * kVector);
  int64_t parts = smaller<int64_t>(3 * multiprocessors / pairs, most);
  while (parts > 1 && parts * parts * wanted > 2 * static_cast<int64_t>(op.capacity)) --parts;
  return static_cast<int32_t>(larger<int64_t>(1, parts));
}

// Tokens of a part that belong to the middle.
TAILORKV_HD int32_t tokens_of(const Middle& middle, const Vectors& vectors) {
  const int32_t begin = larger(middle.first + vectors.begin * kVector, middle.begin);
  const int32_t end = smaller(middle.first + vectors.end * kVector, middle.end);
  return larger(end - begin, 0);
}

// The tokens of a pair.
struct Scores {
  const float* scores;
  Middle middle;

  // The keys of one vector. Returns a bit for each that belongs to the middle.
  __device__ __forceinline__ uint32_t load(int32_t vector, uint32_t (&keys)[kVector]) const {
    const int32_t first = token(vector, 0);
    if (first >= middle.begin && first + kVector <= middle.end) {
      const float4 four = *reinterpret_cast<const float4*>(scores + first);
      keys[0] = sort_key(four.x);
      keys[1] = sort_key(four.y);
      keys[2] = sort_key(four.z);
      keys[3] = sort_key(four.w);
      return (1u << kVector) - 1;
    }
    uint32_t inside = 0;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const bool valid = first + i >= middle.begin && first + i < middle.end;
      keys[i] = valid ? sort_key(scores[first + i]) : 0;
      inside |= static_cast<uint32_t>(valid) << i;
    }
    return inside;
  }

  __device__ __forceinline__ int32_t token(int32_t vector, int i) const {
    return middle.first + vector * kVector + i;
  }
};

// What the parts of a pair have left. Other blocks wrote it: it is read past this multiprocessor's
// own cache.
struct Selected {
  const uint32_t* keys;
  const int32_t* tokens;
  Middle middle;
  int32_t part_tokens;  // of a part, whole vectors
  int32_t slots, k;

  __device__ __forceinline__ uint32_t load(int32_t vector, uint32_t (&loaded)[kVector]) const {
    const int32_t part = vector * kVector / slots, slot = vector * kVector % slots;
    const int32_t begin = middle.first + part * part_tokens;
    const int32_t end = smaller(begin + part_tokens, middle.end);
    const int32_t count = smaller(k, end - larger(begin, middle.begin)) - slot;
    if (count <= 0) return 0;
    const uint4 four = __ldcg(reinterpret_cast<const uint4*>(keys) + vector);
    loaded[0] = four.x;
    loaded[1] = four.y;
    loaded[2] = four.z;
    loaded[3] = four.w;
    return (1u << smaller(count, kVector)) - 1;
  }

  __device__ __forceinline__ int32_t token(int32_t vector, int i) const {
    return __ldcg(tokens + vector * kVector + i);
  }
};

// The bins that a thread looks at stand next to each other, higher threads have lower ones.
template <int Threads, int Bins>
__device__ __forceinline__ int highest_bin() {
  static_assert(Bins % Threads == 0);
  return Bins - 1 - static_cast<int>(threadIdx.x) * (Bins / Threads);
}

// How many keys are in bins above those of this thread.
template <int Threads, int Bins>
__device__ __forceinline__ uint32_t count_above(const uint32_t* histogram) {
  uint32_t count = 0, total;
#pragma unroll
  for (int i = 0; i < Bins / Threads; ++i) {
    count += histogram[highest_bin<Threads, Bins>() - i];
  }
  return exclusive_sum<Threads>(count, &total);
}

// Count digit `Pass`, and what is then known of the k-th best key.
//   counts: shared, [kMostBins]
template <int Threads, int Pass, class Source>
__device__ __forceinline__ Selection narrow(const Source& source, const Vectors& vectors,
                                            Selection before, uint32_t* counts) {
  constexpr int kCount = bins_of_pass(Pass);
  __shared__ Selection result;
  for (int bin = threadIdx.x; bin < kCount; bin += Threads) counts[bin] = 0;
  __syncthreads();
#pragma unroll 1
  for (int32_t vector = vectors.begin + static_cast<int32_t>(threadIdx.x); vector < vectors.end;
       vector += Threads) {
    uint32_t keys[kVector];
    const uint32_t inside = source.load(vector, keys);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if ((inside >> i & 1) == 0 || key_prefix(keys[i], Pass) != before.prefix) continue;
      atomicAdd(&counts[key_digit(keys[i], Pass)], 1u);
    }
  }
  __syncthreads();
  uint32_t above = count_above<Threads, kCount>(counts);
#pragma unroll
  for (int i = 0; i < kCount / Threads; ++i) {
    const int bin = highest_bin<Threads, kCount>() - i;
    // True for one bin of one thread.
    if (above < before.wanted && before.wanted <= above + counts[bin]) {
      result = with_digit(before, Pass, static_cast<uint32_t>(bin), above);
    }
    above += counts[bin];
  }
  __syncthreads();
  return result;
}

// Give the best `wanted` of so many `available` keys to `take(slot, key, token)`, in their order.
template <int Threads, class Source, class Take>
__device__ __forceinline__ void select_best(const Source& source, const Vectors& vectors,
                                            int32_t available, int32_t wanted, uint32_t* counts,
                                            const Take& take) {
  // Where all are wanted, the lowest of all keys will do as the last one.
  Selection last{0, static_cast<uint32_t>(wanted)};
  if (wanted < available) {
    last = narrow<Threads, 0>(source, vectors, last, counts);
    last = narrow<Threads, 1>(source, vectors, last, counts);
    last = narrow<Threads, 2>(source, vectors, last, counts);
  }
  uint32_t above = 0, equal = 0;
#pragma unroll 1
  for (int32_t start = vectors.begin; start < vectors.end; start += Threads) {
    const int32_t vector = start + static_cast<int32_t>(threadIdx.x);
    uint32_t keys[kVector], inside = 0, found = 0;
    if (vector < vectors.end) inside = source.load(vector, keys);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      // Keys above the last one in the low half, those equal to it in the high one: at most 2048.
      if ((inside >> i & 1) == 0) continue;
      found += static_cast<uint32_t>(keys[i] > last.prefix);
      found += static_cast<uint32_t>(keys[i] == last.prefix) << 16;
    }
    uint32_t all_found;
    const uint32_t before = exclusive_sum<Threads>(found, &all_found);
    uint32_t my_above = above + (before & 0xFFFF), my_equal = equal + (before >> 16);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if ((inside >> i & 1) == 0 || keys[i] < last.prefix) continue;
      const bool is_equal = keys[i] == last.prefix;
      if (!is_equal || my_equal < last.wanted) {
        take(output_slot(my_above, my_equal, last.wanted), keys[i], source.token(vector, i));
      }
      my_equal += is_equal;
      my_above += !is_equal;
    }
    above += all_found & 0xFFFF;
    equal += all_found >> 16;
  }
}

// One part of one pair.
template <int Threads>
__global__ void __launch_bounds__(Threads, 3)
    select_tokens(SelectTopk op, TopkWorkspace workspace, int32_t parts) {
  __shared__ uint32_t counts[kMostBins];
  __shared__ bool is_last;
  const int64_t pair = blockIdx.x / parts;
  const auto part = static_cast<int32_t>(blockIdx.x % parts);
  const int64_t row = pair / op.kv_heads, head = pair % op.kv_heads;
  const float* scores = op.scores + row * op.scores_row + head * op.scores_head;
  const Middle middle = middle_of(scores, op.sink_tokens, op.tail_start[row]);
  const int32_t available = middle.end - middle.begin, wanted = smaller(op.k, available);
  int32_t* indices = op.indices + pair * op.k;
  const auto write = [&](int32_t slot, uint32_t, int32_t token) { indices[slot] = token; };
  if (parts == 1) {
    select_best<Threads>(Scores{scores, middle}, part_of(middle, 0, 1), available, wanted, counts,
                         write);
  } else {
    const int32_t slots = slots_of_part(op, parts);
    uint32_t* keys = workspace.keys + blockIdx.x * static_cast<int64_t>(slots);
    int32_t* tokens = workspace.tokens + blockIdx.x * static_cast<int64_t>(slots);
    const Vectors mine = part_of(middle, part, parts);
    const int32_t few = tokens_of(middle, mine);
    select_best<Threads>(Scores{scores, middle}, mine, few, smaller(op.k, few), counts,
                         [&](int32_t slot, uint32_t key, int32_t token) {
                           keys[slot] = key;
                           tokens[slot] = token;
                         });
    // Each thread's writes are there for all blocks before this one counts as done.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicInc(&blocks_done[pair], parts - 1) == parts - 1u;
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    keys -= part * static_cast<int64_t>(slots);
    tokens -= part * static_cast<int64_t>(slots);
    const int32_t part_tokens = ceil_div(middle.num_vectors, parts) * kVector;
    select_best<Threads>(Selected{keys, tokens, middle, part_tokens, slots, op.k},
                         Vectors{0, parts * (slots / kVector)}, available, wanted, counts, write);
  }
  for (int32_t i = wanted + static_cast<int32_t>(threadIdx.x); i < op.k; i += Threads) {
    indices[i] = -1;
  }
}

// Launch it: `launch` starts the kernel.
//   workspace: topk_bytes(op, parts) bytes, aligned to 16
template <int Threads, class Launch>
void run_select_topk(Launch& launch, const SelectTopk& op, void* workspace, int32_t parts) {
  static_assert(kPasses == 3 && Threads * kVector < 1 << 16);
  if (num_pairs(op) == 0 || op.k == 0) return;
  launch(select_tokens<Threads>, num_pairs(op) * parts, Threads, op,
         carve_topk(op, workspace, parts), parts);
}

}  // namespace tailorkv::cuda
