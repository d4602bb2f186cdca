// Outer stages of the long convolution, for transforms that do not fit in shared memory: of radix 8, in global memory.
//
// A thread has 8 points of a channel in a batch. The first stage reads a tensor, the last one of the way back writes
// one; neighbours take neighbouring positions.

#include "monarch/cuda/long_conv_points.h"
#include "monarch/cuda/long_conv_tile.h"

namespace vitkernels {
namespace {

using namespace cuda;

constexpr int kThreads = 256;

// A row of points is a channel of a batch.
struct Row {
  int64_t batch, channel;
  int q;           // the first point of this thread
  float2* points;  // [num_positions()] of this row
  int count;       // of points between two of a thread's

  __device__ Row(const LongConvCudaParams& p, float* all) : count(1 << (p.plan.log_length - 3)) {
    const int blocks = max(count / kThreads, 1);
    const int64_t row = blockIdx.x / unsigned(blocks);
    batch = row / p.channels, channel = row % p.channels;
    q = int(blockIdx.x % unsigned(blocks)) * kThreads + int(threadIdx.x);
    points = reinterpret_cast<float2*>(all) + (row << p.plan.log_length);
  }
};

template <class Points>
__device__ void first_outer_stage(const LongConvCudaParams& p, const Row& row, const Points& from) {
  float2 x[8];
#pragma unroll
  for (int k = 0; k < 8; ++k) x[k] = from.load(0, row.q + k * row.count);
  first_stage_of_points<true>(x, reinterpret_cast<const float2*>(p.roots) + row.q, row.count);
#pragma unroll
  for (int k = 0; k < 8; ++k) row.points[row.q + k * row.count] = x[k];
}

template <class Points>
__device__ void first_outer_stage_inverse(const LongConvCudaParams& p, const Row& row, const Points& to) {
  float2 x[8];
#pragma unroll
  for (int k = 0; k < 8; ++k) x[k] = row.points[row.q + k * row.count];
  first_stage_of_points_inverse<true>(x, reinterpret_cast<const float2*>(p.roots) + row.q, row.count);
#pragma unroll
  for (int k = 0; k < 8; ++k) to.store(0, row.q + k * row.count, x[k]);
}

template <class S, bool kInverse>
__global__ void __launch_bounds__(kThreads) long_conv_outer(const __grid_constant__ LongConvCudaParams p,
                                                            const __grid_constant__ Signals tensor, float* points) {
  const Row row(p, points);
  const SignalPoints<S> signal(p, tensor, row.batch, row.channel);
  if constexpr (kInverse) {
    first_outer_stage_inverse(p, row, signal);
  } else {
    first_outer_stage(p, row, signal);
  }
}

template <class S, bool kInverse>
__global__ void __launch_bounds__(kThreads) long_conv_outer_taps(const __grid_constant__ LongConvCudaParams p) {
  const Row row(p, p.filter_points);
  if constexpr (kInverse) {
    first_outer_stage_inverse(p, row, TapPoints<S>(p, p.grad_filter, row.channel));
  } else {
    first_outer_stage(p, row, TapPoints<S>(p, p.filter, row.channel));
  }
}

// A later one, of spans of 2^log_span points.
template <bool kInverse>
__global__ void __launch_bounds__(kThreads)
    long_conv_outer_stage(const __grid_constant__ LongConvCudaParams p, float* points, int log_span, int first_root) {
  const Row row(p, points);
  const int log_count = log_span - 3, within = row.q & ((1 << log_count) - 1);
  float2* const at = row.points + ((row.q - within) * 8 + within);
  const float2* const roots = reinterpret_cast<const float2*>(p.roots) + first_root + within;
  float2 x[8];
#pragma unroll
  for (int k = 0; k < 8; ++k) x[k] = at[k << log_count];
  if constexpr (!kInverse) dft<false>(x);
#pragma unroll
  for (int k = 1; k < 8; ++k) x[k] = product<kInverse>(x[k], __ldg(roots + ((k - 1) << log_count)));
  if constexpr (kInverse) dft<true>(x);
#pragma unroll
  for (int k = 0; k < 8; ++k) at[k << log_count] = x[k];
}

const Signals& signals_of(const LongConvCudaParams& p, LongConvTensor tensor) {
  switch (tensor) {
    case LongConvTensor::kX: return p.x;
    case LongConvTensor::kOut: return p.out;
    case LongConvTensor::kGradOut: return p.grad_out;
    default: return p.grad_x;
  }
}

}  // namespace

template <DType kDType>
cudaError_t LongConvLaunches<kDType>::outer(const LongConvCudaParams& p, LongConvTensor tensor, cudaStream_t stream) {
  using S = LongConvElement<kDType>;
  const LongConvCudaPlan& plan = p.plan;
  if (plan.outer == 0) return cudaSuccess;
  const bool is_filter = tensor == LongConvTensor::kFilter || tensor == LongConvTensor::kGradFilter;
  const bool is_grad = tensor == LongConvTensor::kGradOut || tensor == LongConvTensor::kGradX;
  const bool is_result =
      tensor == LongConvTensor::kOut || tensor == LongConvTensor::kGradX || tensor == LongConvTensor::kGradFilter;
  float* const points = is_filter ? p.filter_points : is_grad ? p.grad_points : p.points;
  const int64_t rows = is_filter ? p.channels : p.batch * p.channels;
  const auto launch = [&](auto* kernel, const auto&... params) {
    return launch_tasks(kernel, rows * (plan.num_positions() / 8 / kThreads), kThreads, 0, stream, params...);
  };
  const auto first = [&] {
    if (is_filter) return launch(is_result ? &long_conv_outer_taps<S, true> : &long_conv_outer_taps<S, false>, p);
    return launch(is_result ? &long_conv_outer<S, true> : &long_conv_outer<S, false>, p, signals_of(p, tensor), points);
  };
  const auto later = [&](int stage) {
    int first_root = 0, log_span = plan.log_length;
    for (int s = 0; s < stage; ++s, log_span -= 3) first_root += LongConvCudaPlan::roots_of(log_span, 3, s == 0);
    return launch(is_result ? &long_conv_outer_stage<true> : &long_conv_outer_stage<false>, p, points, log_span,
                  first_root);
  };
  cudaError_t error = cudaSuccess;
  for (int i = 0; i < plan.outer && error == cudaSuccess; ++i) {
    const int stage = is_result ? plan.outer - 1 - i : i;
    error = stage == 0 ? first() : later(stage);
  }
  return error;
}

template cudaError_t LongConvLaunches<DType::VK_DTYPE>::outer(const LongConvCudaParams&, LongConvTensor, cudaStream_t);

}  // namespace vitkernels
