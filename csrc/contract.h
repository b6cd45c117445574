// Checks of an op's tensors: dtype, shape by named axes, strides. The bindings make no pointer
// that has not passed here, so that a wrong argument is a Python exception on every device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>

namespace tailorkv {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The size of an axis by its name: the first tensor that has it sets it, the others must agree.
struct Axis {
  const char* name;
  int64_t size = -1;
};

// One axis of an expected shape: by name, or a number that follows from others.
struct Extent {
  Extent(Axis& named) : axis(&named) {}                    // NOLINT: reads as a shape
  Extent(int64_t number) : axis(nullptr), size(number) {}  // NOLINT
  Axis* axis;
  int64_t size = -1;
};

enum class Strides { kAny, kRows, kContiguous };

inline const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Byte:
      return "uint8";
    default:
      return "another dtype";
  }
}

class Contract {
 public:
  explicit Contract(const char* op) : op_(op) {}

  template <class... Parts>
  void require(bool condition, const Parts&... parts) const {
    if (condition) return;
    std::ostringstream message;
    message << "vllm_tailorkv::" << op_ << ": ";
    (message << ... << parts);
    throw std::runtime_error(message.str());
  }

  void tensor(const Tensor& tensor, const char* name, ScalarType dtype, Strides strides,
              std::initializer_list<Extent> shape) const {
    not_mixed(tensor, name);
    require(tensor.scalar_type() == dtype, name, " must be ", name_of(dtype), ", is ",
            name_of(tensor.scalar_type()));
    bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
    int64_t axis = 0;
    for (const Extent& extent : shape) {
      if (!fits) break;
      const int64_t size = tensor.size(axis++);
      // Kernels count in int32.
      fits = size <= std::numeric_limits<int32_t>::max();
      if (extent.axis == nullptr) {
        fits = fits && size == extent.size;
      } else if (extent.axis->size < 0) {
        extent.axis->size = size;
      } else {
        fits = fits && size == extent.axis->size;
      }
    }
    require(fits, name, " must be ", text_of(shape), ", is ", shape_of(tensor));
    if (strides == Strides::kContiguous) {
      require(tensor.is_contiguous(), name, " must be contiguous");
    } else if (strides == Strides::kRows) {
      const int64_t last = tensor.dim() - 1;
      require(tensor.size(last) <= 1 || tensor.stride(last) == 1, name,
              " must be contiguous in its last axis");
    }
  }

  void floating(const Tensor& tensor, const char* name) const {
    const auto dtype = tensor.scalar_type();
    require(
        dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
        name, " must be float32, float16 or bfloat16, is ", name_of(dtype));
  }

  int32_t within(int64_t value, const char* name, int64_t low,
                 int64_t high = std::numeric_limits<int32_t>::max()) const {
    require(value >= low && value <= high, name, " must be from ", low, " to ", high, ", is ",
            value);
    return static_cast<int32_t>(value);
  }

 private:
  // Where any tensor is a meta tensor torch calls the variant that only checks: with others among
  // them nothing would be done, and nothing said.
  void not_mixed(const Tensor& tensor, const char* name) const {
    const bool meta = tensor.device().type() == torch::headeronly::DeviceType::Meta;
    const Kind kind = meta ? Kind::kMeta : Kind::kReal;
    require(seen_ == Kind::kNone || kind == seen_, name, meta ? " is" : " is not",
            " a meta tensor, but others are", meta ? " not" : "");
    seen_ = kind;
  }

  static std::string text_of(std::initializer_list<Extent> shape) {
    std::ostringstream text;
    const char* comma = "[";
    for (const Extent& extent : shape) {
      text << comma;
      comma = ", ";
      if (extent.axis == nullptr) {
        text << extent.size;
      } else {
        text << extent.axis->name;
        if (extent.axis->size >= 0) text << "=" << extent.axis->size;
      }
    }
    text << "]";
    return text.str();
  }

  static std::string shape_of(const Tensor& tensor) {
    std::ostringstream text;
    text << "[";
    for (int64_t i = 0; i < tensor.dim(); ++i) text << (i == 0 ? "" : ", ") << tensor.size(i);
    text << "]";
    return text.str();
  }

  enum class Kind { kNone, kReal, kMeta };

  const char* op_;
  mutable Kind seen_ = Kind::kNone;
};

// select_topk, which both devices have.
inline void check_select_topk(const Contract& contract, const Tensor& indices, const Tensor& scores,
                              const Tensor& tail_start, int64_t sink_tokens) {
  Axis R{"R"}, Hk{"Hk"}, k{"k"}, S{"S"};
  contract.tensor(indices, "indices", ScalarType::Int, Strides::kContiguous, {R, Hk, k});
  contract.tensor(scores, "scores", ScalarType::Float, Strides::kRows, {R, Hk, S});
  contract.tensor(tail_start, "tail_start", ScalarType::Int, Strides::kContiguous, {R});
  contract.within(sink_tokens, "sink_tokens", 0);
}

}  // namespace tailorkv
