// Tasks of the operators whose lanes are channels.
#pragma once

#include <algorithm>
#include <cstdint>

namespace vitkernels {

// From few groups of channels, tasks of a part of the batch each. They depend on shapes and the instruction set alone.
inline int64_t batch_shares(int64_t groups, int64_t batch) {
  constexpr int64_t kTasks = 48;
  return std::clamp<int64_t>((kTasks + groups - 1) / groups, 1, std::max<int64_t>(batch, 1));
}

}  // namespace vitkernels
