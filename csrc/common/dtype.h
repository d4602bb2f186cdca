// The element types of tensors, without torch. CPU and CUDA share them.
#pragma once

#include <cstdint>
#include <type_traits>

namespace vitkernels {

enum class DType : int32_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Accumulation and softmax statistics: float, or double for double.
template <class S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;

// Calls `function` with a value of the element type that `dtype` names.
template <class Function>
inline auto dispatch_dtype(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kFloat64: return function(double{});
    case DType::kFloat32: return function(float{});
    case DType::kBFloat16: return function(BFloat16{});
    case DType::kFloat16: break;
  }
  return function(Float16{});
}

}  // namespace vitkernels
