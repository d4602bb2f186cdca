// Gradients of an attention over maps that several tasks add to: of keys that several tiles or heads see, and of a
// query window that all windows share.
#pragma once

#include "attention/op/spatial_arguments.h"

namespace vitkernels {

// Owns partial sums.
class MapPartialSumsOwner {
 public:
  // For `gradient`, of which each split adds to a range of tokens; the kernel clears the sums.
  void attach_keys(const SpatialArguments& args, const SpatialBackwardParams& params, const Tensor& gradient);
  // For a query window, to which every split adds. The sums are zero.
  void attach_window(const SpatialArguments& args, const SpatialBackwardParams& params, const Tensor& gradient);

  const MapPartialSums& view() const { return sums; }

  // After the kernel: reduces the sums to the gradient.
  void finish() const;

 private:
  void allocate(const SpatialArguments& args, const Tensor& gradient, const int64_t (&size)[kMaxAxes], bool is_zero);

  MapPartialSums sums;
  std::vector<SplitTokens> of_split;
  OptionalTensor owned, parts;
};

}  // namespace vitkernels
