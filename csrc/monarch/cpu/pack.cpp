// Packs the weights of a Monarch product on the CPU. Compiled once per instruction set.

#include "cpu/make_kernel.h"
#include "monarch/cpu/packed_blocks.h"

namespace vitkernels::VK_ISA {
namespace {

template <class S>
class MonarchPack {
  using E = Operand<S>;

 public:
  MonarchPack(const MonarchPackParams& params, void*) : params(params) {}

  // Bytes of the first weight's blocks, then of the second's.
  int64_t parts_size() const { return (first.size() + second.size()) * int64_t(sizeof(E)); }

  void run(int64_t begin, int64_t end) {
    const int64_t blocks = params.problem.first.blocks;
    E* const packed = static_cast<E*>(params.packed);
    for (int64_t task = begin; task < end; ++task) {
      if (task < blocks) {
        first.template pack<S>(task, packed);
      } else {
        second.template pack<S>(task - blocks, packed + first.size());
      }
    }
  }

 private:
  const MonarchPackParams& params;
  const PackedBlocks<E> first{params.problem.first, params.is_transposed};
  const PackedBlocks<E> second{params.problem.second, params.is_transposed};
};

}  // namespace
}  // namespace vitkernels::VK_ISA

VK_KERNEL(MonarchPack, MonarchPackParams);
