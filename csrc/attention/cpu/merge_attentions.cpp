// Merges attention results over disjoint sets of keys. Compiled once per instruction set.

#include <cmath>
#include <limits>

#include "attention/cpu/softmax.h"
#include "attention/dense.h"
#include "cpu/convert.h"
#include "cpu/make_kernel.h"

namespace vitkernels::VK_ISA {
namespace {

template <class T, class S>
VK_INLINE Vec<T> part_of(const void* tensor, int64_t offset, int64_t count) {
  return load_widened<T>(static_cast<const S*>(tensor) + offset, count);
}

// The weight of part p is exp(lse_p - max) over the sum of these. It is not exp(lse_p - lse): a large lse is rounded by
// more than the logarithm of that sum, and the weights would not add up to one. NaN stays NaN.
template <class T>
class PartWeights {
 public:
  PartWeights(const MergeParams& p, int64_t row) : p_(p), row_(row) {
    for (int64_t part = 0; part < p.parts; ++part) total_.max = std::fmax(total_.max, lse_of(part));
    for (int64_t part = 0; part < p.parts; ++part) total_.sum += share(part);
  }

  VK_INLINE T operator[](int64_t part) const { return total_.sum == T(0) ? T(0) : share(part) / total_.sum; }

  T lse() const { return total_.lse(); }

 private:
  VK_INLINE T lse_of(int64_t part) const { return static_cast<const T*>(p_.lses[part])[row_]; }

  // Zero for a part that saw no key.
  VK_INLINE T share(int64_t part) const {
    return lse_of(part) == kMinusInfinity<T> ? T(0) : std::exp(lse_of(part) - total_.max);
  }

  const MergeParams& p_;
  int64_t row_;
  RowState<T> total_;
};

// out = sum_p w_p out_p.
template <class S>
class Merge {
  using T = Compute<S>;

 public:
  Merge(const MergeParams& params, void*) : p(params) {}

  void run(int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const PartWeights<T> weights(p, row);
      static_cast<T*>(p.lse)[row] = weights.lse();
      // Parts are the inner loop of a block of columns: a weight is computed once per block.
      constexpr int64_t kBlock = 16 * kWidth<T>;
      for (int64_t first = 0; first < p.dim; first += kBlock) {
        const Range columns{0, std::min(p.dim - first, kBlock)};
        T sum[kBlock] = {};
        for (int64_t part = 0; part < p.parts; ++part) {
          const T weight = weights[part];
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

 private:
  const MergeParams& p;
};

// dout_p = w_p dout, dlse_p = w_p (d_p - sum_q w_q d_q + dlse) with d_p = dout . out_p.
template <class S>
class MergeBackward {
  using T = Compute<S>;

 public:
  MergeBackward(const MergeBackwardParams& params, void*) : p(params) {}

  void run(int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const PartWeights<T> weights(p.forward, row);
      const auto grad_of_part = [&](int64_t part) -> T& { return static_cast<T*>(p.grad_lses[part])[row]; };
      T mean = 0;
      for (int64_t part = 0; part < p.forward.parts; ++part) {
        const T weight = weights[part];
        Vec<T> dot{};
        for_each_vector<T>({0, p.forward.dim}, [&](int64_t c, Range lanes) {
          const int64_t offset = row * p.forward.dim + c;
          const Vec<T> grad = part_of<T, S>(p.grad_out, offset, lanes.end);
          dot += grad * part_of<T, S>(p.forward.outs[part], offset, lanes.end);
          store_narrowed<T>(static_cast<S*>(p.grad_outs[part]) + offset, grad * weight, lanes.end);
        });
        grad_of_part(part) = reduce_add<T>(dot);
        if (weight != T(0)) mean += weight * grad_of_part(part);
      }
      const T grad_lse = p.grad_lse ? static_cast<const T*>(p.grad_lse)[row] : T(0);
      for (int64_t part = 0; part < p.forward.parts; ++part) {
        const T weight = weights[part];
        grad_of_part(part) = weight == T(0) ? T(0) : weight * (grad_of_part(part) - mean + grad_lse);
      }
    }
  }

 private:
  const MergeBackwardParams& p;
};

}  // namespace
}  // namespace vitkernels::VK_ISA

VK_KERNEL(Merge, MergeParams);
VK_KERNEL(MergeBackward, MergeBackwardParams);
