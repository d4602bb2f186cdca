// Backward of what follows a Monarch product on the CPU: GELU and the bias. Compiled once per instruction set.
//
// A task owns some columns, and adds their gradients up over all rows, in order.

#include "cpu/convert.h"
#include "cpu/gelu.h"
#include "cpu/make_kernel.h"
#include "monarch/monarch.h"

namespace vitkernels::VK_ISA {
namespace {

template <class S>
class MonarchGradEpilogue {
  using T = Compute<S>;

 public:
  MonarchGradEpilogue(const MonarchGradEpilogueParams& params, void*) : p(params) {}

  void run(int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * kEpilogueColumns;
      if (p.columns - first >= kEpilogueColumns) {
        of_columns<true>(first, kEpilogueColumns);
      } else {
        of_columns<false>(first, p.columns - first);
      }
    }
  }

 private:
  static constexpr int kVectors = kEpilogueColumns / kWidth<T>;

  template <bool kIsFull>
  void of_columns(int64_t first, int64_t count) {
    Vec<T> total[kVectors] = {};
    for (int64_t row = 0; row < p.rows; row += kSummedRows) {
      Vec<T> sums[kVectors] = {};  // few numbers each: a long sum in float32 loses bits
      for (int64_t r = row; r < std::min(row + kSummedRows, p.rows); ++r) add_row<kIsFull>(r, first, count, sums);
      for (int i = 0; i < kVectors; ++i) total[i] += sums[i];
    }
    if (!p.grad_bias) return;
    for_each_vector<kIsFull>(count, [&](int i, int64_t c, int64_t n) VK_BODY {
      store_narrowed<T>(static_cast<T*>(p.grad_bias) + first + c, total[i], n);
    });
  }

  template <bool kIsFull>
  VK_INLINE void add_row(int64_t r, int64_t first, int64_t count, Vec<T> (&sums)[kVectors]) const {
    const S* grad = p.grad_out.row<const S>(r) + first;
    for_each_vector<kIsFull>(count, [&](int i, int64_t c, int64_t n) VK_BODY {
      Vec<T> v = load_widened<T>(grad + c, n);
      if (p.activation == Activation::kGelu) {
        v *= gelu_derivative<T>(load_widened<T>(p.before.row<const S>(r) + first + c, n));
        store_narrowed<T>(p.grad_before.row<S>(r) + first + c, v, n);
      }
      sums[i] += v;
    });
  }

  template <bool kIsFull, class Function>
  VK_INLINE static void for_each_vector(int64_t count, Function&& f) {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      const int64_t c = i * kWidth<T>, n = kIsFull ? kWidth<T> : std::min<int64_t>(count - c, kWidth<T>);
      if (n > 0) f(i, c, n);
    }
  }

  static constexpr int64_t kSummedRows = 128;

  const MonarchGradEpilogueParams& p;
};

}  // namespace
}  // namespace vitkernels::VK_ISA

VK_KERNEL(MonarchGradEpilogue, MonarchGradEpilogueParams);
