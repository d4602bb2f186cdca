// Memory for the sums of a gradient: the gradient itself, or parts that are added to it.
#pragma once

#include "attention/cuda/launches.h"
#include "common/stable.h"

namespace vitkernels {

class SumsInParts {
 public:
  enum class Start { kAnything, kZero };

  // The gradient of `t`. Each part has `size` elements, a whole number of those of `t` where heads share it.
  SumsInParts(const Tensor& t, int64_t parts, int64_t size, Start start)
      : grad_(room(t, sizes_of(t), start)), count_(parts), size_(size) {
    if (parts * size != grad_.numel()) parts_ = room(t, {parts, size}, start);
  }

  PartialSums sums() const {
    const Tensor& t = parts_ ? *parts_ : grad_;
    return {.data = static_cast<float*>(t.mutable_data_ptr()), .count = count_, .stride = size_};
  }

  // Once the parts are there.
  cudaError_t add(cudaStream_t stream) const {
    if (!parts_) return cudaSuccess;
    const int64_t elements = grad_.numel();
    return launch_sum_parts({sums().data, count_ * size_ / elements, elements}, elements,
                            static_cast<float*>(grad_.mutable_data_ptr()), stream);
  }

  const Tensor& gradient() const { return grad_; }

 private:
  static Tensor room(const Tensor& like, const std::vector<int64_t>& sizes, Start start) {
    return start == Start::kZero ? zeros_as(like, sizes, ScalarType::Float) : empty_as(like, sizes, ScalarType::Float);
  }

  Tensor grad_;
  OptionalTensor parts_;
  int64_t count_, size_;
};

}  // namespace vitkernels
