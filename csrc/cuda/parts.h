// Sums with too few owners to fill a GPU: their work is cut into parts, whose sums are added in order at the end.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/launch.h"

namespace vitkernels::cuda {

// A few for each multiprocessor of a large GPU.
inline constexpr int64_t kEnoughBlocks = 512;
// In all parts together: 16 MB in float32.
inline constexpr int64_t kMostPartElements = int64_t(1) << 22;

// Parts for `owners` blocks, which share `served` pieces of work and `elements` sums. By shapes alone.
inline int64_t parts_for(int64_t owners, int64_t served, int64_t elements) {
  const int64_t wanted = ceil_div(kEnoughBlocks, std::max<int64_t>(owners, 1));
  const int64_t held = kMostPartElements / std::max<int64_t>(elements, 1);
  return std::clamp<int64_t>(std::min(wanted, held), 1, std::max<int64_t>(served, 1));
}

}  // namespace vitkernels::cuda
