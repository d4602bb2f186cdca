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
inline Range linear_tile(Range tokens, int64_t tile) {
  const int64_t first = tokens.begin + tile * kLinearTile;
  return {first, std::min(first + kLinearTile, tokens.end)};
}

inline constexpr int64_t kDecayedChunk = 1024;  // tokens that share a state of those before them

constexpr int64_t decayed_chunks(int64_t tokens) { return (tokens + kDecayedChunk - 1) / kDecayedChunk; }

// Whether the chunks of all pairs, each read twice, are done earlier than the longest share of whole pairs. Of no
// influence on any result, so the number of threads may decide.
constexpr bool splits_decayed(int64_t pairs, int64_t chunks, int64_t threads) {
  const auto shares = [=](int64_t tasks) { return (tasks + threads - 1) / threads; };
  return chunks > 1 && shares(pairs * chunks) * 11 < shares(pairs) * chunks * 8;
}

}  // namespace vitkernels
