// Backward of a Monarch product on the CPU, first pass: the gradient of x. Compiled once per instruction set.
//
// A task is a block of rows, as in the forward. It leaves the intermediate, which it reads or computes, and its
// gradient to the second pass.

#include "cpu/make_kernel.h"
#include "monarch/cpu/monarch_tile.h"

namespace vitkernels::VK_ISA {
namespace {

template <class S>
class MonarchGradInput {
  using T = Compute<S>;
  using E = Operand<S>;

 public:
  MonarchGradInput(const MonarchGradInputParams& params, void* memory) : params(params), scratch(memory) {}

  int64_t scratch_size() const { return scratch.size(); }
  int64_t parts_size() const { return inner.size(); }

  void run(int64_t begin, int64_t end) {
    const TileScope tiles;
    for (int64_t task = begin; task < end; ++task) {
      const Range rows = monarch_rows(p, task);
      if (params.needs_inner) first.run(rows, inner.rows, rows.begin);
      grad_inner(rows);
      for (int64_t row = rows.begin; row < rows.end; row += kGroupRows) {
        grad_input(row, std::min(rows.end - row, kGroupRows));
      }
    }
  }

 private:
  // dt = dy through the second weight, some outputs of all blocks at a time.
  void grad_inner(Range rows) {
    const int64_t count = rows.end - rows.begin, blocks = p.second.blocks;
    for (int64_t column = 0; column < p.second.outputs; column += chunk) {
      const int64_t columns = std::min(p.second.outputs - column, chunk);
      for (int64_t r = 0; r < count; ++r) {
        const S* row = params.grad_out.row<const S>(rows.begin + r) + column * blocks;
        out_gradients.set(r, columns, [&](int64_t c, int64_t n) VK_BODY { return load_widened<T>(row + c, n); });
      }
      for (int64_t j = 0; j < blocks; ++j) {
        const MatmulB<E> all = second.block(packed_second, j);
        const MatmulB<E> of_columns{all.data + column / kGroup<E> * all.row_stride, all.row_stride, all.panel_stride};
        const auto multiply = column == 0 ? &matmul<E, false> : &matmul<E, true>;
        multiply(out_gradients.of_block(j), of_columns, count, second.width(), padded_depth<E>(columns),
                 sums + j * second.width(), sum_width);  // [count, r]
      }
    }
    for (int64_t r = 0; r < count; ++r) {
      E* to = inner.grad_row(rows.begin + r);
      interleave_rows<T>(sums + r * sum_width, second.width(), blocks, p.second.inputs,
                         [&](int64_t c, Vec<T> v, int64_t n) VK_BODY { store_narrowed<T>(to + c, v, n); });
    }
  }

  void grad_input(int64_t row, int64_t count) {
    for (int64_t i = 0; i < p.first.blocks; ++i) {
      const E* from = inner.grad_row(row) + i * p.first.outputs;
      const MatmulA<E> gradients =
          operand_rows(from, inner.grad_width, count, p.first.outputs, operands, operand_width);
      matmul<E, false>(gradients, first_back.block(packed_first, i), count, first_back.width(),
                       padded_depth<E>(p.first.outputs), results, first_back.width());  // [count, p]
      unpack_rows<T>(results, first_back.width(), count, p.first.inputs, T(1),
                     params.grad_x.row<S>(row) + i * p.first.inputs, params.grad_x.row_stride);
    }
  }

  static constexpr int64_t kGroupRows = kRowGroup<E> * 2;

  const MonarchGradInputParams& params;
  const MonarchProblem& p = params.problem;
  Scratch scratch;
  const PackedBlocks<E> first_back{p.first, true}, second{p.second, true};
  const E* const packed_first = static_cast<const E*>(params.packed_transposed);
  const E* const packed_second = packed_first + first_back.size();
  const int64_t chunk = turn_columns<E>(p.second.blocks), sum_width = p.second.blocks * second.width();
  const int64_t operand_width = round_up(padded_depth<E>(p.first.outputs), kOperandWidth<E>);

  const SharedInner<E> inner{p, params.shared};
  FirstProduct<S> first{p, params.packed, params.kept, scratch};
  TurnRows<E> out_gradients = turn_rows<E>(p.second.blocks, chunk, scratch);
  T* sums = scratch.take<T>(kMonarchRows * sum_width);
  E* operands = scratch.take<E>(round_up(kGroupRows, kTileSize) * operand_width);
  T* results = scratch.take<T>(kGroupRows * first_back.width());
};

}  // namespace
}  // namespace vitkernels::VK_ISA

VK_KERNEL(MonarchGradInput, MonarchGradInputParams);
