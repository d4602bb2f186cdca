// The backward of linear attention on the CPU, for the queries and the state. Compiled once per instruction set.
//
// With n = phi(q) . z + eps and o = phi(q) S / n: the gradient of phi(q) S is dO / n, that of n is -dO . o / n.

#include "cpu/make_kernel.h"
#include "linear_attention/cpu/state_tile.h"

namespace vitkernels::VK_ISA {
namespace {

template <class S>
class LinearGradQuery {
  using T = Compute<S>;

 public:
  LinearGradQuery(const LinearGradQueryParams& params, void* memory) : params(params), scratch(memory) {}

  int64_t scratch_size() const { return scratch.size(); }
  int64_t parts_size() const { return parts.bytes(); }

  void run(int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t pair = task / params.splits, split = task % params.splits;
      const int64_t batch = pair / p.kv_heads, kv_head = pair % p.kv_heads;
      const Range queries = share_of(p.queries(batch), split, params.splits), heads = p.candidates(kv_head);
      state.load_from(static_cast<const T*>(params.state) + pair * p.state_size(), T(p.scale));
      T* const part = parts.cleared(split, pair);
      for (int64_t head = heads.begin; head < heads.end; ++head) {
        if (p.kv_head(head) != kv_head) continue;
        for_each_block(queries, [&](int64_t first, int64_t count) { block(batch, head, first, count, part); });
      }
    }
  }

  // Queries read the state times the scale.
  void finish(int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) parts.add_up(pair, T(p.scale), params.grad_state);
  }

 private:
  void block(int64_t batch, int64_t head, int64_t first, int64_t count, T* part) {
    const EvenRows<S> queries = rows_of<S>(p.query, batch, first, head);
    features.apply(queries, count, phi);  // [queries, d]
    pack_rows(rows_of<S>(params.grad_out, batch, first, head), count, p.value_dim, T(1), grad_out,
              state.width);  // [queries, dv]
    if (p.normalizes) {
      matmul<T, false>({phi, features.width, 1}, state.by_features(), count, state.width, p.head_dim, out,
                       state.width);  // [queries, dv]
      for (int64_t r = 0; r < count; ++r) grad_sums[r] = normalize(r);
    }
    add_products(phi, features.width, p.head_dim, {grad_out, state.width, kPanel<T>}, state.width, count, part);
    if (p.normalizes) add_rows(phi, features.width, count, grad_sums, parts.sums_of(part));
    matmul<T, false>({grad_out, state.width, 1}, state.by_values(), count, features.width, p.value_dim, grad,
                     features.width);  // [queries, d]
    if (p.normalizes) {
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t c = 0; c < features.width; c += kWidth<T>) {
          T* const at = grad + r * features.width + c;
          store(at, load(at) + load(state.sums + c) * grad_sums[r]);
        }
      }
    }
    features.differentiate(queries, phi, count, grad);
    unpack_rows<T>(grad, features.width, count, p.head_dim, T(1), params.grad_query.at<S>(batch, first, head),
                   params.grad_query.token_stride);
  }

  // A row of dO becomes dO / n; returns the gradient of n. The output is computed again: it was rounded.
  T normalize(int64_t r) {
    const T sum = dot(phi + r * features.width, state.sums, features.width) + T(p.eps);
    const T* const from = out + r * state.width;
    T* const row = grad_out + r * state.width;
    Vec<T> dots{};
    for (int64_t c = 0; c < state.width; c += kWidth<T>) {
      const Vec<T> scaled = sum == T(0) ? Vec<T>{} : load(row + c) / broadcast(sum);
      dots += scaled * load(from + c);
      store(row + c, scaled);
    }
    return sum == T(0) ? T(0) : -reduce_add<T>(dots) / sum;
  }

  const LinearGradQueryParams& params;
  const LinearProblem& p = params.problem;
  Scratch scratch;
  const Features<T> features{p};
  const StateParts<T> parts{p, params.splits, params.parts};
  StateTile<T> state{p, scratch};
  T* phi = scratch.take<T>(kLinearBlock * features.width);
  T* grad = scratch.take<T>(kLinearBlock * features.width);
  T* grad_out = scratch.take<T>(kLinearBlock * state.width);
  T* out = scratch.take<T>(kLinearBlock * state.width);
  T* grad_sums = scratch.take<T>(kLinearBlock);
};

}  // namespace
}  // namespace vitkernels::VK_ISA

VK_KERNEL(LinearGradQuery, LinearGradQueryParams);
