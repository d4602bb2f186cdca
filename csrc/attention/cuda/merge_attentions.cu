// Merges attention results over disjoint sets of keys on a GPU: a warp takes a row, its lanes the columns.

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention/cuda/launches.h"
#include "cuda/launch.h"
#include "cuda/vector.h"

namespace vitkernels {
namespace {

using namespace cuda;

constexpr int kWarps = 4;  // of a block

// MergeParams with the lists of pointers by value: a kernel cannot read host memory.
struct MergeKernelParams {
  int32_t parts;
  int64_t rows, dim;
  const void* outs[kMaxMergeParts];  // [rows, dim] each
  const void* lses[kMaxMergeParts];  // [rows] each
  const float* sums;                 // [parts, rows] or null
  void *out, *lse;
  const void *grad_out = nullptr, *grad_lse = nullptr;
  void* grad_outs[kMaxMergeParts] = {};
  void* grad_lses[kMaxMergeParts] = {};

  explicit MergeKernelParams(const MergeParams& p)
      : parts(int32_t(p.parts)), rows(p.rows), dim(p.dim), sums(p.sums), out(p.out), lse(p.lse) {
    std::copy_n(p.outs, parts, outs);
    std::copy_n(p.lses, parts, lses);
  }

  explicit MergeKernelParams(const MergeBackwardParams& p) : MergeKernelParams(p.forward) {
    grad_out = p.grad_out, grad_lse = p.grad_lse;
    std::copy_n(p.grad_outs, parts, grad_outs);
    std::copy_n(p.grad_lses, parts, grad_lses);
  }

  template <class T>
  __device__ T max_of(int part, int64_t row) const {
    return static_cast<const T*>(lses[part])[row];
  }

  // An LSE is a maximum whose exponentials have a sum of one. Without keys the sum is zero.
  template <class T>
  __device__ T sum_of(int part, int64_t row) const {
    if (sums) return sums[part * rows + row];
    return max_of<T>(part, row) == -std::numeric_limits<T>::infinity() ? T(0) : T(1);
  }
};

// The weight of part p is sum_p exp(max_p - max) over the sum of these. It is not exp(lse_p - lse): a large lse is
// rounded by more than the logarithm of that sum, and the weights would not add up to one. NaN stays NaN.
template <class T>
class PartWeights {
 public:
  __device__ PartWeights(const MergeKernelParams& p, int64_t row) : p_(p), row_(row) {
    for (int part = 0; part < p.parts; ++part) max_ = std::fmax(max_, p.max_of<T>(part, row));
    for (int part = 0; part < p.parts; ++part) sum_ += share(part);
  }

  __device__ T operator[](int part) const { return sum_ == T(0) ? T(0) : share(part) / sum_; }

  __device__ T lse() const { return sum_ == T(0) ? max_ : max_ + std::log(sum_); }

 private:
  __device__ T share(int part) const {
    const T sum = p_.sum_of<T>(part, row_);
    return sum == T(0) ? T(0) : sum * std::exp(p_.max_of<T>(part, row_) - max_);
  }

