// Linear attention on the CPU in its quadratic form (quadratic_tile.h). Compiled once per instruction set.

#include "cpu/make_kernel.h"
#include "linear_attention/cpu/quadratic_tile.h"

namespace vitkernels::VK_ISA {
namespace {

template <class S>
class LinearQuadratic {
  using T = Compute<S>;

 public:
  LinearQuadratic(const LinearQuadraticParams& params, void* memory) : params(params), scratch(memory) {}

  int64_t scratch_size() const { return scratch.size(); }

  void run(int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t batch = pair / p.kv_heads, kv_head = pair % p.kv_heads;
      block.features.apply(rows_of<S>(p.key, batch, 0, kv_head), p.num_keys, keys.rows);  // [keys, d]
      keys.pack_panels();
      pack_rows(rows_of<S>(p.value, batch, 0, kv_head), p.num_keys, p.value_dim, T(1), values.rows,
                values.width);  // [keys, dv]
      const Range heads = p.candidates(kv_head);
      for (int64_t head = heads.begin; head < heads.end; ++head) {
        if (p.kv_head(head) != kv_head) continue;
        for_each_block({0, p.num_queries}, [&](int64_t first, int64_t count) { read(batch, head, first, count); });
      }
    }
  }

 private:
  void read(int64_t batch, int64_t head, int64_t first, int64_t count) {
    block.multiply(rows_of<S>(p.query, batch, first, head), count, keys);
    matmul<T, false>({block.products, block.width, 1}, values.by_rows(), count, values.width, p.num_keys, out,
                     values.width);  // [queries, dv]
    for (int64_t r = 0; r < count; ++r) {
      const T* const row = out + r * values.width;
      const T* const own = p.residual ? values.rows + (first + r) * values.width : nullptr;
      S* const to = params.out.at<S>(batch, first + r, head);
      for_each_part<kWidth<T>>(p.value_dim, [&](int64_t c, int64_t n) VK_BODY {
        Vec<T> x = divided(load(row + c), block.sums[r]);
        if (own) x += load(own + c) * T(p.residual);
        store_narrowed<T>(to + c, x, n);
      });
    }
  }

  const LinearQuadraticParams& params;
  const LinearProblem& p = params.problem;
  Scratch scratch;
  QuadraticRows<T> keys{p.num_keys, p.head_dim, scratch}, values{p.num_keys, p.value_dim, scratch};
  QuadraticBlock<T> block{p, scratch};
  T* out = scratch.take<T>(kLinearBlock * values.width);
};

}  // namespace
}  // namespace vitkernels::VK_ISA

VK_KERNEL(LinearQuadratic, LinearQuadraticParams);
