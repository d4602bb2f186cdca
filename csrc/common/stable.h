// The one header that includes torch. Everything is the LibTorch stable ABI: a library built once runs with every
// torch from 2.10 on.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/dtype.h"

namespace vitkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The type of log-sum-exps, biases and scales that go with tensors of `dtype`.
inline ScalarType statistics_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}
inline ScalarType statistics_type(DType dtype) {
  return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

// Calls the function with a value of a statistics tensor's element type.
template <class Function>
auto dispatch_statistics(const Tensor& t, Function&& function) {
  return t.scalar_type() == ScalarType::Double ? function(double{}) : function(float{});
}

inline std::vector<int64_t> sizes_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

// The shape of a tensor in a message: (2, 3).
struct Shape {
  explicit Shape(const Tensor& t) : sizes(t.sizes()) {}
  explicit Shape(const std::vector<int64_t>& sizes) : sizes(sizes) {}
  torch::headeronly::IntHeaderOnlyArrayRef sizes;
};

inline std::ostream& operator<<(std::ostream& text, const Shape& shape) {
  text << "(";
  for (size_t i = 0; i < shape.sizes.size(); ++i) text << (i ? ", " : "") << shape.sizes[i];
  return text << ")";
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// Torch's C codes of a tensor's dtype and device.
struct Placement {
  Placement(const Tensor& like, ScalarType type)
      : dtype(torch::stable::detail::to<int32_t>(torch::stable::detail::from(type))) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  }

  int32_t dtype, device_type, device_index;
};

// Torch has no memory for a tensor. What serves all operators does not know which one it fails: boxed() adds the name.
class AllocationError : public std::runtime_error {
 public:
  AllocationError(const std::string& what, const std::vector<int64_t>& sizes)
      : std::runtime_error((std::ostringstream() << "cannot " << what << Shape(sizes)).str()) {}
};

// Calls torch's C function for new_empty or new_zeros, which saves the dispatcher's boxing, 0.5 us per tensor. Errors
// lose their text on the way, so running out of memory gets a message here.
template <class NewTensor>
Tensor allocate(NewTensor&& new_tensor, const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  Placement at(like, type);
  int32_t layout = aoti_torch_layout_strided();
  AtenTensorHandle tensor;
  if (new_tensor(like.get(), sizes.data(), int64_t(sizes.size()), &at.dtype, &layout, &at.device_type, at.device_index,
                 nullptr, &tensor) == AOTI_TORCH_SUCCESS) {
    return Tensor(tensor);
  }
  throw AllocationError("allocate a tensor of shape ", sizes);
}

inline Tensor empty_as(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  return allocate(aoti_torch_aten_new_empty, like, sizes, type);
}

inline Tensor zeros_as(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  return allocate(aoti_torch_aten_new_zeros, like, sizes, type);
}

inline Tensor empty_as(const Tensor& t) { return empty_as(t, sizes_of(t), t.scalar_type()); }
inline Tensor zeros_as(const Tensor& t) { return zeros_as(t, sizes_of(t), t.scalar_type()); }

// A result that was not requested, of which a backward has many: made without the dispatcher, and a new one each time,
// since results must not alias.
inline Tensor none_like(const Tensor& like) {
  const Placement at(like, like.scalar_type());
  const int64_t size = 0, stride = 1;
  AtenTensorHandle tensor;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(1, &size, &stride, at.dtype, at.device_type, at.device_index, &tensor));
  return Tensor(tensor);
}

// Torch's own error, of an expanded tensor that is too large to be copied, loses its text on the way.
inline Tensor as_contiguous(const Tensor& t) try {
  return torch::stable::contiguous(t);
} catch (const std::exception&) {
  throw AllocationError("copy to contiguous memory a tensor of shape ", sizes_of(t));
}

// Any strides are fine as long as the last one is 1; a tensor without that is copied.
inline Tensor with_unit_last_stride(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : as_contiguous(t);
}

// Scratch memory for one call of a kernel: `bytes` for each thread that may work on so many tasks.
class ThreadScratch {
 public:
  ThreadScratch(const Tensor& like, int64_t bytes, int64_t tasks)
      : bytes_((bytes + 63) / 64 * 64),
        memory_(empty_as(like, {bytes_ * std::min<int64_t>(torch::stable::get_num_threads(), tasks) + 64},
                         ScalarType::Byte)) {}

  void* mine() const {
    uint32_t thread = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_thread_idx(&thread));
    const auto base = (reinterpret_cast<uintptr_t>(memory_.data_ptr()) + 63) / 64 * 64;
    return reinterpret_cast<void*>(base + thread * bytes_);
  }

 private:
  int64_t bytes_;
  Tensor memory_;
};

}  // namespace vitkernels
