// The backward of linear attention on the CPU in its quadratic form (quadratic_tile.h). Compiled once per instruction set.
//
// With n = the sum of a row of A, plus eps, and o = A v / n: the gradient of A is (dO v^T - dO . o) / n.

#include "cpu/make_kernel.h"
#include "linear_attention/cpu/quadratic_tile.h"

namespace vitkernels::VK_ISA {
namespace {

template <class S>
class LinearQuadraticGrad {
  using T = Compute<S>;

 public:
  LinearQuadraticGrad(const LinearQuadraticGradParams& params, void* memory) : params(params), scratch(memory) {}

  int64_t scratch_size() const { return scratch.size(); }

  void run(int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t batch = pair / p.kv_heads, kv_head = pair % p.kv_heads;
      const EvenRows<S> from = rows_of<S>(p.key, batch, 0, kv_head);
      block.features.apply(from, p.num_keys, keys.rows);  // [keys, d]
      keys.pack_panels();
      pack_rows(rows_of<S>(p.value, batch, 0, kv_head), p.num_keys, p.value_dim, T(1), values.rows,
                values.width);  // [keys, dv]
      values.pack_panels();
      std::fill_n(grad_key, p.num_keys * keys.width, T(0));
      std::fill_n(grad_value, p.num_keys * values.width, T(0));
      const Range heads = p.candidates(kv_head);
      for (int64_t head = heads.begin; head < heads.end; ++head) {
        if (p.kv_head(head) != kv_head) continue;
        for_each_block({0, p.num_queries}, [&](int64_t first, int64_t count) { add(batch, head, first, count); });
      }
      block.features.differentiate(from, keys.rows, p.num_keys, grad_key);
      unpack_rows<T>(grad_key, keys.width, p.num_keys, p.head_dim, T(1), params.grad_key.at<S>(batch, 0, kv_head),
                     params.grad_key.token_stride);
      unpack_rows<T>(grad_value, values.width, p.num_keys, p.value_dim, T(1),
                     params.grad_value.at<S>(batch, 0, kv_head), params.grad_value.token_stride);
    }
  }

 private:
  void add(int64_t batch, int64_t head, int64_t first, int64_t count) {
    const EvenRows<S> queries = rows_of<S>(p.query, batch, first, head);
    block.multiply(queries, count, keys);
    pack_rows(rows_of<S>(params.grad_out, batch, first, head), count, p.value_dim, T(1), grad_out,
              values.width);  // [queries, dv]
    matmul<T, false>({grad_out, values.width, 1}, values.by_columns(), count, block.width, p.value_dim, grads,
                     block.width);  // [queries, keys]
    for (int64_t r = 0; r < count; ++r) differentiate(r);
    add_transposed(block.products, {grad_out, values.width, kPanel<T>}, values.width, count, grad_value);  // [keys, dv]
    add_transposed(grads, {block.phi, block.features.width, kPanel<T>}, keys.width, count, grad_key);      // [keys, d]
    matmul<T, false>({grads, block.width, 1}, keys.by_rows(), count, keys.width, p.num_keys, grad_query,
                     keys.width);  // [queries, d]
    block.features.differentiate(queries, block.phi, count, grad_query);
    unpack_rows<T>(grad_query, keys.width, count, p.head_dim, T(1), params.grad_query.at<S>(batch, first, head),
                   params.grad_query.token_stride);
    if (p.residual) {
      for (int64_t i = 0; i < count * values.width; i += kWidth<T>) {
        T* const to = grad_value + first * values.width + i;
        store(to, load(to) + load(grad_out + i) * T(p.residual));
      }
    }
  }

  // A row of dO v^T becomes the gradient of the products before the scale, one of A becomes A / n.
  void differentiate(int64_t r) {
    T *const row = block.products + r * block.width, *const grad = grads + r * block.width;
    Vec<T> dots{};
    for (int64_t c = 0; c < block.width; c += kWidth<T>) {
      const Vec<T> weight = divided(load(row + c), block.sums[r]);
      store(row + c, weight);
      dots += weight * load(grad + c);
    }
    const Vec<T> mean = broadcast(p.normalizes ? reduce_add<T>(dots) : T(0));  // dO . o
    for (int64_t c = 0; c < block.width; c += kWidth<T>) {
      store(grad + c, divided(load(grad + c) - mean, block.sums[r]) * T(p.scale));
    }
  }

  // acc [keys, width] += a^T b of a block of queries.
  void add_transposed(const T* a, MatmulB<T> b, int64_t width, int64_t count, T* acc) const {
    matmul<T, true>({a, 1, block.width}, b, p.num_keys, width, count, acc, width);
  }

  const LinearQuadraticGradParams& params;
  const LinearProblem& p = params.problem;
  Scratch scratch;
  QuadraticRows<T> keys{p.num_keys, p.head_dim, scratch}, values{p.num_keys, p.value_dim, scratch};
  QuadraticBlock<T> block{p, scratch};
  T* grads = scratch.take<T>(kLinearBlock * block.width);
  T* grad_out = scratch.take<T>(kLinearBlock * values.width);
  T* grad_query = scratch.take<T>(kLinearBlock * keys.width);
  T* grad_key = scratch.take<T>(p.num_keys * keys.width);
  T* grad_value = scratch.take<T>(p.num_keys * values.width);
};

}  // namespace
}  // namespace vitkernels::VK_ISA

VK_KERNEL(LinearQuadraticGrad, LinearQuadraticGradParams);
