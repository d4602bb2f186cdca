// The operands of a Monarch product on their way to shared memory, some steps ahead of the products.
#pragma once

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

template <class Element, int kBlocksOfSlot>
class MonarchStream {
  using Tile = MonarchTile<Element>;
  using Slots = MonarchSlots<kBlocksOfSlot>;

 public:
  __device__ MonarchStream(const MonarchGroup& group, int64_t first_row, Element* stages)
      : group_(group), slots_(group), first_row_(first_row), stages_(stages) {
    cursor_.advance(group_, Slots::kColumns, slots_.parts);
  }

  // The intermediate may be read.
  __device__ void pass_barrier(int stage) { may_read_inner_ = true, stage_ = stage; }

  // Starts the copies of the next step, if there is one. The caller commits them.
  __device__ __forceinline__ void start() {
    if (cursor_.is_done(group_)) return;
    const bool is_second = cursor_.is_second(group_);
    if (is_second && !may_read_inner_ && !group_.p.is_inner_shared) return;
    if (step_ == 0) find_rows(is_second);
    Element* const to = stages_ + stage_ * Tile::kStage + place();
    const int column = step_ * Tile::kDepth + vector() * Tile::kVector, left = depth_ - column;
    if (!is_second || !group_.p.is_inner_shared) {
      copy_vector(to, input_ + column, has_input_ ? left : 0, is_input_aligned_);
    }
    if (is_weight_aligned_) {
      CUTE_UNROLL
      for (int i = 0; i < Tile::kSlots; ++i) {
        copy_16_bytes(to + (1 + i) * Tile::kTile, weight_ + rows_[i] + column, left > 0 && rows_[i] != kNone ? 16 : 0);
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < Tile::kSlots; ++i) {
        copy_vector(to + (1 + i) * Tile::kTile, weight_ + rows_[i] + column, rows_[i] != kNone ? left : 0, false);
      }
    }
    stage_ = stage_ + 1 == Tile::kStages ? 0 : stage_ + 1;
    if (++step_ * Tile::kDepth >= depth_) step_ = 0, cursor_.advance(group_, Slots::kColumns, slots_.parts);
  }

 private:
  static constexpr unsigned kNone = 1u << 31;

  static __device__ int row() { return int(threadIdx.x) / 4; }
  static __device__ int vector() { return int(threadIdx.x) % 4; }
  static __device__ int place() { return typename Tile::Shared::Layout{}(row(), vector() * Tile::kVector); }

  __device__ void find_rows(bool is_second) {
    const MonarchCudaParams& p = group_.p;
    const BlockWeight& weight = is_second ? p.problem.second : p.problem.first;
    weight_ = static_cast<const Element*>(weight.data);
    depth_ = int(weight.inputs);
    is_weight_aligned_ = is_second ? p.is_second_aligned : p.is_first_aligned;
    is_input_aligned_ = is_second ? p.is_inner_aligned : p.is_x_aligned;
    has_input_ = first_row_ + row() < p.problem.rows;
    const Matrix& input = is_second ? p.inner : p.problem.x;
    const int block = is_second ? group_.first : cursor_.block;  // a group that is not shared has one
    input_ = input.row<const Element>(has_input_ ? first_row_ + row() : 0) + int64_t(block) * depth_;
    for (int i = 0; i < Tile::kSlots; ++i) {
      rows_[i] = is_second ? second_row(i) : first_row(i);
      rows_[i] = rows_[i] == kNone ? kNone : rows_[i] * unsigned(depth_);
    }
  }
  __device__ unsigned first_row(int slot) const {
    const int column = cursor_.first + slot * cursor_.width + row();
    if (row() >= cursor_.width || column >= cursor_.end) return kNone;
    const MonarchGroup::Place at = group_.place(cursor_.block, column);
    if (at.block >= group_.count) return kNone;
    return unsigned(cursor_.block) * unsigned(group_.p.problem.first.outputs) + unsigned(at.output);
  }
  __device__ unsigned second_row(int slot) const {
    const int block = slots_.block(slot, row() / Slots::kColumns), column = row() % Slots::kColumns;
    const int output = cursor_.first + slots_.part(slot) * cursor_.width + column;
    if (column >= cursor_.width || block >= group_.count || slots_.part(slot) >= slots_.parts) return kNone;
    if (output >= cursor_.end) return kNone;
    return unsigned(group_.first + block) * unsigned(group_.p.problem.second.outputs) + unsigned(output);
  }

  const MonarchGroup& group_;
  const Slots slots_;
  const int64_t first_row_;
  Element* const stages_;
  MonarchCursor cursor_;
  const Element* input_ = nullptr;
  const Element* weight_ = nullptr;
  unsigned rows_[Tile::kSlots] = {};  // where they begin
  int depth_ = 0, step_ = 0, stage_ = 0;
  bool is_weight_aligned_ = false, is_input_aligned_ = false, has_input_ = false, may_read_inner_ = false;
};

}  // namespace vitkernels::cuda
