// The gradients of the long convolution.
//
// Both are correlations, products with conjugate spectra: that of x with the filter's, and that of the filter, of which
// a thread block adds up the spectra of its batches in registers. The shares of a batch are added up in order, before
// one transform takes their sum back.

#include "monarch/cuda/long_conv_block.h"

namespace vitkernels {
namespace {

using namespace cuda;

constexpr int kThreads = LongConvCudaPlan::kMaxThreads;

// With kNeedsFilter, also the partial sums of the filter's gradient.
template <class S, int kTurns, bool kIsWhole, bool kNeedsFilter>
__global__ void __launch_bounds__(kThreads, kNeedsFilter ? 1 : 2)
    long_conv_grad(const __grid_constant__ LongConvCudaParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  const LongConvBlock<S, kTurns, kIsWhole> block(p, shared);
  float2 acc[kTurns][8] = {}, other[kTurns][8];
  const Range batches = block.batches();
  for (int64_t batch = batches.begin; batch < batches.end; ++batch) {
    if constexpr (kNeedsFilter) {
      block.read(p.x, p.points, batch);
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) block.tile.load_ends(turn, other[turn]);
      __syncthreads();  // all have read what the gradient takes the place of
    }
    block.read(p.grad_out, p.grad_points, batch);
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      float2 x[8], by[8];
      block.tile.load_ends(turn, x);
      if constexpr (kNeedsFilter) {
#pragma unroll
        for (int k = 0; k < 8; ++k) acc[turn][k] = sum(acc[turn][k], product<true>(x[k], other[turn][k]));
      }
      block.tile.read_ends(p.spectrum, block.group(), turn, by);
#pragma unroll
      for (int k = 0; k < 8; ++k) x[k] = product<true>(x[k], by[k]);
      block.tile.store_ends(turn, x);
    }
    block.write(p.grad_x, p.grad_points, batch);
  }
  if constexpr (kNeedsFilter) {
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      block.tile.write_ends(p.partial, block.share() * p.groups + block.group(), turn, acc[turn]);
    }
  }
}

template <class S, int kTurns, bool kIsWhole>
__global__ void __launch_bounds__(kThreads) long_conv_grad_filter(const __grid_constant__ LongConvCudaParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  const LongConvBlock<S, kTurns, kIsWhole> block(p, shared);
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    float2 total[8] = {}, x[8];
    for (int64_t share = 0; share < p.shares; ++share) {
      block.tile.read_ends(p.partial, share * p.groups + block.group(), turn, x);
#pragma unroll
      for (int k = 0; k < 8; ++k) total[k] = sum(total[k], x[k]);
    }
#pragma unroll
    for (float2& value : total) value = {value.x * block.scale(), value.y * block.scale()};
    block.tile.store_ends(turn, total);
  }
  block.write_taps();
}

}  // namespace

template <DType kDType>
cudaError_t LongConvLaunches<kDType>::differentiate(const LongConvCudaParams& p, cudaStream_t stream) {
  using S = LongConvElement<kDType>;
  const bool needs_filter = p.grad_filter.data;
  cudaError_t error = outer(p, LongConvTensor::kGradOut, stream);
  if (error == cudaSuccess && needs_filter) error = outer(p, LongConvTensor::kX, stream);
  if (error != cudaSuccess) return error;
  error = with_form(p.plan, [&](auto turns, auto is_whole) {
    const auto launch = [&](auto* kernel, int64_t tasks) {
      return launch_tasks(kernel, tasks, p.plan.threads(), p.plan.shared_bytes(), stream, p);
    };
    if (!needs_filter) return launch(&long_conv_grad<S, turns, is_whole, false>, p.groups * p.shares);
    const cudaError_t first = launch(&long_conv_grad<S, turns, is_whole, true>, p.groups * p.shares);
    return first == cudaSuccess ? launch(&long_conv_grad_filter<S, turns, is_whole>, p.groups) : first;
  });
  if (error == cudaSuccess) error = outer(p, LongConvTensor::kGradX, stream);
  if (error == cudaSuccess && needs_filter) error = outer(p, LongConvTensor::kGradFilter, stream);
  return error;
}

template cudaError_t LongConvLaunches<DType::VK_DTYPE>::differentiate(const LongConvCudaParams&, cudaStream_t);

}  // namespace vitkernels
