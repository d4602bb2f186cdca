// What queries read from the state of linear attention on the CPU. Compiled once per instruction set.

#include "cpu/make_kernel.h"
#include "linear_attention/cpu/state_tile.h"

namespace vitkernels::VK_ISA {
namespace {

template <class S>
class LinearOutput {
  using T = Compute<S>;

 public:
  LinearOutput(const LinearOutputParams& params, void* memory) : params(params), scratch(memory) {}

  int64_t scratch_size() const { return scratch.size(); }

  void run(int64_t begin, int64_t end) {
    const int64_t tiles = linear_tiles(p.num_queries);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t batch = task / tiles / p.heads;
      tile(batch, task / tiles % p.heads, linear_tile(p.queries(batch), task % tiles));
    }
  }

 private:
  void tile(int64_t batch, int64_t head, Range queries) {
    if (queries.empty()) return;
    const int64_t kv_head = p.kv_head(head), pair = batch * p.kv_heads + kv_head;
    if (loaded != pair) {
      state.load_from(static_cast<const T*>(params.state) + pair * p.state_size(), T(p.scale));
      loaded = pair;
    }
    for_each_block(queries, [&](int64_t first, int64_t count) {
      features.apply(rows_of<S>(p.query, batch, first, head), count, phi);  // [queries, d]
      matmul<T, false>({phi, features.width, 1}, state.by_features(), count, state.width, p.head_dim, out,
                       state.width);  // [queries, dv]
      for (int64_t r = 0; r < count; ++r) {
        const T sum = p.normalizes ? dot(phi + r * features.width, state.sums, features.width) + T(p.eps) : T(1);
        const S* const own = p.residual ? p.value.at<const S>(batch, first + r, kv_head) : nullptr;
        finish_row(out + r * state.width, sum, own, params.out.at<S>(batch, first + r, head));
      }
    });
  }

  // Divided, since the reciprocal of a small sum is infinite.
  void finish_row(const T* from, T sum, const S* own, S* to) const {
    for_each_part<kWidth<T>>(p.value_dim, [&](int64_t c, int64_t count) VK_BODY {
      Vec<T> x = sum == T(0) ? Vec<T>{} : load(from + c) / broadcast(sum);
      if (own) x += load_widened<T>(own + c, count) * T(p.residual);
      store_narrowed<T>(to + c, x, count);
    });
  }

  const LinearOutputParams& params;
  const LinearProblem& p = params.problem;
  Scratch scratch;
  const Features<T> features{p};
  StateTile<T> state{p, scratch};
  T* phi = scratch.take<T>(kLinearBlock * features.width);
  T* out = scratch.take<T>(kLinearBlock * state.width);
  int64_t loaded = -1;
};

}  // namespace
}  // namespace vitkernels::VK_ISA

VK_KERNEL(LinearOutput, LinearOutputParams);
