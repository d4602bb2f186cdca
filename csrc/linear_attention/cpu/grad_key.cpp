// The backward of linear attention on the CPU, for keys and values, from the gradient of the state. Compiled once per
// instruction set.

#include "cpu/make_kernel.h"
#include "linear_attention/cpu/state_tile.h"

namespace vitkernels::VK_ISA {
namespace {

template <class S>
class LinearGradKey {
  using T = Compute<S>;

 public:
  LinearGradKey(const LinearGradKeyParams& params, void* memory) : params(params), scratch(memory) {}

  int64_t scratch_size() const { return scratch.size(); }

  void run(int64_t begin, int64_t end) {
    const int64_t tiles = linear_tiles(p.num_keys);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t pair = task / tiles;
      const Range tile = linear_tile(p.keys(pair / p.kv_heads), task % tiles);
      if (tile.empty()) continue;
      if (loaded != pair) {
        grad_state.load_from(static_cast<const T*>(params.grad_state) + pair * p.state_size(), T(1));
        loaded = pair;
      }
      for_each_block(tile,
                     [&](int64_t key, int64_t count) { block(pair / p.kv_heads, pair % p.kv_heads, key, count); });
    }
  }

 private:
  void block(int64_t batch, int64_t head, int64_t first, int64_t count) {
    const EvenRows<S> keys = rows_of<S>(p.key, batch, first, head);
    features.apply(keys, count, phi);  // [keys, d]
    matmul<T, false>({phi, features.width, 1}, grad_state.by_features(), count, grad_state.width, p.head_dim,
                     grad_value, grad_state.width);  // [keys, dv]
    if (p.residual) add_residual(batch, head, first, count);
    unpack_rows<T>(grad_value, grad_state.width, count, p.value_dim, T(1), params.grad_value.at<S>(batch, first, head),
                   params.grad_value.token_stride);

    const OperandRows<T> v(rows_of<S>(p.value, batch, first, head), count, p.value_dim, values);  // [keys, dv]
    matmul<T, false>(v.as_a(), grad_state.by_values(), count, features.width, p.value_dim, grad,
                     features.width);  // [keys, d]
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t c = 0; c < features.width; c += kWidth<T>) {
        T* const at = grad + r * features.width + c;
        store(at, load(at) + load(grad_state.sums + c));
      }
    }
    features.differentiate(keys, phi, count, grad);
    unpack_rows<T>(grad, features.width, count, p.head_dim, T(1), params.grad_key.at<S>(batch, first, head),
                   params.grad_key.token_stride);
  }

  // The token's own value is in the outputs of all heads that share it.
  void add_residual(int64_t batch, int64_t kv_head, int64_t first, int64_t count) {
    const Range heads = p.candidates(kv_head);
    for (int64_t head = heads.begin; head < heads.end; ++head) {
      if (p.kv_head(head) != kv_head) continue;
      const EvenRows<S> rows = rows_of<S>(params.grad_out, batch, first, head);
      for (int64_t r = 0; r < count; ++r) {
        T* const to = grad_value + r * grad_state.width;
        for_each_part<kWidth<T>>(p.value_dim, [&](int64_t c, int64_t n) VK_BODY {
          store(to + c, load(to + c) + load_widened<T>(rows[r] + c, n) * T(p.residual));
        });
      }
    }
  }

  const LinearGradKeyParams& params;
  const LinearProblem& p = params.problem;
  Scratch scratch;
  const Features<T> features{p};
  StateTile<T> grad_state{p, scratch};
  T* phi = scratch.take<T>(kLinearBlock * features.width);
  T* grad = scratch.take<T>(kLinearBlock * features.width);
  T* values = scratch.take<T>(kLinearBlock * grad_state.width);
  T* grad_value = scratch.take<T>(kLinearBlock * grad_state.width);
  int64_t loaded = -1;
};

}  // namespace
}  // namespace vitkernels::VK_ISA

VK_KERNEL(LinearGradKey, LinearGradKeyParams);
