// Backward of attention to listed keys on the CPU, for groups of one query. Compiled once per instruction set.
//
// A task loops over a range of groups, for every query head of one kv head. The gradients of keys are added to the task's
// partial sums, key by key.

#include "attention/cpu/differentiate.h"
#include "attention/cpu/listed_sums.h"
#include "attention/cpu/lone_query.h"
#include "cpu/make_kernel.h"

namespace vitkernels::VK_ISA {
namespace {

template <class S>
class LoneQueryBackward {
  using T = Compute<S>;

 public:
  LoneQueryBackward(const ListedBackwardParams& params, void* memory) : params(params), scratch(memory) {}

  int64_t scratch_size() const { return scratch.size(); }
  int64_t parts_size() const { return sums.size(); }

  void run(int64_t begin, int64_t end) {
    at.clear_zeros(forward);
    for (int64_t task = begin; task < end; ++task) {
      sums.start(task);
      sums.for_each_head([&](int64_t batch, int64_t head, Range groups) {
        double head_scale_sum = 0;
        for (int64_t group = groups.begin; group < groups.end; ++group) {
          if (at.find(forward, batch, head, group)) head_scale_sum += differentiate(batch, head);
        }
        return head_scale_sum;
      });
    }
  }

  void finish(int64_t begin, int64_t end) { sums.template finish<S>(begin, end); }

 private:
  // Returns the gradient of the head's scale.
  double differentiate(int64_t batch, int64_t head) {
    const T scale = p.score.scale_of<T>(head);
    const int64_t statistic = (batch * p.num_queries() + at.query) * p.heads + head;
    const S* const out_gradients = params.grad_out.at<const S>(batch, at.query, head);
    pack_rows(EvenRows<S>{p.query.at<const S>(batch, at.query, head), 0}, 1, p.head_dim, T(1), query, 0);
    pack_rows(EvenRows<S>{out_gradients, 0}, 1, p.value_dim, T(1), out_gradient, 0);
    // delta = dO.O - dlse, so that dS = P * (dP - delta).
    T delta = dot_rows<T>(forward.out.at<const S>(batch, at.query, head), out_gradients, p.value_dim);
    if (params.grad_lse) delta -= static_cast<const T*>(params.grad_lse)[statistic];
    const T offset = exponent_offset(static_cast<const T*>(forward.lse)[statistic]);

    multiply_rows(query, at.keys, p.head_dim, probabilities);
    multiply_rows(out_gradient, at.values, p.value_dim, gradients);
    differentiate_products({0, at.keys.count}, RowNumbers<T>{scale, offset, delta}, probabilities, gradients);
    add_rows(gradients, at.keys, p.head_dim, query_gradient);
    const double of_scale = params.head_scale_sums ? double(dot_rows<T>(query, query_gradient, p.head_dim)) : 0.0;
    unpack_rows<T>(query_gradient, 0, 1, p.head_dim, scale, params.grad_query.at<S>(batch, at.query, head), 0);
    for (int64_t c = 0; c < p.head_dim; c += kWidth<T>) store(query + c, load(query + c) * scale);
    add_to_rows(gradients, query, at.keys.tokens, at.keys.count, sums.query_width, sums.keys);
    add_to_rows(probabilities, out_gradient, at.keys.tokens, at.keys.count, sums.value_width, sums.values);
    return of_scale;
  }

  const ListedBackwardParams& params;
  const ListedParams& forward = params.forward;
  const Problem& p = forward.problem;
  Scratch scratch;
  ListedSums<T> sums{params, round_up(p.head_dim, kWidth<T>), round_up(p.value_dim, kWidth<T>)};
  LoneQuery<S> at{forward, scratch};
  T* query = scratch.take<T>(sums.query_width);
  T* query_gradient = scratch.take<T>(sums.query_width);
  T* out_gradient = scratch.take<T>(sums.value_width);
  T* probabilities = scratch.take<T>(round_up(forward.keys.max_tokens(), kWidth<T>));
  T* gradients = scratch.take<T>(round_up(forward.keys.max_tokens(), kWidth<T>));
};

}  // namespace
}  // namespace vitkernels::VK_ISA

VK_KERNEL(LoneQueryBackward, LoneQueryBackwardParams);