  const MergeKernelParams& p_;
  int64_t row_;
  T max_ = -std::numeric_limits<T>::infinity(), sum_ = 0;
};

// out = sum_p w_p out_p.
template <class S, class Out, int kVector>
__global__ void merge(const __grid_constant__ MergeKernelParams p) {
  using T = Compute<S>;
  for (int64_t row = warp_of_grid(); row < p.rows; row += warps_in_grid()) {
    const PartWeights<T> weights(p, row);
    if (lane_index() == 0) static_cast<T*>(p.lse)[row] = weights.lse();
    for (int64_t c = lane_index() * kVector; c < p.dim; c += kWarpSize * kVector) {
      T sum[kVector] = {};
      for (int part = 0; part < p.parts; ++part) {
        const T weight = weights[part];
        if (weight == T(0)) continue;
        const auto out = load_elements<kVector, S>(p.outs[part], row * p.dim + c);
        for (int i = 0; i < kVector; ++i) sum[i] += widen(out.values[i]) * weight;
      }
      Elements<Out, kVector> merged;
      for (int i = 0; i < kVector; ++i) merged.values[i] = narrow<Out>(sum[i]);
      store_elements(p.out, row * p.dim + c, merged);
    }
  }
}

// dout_p = w_p dout, dlse_p = w_p (d_p - sum_q w_q d_q + dlse) with d_p = dout . out_p.
template <class S, int kVector>
__global__ void merge_backward(const __grid_constant__ MergeKernelParams p) {
  using T = Compute<S>;
  for (int64_t row = warp_of_grid(); row < p.rows; row += warps_in_grid()) {
    const PartWeights<T> weights(p, row);
    const auto grad_of = [&](int part) -> T& { return static_cast<T*>(p.grad_lses[part])[row]; };
    T mean = 0;
    for (int part = 0; part < p.parts; ++part) {
      const T weight = weights[part];
      T dot = 0;
      for (int64_t c = lane_index() * kVector; c < p.dim; c += kWarpSize * kVector) {
        const int64_t offset = row * p.dim + c;
        const auto grad = load_elements<kVector, S>(p.grad_out, offset);
        const auto out = load_elements<kVector, S>(p.outs[part], offset);
        Elements<S, kVector> grad_part;
        for (int i = 0; i < kVector; ++i) {
          dot += widen(grad.values[i]) * widen(out.values[i]);
          grad_part.values[i] = narrow<S>(widen(grad.values[i]) * weight);
        }
        store_elements(p.grad_outs[part], offset, grad_part);
      }
      dot = warp_sum(dot);
      if (lane_index() == part % kWarpSize) grad_of(part) = dot;
      if (weight != T(0)) mean += weight * dot;
    }
    const T grad_lse = p.grad_lse ? static_cast<const T*>(p.grad_lse)[row] : T(0);
    for (int part = lane_index(); part < p.parts; part += kWarpSize) {  // each lane those that it wrote
      const T weight = weights[part];
      grad_of(part) = weight == T(0) ? T(0) : weight * (grad_of(part) - mean + grad_lse);
    }
  }
}

// Rows can be read in vectors if each begins at a multiple of one; those of a narrower result then do as well.
template <class S>
bool rows_are_aligned(const MergeKernelParams& p) {
  bool aligned = p.dim * sizeof(S) % kVectorBytes == 0 && is_aligned(p.out) && is_aligned(p.grad_out);
  for (int part = 0; part < p.parts; ++part) {
    aligned = aligned && is_aligned(p.outs[part]) && is_aligned(p.grad_outs[part]);
  }
  return aligned;
}

template <class S, class Out, int kVector>
void launch_forward(const MergeKernelParams& p, cudaStream_t stream) {
  merge<S, Out, kVector><<<blocks_for(p.rows, kWarps), kWarps * kWarpSize, 0, stream>>>(p);
}

// Parts of S, the result as S or, from float, narrower.
template <class S, class Out>
inline constexpr bool kCanMerge = std::is_same_v<S, Out> || (std::is_same_v<S, float> && sizeof(Out) < sizeof(S));

template <class S, int kVector>
void launch_backward(const MergeKernelParams& p, cudaStream_t stream) {
  merge_backward<S, kVector><<<blocks_for(p.rows, kWarps), kWarps * kWarpSize, 0, stream>>>(p);
}

}  // namespace

cudaError_t launch_merge_attentions(const MergeParams& params, cudaStream_t stream) {
  if (params.rows == 0) return cudaSuccess;
  const MergeKernelParams p(params);
  bool can_merge = false;
  dispatch_dtype(params.dtype, [&]<class S>(S) {
    dispatch_dtype(params.out_dtype, [&]<class Out>(Out) {
      if constexpr (kCanMerge<S, Out>) {
        can_merge = true;
        rows_are_aligned<S>(p) ? launch_forward<S, Out, kVectorBytes / sizeof(S)>(p, stream)
                               : launch_forward<S, Out, 1>(p, stream);
      }
    });
  });
  return can_merge ? cudaGetLastError() : cudaErrorInvalidValue;
}

cudaError_t launch_merge_attentions(const MergeBackwardParams& params, cudaStream_t stream) {
  if (params.forward.rows == 0) return cudaSuccess;
  const MergeKernelParams p(params);
  dispatch_dtype(params.forward.dtype, [&]<class S>(S) {
    rows_are_aligned<S>(p) ? launch_backward<S, kVectorBytes / sizeof(S)>(p, stream) : launch_backward<S, 1>(p, stream);
  });
  return cudaGetLastError();
}

}  // namespace vitkernels
