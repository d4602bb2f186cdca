// The gradients of spectral gating on the CPU. Compiled once per instruction set.
//
// That of x is the same operator with the conjugate weight. That of the weight is the product of grad_out's spectra
// with the conjugates of x's, added up over the batch in order; with several tasks for the same channels, the sums of
// each are added up in the end.

#include "cpu/make_kernel.h"
#include "monarch/cpu/spectral_gating_task.h"

namespace vitkernels::VK_ISA {
namespace {

// Adds the products of grad_out's and x's spectra to sums, on the way to the gradient of x.
template <class T>
struct AddProducts {
  MultiplyBy<T, true> with_x, gate;
  T* sums;

  template <int kCount>
  VK_INLINE void operator()(Points<T, kCount>& points, int64_t at) const {
    constexpr int64_t kPoint = 2 * kWidth<T>;
#pragma GCC unroll 16
    for (int k = 0; k < kCount; ++k) {
      Points<T, 1> product, sum;
      product.re[0] = points.re[k], product.im[0] = points.im[k];
      with_x(product, at + k);
      T* to = sums + (at + k) * kPoint;
      sum.load(to, kPoint);
      sum.re[0] += product.re[0], sum.im[0] += product.im[0];
      sum.store(to, kPoint);
    }
    gate(points, at);
  }
};

template <class S>
class SpectralGatingGrad {
  using T = Compute<S>;
  using Task = SpectralGatingTask<S>;

 public:
  SpectralGatingGrad(const SpectralGatingGradParams& params, void* memory) : params(params), scratch(memory) {}

  int64_t scratch_size() const { return scratch.size(); }
  int64_t parts_size() const { return has_parts() ? p.tasks() * task.size() * int64_t(sizeof(T)) : 0; }

  void run(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      task.begin(i);
      T* to = has_parts() ? part(i) : sum;
      if (needs_weight) std::fill_n(to, task.size(), T(0));
      const Range batches = task.batches(i);
      for (int64_t b = batches.begin; b < batches.end; ++b) {
        task.read(params.grad_out, b, grad);
        if (needs_weight) task.read(p.x, b, data);
        for (int64_t k = 0; k < p.frequencies(); ++k) multiply_column(k, to);
        task.write(params.grad_x, b, grad);
      }
      if (needs_weight && !has_parts()) write_weight(to);
    }
  }

  // Groups [begin, end).
  void finish(int64_t begin, int64_t end) {
    for (task.group = begin; task.group < end; ++task.group) {
      T* total = part(task.group * p.shares);
      for (int64_t share = 1; share < p.shares; ++share) {
        const T* other = part(task.group * p.shares + share);
        for (int64_t i = 0; i < task.size(); i += Task::kN) store(total + i, load(total + i) + load(other + i));
      }
      write_weight(total);
    }
  }

 private:
  void multiply_column(int64_t k, T* to) {
    const MultiplyBy<T, true> gate{task.column(task.weight, k)};
    if (!needs_weight) return task.of_columns.forward_and_inverse(task.column(grad, k), gate);
    T* other = task.column(data, k);
    task.of_columns.forward(other);
    task.of_columns.forward_and_inverse(task.column(grad, k), AddProducts<T>{{other}, gate, task.column(to, k)});
  }

  // Both spectra are times 2, and each frequency between the first and the last stands for two.
  void write_weight(T* total) {
    const T one = T(0.25) / T(p.rows * p.columns);
    for (int64_t k = 0; k < p.frequencies(); ++k) {
      const T scale = k == 0 || 2 * k == p.columns ? one : 2 * one;
      T *column = task.column(total, k), *end = task.column(total, k + 1);
      for (; column < end; column += Task::kN) store(column, load(column) * scale);
    }
    task.write_weight(params.grad_weight, total);
  }

  bool has_parts() const { return needs_weight && p.shares > 1; }
  T* part(int64_t i) const { return static_cast<T*>(params.partial) + i * task.size(); }

  const SpectralGatingGradParams& params;
  const SpectralGatingProblem& p = params.problem;
  const bool needs_weight = params.grad_weight.data;
  Scratch scratch;
  Task task{p, scratch};
  T* grad = scratch.take<T>(task.size());                                     // a spectrum
  T* data = scratch.take<T>(needs_weight ? task.size() : 0);                  // that of x
  T* sum = scratch.take<T>(needs_weight && p.shares == 1 ? task.size() : 0);  // of their products
};

}  // namespace
}  // namespace vitkernels::VK_ISA

VK_KERNEL(SpectralGatingGrad, SpectralGatingGradParams);
