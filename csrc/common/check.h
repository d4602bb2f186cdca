// Argument checks of the operators. They run before any memory is touched, and name the operator, the argument,
// what it got and what it takes.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include "common/stable.h"

namespace vitkernels {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape_text(const Tensor& t) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << ")";
  return text.str();
}

inline const char* dtype_text(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return "float64";
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Bool: return "bool";
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
    check(t.dim() == rank, name, " has shape ", shape_text(t), ", takes ", rank, " dimensions ", takes);
  }

  void size(const char* name, const Tensor& t, int64_t axis, int64_t expected, const char* meaning) const {
    check(t.size(axis) == expected, name, " has size ", t.size(axis), " in dimension ", axis, ", takes ", expected,
          " (", meaning, ")");
  }

  void shape(const char* name, const Tensor& t, const std::vector<int64_t>& expected) const {
    bool same = t.dim() == int64_t(expected.size());
    for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == expected[i];
    std::ostringstream takes;
    for (size_t i = 0; i < expected.size(); ++i) takes << (i ? ", " : "") << expected[i];
    check(same, name, " has shape ", shape_text(t), ", takes (", takes.str(), ")");
  }

  void dtype(const char* name, const Tensor& t, ScalarType expected) const {
    check(t.scalar_type() == expected, name, " is ", dtype_text(t.scalar_type()), ", takes ", dtype_text(expected));
  }

  void strided_like(const char* name, const Tensor& t, const Tensor& like) const {
    defined(name, t);
    check(t.device() == like.device(), name, " is on another device than query, takes the same device");
    check(t.layout() == torch::headeronly::Layout::Strided, name, " is not a strided tensor, takes a strided one");
  }

  // The element type of the operator, from its first tensor.
  DType element_type(const char* name, const Tensor& t) const {
    switch (t.scalar_type()) {
      case ScalarType::Double: return DType::kFloat64;
      case ScalarType::Float: return DType::kFloat32;
      case ScalarType::BFloat16: return DType::kBFloat16;
      case ScalarType::Half: return DType::kFloat16;
      default:
        check(false, name, " is ", dtype_text(t.scalar_type()), ", takes float64, float32, bfloat16 or float16");
        return DType::kFloat32;
    }
  }

 private:
  const char* op_;
};

}  // namespace vitkernels
