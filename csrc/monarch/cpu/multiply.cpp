// A Monarch product on the CPU. Compiled once per instruction set.
//
// A task is a block of rows. Their intermediate stays in its scratch memory: the first product writes it row by row,
// and it is shared out between the blocks of the second on the way.

#include "cpu/gelu.h"
#include "cpu/make_kernel.h"
#include "monarch/cpu/monarch_tile.h"

namespace vitkernels::VK_ISA {
namespace {

template <class S>
class Monarch {
  using T = Compute<S>;
  using E = Operand<S>;

 public:
  Monarch(const MonarchParams& params, void* memory) : params(params), scratch(memory) {}

  int64_t scratch_size() const { return scratch.size(); }

  void run(int64_t begin, int64_t end) {
    const TileScope tiles;
    for (int64_t task = begin; task < end; ++task) {
      const Range rows = monarch_rows(p, task);
      first.run(rows, inner, 0);
      second_product(rows);
    }
  }

 private:
  void second_product(Range rows) {
    const int64_t count = rows.end - rows.begin, blocks = p.second.blocks;
    for (int64_t column = 0; column < p.second.outputs; column += chunk) {
      const int64_t columns = std::min(p.second.outputs - column, chunk);
      for (int64_t j = 0; j < blocks; ++j) {
        matmul<E, false>(inner.of_block(j), second.block(packed, j, column), count, round_up(columns, kWidth<T>),
                         padded_depth<E>(p.second.inputs), outputs + j * chunk,
                         output_width);  // [count, columns]
      }
      for (int64_t r = 0; r < count; ++r) {
        const int64_t first_column = column * blocks;
        S* to = params.out.row<S>(rows.begin + r) + first_column;
        interleave_rows<T>(outputs + r * output_width, chunk, blocks, columns,
                           [&](int64_t c, Vec<T> v, int64_t n)
                               VK_BODY { store_narrowed<T>(to + c, epilogue(v, first_column + c, n), n); });
      }
    }
  }

  // The outputs from a column on, which the sums become.
  VK_INLINE Vec<T> epilogue(Vec<T> sums, int64_t column, int64_t count) const {
    if (params.bias) sums += load_widened<T>(static_cast<const T*>(params.bias) + column, count);
    return params.activation == Activation::kGelu ? gelu<T>(sums) : sums;
  }

  const MonarchParams& params;
  const MonarchProblem& p = params.problem;
  Scratch scratch;
  const PackedBlocks<E> second{p.second, false};
  const E* const packed = static_cast<const E*>(params.packed) + PackedBlocks<E>(p.first, false).size();
  const int64_t chunk = turn_columns<E>(p.second.blocks), output_width = p.second.blocks * chunk;

  FirstProduct<S> first{p, params.packed, params.inner, scratch};
  TurnRows<E> inner = turn_rows<E>(p.second.blocks, p.second.inputs, scratch);
  T* outputs = scratch.take<T>(kMonarchRows * output_width);
};

}  // namespace
}  // namespace vitkernels::VK_ISA

VK_KERNEL(Monarch, MonarchParams);
