// The transforms of a thread block: evaluation of polynomials at the roots of z^L = -i, and back.
//
// Points lie in shared memory in the order of their positions, of the block's channels one behind the other or taking
// turns. A stage of decimation in frequency takes those a fixed stride apart to registers and back to where they were,
// so that one barrier a stage is enough; decimation in time goes the same way back. Signals are read into the first
// stage, spectra are multiplied where the last one leaves them.
#pragma once

#include "cuda/vector.h"
#include "monarch/cuda/long_conv_dft.h"
#include "monarch/cuda/long_conv_launches.h"

namespace vitkernels::cuda {

// A permutation within 16 points, the width of the banks: the threads of a half warp, whose points are 1, 8 or any other
// power of two apart, find them in different banks. It is linear over exclusive or.
__device__ __forceinline__ int swizzled(int point) {
  constexpr uint32_t kOfRow = 0xf65c3a90;  // 4 bits for each of eight rows, odd in their number and all different
  return point ^ int(kOfRow >> (point >> 2 & 28) & 15);
}

// exp(-i pi k / 16): the weight of the k-th point of the first stage, beyond that of its roots.
__device__ __forceinline__ float2 weight_of(int k) {
  constexpr double kCosine[] = {1.0,
                                0.980785280403230449126182236134239037,
                                0.923879532511286756128183189396788287,
                                0.831469612302545237078788377617905757,
                                0.707106781186547524400844362104849039,
                                0.555570233019602224742830813948532874,
                                0.382683432365089771728459984030398867,
                                0.195090322016128267848284868477022241};
  return {float(kCosine[k]), k == 0 ? 0.0f : -float(kCosine[8 - k])};
}

// The first stage, of points that are `count` roots apart; it is weighted where it is that of a whole transform.
template <bool kIsWeighted>
__device__ __forceinline__ void first_stage_of_points(float2 (&x)[8], const float2* roots, int count) {
  if constexpr (kIsWeighted) {
#pragma unroll
    for (int k = 1; k < 8; ++k) x[k] = product<false>(x[k], weight_of(k));
  }
  dft<false>(x);
#pragma unroll
  for (int k = 0; k < 8; ++k) x[k] = product<false>(x[k], __ldg(roots + k * count));
}
template <bool kIsWeighted>
__device__ __forceinline__ void first_stage_of_points_inverse(float2 (&x)[8], const float2* roots, int count) {
#pragma unroll
  for (int k = 0; k < 8; ++k) x[k] = product<true>(x[k], __ldg(roots + k * count));
  dft<true>(x);
  if constexpr (kIsWeighted) {
#pragma unroll
    for (int k = 1; k < 8; ++k) x[k] = product<true>(x[k], weight_of(k));
  }
}

// A whole transform, or a span that outer stages have left.
template <int kTurns, bool kIsWhole>
class LongConvTile {
 public:
  static constexpr int kEnds = 8;
  using Points = float2[kEnds];

  __device__ LongConvTile(const LongConvCudaPlan& plan, const float* roots, void* shared)
      : plan_(plan),
        roots_(reinterpret_cast<const float2*>(roots) + plan.roots_of_tile),
        shared_(static_cast<unsigned char*>(shared)),
        log_inner_(plan.is_interleaved ? plan.log_group : 0) {}

  // From signals to points: load(channel, position) is real or complex.
  template <class Load>
  __device__ void first_stage(Load&& load) const {
    for_each_first([&](int channel, int q, int first, int log_stride) {
      const int count = 1 << (plan_.log_tile - 3);
      Points x;
#pragma unroll
      for (int k = 0; k < kEnds; ++k) x[k] = load(channel, q + k * count);
      first_stage_of_points<kIsWhole>(x, roots_ + q, count);
#pragma unroll
      for (int k = 0; k < kEnds; ++k) at(first, k, log_stride) = x[k];
    });
  }

  // The way back: store(channel, position, value).
  template <class Store>
  __device__ void first_stage_inverse(Store&& store) const {
    for_each_first([&](int channel, int q, int first, int log_stride) {
      const int count = 1 << (plan_.log_tile - 3);
      Points x;
#pragma unroll
      for (int k = 0; k < kEnds; ++k) x[k] = at(first, k, log_stride);
      first_stage_of_points_inverse<kIsWhole>(x, roots_ + q, count);
#pragma unroll
      for (int k = 0; k < kEnds; ++k) store(channel, q + k * count, x[k]);
    });
  }

  // The stages in between, with barriers around each.
  __device__ void inner_stages() const {
    int log_span = plan_.log_tile - 3;
    const float2* roots = roots_ + (1 << plan_.log_tile);
    __syncthreads();
    for (int s = 0; s < plan_.stages; ++s) {
      stage_of<false>(plan_.log_radix[s], log_span, roots);
      roots += LongConvCudaPlan::roots_of(log_span, plan_.log_radix[s], false);
      log_span -= plan_.log_radix[s];
      __syncthreads();
    }
  }

