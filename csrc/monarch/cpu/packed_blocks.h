// Block weights as the second operand of products.
#pragma once

#include "cpu/pack.h"
#include "monarch/monarch.h"

namespace vitkernels::VK_ISA {

// Blocks [depth, columns] of a product, one after the other: the weight transposed, or as it is where gradients flow
// from outputs to inputs.
template <class E>
class PackedBlocks {
 public:
  PackedBlocks(const BlockWeight& weight, bool is_transposed) : weight_(weight), columns_are_inputs_(is_transposed) {}

  int64_t depth() const { return columns_are_inputs_ ? weight_.outputs : weight_.inputs; }
  int64_t columns() const { return columns_are_inputs_ ? weight_.inputs : weight_.outputs; }
  int64_t width() const { return round_up(columns(), kWidth<Sum<E>>); }
  int64_t size() const { return weight_.blocks * block_size(); }

  template <class S>
  void pack(int64_t i, E* target) const {
    const EvenRows<S> rows{weight_.block<S>(i), weight_.inputs};
    E* block = target + i * block_size();
    if (!columns_are_inputs_) return pack_transposed<E>(rows, weight_.outputs, weight_.inputs, block);
    pack_groups(rows, weight_.outputs, weight_.inputs, block, panel_columns());
  }

  // From a column on, which is a multiple of kPanel.
  MatmulB<E> block(const E* packed, int64_t i, int64_t column = 0) const {
    const E* const data = packed + i * block_size();
    constexpr int64_t kPanelElements = kPanel<E> * kGroup<E>;
    if (columns_are_inputs_) {
      return {data + column * kGroup<E>, panel_columns() * kGroup<E>, kPanelElements};
    }
    const int64_t panel = kPanel<E> * padded_depth<E>(depth());
    return {data + column / kPanel<E> * panel, kPanelElements, panel};
  }

 private:
  int64_t panel_columns() const { return round_up(columns(), kPanel<E>); }
  int64_t block_size() const { return panel_columns() * padded_depth<E>(depth()); }

  const BlockWeight weight_;
  const bool columns_are_inputs_;
};

// Rows as the first operand of products: in place where their elements are operands, whole groups of them. Tiles read
// whole tiles of rows.
template <class E, class S>
MatmulA<E> operand_rows(const S* rows, int64_t stride, int64_t count, int64_t columns, E* copy, int64_t copy_stride) {
  if constexpr (std::is_same_v<S, E>) {
    const bool is_whole = columns == padded_depth<E>(columns) && (!kByTiles<E> || count % kTileSize == 0);
    if (is_whole) return {rows, stride, kGroup<E>};
  }
  pack_operands(EvenRows<S>{rows, stride}, count, columns, copy, copy_stride);
  return {copy, copy_stride, kGroup<E>};
}

}  // namespace vitkernels::VK_ISA
