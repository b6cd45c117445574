// select_topk: a radix selection in three counting passes and one that writes.
//
// Pass p counts digit p of the keys whose higher digits are those of the k-th best; a block works
// on one part of one row and KV head (a pair), so that few pairs still fill the device. Each kernel
// first looks up, from the counts of the pass before, which digit comes next. After the last one
// the k-th best key is known to the bit, and each part knows how many keys above it and equal to it
// stand in the parts before: positions come out in order, ties by position, whatever the scores.
#pragma once

#include "block_scan.cuh"
#include "ops.h"
#include "portable.cuh"
#include "radix.cuh"

namespace tailorkv::cuda {

constexpr int kTopkThreads = 1024;
constexpr int kLastBins = bins_of_pass(kPasses - 1);

// Scratch memory of a call.
struct TopkWorkspace {
  uint32_t* histograms;   // [pairs, kBins], zero at the start
  Selection* selections;  // [pairs, kPasses - 1], after the first passes
  // [pairs, parts, kLastBins + 1]: how many keys of the part have higher digits above those of the
  // selection, or the same and a last digit of at least d.
  uint32_t* at_least;
};

inline int64_t num_pairs(const SelectTopk& op) {
  return static_cast<int64_t>(op.rows) * op.kv_heads;
}

inline int64_t histogram_bytes(const SelectTopk& op) {
  return num_pairs(op) * kBins * static_cast<int64_t>(sizeof(uint32_t));
}

inline int64_t topk_bytes(const SelectTopk& op, int32_t parts) {
  return histogram_bytes(op) +
         num_pairs(op) * (kPasses - 1) * static_cast<int64_t>(sizeof(Selection)) +
         num_pairs(op) * parts * (kLastBins + 1) * static_cast<int64_t>(sizeof(uint32_t));
}

inline TopkWorkspace carve_topk(const SelectTopk& op, void* workspace) {
  auto* histograms = static_cast<uint32_t*>(workspace);
  auto* selections = reinterpret_cast<Selection*>(histograms + num_pairs(op) * kBins);
  auto* at_least = reinterpret_cast<uint32_t*>(selections + num_pairs(op) * (kPasses - 1));
  return {histograms, selections, at_least};
}

// Two blocks for every multiprocessor, but none with less than one vector for each thread.
inline int32_t parts_for(const SelectTopk& op, int32_t multiprocessors) {
  const int64_t pairs = larger<int64_t>(num_pairs(op), 1);
  const int64_t most = ceil_div(op.capacity, kTopkThreads * kVector);
  return static_cast<int32_t>(
      larger<int64_t>(1, smaller<int64_t>(2 * multiprocessors / pairs, most)));
}

// The part of a pair that a block works on.
struct TopkTask {
  int64_t pair;
  int32_t part;
  const float* scores;  // of the pair
  Middle middle;
  uint32_t wanted;  // how many tokens to select
};

__device__ __forceinline__ TopkTask topk_task(const SelectTopk& op, int32_t parts) {
  TopkTask task;
  task.pair = blockIdx.x / parts;
  task.part = static_cast<int32_t>(blockIdx.x % parts);
  const int64_t row = task.pair / op.kv_heads, head = task.pair % op.kv_heads;
  task.scores = op.scores + row * op.scores_row + head * op.scores_head;
  task.middle = middle_of(task.scores, op.sink_tokens, op.tail_start[row]);
  task.wanted = static_cast<uint32_t>(smaller(op.k, task.middle.end - task.middle.begin));
  return task;
}

// The keys of one vector. Returns a bit for each that belongs to the middle.
__device__ __forceinline__ uint32_t load_keys(const TopkTask& task, int32_t vector,
                                              uint32_t (&keys)[kVector]) {
  const int64_t token = task.middle.first + static_cast<int64_t>(vector) * kVector;
  if (token >= task.middle.begin && token + kVector <= task.middle.end) {
    const float4 scores = *reinterpret_cast<const float4*>(task.scores + token);
    keys[0] = sort_key(scores.x);
    keys[1] = sort_key(scores.y);
    keys[2] = sort_key(scores.z);
    keys[3] = sort_key(scores.w);
    return (1u << kVector) - 1;
  }
  uint32_t inside = 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const bool valid = token + i >= task.middle.begin && token + i < task.middle.end;
    keys[i] = valid ? sort_key(task.scores[token + i]) : 0;
    inside |= static_cast<uint32_t>(valid) << i;
  }
  return inside;
}

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

// What is known after pass `Pass`, from its counts and from what was known before.
template <int Threads, int Pass>
__device__ __forceinline__ Selection next_selection(const TopkTask& task,
                                                    const TopkWorkspace& workspace) {
  constexpr int kCount = bins_of_pass(Pass);
  __shared__ Selection result;
  const Selection before = Pass == 0 ? Selection{0, task.wanted}
                                     : workspace.selections[task.pair * (kPasses - 1) + Pass - 1];
  const uint32_t* histogram = workspace.histograms + task.pair * kBins + first_bin_of_pass(Pass);
  uint32_t above = count_above<Threads, kCount>(histogram);
#pragma unroll
  for (int i = 0; i < kCount / Threads; ++i) {
    const int bin = highest_bin<Threads, kCount>() - i;
    const uint32_t count = histogram[bin];
    // True for one bin of one thread.
    if (above < before.wanted && before.wanted <= above + count) {
      result = with_digit(before, Pass, static_cast<uint32_t>(bin), above);
    }
    above += count;
  }
  __syncthreads();
  return result;
}

