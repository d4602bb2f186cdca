// Joining attention results over disjoint sets of keys. Compiled once per instruction set.

#include <cmath>
#include <limits>

#include "attention/attention.h"
#include "attention/softmax_cpu.h"
#include "cpu/convert.h"
#include "cpu/kernels.h"

namespace vitkernels::VK_ISA {
namespace {

template <class T, class S>
VK_INLINE Vec<T> part_of(const void* tensor, int64_t offset, int64_t count) {
  return load_widened<T>(static_cast<const S*>(tensor) + offset, count);
}

// exp(a - b), where a = -inf means that this part saw no key. NaN stays NaN.
template <class T>
VK_INLINE T weight_of(T a, T b) {
  return a == kMinusInfinity<T> ? T(0) : std::exp(a - b);
}

// out = sum_p w_p out_p with w_p = exp(lse_p - lse).
template <class S>
void merge(const MergeParams& p, int64_t begin, int64_t end) {
  using T = Compute<S>;
  const auto lse_of = [&](int64_t part, int64_t row) { return static_cast<const T*>(p.lses[part])[row]; };
  for (int64_t row = begin; row < end; ++row) {
    RowState<T> state;
    for (int64_t part = 0; part < p.parts; ++part) {
      if (!(lse_of(part, row) <= state.max)) state.max = lse_of(part, row);  // once NaN, always NaN
    }
    for (int64_t part = 0; part < p.parts; ++part) state.sum += weight_of(lse_of(part, row), state.max);
    const T lse = state.lse();
    static_cast<T*>(p.lse)[row] = lse;
    // A block of columns for all parts, so that a weight is computed once a block.
    constexpr int64_t kBlock = 16 * kWidth<T>;
    for (int64_t first = 0; first < p.dim; first += kBlock) {
      const Range columns{0, std::min(p.dim - first, kBlock)};
      T sum[kBlock] = {};
      for (int64_t part = 0; part < p.parts; ++part) {
        const T weight = weight_of(lse_of(part, row), lse);
        if (weight == T(0)) continue;
        for_each_vector<T>(columns, [&](int64_t c, Range lanes) {
          store(sum + c, load(sum + c) + part_of<T, S>(p.outs[part], row * p.dim + first + c, lanes.end) * weight);
        });
      }
      for_each_vector<T>(columns, [&](int64_t c, Range lanes) {
        store_narrowed<T>(static_cast<S*>(p.out) + row * p.dim + first + c, load(sum + c), lanes.end);
      });
    }
  }
}

// dout_p = w_p dout, dlse_p = w_p (d_p - sum_q w_q d_q + dlse) with d_p = dout . out_p.
template <class S>
void merge_backward(const MergeParams& p, int64_t begin, int64_t end) {
  using T = Compute<S>;
  for (int64_t row = begin; row < end; ++row) {
    const T lse = static_cast<const T*>(p.lse)[row];
    const auto weight_of_part = [&](int64_t part) { return weight_of(static_cast<const T*>(p.lses[part])[row], lse); };
    const auto grad_of_part = [&](int64_t part) -> T& { return static_cast<T*>(p.grad_lses[part])[row]; };
    T mean = 0;
    for (int64_t part = 0; part < p.parts; ++part) {
      const T weight = weight_of_part(part);
      Vec<T> dot{};
      for_each_vector<T>({0, p.dim}, [&](int64_t c, Range lanes) {
        const int64_t offset = row * p.dim + c;
        const Vec<T> grad = part_of<T, S>(p.grad_out, offset, lanes.end);
        dot += grad * part_of<T, S>(p.outs[part], offset, lanes.end);
        store_narrowed<T>(static_cast<S*>(p.grad_outs[part]) + offset, grad * weight, lanes.end);
      });
      grad_of_part(part) = reduce_add<T>(dot);
      if (weight != T(0)) mean += weight * grad_of_part(part);
    }
    const T grad_lse = p.grad_lse ? static_cast<const T*>(p.grad_lse)[row] : T(0);
    for (int64_t part = 0; part < p.parts; ++part) {
      const T weight = weight_of_part(part);
      grad_of_part(part) = weight == T(0) ? T(0) : weight * (grad_of_part(part) - mean + grad_lse);
    }
  }
}

}  // namespace

void merge_attentions(const MergeParams& params, int64_t begin, int64_t end) {
  dispatch_dtype(params.dtype, [&]<class S>(S) { merge<S>(params, begin, end); });
}

void merge_attentions_backward(const MergeParams& params, int64_t begin, int64_t end) {
  dispatch_dtype(params.dtype, [&]<class S>(S) { merge_backward<S>(params, begin, end); });
}

}  // namespace vitkernels::VK_ISA