  __device__ void inner_stages_inverse() const {
    int log_span = 3;
    const float2* roots = roots_ + (plan_.num_roots - plan_.roots_of_tile);
    __syncthreads();
    for (int s = plan_.stages - 1; s >= 0; --s) {
      log_span += plan_.log_radix[s];
      roots -= LongConvCudaPlan::roots_of(log_span, plan_.log_radix[s], false);
      stage_of<true>(plan_.log_radix[s], log_span, roots);
      __syncthreads();
    }
  }

  // Frequencies of the last stage, of a turn: each thread has the same ones in every transform.
  __device__ void load_ends(int turn, Points& x) const {
    asm volatile("" ::: "memory");  // one turn after the other: they would not have enough registers together
    const int first = first_end(turn);
#pragma unroll
    for (int k = 0; k < kEnds; ++k) x[k] = at(first, k, log_inner_);
    dft<false>(x);
  }
  __device__ void store_ends(int turn, Points& x) const {
    const int first = first_end(turn);
    dft<true>(x);
#pragma unroll
    for (int k = 0; k < kEnds; ++k) at(first, k, log_inner_) = x[k];
  }

  // Such frequencies in memory [groups, num_points()].
  __device__ float4* ends(float* memory, int64_t group, int turn) const {
    return reinterpret_cast<float4*>(memory) + (group * kTurns + turn) * (kEnds / 2) * blockDim.x + thread_index();
  }
  __device__ void read_ends(const float* memory, int64_t group, int turn, Points& x) const {
    const float4* from = ends(const_cast<float*>(memory), group, turn);
#pragma unroll
    for (int k = 0; k < kEnds; k += 2) {
      const float4 two = __ldg(from + k / 2 * blockDim.x);
      x[k] = {two.x, two.y}, x[k + 1] = {two.z, two.w};
    }
  }
  __device__ void write_ends(float* memory, int64_t group, int turn, const Points& x) const {
    float4* to = ends(memory, group, turn);
#pragma unroll
    for (int k = 0; k < kEnds; k += 2) to[k / 2 * blockDim.x] = {x[k].x, x[k].y, x[k + 1].x, x[k + 1].y};
  }

 private:
  // The k-th of the points 2^log_stride apart.
  __device__ float2& at(int first, int k, int log_stride) const {
    return *reinterpret_cast<float2*>(shared_ + (first ^ swizzled(k << log_stride) * int(sizeof(float2))));
  }

  // Where the points of a thread begin: those of a work item lie in a span of 2^(log_stride + log_radix) points.
  static __device__ int first_of(int work, int log_stride, int log_radix) {
    const int within = work & ((1 << log_stride) - 1);
    return swizzled(((work - within) << log_radix) + within) * int(sizeof(float2));
  }

  template <class Function>
  __device__ void for_each_first(Function&& f) const {
    const int log_stride = plan_.log_tile - 3 + log_inner_;
#pragma unroll 1  // in the backward a turn leaves few registers
    for (int turn = 0; turn < kTurns; ++turn) {
      const int work = thread_index() + turn * int(blockDim.x);
      const int inner = work & ((1 << log_inner_) - 1), q = (work & ((1 << log_stride) - 1)) >> log_inner_;
      f(work >> log_stride | inner, q, first_of(work, log_stride, 3), log_stride);
    }
  }

  __device__ int first_end(int turn) const { return first_of(thread_index() + turn * int(blockDim.x), log_inner_, 3); }

  template <bool kInverse>
  __device__ void stage_of(int log_radix, int log_span, const float2* roots) const {
    switch (log_radix) {
      case 1: return stage<1, kInverse>(log_span, roots);
      case 2: return stage<2, kInverse>(log_span, roots);
      default: return stage<3, kInverse>(log_span, roots);
    }
  }

  template <int kLogRadix, bool kInverse>
  __device__ void stage(int log_span, const float2* roots) const {
    constexpr int kRadix = 1 << kLogRadix, kOfTurn = kEnds / kRadix;
    const int log_count = log_span - kLogRadix, log_stride = log_count + log_inner_;
#pragma unroll kOfTurn
    for (int i = 0; i < kTurns * kOfTurn; ++i) {
      const int work = thread_index() + i * int(blockDim.x);
      const int first = first_of(work, log_stride, kLogRadix);
      const float2* root = roots + ((work & ((1 << log_stride) - 1)) >> log_inner_);
      float2 x[kRadix];
#pragma unroll
      for (int k = 0; k < kRadix; ++k) x[k] = at(first, k, log_stride);
      if constexpr (!kInverse) dft<false>(x);
#pragma unroll
      for (int k = 1; k < kRadix; ++k) x[k] = product<kInverse>(x[k], __ldg(root + ((k - 1) << log_count)));
      if constexpr (kInverse) dft<true>(x);
#pragma unroll
      for (int k = 0; k < kRadix; ++k) at(first, k, log_stride) = x[k];
    }
  }

  const LongConvCudaPlan& plan_;
  const float2* const roots_;
  unsigned char* const shared_;  // [num_points()]
  const int log_inner_;          // of the points of other channels between neighbours of one
};

}  // namespace vitkernels::cuda
