// Sums with too few owners to fill a GPU: the work is cut into parts, whose partial sums are added in order at the end.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/launch.h"

namespace vitkernels::cuda {

// A few blocks for each multiprocessor of a large GPU.
inline constexpr int64_t kEnoughBlocks = 512;
// Of all parts together: 16 MB in float32.
inline constexpr int64_t kMaxPartElements = int64_t(1) << 22;

// The number of parts, where `owners` blocks own `elements` sums and each has `served` units of work. By shapes alone,
// so that the order of the sums does not depend on the GPU.
inline int64_t parts_for(int64_t owners, int64_t served, int64_t elements) {
  const int64_t wanted = ceil_div(kEnoughBlocks, std::max<int64_t>(owners, 1));
  const int64_t held = kMaxPartElements / std::max<int64_t>(elements, 1);
  return std::clamp<int64_t>(std::min(wanted, held), 1, std::max<int64_t>(served, 1));
}

}  // namespace vitkernels::cuda
