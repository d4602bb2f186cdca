// Argument checks of the operators. They run before any memory is touched, and name the operator, the argument,
// what it got and what it takes.
#pragma once

#include "common/stable.h"

namespace vitkernels {

inline const char* dtype_text(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return "float64";
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Short: return "int16";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    case ScalarType::ComplexHalf: return "complex32";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    case ScalarType::Float8_e5m2: return "float8_e5m2";
    default: return "another dtype";
  }
}

// Checks on the arguments of one operator.
class Checker {
 public:
  explicit Checker(const char* op) : op_(op) {}

  template <class... Parts>
  void check(bool condition, const Parts&... parts) const {
    if (!condition) fail("vitkernels::", op_, ": ", parts...);
  }

  // Python's None passes for a tensor in a schema.
  void defined(const char* name, const Tensor& t) const { check(t.defined(), name, " is None, takes a tensor"); }

  void rank(const char* name, const Tensor& t, int64_t rank, const char* takes) const {
    defined(name, t);
    check(t.dim() == rank, name, " has shape ", Shape(t), ", takes ", rank, " dimensions ", takes);
  }

  void size(const char* name, const Tensor& t, int64_t axis, int64_t expected, const char* meaning) const {
    check(t.size(axis) == expected, name, " has size ", t.size(axis), " in dimension ", axis, ", takes ", expected,
          " (", meaning, ")");
  }

  void shape(const char* name, const Tensor& t, const std::vector<int64_t>& expected) const {
    check(std::ranges::equal(t.sizes(), expected), name, " has shape ", Shape(t), ", takes ", Shape(expected));
  }

  void strided_like(const char* name, const Tensor& t, const Tensor& like) const {
    defined(name, t);
    check(t.device() == like.device(), name, " is on another device than query, takes the same device");
    check(t.layout() == torch::headeronly::Layout::Strided, name, " is not a strided tensor, takes a strided one");
    if (t.numel() > 0) stored(name, t);
  }

  // Sharded parameters are views of storages that are resized to nothing between uses.
  void stored(const char* name, const Tensor& t) const {
    const auto sizes = t.sizes(), strides = t.strides();
    int64_t bytes, end = t.storage_offset() + 1;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
    for (size_t i = 0; i < sizes.size(); ++i) end += (sizes[i] - 1) * strides[i];
    const int64_t needed = end * int64_t(t.element_size());
    check(needed <= bytes, name, " of shape ", Shape(t), " has a storage of ", bytes, " bytes, takes ", needed,
          ": it was resized");
  }

  void tensor(const char* name, const Tensor& t, const Tensor& like, ScalarType expected) const {
    strided_like(name, t, like);
    check(t.scalar_type() == expected, name, " is ", dtype_text(t.scalar_type()), ", takes ", dtype_text(expected));
  }

  void tensor(const char* name, const Tensor& t, const Tensor& like, ScalarType expected,
              const std::vector<int64_t>& sizes) const {
    tensor(name, t, like, expected);
    shape(name, t, sizes);
  }

  // The element type of the operator, from its first tensor.
  DType element_type(const char* name, const Tensor& t) const {
    switch (t.scalar_type()) {
      case ScalarType::Double: return DType::kFloat64;
      case ScalarType::Float: return DType::kFloat32;
      case ScalarType::BFloat16: return DType::kBFloat16;
      case ScalarType::Half: return DType::kFloat16;
      default:
        fail("vitkernels::", op_, ": ", name, " is ", dtype_text(t.scalar_type()),
             ", takes float64, float32, bfloat16 or float16");
    }
  }

 private:
  const char* op_;
};

}  // namespace vitkernels
