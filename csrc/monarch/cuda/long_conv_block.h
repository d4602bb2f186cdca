// What a thread block of the long convolution has: a group of channels in a share of the batch.
#pragma once

#include "cuda/scheduler.h"
#include "monarch/cuda/long_conv_points.h"
#include "monarch/cuda/long_conv_tile.h"

namespace vitkernels::cuda {

template <class S, int kTurns, bool kIsWhole>
struct LongConvBlock {
  using Tile = LongConvTile<kTurns, kIsWhole>;
  using Points = typename Tile::Points;

  const LongConvCudaParams& p;
  Tile tile;

  __device__ LongConvBlock(const LongConvCudaParams& params, void* shared)
      : p(params), tile(params.plan, params.roots, shared) {}

  __device__ int64_t group() const { return block_index() % unsigned(p.groups); }
  __device__ int64_t share() const { return block_index() / unsigned(p.groups); }
  __device__ Range batches() const { return part_of(p.batch, share(), p.shares); }

  // From a batch of a tensor, or of its points, up to the last stage; and back.
  __device__ void read(const Signals& tensor, float* points, int64_t batch) const {
    if constexpr (kIsWhole) {
      read(SignalPoints<S>(p, tensor, batch, first_channel()));
    } else {
      read(span(points, batch));
    }
  }
  __device__ void write(const Signals& tensor, float* points, int64_t batch) const {
    if constexpr (kIsWhole) {
      write(SignalPoints<S>(p, tensor, batch, first_channel()));
    } else {
      write(span(points, batch));
    }
  }
  __device__ void read_taps() const {
    if constexpr (kIsWhole) {
      read(TapPoints<S>(p, p.filter, first_channel()));
    } else {
      read(span(p.filter_points, 0));
    }
  }
  __device__ void write_taps() const {
    if constexpr (kIsWhole) {
      write(TapPoints<S>(p, p.grad_filter, first_channel()));
    } else {
      write(span(p.filter_points, 0));
    }
  }

  // Products of spectra are divided by the length once.
  __device__ float scale() const { return 1.0f / float(p.plan.num_positions()); }

 private:
  __device__ int64_t first_channel() const { return group() << p.plan.log_group; }
  __device__ SpanPoints span(float* points, int64_t batch) const {
    return {reinterpret_cast<float2*>(points) + (batch * p.groups + group()) * p.plan.num_points()};
  }

  template <class From>
  __device__ void read(const From& from) const {
    tile.first_stage([&](int channel, int position) { return from.load(channel, position); });
    tile.inner_stages();
  }
  template <class To>
  __device__ void write(const To& to) const {
    tile.inner_stages_inverse();
    tile.first_stage_inverse([&](int channel, int position, float2 value) { to.store(channel, position, value); });
  }
};

// Calls f(turns, is_whole), which are constants, for what the plan needs.
template <class Function>
cudaError_t with_form(const LongConvCudaPlan& plan, Function&& f) {
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  if (plan.outer > 0) return f(One{}, std::false_type{});
  return plan.turns() == 1 ? f(One{}, std::true_type{}) : f(Two{}, std::true_type{});
}

}  // namespace vitkernels::cuda
