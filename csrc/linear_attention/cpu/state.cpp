// The state of linear attention on the CPU: the sum of phi(k)^T v over the keys, and that of phi(k). Compiled once per
// instruction set.

#include "cpu/make_kernel.h"
#include "linear_attention/cpu/state_tile.h"

namespace vitkernels::VK_ISA {
namespace {

template <class S>
class LinearState {
  using T = Compute<S>;

 public:
  LinearState(const LinearStateParams& params, void* memory) : params(params), scratch(memory) {}

  int64_t scratch_size() const { return scratch.size(); }
  int64_t parts_size() const { return parts.bytes(); }

  void run(int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t pair = task / params.splits, split = task % params.splits;
      sum(pair, share_of(p.keys(pair / p.kv_heads), split, params.splits), parts.cleared(split, pair));
    }
  }

  void finish(int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) parts.add_up(pair, T(1), params.state);
  }

 private:
  void sum(int64_t pair, Range keys, T* part) {
    const int64_t batch = pair / p.kv_heads, head = pair % p.kv_heads;
    for_each_block(keys, [&](int64_t first, int64_t count) {
      features.apply(rows_of<S>(p.key, batch, first, head), count, phi);                            // [keys, d]
      const OperandRows<T> v(rows_of<S>(p.value, batch, first, head), count, p.value_dim, values);  // [keys, dv]
      add_products(phi, features.width, p.head_dim, v.as_b(), parts.width, count, part);            // [d, dv]
      add_rows<T>(phi, features.width, count, nullptr, parts.sums_of(part));                        // [d]
    });
  }

  const LinearStateParams& params;
  const LinearProblem& p = params.problem;
  Scratch scratch;
  const Features<T> features{p};
  const StateParts<T> parts{p, params.splits, params.parts};
  T* phi = scratch.take<T>(kLinearBlock * features.width);
  T* values = scratch.take<T>(kLinearBlock * parts.width);
};

}  // namespace
}  // namespace vitkernels::VK_ISA

VK_KERNEL(LinearState, LinearStateParams);
