// The forward of the long convolution.
//
// A thread block has a group of channels in shared memory, and goes through batches. x is read into the first stage of
// the transform, and y written from the last one of the way back. The filter's spectrum was made by a launch before: a
// block reads it for each batch. Its 8 bytes a point have room in the first-level cache beside the shared memory of two
// blocks; in registers they would halve the blocks that a multiprocessor has at a time.

#include "cuda/parts.h"
#include "monarch/cuda/long_conv_block.h"

namespace vitkernels {
namespace {

using namespace cuda;

constexpr int kThreads = LongConvCudaPlan::kMaxThreads, kRootThreads = 256;

// exp(-2 pi i e / 4L), rounded once.
__device__ float2 root_of(int64_t e, int64_t length) {
  double sine, cosine;
  sincospi(-double(e) / double(2 * length), &sine, &cosine);
  return {float(cosine), float(sine)};
}

__global__ void __launch_bounds__(kRootThreads) long_conv_roots(const __grid_constant__ LongConvCudaParams p) {
  const int64_t i = int64_t(blockIdx.x) * kRootThreads + threadIdx.x, length = p.plan.num_positions();
  float2* roots = reinterpret_cast<float2*>(p.roots);
  const int stages = p.plan.outer + 1 + p.plan.stages;
  int log_span = p.plan.log_length;
  for (int s = 0; s < stages; ++s) {
    const int log_radix = s > p.plan.outer ? p.plan.log_radix[s - p.plan.outer - 1] : 3;
    const bool has_all = s == 0 || s == p.plan.outer;
    const int count = LongConvCudaPlan::roots_of(log_span, log_radix, has_all), log_stride = log_span - log_radix;
    if (i < count) {
      const int64_t k = (i >> log_stride) + !has_all, q = i & ((int64_t(1) << log_stride) - 1);
      roots[i] = root_of(s == 0 ? q * (4 * k + 1) : (4 * k * q) << (p.plan.log_length - log_span), length);
    }
    roots += count, log_span = log_stride;
  }
}

template <class S, int kTurns, bool kIsWhole>
__global__ void __launch_bounds__(kThreads) long_conv_spectrum(const __grid_constant__ LongConvCudaParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  const LongConvBlock<S, kTurns, kIsWhole> block(p, shared);
  block.read_taps();
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    float2 x[8];
    block.tile.load_ends(turn, x);
#pragma unroll
    for (float2& value : x) value = {value.x * block.scale(), value.y * block.scale()};
    block.tile.write_ends(p.spectrum, block.group(), turn, x);
  }
}

template <class S, int kTurns, bool kIsWhole>
__global__ void __launch_bounds__(kThreads, 2) long_conv(const __grid_constant__ LongConvCudaParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  const LongConvBlock<S, kTurns, kIsWhole> block(p, shared);
  const Range batches = block.batches();
  for (int64_t batch = batches.begin; batch < batches.end; ++batch) {
    block.read(p.x, p.points, batch);
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      float2 x[8], by[8];
      block.tile.read_ends(p.spectrum, block.group(), turn, by);
      block.tile.load_ends(turn, x);
#pragma unroll
      for (int k = 0; k < 8; ++k) x[k] = product<false>(x[k], by[k]);
      block.tile.store_ends(turn, x);
    }
    block.write(p.out, p.points, batch);
  }
}

}  // namespace

template <DType kDType>
int64_t LongConvLaunches<kDType>::shares(const LongConvCudaParams& p, int64_t elements) {
  return parts_for(p.groups, p.batch, elements);
}

template <DType kDType>
cudaError_t LongConvLaunches<kDType>::prepare(const LongConvCudaParams& p, cudaStream_t stream) {
  cudaError_t error = launch_tasks(long_conv_roots, ceil_div<int64_t>(p.plan.num_positions(), kRootThreads),
                                   kRootThreads, 0, stream, p);
  if (error == cudaSuccess) error = outer(p, LongConvTensor::kFilter, stream);
  if (error != cudaSuccess) return error;
  return with_form(p.plan, [&](auto turns, auto is_whole) {
    return launch_tasks(long_conv_spectrum<LongConvElement<kDType>, turns, is_whole>, p.groups, p.plan.threads(),
                        p.plan.shared_bytes(), stream, p);
  });
}

template <DType kDType>
cudaError_t LongConvLaunches<kDType>::convolve(const LongConvCudaParams& p, cudaStream_t stream) {
  cudaError_t error = outer(p, LongConvTensor::kX, stream);
  if (error != cudaSuccess) return error;
  error = with_form(p.plan, [&](auto turns, auto is_whole) {
    return launch_tasks(long_conv<LongConvElement<kDType>, turns, is_whole>, p.groups * p.shares, p.plan.threads(),
                        p.plan.shared_bytes(), stream, p);
  });
  return error == cudaSuccess ? outer(p, LongConvTensor::kOut, stream) : error;
}

template int64_t LongConvLaunches<DType::VK_DTYPE>::shares(const LongConvCudaParams&, int64_t);
template cudaError_t LongConvLaunches<DType::VK_DTYPE>::prepare(const LongConvCudaParams&, cudaStream_t);
template cudaError_t LongConvLaunches<DType::VK_DTYPE>::convolve(const LongConvCudaParams&, cudaStream_t);

}  // namespace vitkernels
