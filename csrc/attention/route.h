// Params of the kernels that find which regions of keys are most like each region of queries. Plain data, no torch.
#pragma once

#include "common/dtype.h"
#include "common/token_tensor.h"

namespace vitkernels {

// Means of the tokens of each region, in the type of the arithmetic, by channels: heads one after the other.
struct RegionMeansParams {
  DType dtype = DType::kFloat32;
  int64_t batch = 0, heads = 0, head_dim = 0, regions = 0;
  TokenTensor rows;                 // heads
  const int32_t* tokens = nullptr;  // [regions, tokens_per_region]; -1 is no token
  int64_t tokens_per_region = 0;
  int64_t panel = 1;      // regions whose means of a channel are neighbors
  void* means = nullptr;  // [batch, panels, channels, panel]

  DType element_type() const { return dtype; }
  int64_t channels() const { return heads * head_dim; }
  int64_t padded_regions() const { return (regions + panel - 1) / panel * panel; }
  int64_t element(int64_t batch, int64_t region) const {
    return (batch * padded_regions() + region / panel * panel) * channels() + region % panel;
  }
};

// On the CPU: regions of keys in a panel, and regions of queries that a task multiplies with all panels.
inline constexpr int kRoutePanel = 32, kRouteRows = 4;

struct RouteParams {
  RegionMeansParams queries, keys;  // queries in panels of 1
  int64_t topk = 0;
  int64_t* graph = nullptr;  // [batch, regions of queries, topk]

  DType element_type() const { return queries.dtype; }
};

// The order of what is most alike: NaN, then the larger value; of equal ones the lower region.
template <class T>
VK_HOST_DEVICE bool is_before(T value, int64_t region, T other, int64_t other_region) {
  const bool is_nan = value != value, other_is_nan = other != other;
  if (is_nan || other_is_nan) return is_nan && other_is_nan ? region < other_region : is_nan;
  return value == other ? region < other_region : value > other;
}

}  // namespace vitkernels
