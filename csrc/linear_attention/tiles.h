// How linear attention on the CPU is cut into tasks: by shapes alone, never by the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/range.h"

namespace vitkernels {

inline constexpr int64_t kLinearBlock = 64;  // tokens whose features stay in the L1 cache
inline constexpr int64_t kLinearTile = 256;  // tokens of a task

// Enough tasks for some dozens of threads, none of so few tokens that its partial sums cost more than they save.
constexpr int64_t linear_splits(int64_t pairs, int64_t tokens) {
  constexpr int64_t kTasks = 64, kMinTokens = 512;
  if (pairs == 0) return 1;
  return std::clamp<int64_t>(kTasks / pairs, 1, std::max<int64_t>(tokens / kMinTokens, 1));
}

constexpr int64_t linear_tiles(int64_t tokens) { return (tokens + kLinearTile - 1) / kLinearTile; }

}  // namespace vitkernels
