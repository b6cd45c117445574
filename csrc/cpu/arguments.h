// From checked tensors to what the kernels take: pointers, strides, group sizes.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <vector>

#include "../contract.h"
#include "kernels.h"

namespace tailorkv {

// The axes that the ops share, see `kernels/types.py`.
struct Axes {
  Axis NB{"NB"}, Hk{"Hk"}, bs{"bs"}, d{"d"}, R{"R"}, H{"H"}, max_blocks{"max_blocks"};
};

// Whether values are checked too: entries of block tables, slots, groups, indices.
inline bool checks_values() {
  const char* wanted = std::getenv("VLLM_TAILORKV_CHECK_VALUES");
  return wanted != nullptr && *wanted == '1';
}

inline Dtype dtype_of(const Tensor& tensor) {
  if (tensor.scalar_type() == ScalarType::Float) return Dtype::kFloat32;
  return tensor.scalar_type() == ScalarType::Half ? Dtype::kFloat16 : Dtype::kBfloat16;
}

template <class T>
T* data(const Contract& contract, const Tensor& tensor, const char* name) {
  contract.require(tensor.is_cpu(), name, " must be on the CPU");
  return static_cast<T*>(tensor.data_ptr());
}

// Pages of K or V; the first ones set the axes.
inline void check_cache(const Contract& contract, const Tensor& cache, const char* name,
                        ScalarType dtype, Axes& axes) {
  contract.tensor(cache, name, dtype, Strides::kAny, {axes.NB, axes.Hk, axes.bs, axes.d});
  contract.require(axes.Hk.size > 0 && axes.bs.size > 0, name, " must have heads and tokens");
  contract.require(axes.d.size > 0 && axes.d.size % 8 == 0, "head_size must be a multiple of 8");
}

inline void check_caches(const Contract& contract, const Tensor& key, const Tensor& value,
                         Axes& axes) {
  contract.floating(key, "key_cache");
  check_cache(contract, key, "key_cache", key.scalar_type(), axes);
  check_cache(contract, value, "value_cache", key.scalar_type(), axes);
}

inline Shape shape_of(const Axes& axes) {
  return {static_cast<int32_t>(axes.Hk.size), static_cast<int32_t>(axes.bs.size),
          static_cast<int32_t>(axes.d.size)};
}

inline Cache cache_of(const Contract& contract, const Tensor& tensor, const char* name) {
  return {data<void>(contract, tensor, name), tensor.stride(0), tensor.stride(1), tensor.stride(2),
          tensor.stride(3)};
}

// Group records with 5 axes ([NB, Hk, G, n, m]) or 4 ([NB, Hk, G, n]).
template <class T>
Records<T> records_of(const Contract& contract, const Tensor& tensor, const char* name) {
  return {data<T>(contract, tensor, name), tensor.stride(0), tensor.stride(1), tensor.stride(2),
          tensor.dim() == 5 ? tensor.stride(3) : 1};
}

inline Grouping check_groups(const Contract& contract, const Axes& axes, int64_t groups) {
  contract.require(groups > 0 && axes.bs.size % groups == 0,
                   "block_size must be a multiple of group_size");
  const int64_t group_size = axes.bs.size / groups;
  contract.require(group_size % 32 == 0, "group_size must be a multiple of 32, is ", group_size);
  return {static_cast<int32_t>(group_size), static_cast<int32_t>(groups), 0};
}

// Codes, scales and zeros of K.
inline Grouping check_key_codes(const Contract& contract, const std::vector<Tensor>& derived,
                                Axes& axes) {
  const Tensor& codes = derived[0];
  contract.require(codes.dim() == 5, "K codes must be [NB, Hk, G, d, g*b/8]");
  Grouping grouping = check_groups(contract, axes, codes.size(2));
  const int64_t groups = codes.size(2), run = codes.size(4), g = grouping.group_size;
  grouping.bits = static_cast<int32_t>(run * 8 / g);
  contract.require(
      run * 8 % g == 0 && (grouping.bits == 1 || grouping.bits == 2 || grouping.bits == 4),
      "K codes must have 1, 2 or 4 bits, have ", run, " bytes for ", g, " tokens");
  contract.tensor(codes, "K codes", ScalarType::Byte, Strides::kRows,
                  {axes.NB, axes.Hk, groups, axes.d, run});
  for (size_t i = 1; i < 3; ++i) {
    contract.tensor(derived[i], i == 1 ? "K scales" : "K zeros", ScalarType::Half, Strides::kRows,
                    {axes.NB, axes.Hk, groups, axes.d});
  }
  return grouping;
}

// Codes, scales and zeros of K and V.
inline Grouping check_dense(const Contract& contract, const std::vector<Tensor>& derived,
                            Axes& axes) {
  contract.require(derived.size() == 6, "the codes of a dense layer are six tensors");
  const Grouping grouping = check_key_codes(contract, derived, axes);
  const int64_t g = grouping.group_size, groups = grouping.groups_per_block;
  const int64_t row = (axes.d.size * grouping.bits + 7) / 8,
                value_groups = (axes.d.size + g - 1) / g;
  contract.tensor(derived[3], "V codes", ScalarType::Byte, Strides::kRows,
                  {axes.NB, axes.Hk, groups, g, row});
  for (size_t i = 4; i < 6; ++i) {
    contract.tensor(derived[i], i == 4 ? "V scales" : "V zeros", ScalarType::Half, Strides::kRows,
                    {axes.NB, axes.Hk, groups, g, value_groups});
  }
  return grouping;
}

inline Grouping check_onebit(const Contract& contract, const std::vector<Tensor>& derived,
                             Axes& axes) {
  const Grouping grouping = check_key_codes(contract, derived, axes);
  contract.require(grouping.bits == 1, "the index must hold one bit for every token and channel");
  return grouping;
}

inline Grouping check_extremes(const Contract& contract, const Tensor& extremes, ScalarType dtype,
                               Axes& axes) {
  contract.require(extremes.dim() == 5, "extremes must be [NB, Hk, G, 2, d]");
  const Grouping grouping = check_groups(contract, axes, extremes.size(2));
  contract.tensor(extremes, "extremes", dtype, Strides::kRows,
                  {axes.NB, axes.Hk, extremes.size(2), 2, axes.d});
  return grouping;
}

inline Codes codes_of(const Contract& contract, const std::vector<Tensor>& derived, size_t first) {
  return {records_of<uint8_t>(contract, derived[first], "codes"),
          records_of<uint16_t>(contract, derived[first + 1], "scales"),
          records_of<uint16_t>(contract, derived[first + 2], "zeros")};
}

// What both decode attentions read; outputs of that shape.
inline void check_query(const Contract& contract, const Tensor& query, ScalarType dtype,
                        Axes& axes) {
  contract.tensor(query, "query", dtype, Strides::kContiguous, {axes.R, axes.H, axes.d});
  contract.require(axes.H.size > 0 && axes.H.size % axes.Hk.size == 0, "query has ", axes.H.size,
                   " heads for ", axes.Hk.size, " KV heads");
}

inline void check_row_values(const Contract& contract, const Tensor& tensor, const char* name,
                             Axes& axes) {
  contract.tensor(tensor, name, ScalarType::Int, Strides::kContiguous, {axes.R});
}

inline void check_block_table(const Contract& contract, const Tensor& tensor, Axes& axes) {
  contract.tensor(tensor, "block_table", ScalarType::Int, Strides::kRows,
                  {axes.R, axes.max_blocks});
}

inline void check_indices(const Contract& contract, const Tensor& tensor, const char* name,
                          Axes& axes, Axis& count) {
  contract.tensor(tensor, name, ScalarType::Int, Strides::kContiguous, {axes.R, axes.Hk, count});
}

inline BlockTable block_table_of(const Contract& contract, const Tensor& tensor) {
  return {data<const int32_t>(contract, tensor, "block_table"), tensor.stride(0)};
}

// One value a row, none beyond `limit`: so many tokens there is room for. A tail may start before
// its row does; a length is never negative.
inline const int32_t* row_values_of(const Contract& contract, const Tensor& tensor,
                                    const char* name, int64_t limit,
                                    int64_t least = std::numeric_limits<int32_t>::min()) {
  const auto* values = data<const int32_t>(contract, tensor, name);
  for (int64_t row = 0; row < tensor.size(0); ++row) {
    contract.require(values[row] <= limit, name, "[", row, "] is ", values[row],
                     ", but there is room for ", limit, " tokens");
    contract.require(values[row] >= least, name, "[", row, "] is ", values[row],
                     ", but must be at least ", least);
  }
  return values;
}

// Under the debug switch: the blocks of the first `tokens[row]` tokens of every row exist.
inline void check_blocks(const Contract& contract, const Axes& axes, const BlockTable& table,
                         const int32_t* tokens) {
  if (!checks_values()) return;
  for (int64_t row = 0; row < axes.R.size; ++row) {
    for (int64_t i = 0; i * axes.bs.size < tokens[row]; ++i) {
      const int32_t block = table.data[row * table.stride + i];
      contract.require(block >= 0 && block < axes.NB.size, "block_table[", row, ", ", i, "] is ",
                       block, ", but there are ", axes.NB.size, " blocks");
    }
  }
}

// Under the debug switch: none of n values is `limit` or more, and none is below `least`.
template <class T>
void check_values(const Contract& contract, const T* values, int64_t n, const char* name,
                  int64_t least, int64_t limit) {
  if (!checks_values()) return;
  for (int64_t i = 0; i < n; ++i) {
    contract.require(values[i] >= least && values[i] < limit, name, " holds ", values[i],
                     " at place ", i, ", but must lie below ", limit);
  }
}

// Under the debug switch: selected tokens exist and their blocks too; negative ones are none.
inline void check_tokens(const Contract& contract, const Axes& axes, const int32_t* indices,
                         int64_t count, const char* name, const BlockTable& table) {
  if (!checks_values()) return;
  for (int64_t row = 0; row < axes.R.size; ++row) {
    for (int64_t i = 0; i < axes.Hk.size * count; ++i) {
      const int32_t* at = indices + row * axes.Hk.size * count + i;
      const int32_t token = *at;
      if (token < 0) continue;
      contract.require(i % count == 0 || at[-1] >= 0, name, " of row ", row, " hold token ", token,
                       " behind a negative one, which ends them");
      const int64_t place = token / axes.bs.size;
      contract.require(place < axes.max_blocks.size, name, " of row ", row, " hold token ", token,
                       ", but there is room for ", axes.max_blocks.size * axes.bs.size);
      const int32_t block = table.data[row * table.stride + place];
      contract.require(block >= 0 && block < axes.NB.size, name, " of row ", row, " hold token ",
                       token, ", whose block is ", block, " of ", axes.NB.size);
    }
  }
}

}  // namespace tailorkv
