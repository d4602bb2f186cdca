// Rows of a Monarch product on the CPU: what the two block products read and write.
#pragma once

#include "cpu/interleave.h"
#include "cpu/scratch.h"
#include "monarch/cpu/packed_blocks.h"

namespace vitkernels::VK_ISA {

// Rows whose elements are shared out between the blocks that take turns, as operands: [blocks, rows, width].
template <class E>
struct TurnRows {
  int64_t blocks, columns, max_rows;
  E* data = nullptr;
  int64_t width = round_up(padded_depth<E>(columns), kOperandWidth<E>);

  int64_t size() const { return blocks * max_rows * width; }
  E* row(int64_t j, int64_t r) const { return data + (j * max_rows + r) * width; }
  MatmulA<E> of_block(int64_t j, int64_t r = 0) const { return {row(j, r), width, kGroup<E>}; }

  // Row r from load(position, count); the padding of the depth becomes zero.
  template <class Load>
  VK_INLINE void set(int64_t r, int64_t count, Load&& load) const {
    using T = Sum<E>;
    separate_rows<T>(blocks, count, load, [&](int64_t j, int64_t c, Vec<T> v, int64_t n) VK_BODY {
      store_narrowed<T>(row(j, r) + c, v, n);
    });
    for (int64_t j = 0; j < blocks && count < width; ++j) std::fill(row(j, r) + count, row(j, r) + width, E{});
  }
};

// Those of a task.
template <class E>
TurnRows<E> turn_rows(int64_t blocks, int64_t columns, Scratch& scratch) {
  TurnRows<E> rows{blocks, columns, round_up(kMonarchRows, 2 * kTileSize)};
  rows.data = scratch.take<E>(rows.size());
  return rows;
}

// The intermediate of all rows, which the passes of the backward share, and its gradient.
template <class E>
struct SharedInner {
  TurnRows<E> rows;
  int64_t grad_width;

  SharedInner(const MonarchProblem& p, void* inner)
      : rows{p.second.blocks, p.second.inputs, round_up(p.rows, 2 * kTileSize), static_cast<E*>(inner)},
        grad_width(round_up(p.inner(), kOperandWidth<E>)) {}

  int64_t size() const { return (rows.size() + rows.max_rows * grad_width) * int64_t(sizeof(E)); }
  E* grad_row(int64_t r) const { return rows.data + rows.size() + r * grad_width; }
};

// Columns of all blocks at once that a product into turns computes: what stays in the second-level cache beside the
// rows.
template <class E>
int64_t turn_columns(int64_t blocks) {
  constexpr int64_t kColumns = 256;
  return round_up(std::max<int64_t>(kColumns / std::max<int64_t>(blocks, 1), 1), kPanel<E>);
}

// The first product of a Monarch matrix: x to the intermediate, shared out between the second's blocks. Where a forward
// kept that, it is read instead.
template <class S>
class FirstProduct {
  using T = Compute<S>;
  using E = Operand<S>;

 public:
  FirstProduct(const MonarchProblem& problem, const void* packed, const Inner& kept, Scratch& scratch)
      : p(problem),
        kept(kept),
        packed(static_cast<const E*>(packed)),
        inputs(scratch.take<E>(round_up(kGroupRows, kTileSize) * input_width)),
        results(scratch.take<T>(kGroupRows * result_width)) {}

  // Of the rows of x, into the rows of `inner` from `at` on.
  void run(Range rows, const TurnRows<E>& inner, int64_t at) {
    if (kept.is_read()) {
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        share_out(kept.rows.row<const S>(row), inner, at + row - rows.begin);
      }
      return;
    }
    for (int64_t row = rows.begin; row < rows.end; row += kGroupRows) {
      of_group(row, std::min(rows.end - row, kGroupRows), inner, at + row - rows.begin);
    }
  }

 private:
  void of_group(int64_t row, int64_t count, const TurnRows<E>& inner, int64_t at) {
    for (int64_t i = 0; i < p.first.blocks; ++i) {
      const S* x = p.x.row<const S>(row) + i * p.first.inputs;
      const MatmulA<E> of_block = operand_rows(x, p.x.row_stride, count, p.first.inputs, inputs, input_width);
      // Columns beyond the block's are the next one's, which is computed later, or padding.
      matmul<E, false>(of_block, weight.block(packed, i), count, weight.width(), padded_depth<E>(p.first.inputs),
                       results + i * p.first.outputs, result_width);  // [count, q]
    }
    if (kept.use == Inner::Use::kWrite) {
      unpack_rows<T>(results, result_width, count, p.inner(), T(1), kept.rows.row<S>(row), kept.rows.row_stride);
    }
    for (int64_t r = 0; r < count; ++r) share_out(results + r * result_width, inner, at + r);
  }

  template <class From>
  void share_out(const From* from, const TurnRows<E>& inner, int64_t at) const {
    inner.set(at, p.second.inputs, [&](int64_t c, int64_t n) VK_BODY { return load_widened<T>(from + c, n); });
  }

  // Results are shared out while they are in the first-level cache or near it.
  static constexpr int64_t kGroupRows = kRowGroup<E> * 2;

  const MonarchProblem& p;
  const Inner& kept;
  const E* const packed;
  const PackedBlocks<E> weight{p.first, false};
  const int64_t input_width = round_up(padded_depth<E>(p.first.inputs), kOperandWidth<E>);
  const int64_t result_width = round_up(p.inner() + kWidth<T>, kWidth<T>);
  E* inputs;
  T* results;
};

}  // namespace vitkernels::VK_ISA
