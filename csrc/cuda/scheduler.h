// Which task a thread block takes.
#pragma once

#include "common/range.h"
#include "cuda/launch.h"

namespace vitkernels::cuda {

// An index, decomposed into coordinates: the fastest-varying one first. That of a block has 32 bits, in which a
// division takes a fifth of the instructions.
template <class Index>
class TaskIndex {
 public:
  explicit VK_HOST_DEVICE TaskIndex(Index index) : rest_(index) {}

  VK_HOST_DEVICE int64_t take(int64_t count) {
    const Index coordinate = rest_ % Index(count);
    rest_ /= Index(count);
    return coordinate;
  }
  VK_HOST_DEVICE int64_t rest() const { return rest_; }

 private:
  Index rest_;
};

// The tile `index` of `count` tokens.
VK_HOST_DEVICE Range tile_of(int64_t index, int64_t size, int64_t count) {
  return intersect({index * size, (index + 1) * size}, {0, count});
}

// One of `parts` shares of `count` units of work.
VK_HOST_DEVICE Range part_of(int64_t count, int64_t part, int64_t parts) {
  return {part * count / parts, (part + 1) * count / parts};
}

}  // namespace vitkernels::cuda
