// quantized_decode_attention
#pragma once

#include "ahead.h"
#include "attention.h"
#include "codes.h"

namespace tailorkv::TAILORKV_ISA {
namespace {

// Scratch of one thread for groups of codes.
//   key_scale, key_zero: [padded(d)]; scores: [G, g]; value_scale, value_zero: [Vg, g]
struct CodeScratch {
  float *key_scale, *key_zero, *scores, *value_scale, *value_zero;
  ProductScratch product;
};

inline CodeScratch take_code_scratch(const QuantizedDecode& op) {
  const int64_t d = padded(op.decode.shape.head_size), g = op.grouping.group_size;
  const int64_t group_heads = op.decode.query_heads / op.decode.shape.kv_heads;
  const int64_t value_groups = ceil_div(op.decode.shape.head_size, g);
  return CodeScratch{take<float>(d),
                     take<float>(d),
                     take<float>(group_heads * g),
                     take<float>(value_groups * g),
                     take<float>(value_groups * g),
                     take_product_scratch(d, g)};
}

// Scales or zeros of V, a token's beside each other, as one row for each group of channels.
//   from: [g, Vg], rows item apart; to: [Vg, g]
inline void read_value_scales(const uint16_t* from, int64_t item, int64_t g, int64_t value_groups,
                              float* to) {
  const auto* halves = reinterpret_cast<const Half*>(from);
  if (item == 2 && value_groups == 2) {
    for (int64_t t = 0; t < g; t += W) {
      F first, second;
      load_pairs(halves + 2 * t, first, second);
      store(to + t, first);
      store(to + g + t, second);
    }
    return;
  }
  for (int64_t i = 0; i < value_groups; ++i) {
    for (int64_t t = 0; t < g; ++t) to[i * g + t] = to_float(halves[t * item + i]);
  }
}

// Add the cache lines of one group.
inline void add_lines(const QuantizedDecode& op, const HeadView& view, int64_t unit, Ahead& ahead) {
  const int64_t block = view.table[unit / op.grouping.groups_per_block];
  const int64_t group = unit % op.grouping.groups_per_block, g = op.grouping.group_size;
  const int64_t head = view.head;
  add_key_lines(op.key, block, head, group, op.decode.shape.head_size, ahead);
  ahead.add(at(op.value.codes, block, head, group), g * op.value.codes.item);
  ahead.add(at(op.value.scale, block, head, group), g * op.value.scale.item);
  ahead.add(at(op.value.zero, block, head, group), g * op.value.zero.item);
}

// Attend to one group of codes, asking for the next one's lines between the steps.
template <int B, bool Tables>
void attend_codes(const QuantizedDecode& op, const HeadView& view, const CodeScratch& scratch,
                  int64_t unit, Ahead& ahead, const Partial& partial) {
  const Decode& decode = op.decode;
  const int64_t d = decode.shape.head_size, pitch = padded(d), g = op.grouping.group_size;
  const int64_t block = view.table[unit / op.grouping.groups_per_block];
  const int64_t group = unit % op.grouping.groups_per_block, head = view.head;
  const int64_t value_groups = ceil_div(d, g);
  int64_t stages = 2 + view.group_heads + value_groups;
  ahead.ask_part(stages--);
  read_key_scales(op.key, block, head, group, d, scratch.key_scale, scratch.key_zero);
  const uint8_t* key_codes = at(op.key.codes, block, head, group);
  for_heads(view.group_heads, [&](int h, auto heads) {
    score_codes<B, decltype(heads)::value, Tables>(
        key_codes, op.key.codes.item, d, g, scratch.key_scale, scratch.key_zero,
        view.query + h * pitch, scratch.product, ahead, scratch.scores + h * g, g);
  });
  ahead.ask_part(stages--);
  for (int h = 0; h < view.group_heads; ++h) {
    ahead.ask_part(stages--);
    softmax_step(scratch.scores + h * g, g, decode.scale, decode.softcap, partial.highest + h,
                 partial.total + h, partial.values + h * pitch, d);
  }
  read_value_scales(at(op.value.scale, block, head, group), op.value.scale.item, g, value_groups,
                    scratch.value_scale);
  read_value_scales(at(op.value.zero, block, head, group), op.value.zero.item, g, value_groups,
                    scratch.value_zero);
  const uint8_t* value_codes = at(op.value.codes, block, head, group);
  for (int64_t i = 0; i < value_groups; ++i) {
    ahead.ask_part(stages--);
    for_heads(view.group_heads, [&](int h, auto heads) {
      add_codes<B, decltype(heads)::value, Tables>(
          value_codes, op.value.codes.item, g, i * g, smaller((i + 1) * g, d),
          scratch.value_scale + i * g, scratch.value_zero + i * g, scratch.scores + h * g, g,
          scratch.product, ahead, partial.values + h * pitch, pitch);
    });
  }
}

template <class T, int B>
void quantized_decode(const QuantizedDecode& op) {
  const Decode& decode = op.decode;
  const int64_t g = op.grouping.group_size, d = decode.shape.head_size;
  const int64_t group_heads = decode.query_heads / decode.shape.kv_heads;
  const int64_t size = partial_size(group_heads, d);
  // A unit is one group of tokens, coded or exact.
  Tasks tasks = cut(decode.rows, decode.shape.kv_heads, 8, INT32_MAX,
                    [&](int32_t row) { return ceil_div(decode.seq_lens[row], g); });
  const float* queries = take_queries<T>(decode);
  float* partials = take<float>(size * tasks.count);
  const int threads = num_threads();
  auto* exact_scratch = take<ExactScratch>(threads);
  auto* code_scratch = take<CodeScratch>(threads);
  for (int i = 0; i < threads; ++i) {
    exact_scratch[i] = take_exact_scratch(decode);
    code_scratch[i] = take_code_scratch(op);
  }
  parallel_for(tasks.count, [&](int64_t i) {
    const Task& task = tasks.data[i];
    const ExactScratch& exact = exact_scratch[omp_get_thread_num()];
    HeadView view = head_view(decode, queries, task);
    Partial partial = partial_at(partials + i * size, group_heads);
    clear(partial, group_heads, d);
    const int64_t coded = op.tail_start[task.row];
    const int64_t units = smaller(task.end, coded / g);
    for (int64_t unit = task.begin; unit < units; ++unit) {
      Ahead ahead;
      if (unit + 1 < units) add_lines(op, view, unit + 1, ahead);
      // Tables round factors: they are for caches that are rounded themselves.
      attend_codes<B, sizeof(T) == 2>(op, view, code_scratch[omp_get_thread_num()], unit, ahead,
                                      partial);
    }
    const int64_t end = smaller(task.end * g, decode.seq_lens[task.row]);
    for (int64_t start = larger(task.begin * g, coded); start < end; start += kBatch) {
      const int64_t n = smaller(kBatch, end - start);
      for (int64_t j = 0; j < n; ++j) exact.positions[j] = static_cast<int32_t>(start + j);
      attend_exact<T>(view, exact, n, partial);
    }
  });
  merge<T>(decode, tasks, partials);
}

void quantized_decode_attention(const QuantizedDecode& op) {
  scratch_reset();
  visit(op.decode.dtype, [&](auto element) {
    visit_bits(op.grouping.bits,
               [&](auto bits) { quantized_decode<decltype(element), decltype(bits)::value>(op); });
  });
}

}  // namespace
}  // namespace tailorkv::TAILORKV_ISA
