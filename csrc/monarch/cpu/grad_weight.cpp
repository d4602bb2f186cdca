// Backward of a Monarch product on the CPU, second pass: the gradients of the weights. Compiled once per instruction
// set.
//
// A task owns some rows of the gradients, of one block of the first weight or of all blocks of the second, and adds up
// the products of all rows of x in order.

#include "cpu/make_kernel.h"
#include "monarch/cpu/monarch_tile.h"
#include "monarch/cpu/weight_tasks.h"

namespace vitkernels::VK_ISA {
namespace {

template <class S>
class MonarchGradWeight {
  using T = Compute<S>;
  using E = Operand<S>;

 public:
  MonarchGradWeight(const MonarchGradWeightParams& params, void* memory) : params(params), scratch(memory) {}

  int64_t scratch_size() const { return scratch.size(); }

  void run(int64_t begin, int64_t end) {
    const TileScope tiles;
    for (int64_t task = begin; task < end; ++task) {
      if (task < tasks.of_first()) {
        const int64_t i = task / tasks.first_chunks();
        grad_first(i, tasks.first_rows(task % tasks.first_chunks()));
      } else {
        grad_second(tasks.second_rows(task - tasks.of_first()));
      }
    }
  }

 private:
  // [a, b] += dt x over the rows.
  void grad_first(int64_t i, Range outputs) {
    const int64_t count = outputs.end - outputs.begin, width = round_up(p.first.inputs, kWidth<T>);
    for_each_group([&](int64_t row, int64_t rows) {
      const EvenRows<E> gradients{inner.grad_row(row) + i * p.first.outputs + outputs.begin, inner.grad_width};
      const EvenRows<S> inputs{p.x.row<const S>(row) + i * p.first.inputs, p.x.row_stride};
      add_products(gradients, count, inputs, p.first.inputs, rows, row == 0, sums, width);
    });
    unpack_rows<T>(sums, width, count, p.first.inputs, T(1),
                   static_cast<S*>(params.grad_first) + (i * p.first.outputs + outputs.begin) * p.first.inputs,
                   p.first.inputs);
  }

  // [j, s, r] += dy t over the rows.
  void grad_second(Range outputs) {
    const int64_t count = outputs.end - outputs.begin, width = round_up(p.second.inputs, kWidth<T>);
    const int64_t blocks = p.second.blocks, of_block = count * width;
    for_each_group([&](int64_t row, int64_t rows) {
      for (int64_t r = 0; r < rows; ++r) {
        const S* from = params.grad_out.row<const S>(row + r) + outputs.begin * blocks;
        out_gradients.set(r, count, [&](int64_t c, int64_t n) VK_BODY { return load_widened<T>(from + c, n); });
      }
      for (int64_t j = 0; j < blocks; ++j) {
        add_products(EvenRows<E>{out_gradients.row(j, 0), out_gradients.width}, count,
                     EvenRows<E>{inner.rows.row(j, row), inner.rows.width}, p.second.inputs, rows, row == 0,
                     sums + j * of_block, width);
      }
    });
    for (int64_t j = 0; j < blocks; ++j) {
      unpack_rows<T>(sums + j * of_block, width, count, p.second.inputs, T(1),
                     static_cast<S*>(params.grad_second) + (j * p.second.outputs + outputs.begin) * p.second.inputs,
                     p.second.inputs);
    }
  }

  template <class Function>
  void for_each_group(Function&& f) const {
    for (int64_t row = 0; row < p.rows; row += kMonarchRows) f(row, std::min(p.rows - row, kMonarchRows));
  }

  // result [a_columns, b_columns] (+)= a^T b for rows of the depth.
  template <class Rows>
  void add_products(EvenRows<E> a, int64_t a_columns, Rows b, int64_t b_columns, int64_t rows, bool is_first, T* result,
                    int64_t result_width) {
    const int64_t a_width = round_up(a_columns, kTileSize * 2);
    pack_groups(a, rows, a_columns, a_groups, a_width);
    pack_groups(b, rows, b_columns, b_groups, group_width);
    const auto multiply = is_first ? &matmul<E, false> : &matmul<E, true>;
    multiply({a_groups, kGroup<E>, a_width * kGroup<E>}, {b_groups, group_width * kGroup<E>, kPanel<E> * kGroup<E>},
             a_columns, result_width, padded_depth<E>(rows), result, result_width);  // [a columns, b columns]
  }

  const MonarchGradWeightParams& params;
  const MonarchProblem& p = params.problem;
  Scratch scratch;
  const MonarchWeightTasks tasks{p};
  const SharedInner<E> inner{p, const_cast<void*>(params.shared)};
  const int64_t group_width = round_up(std::max(p.first.inputs, p.second.inputs), kPanel<E>);
  static constexpr int64_t kRows = (kMonarchRows + 31) / 32 * 32;

  TurnRows<E> out_gradients = turn_rows<E>(p.second.blocks, tasks.second_chunk(), scratch);
  E* a_groups = scratch.take<E>(kRows * round_up(std::max(tasks.first_chunk(), tasks.second_chunk()), kTileSize * 2));
  E* b_groups = scratch.take<E>(kRows * group_width);
  T* sums = scratch.take<T>(std::max(tasks.first_chunk(), p.second.blocks* tasks.second_chunk()) * group_width);
};

}  // namespace
}  // namespace vitkernels::VK_ISA

VK_KERNEL(MonarchGradWeight, MonarchGradWeightParams);
