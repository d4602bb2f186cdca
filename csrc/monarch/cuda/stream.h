// The operands of a Monarch product on their way to shared memory, some steps ahead of the products.
#pragma once

#include "cuda/fast_softmax.h"
#include "monarch/cuda/tiles.h"

namespace vitkernels::cuda {

// The columns of the second product in the slots: shares of a block's outputs, or several blocks in one slot.
template <int kBlocksOfSlot>
struct MonarchSlots {
  static constexpr int kColumns = MonarchCursor::kMaxWidth / kBlocksOfSlot;  // of a block, in a slot

  int count, parts;

  __device__ explicit MonarchSlots(const MonarchGroup& group)
      : count(group.count), parts(kBlocksOfSlot == 1 ? MonarchCursor::kSlots / group.count : 1) {}

  __device__ int block(int slot, int of_slot) const {
    return kBlocksOfSlot == 1 ? slot % count : slot * kBlocksOfSlot + of_slot;
  }
  __device__ int part(int slot) const { return kBlocksOfSlot == 1 ? slot / count : 0; }
};

// All of it lives in registers. What is copied for rows and columns that do not exist reaches no result.
template <class Element, int kBlocksOfSlot>
class MonarchStream {
  using Tile = MonarchTile<Element>;
  using Slots = MonarchSlots<kBlocksOfSlot>;

 public:
  __device__ __forceinline__ MonarchStream(const MonarchGroup& group, int64_t first_row, Element* stages)
      : group_(group), slots_(group), first_row_(first_row), stages_(stages), to_(stages + place()) {}

  // The intermediate may be read. Copies go on to a stage.
  __device__ __forceinline__ void pass_barrier(const Element* stage) {
    flags_ |= kMayReadInner, to_ = stages_ + (stage - stages_) + place(thread_index());
  }

  // Starts the copies of the next step, if there is one. The caller commits them.
  __device__ __forceinline__ void start() {
    if (left_ <= 0) {
      rarely();
      if (!find_tile()) return;
    }
    if (is_aligned_) {
      if (has_input_) copy_16_bytes(to_, next_[0], left_ > column() ? 16 : 0);
      const int bytes = left_ > first_of_weight_ ? 16 : 0;
      CUTE_UNROLL
      for (int i = 1; i <= Tile::kSlots; ++i) copy_16_bytes(to_ + i * Tile::kTile, next_[i], bytes);
    } else {
      rarely();
      CUTE_UNROLL
      for (int i = 0; i <= Tile::kSlots; ++i) {
        if (i > 0 || has_input_) copy_elements(to_ + i * Tile::kTile, next_[i], left_ - column());
      }
    }
    CUTE_UNROLL
    for (int i = 0; i <= Tile::kSlots; ++i) next_[i] += Tile::kDepth;
    left_ -= Tile::kDepth;
    to_ = Tile::next_stage(to_, stages_ + place());
  }

 private:
  static constexpr int kMayReadInner = 1, kHasNext = 2;

  static __device__ int row() { return int(threadIdx.x) / 4; }
  static __device__ int column() { return int(threadIdx.x) % 4 * Tile::kVector; }
  static __device__ int place(int thread = threadIdx.x) {
    return typename Tile::Shared::Layout{}(thread / 4, thread % 4 * Tile::kVector);
  }

  // One by one, in few registers.
  static __device__ __forceinline__ void copy_elements(Element* to, const Element* from, int count) {
    from = computed_here(from);
#pragma unroll 1
    for (int e = 0; e < Tile::kVector; ++e) to[e] = e < count ? from[e] : Element(0);
  }

  __device__ __forceinline__ bool find_tile() {
    if (!(flags_ & kHasNext)) cursor_.advance(group_, Slots::kColumns, slots_.parts);
    flags_ |= kHasNext;
    const bool is_second = cursor_.is_second(group_);
    if (cursor_.is_done(group_) || (is_second && !(flags_ & kMayReadInner) && !group_.p.is_inner_shared)) return false;
    flags_ &= ~kHasNext;
    const MonarchCudaParams& p = group_.p;
    const BlockWeight& weight = is_second ? p.problem.second : p.problem.first;
    const int depth = int(weight.inputs);
    has_input_ = !is_second || !p.is_inner_shared;
    is_aligned_ = is_second ? p.is_second_aligned && (p.is_inner_shared || p.is_inner_aligned)
                            : p.is_first_aligned && p.is_x_aligned;
    if (has_input_) {
      const Matrix& input = is_second ? p.inner : p.problem.x;
      const int block = is_second ? group_.first : cursor_.block;  // a group that is not shared has one
      next_[0] =
          input.row<const Element>(min(first_row_ + row(), p.problem.rows - 1)) + int64_t(block) * depth + column();
    }
    CUTE_UNROLL
    for (int i = 0; i < Tile::kSlots; ++i) {
      const unsigned from = is_second ? second_row(i) : first_row(i);
      next_[1 + i] = static_cast<const Element*>(weight.data) + int64_t(from) * depth + column();
    }
    const int of_block = is_second ? row() % Slots::kColumns : row();
    left_ = depth, first_of_weight_ = of_block < cursor_.width ? column() : depth;
    return true;
  }

  // The weight's row for the thread's row of a slot, or any row.
  __device__ unsigned first_row(int slot) const {
    const int column = cursor_.first + slot * cursor_.width + row();
    if (column >= cursor_.end) return 0;
    const MonarchGroup::Place at = group_.place(cursor_.block, column);
    const unsigned outputs = unsigned(group_.p.problem.first.outputs);
    return unsigned(cursor_.block) * outputs + min(unsigned(at.output), outputs - 1);
  }
  __device__ unsigned second_row(int slot) const {
    const int block = slots_.block(slot, row() / Slots::kColumns), column = row() % Slots::kColumns;
    const int output = cursor_.first + slots_.part(slot) * cursor_.width + column;
    if (block >= group_.count || output >= cursor_.end) return 0;
    return unsigned(group_.first + block) * unsigned(group_.p.problem.second.outputs) + unsigned(output);
  }

  const MonarchGroup& group_;
  const Slots slots_;
  const int64_t first_row_;
  Element* const stages_;
  Element* to_;  // the thread's vector of the next stage's first tile
  MonarchCursor cursor_;
  const Element* next_[1 + Tile::kSlots] = {};  // its next vectors: of the input, and of each slot
  int left_ = 0;                                // of the tile's depth
  int first_of_weight_ = 0;                     // the thread's column, or the depth if its rows are not multiplied
  int is_aligned_ = 0, has_input_ = 0, flags_ = 0;
};

}  // namespace vitkernels::cuda
