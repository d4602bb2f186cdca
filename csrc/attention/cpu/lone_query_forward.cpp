// Forward of attention to listed keys on the CPU, for groups of one query. Compiled once per instruction set.
//
// A task is a query of one head.

#include "attention/cpu/lone_query.h"
#include "attention/cpu/softmax.h"
#include "cpu/make_kernel.h"
#include "cpu/pack.h"

namespace vitkernels::VK_ISA {
namespace {

template <class S>
class LoneQueryForward {
  using T = Compute<S>;

 public:
  LoneQueryForward(const ListedParams& params, void* memory) : params(params), scratch(memory) {}

  int64_t scratch_size() const { return scratch.size(); }

  void run(int64_t begin, int64_t end) {
    at.clear_zeros(params);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / params.groups % p.heads, batch = task / params.groups / p.heads;
      if (at.find(params, batch, head, task % params.groups)) attend(batch, head);
    }
  }

 private:
  void attend(int64_t batch, int64_t head) {
    const T scale = p.score.scale_of<T>(head);
    pack_rows(EvenRows<S>{p.query.at<const S>(batch, at.query, head), 0}, 1, p.head_dim, T(1), query, 0);
    multiply_rows(query, at.keys, p.head_dim, weights);
    const Range seen{0, at.keys.count};
    RowState<T> state;
    exponentiate(weights, weights, seen, 0, scale, row_max(weights, seen, scale), state);
    add_rows(weights, at.values, p.value_dim, out);
    const T lse = state.lse(), factor = lse == kMinusInfinity<T> ? T(0) : 1 / state.sum;
    unpack_rows<T>(out, 0, 1, p.value_dim, factor, params.out.at<S>(batch, at.query, head), 0);
    static_cast<T*>(params.lse)[(batch * p.num_queries() + at.query) * p.heads + head] = lse;
  }

  const ListedParams& params;
  const Problem& p = params.problem;
  Scratch scratch;
  LoneQuery<S> at{params, scratch};
  T* query = scratch.take<T>(round_up(p.head_dim, kWidth<T>));
  T* weights = scratch.take<T>(round_up(params.keys.max_tokens(), kWidth<T>));
  T* out = scratch.take<T>(round_up(p.value_dim, kWidth<T>));
};

}  // namespace
}  // namespace vitkernels::VK_ISA

VK_KERNEL(LoneQueryForward, LoneQueryParams);