// Count digit `Pass`.
template <int Threads, int Pass>
__global__ void __launch_bounds__(Threads, 2)
    count_digits(SelectTopk op, TopkWorkspace workspace, int32_t parts) {
  constexpr int kCount = bins_of_pass(Pass);
  // And, behind the counts, how many keys have higher digits above those of the selection.
  __shared__ uint32_t counts[kCount + 1];
  const TopkTask task = topk_task(op, parts);
  if (task.wanted == 0) return;
  for (int bin = threadIdx.x; bin <= kCount; bin += Threads) counts[bin] = 0;
  Selection selection{0, task.wanted};
  if constexpr (Pass > 0) {
    selection = next_selection<Threads, Pass - 1>(task, workspace);
    if (task.part == 0 && threadIdx.x == 0) {
      workspace.selections[task.pair * (kPasses - 1) + Pass - 1] = selection;
    }
  }
  __syncthreads();
  const Vectors vectors = part_of(task.middle, task.part, parts);
  for (int32_t vector = vectors.begin + static_cast<int32_t>(threadIdx.x); vector < vectors.end;
       vector += Threads) {
    uint32_t keys[kVector];
    const uint32_t inside = load_keys(task, vector, keys);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if ((inside >> i & 1) == 0) continue;
      const uint32_t prefix = key_prefix(keys[i], Pass);
      if (prefix == selection.prefix) atomicAdd(&counts[key_digit(keys[i], Pass)], 1u);
      // Fewer than k.
      if (Pass == kPasses - 1 && prefix > selection.prefix) atomicAdd(&counts[kCount], 1u);
    }
  }
  __syncthreads();
  uint32_t* histogram = workspace.histograms + task.pair * kBins + first_bin_of_pass(Pass);
  for (int bin = threadIdx.x; bin < kCount; bin += Threads) {
    if (counts[bin] != 0) atomicAdd(&histogram[bin], counts[bin]);
  }
  if constexpr (Pass == kPasses - 1) {
    uint32_t* at_least = workspace.at_least + (task.pair * parts + task.part) * (kCount + 1);
    uint32_t sum = counts[kCount] + count_above<Threads, kCount>(counts);
    if (threadIdx.x == 0) at_least[kCount] = counts[kCount];
#pragma unroll
    for (int i = 0; i < kCount / Threads; ++i) {
      const int bin = highest_bin<Threads, kCount>() - i;
      sum += counts[bin];
      at_least[bin] = sum;
    }
  }
}

// Write the positions of the selected tokens in order, then -1.
template <int Threads>
__global__ void __launch_bounds__(Threads, 2)
    write_selected(SelectTopk op, TopkWorkspace workspace, int32_t parts) {
  const TopkTask task = topk_task(op, parts);
  int32_t* indices = op.indices + task.pair * op.k;
  const int64_t thread = static_cast<int64_t>(task.part) * Threads + threadIdx.x;
  for (int64_t j = task.wanted + thread; j < op.k; j += static_cast<int64_t>(parts) * Threads) {
    indices[j] = -1;
  }
  if (task.wanted == 0) return;
  const Selection last = next_selection<Threads, kPasses - 1>(task, workspace);
  const uint32_t digit = key_digit(last.prefix, kPasses - 1);
  uint32_t above = 0, equal = 0;
#pragma unroll 1
  for (int32_t part = threadIdx.x; part < task.part; part += Threads) {
    const uint32_t* at_least =
        workspace.at_least + (task.pair * parts + part) * (kLastBins + 1) + digit;
    above += at_least[1];
    equal += at_least[0] - at_least[1];
  }
  exclusive_sum<Threads>(above, &above);
  exclusive_sum<Threads>(equal, &equal);
  const Vectors vectors = part_of(task.middle, task.part, parts);
#pragma unroll 1
  for (int32_t start = vectors.begin; start < vectors.end; start += Threads) {
    const int32_t vector = start + static_cast<int32_t>(threadIdx.x);
    uint32_t keys[kVector], inside = 0, found = 0;
    if (vector < vectors.end) inside = load_keys(task, vector, keys);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      // Keys above the threshold in the low half, those equal to it in the high one: at most 4096.
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
        indices[output_slot(my_above, my_equal, last.wanted)] =
            task.middle.first + vector * kVector + i;
      }
      my_equal += is_equal;
      my_above += !is_equal;
    }
    above += all_found & 0xFFFF;
    equal += all_found >> 16;
  }
}

// Launch all passes. `launch` starts kernels one after another and clears memory.
//   workspace: topk_bytes(op, parts) bytes, aligned to 8
template <int Threads, class Launch>
void run_select_topk(Launch& launch, const SelectTopk& op, void* workspace, int32_t parts) {
  static_assert(kPasses == 3 && Threads * kVector < 1 << 16);
  if (num_pairs(op) == 0 || op.k == 0) return;
  const TopkWorkspace carved = carve_topk(op, workspace);
  const int64_t blocks = num_pairs(op) * parts;
  launch.clear(carved.histograms, histogram_bytes(op));
  launch(count_digits<Threads, 0>, blocks, Threads, op, carved, parts);
  launch(count_digits<Threads, 1>, blocks, Threads, op, carved, parts);
  launch(count_digits<Threads, 2>, blocks, Threads, op, carved, parts);
  launch(write_selected<Threads>, blocks, Threads, op, carved, parts);
}

}  // namespace tailorkv::cuda
