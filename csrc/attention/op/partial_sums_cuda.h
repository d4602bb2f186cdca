// Memory for the partial sums of a gradient.
#pragma once

#include "attention/cuda/launches.h"
#include "common/stable.h"

namespace vitkernels {

// A contiguous gradient, and the float32 partial sums that are reduced to it, unless the only part has its shape.
class PartialSumsOwner {
 public:
  enum class Start { kAnything, kZero };

  // Each part has `size` elements: as many as the gradient, or a multiple where heads share it.
  PartialSumsOwner(const Tensor& grad, int64_t parts, int64_t size, Start start = Start::kAnything)
      : grad_(grad), view_{.count = parts, .stride = size} {
    if (parts * size == grad.numel()) return;
    parts_ = start == Start::kZero ? zeros_as(grad, {parts, size}, ScalarType::Float)
                                   : empty_as(grad, {parts, size}, ScalarType::Float);
    view_.data = static_cast<float*>(parts_->mutable_data_ptr());
  }

  // The parts; absent if the kernel writes the gradient itself.
  const PartialSums& parts() const { return view_; }
  // The parts, or a float32 gradient as the only part.
  PartialSums sums() const {
    PartialSums sums = view_;
    if (!parts_) sums.data = static_cast<float*>(grad_.mutable_data_ptr());
    return sums;
  }

  // To be called after the kernel.
  cudaError_t add(DType dtype, cudaStream_t stream) const {
    if (!parts_) return cudaSuccess;
    const int64_t elements = grad_.numel(), count = view_.count * view_.stride / elements;
    return launch_sum_parts({view_.data, count, elements}, elements, grad_.mutable_data_ptr(), dtype, stream);
  }

  const Tensor& gradient() const { return grad_; }

 private:
  Tensor grad_;
  OptionalTensor parts_;
  PartialSums view_;
};

}  // namespace vitkernels
