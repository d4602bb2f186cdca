// How a thread block goes through a Monarch product: its share of the weights, and the tiles of both products.
#pragma once

#include "monarch/cuda/operands.h"

namespace vitkernels::cuda {

// Sixty-four rows of x, eight warps: two stand below each other, and four side by side have a slot of columns each.
template <class T>
struct MonarchTile {
  using Element = T;
  static constexpr int kRows = 64, kSlots = 4, kColumnsOfSlot = 64, kRowsOfWarp = 32;
  static constexpr int kThreads = 2 * kSlots * kWarpSize;
  static constexpr int kVector = kVectorOf<Element>, kDepth = 64 / int(sizeof(Element)), kStages = 3;

  // A step of the depth: rows of the first operand, and for each slot rows of the weight.
  using Shared = SharedTile<Element, kRows, kDepth>;
  static constexpr int kTile = Shared::kElements, kStage = (1 + kSlots) * kTile;
  // Outputs on their way to memory, in float: sixteen rows, in a stage that has been multiplied.
  static constexpr int kStagedRows = 16, kPitch = kSlots * kColumnsOfSlot + 4;
  static_assert(kStagedRows * kPitch * 4 <= kStage * int(sizeof(Element)));
  // Where columns of two tiles of the intermediate go, and where that begins.
  static constexpr int kPlaces = kStages * kStage, kInner = kPlaces + 2 * kThreads * 4 / int(sizeof(Element));

  // In the next stage, or from the last one on in the `first`.
  template <class E>
  static __device__ E* next_stage(E* at, E* first) {
    return at == first + (kStages - 1) * kStage ? first : at + kStage;
  }

  static int64_t shared_bytes(int64_t blocks, int64_t inputs) {
    return (kInner + blocks * ceil_div<int64_t>(inputs, kDepth) * kTile) * int64_t(sizeof(Element));
  }
};

// Blocks of the second weight, and what of the intermediate they read: its columns are counted in the group.
struct MonarchGroup {
  const MonarchCudaParams& p;
  int first, count;

  __device__ MonarchGroup(const MonarchCudaParams& params, int index)
      : p(params),
        first(index * params.group),
        count(min(params.group, int(params.problem.second.blocks) - index * params.group)) {}

  // Those that a block of the first weight makes.
  __device__ int begin(int block) const {
    if (p.order == MonarchOrder::kForward) return counted(block * outputs());
    return at_least(first * inputs() - block);
  }
  __device__ int end(int block) const {
    if (p.order == MonarchOrder::kForward) return counted((block + 1) * outputs());
    return at_least((first + count) * inputs() - block);
  }

  struct Place {
    int output;        // of the first weight's block
    int block, depth;  // of the group's; the last group may have fewer than `block`
  };
  __device__ Place place(int block, int column) const {
    if (p.order == MonarchOrder::kForward) {
      const int depth = p.divisor.divide(column), of_group = column - depth * p.group;
      return {depth * int(p.problem.second.blocks) + first + of_group - block * outputs(), of_group, depth};
    }
    const int n = column * int(p.problem.first.blocks) + block - first * inputs(), of_group = p.divisor.divide(n);
    return {column, of_group, n - of_group * inputs()};
  }

 private:
  __device__ int outputs() const { return int(p.problem.first.outputs); }
  __device__ int inputs() const { return int(p.problem.second.inputs); }
  __device__ int counted(int n) const {
    const int blocks = int(p.problem.second.blocks), turn = n / blocks;
    return turn * p.group + min(max(n - turn * blocks - first, 0), p.group);
  }
  __device__ int at_least(int n) const { return n <= 0 ? 0 : ceil_div(n, int(p.problem.first.blocks)); }
};

// A tile of either product: `width` columns for each slot.
struct MonarchCursor {
  static constexpr int kSlots = 4, kMinWidth = 48, kMaxWidth = 64;

  int block = -1;  // of the first weight; past them, the second product
  int first = 0, end = 0, width = 0;

  __device__ bool is_second(const MonarchGroup& group) const { return block >= int(group.p.problem.first.blocks); }
  __device__ bool is_done(const MonarchGroup& group) const { return is_second(group) && first >= end; }

  // `max_width` columns of a slot are those of `parts` shares of the outputs of a block, in the second product.
  __device__ void advance(const MonarchGroup& group, int max_width, int parts) {
    const int blocks = int(group.p.problem.first.blocks);
    first += (is_second(group) ? parts : kSlots) * width;
    while (first >= end && block < blocks) {
      ++block;
      const bool is_last = block == blocks;
      first = is_last ? 0 : group.begin(block);
      end = !is_last ? group.end(block) : group.p.out.data ? int(group.p.problem.second.outputs) : 0;
      width = share(end - first, is_last ? parts : kSlots, is_last ? max_width : kMaxWidth);
    }
  }

 private:
  // Of as few tiles as there can be, all about as wide.
  static __device__ int share(int columns, int parts, int max_width) {
    if (max_width < kMinWidth) return max_width;
    const int tiles = max(ceil_div(columns, parts * max_width), 1);
    return max(ceil_div(ceil_div(columns, parts * tiles), 16) * 16, kMinWidth);
  }
};

}  // namespace vitkernels::cuda
