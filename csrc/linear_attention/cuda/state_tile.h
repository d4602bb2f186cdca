// The state of linear attention in a block: what blocks sum, and what they read as an operand.
#pragma once

#include "linear_attention/cuda/tile.h"

namespace vitkernels::cuda {

// The sums of products (features,values) of tokens, and those of features.
template <class Tile>
struct StateSums {
  using Element = typename Tile::Element;
  static constexpr int kDim = Tile::kDim;
  // Warps stand below each other, sixteen features each or more, or in two columns.
  static constexpr int kWarpRows = kDim / 16 < Tile::kWarps ? kDim / 16 : Tile::kWarps;
  static constexpr int kRows = kDim / kWarpRows, kColumns = kDim * kWarpRows / Tile::kWarps;
  template <Depth kDepth, bool kIsA>
  using Operand = StoredOperand<Element, Tile::kTokens, kDim, kDepth, kIsA>;
  using Weights = ColumnOperand<Element, Tile::kTokens>;

  Accumulators<kRows / 16, kColumns / 8> products;  // (MMA,MMA_M,MMA_N)
  Accumulators<kRows / 16, 1> features;             // (MMA,MMA_M,1)

  __device__ StateSums() {
    cute::clear(products);
    cute::clear(features);
  }

  static __device__ int first_row() { return int(threadIdx.x) / kWarpSize % kWarpRows * kRows; }
  static __device__ int first_column() { return int(threadIdx.x) / kWarpSize / kWarpRows * kColumns; }

  // Adds the products of tokens (tokens,features) and (tokens,values).
  __device__ __forceinline__ void add(const Element* tokens, const Element* values, bool allow_tf32) {
    const Operand<Depth::kAcrossRows, true> a(tokens, first_row());
    const Operand<Depth::kAcrossRows, false> b(values, first_column());
    add_products<Element, Tile::kTokens>(products, a, b, allow_tf32);
  }
  // Adds the features times the tokens' weights.
  __device__ __forceinline__ void add_features(const Element* tokens, const Weights& weights, bool allow_tf32) {
    const Operand<Depth::kAcrossRows, true> a(tokens, first_row());
    add_column<Element, Tile::kTokens>(features, a, weights, allow_tf32);
  }

  // Writes a part, and returns where it is.
  __device__ float* store(const LinearProblem& p, void* parts, const LinearTask& task) const {
    const LinearPart part{p.head_dim, p.value_dim};
    float* const data = static_cast<float*>(parts) + (task.block * p.batch * p.kv_heads + task.pair) * part.size();
    CUTE_UNROLL
    for (int m = 0; m < kRows / 16; ++m) {
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int d = first_row() + m * 16 + lane_index() / 4 + r * 8;
        if (d >= p.head_dim) continue;
        float* const row = data + d * part.pitch();
        CUTE_UNROLL
        for (int n = 0; n < kColumns / 8; ++n) {
          const int v = first_column() + n * 8 + lane_index() % 4 * 2;
          if (v < part.pitch())
            __stcg(reinterpret_cast<float2*>(row + v), float2{products(2 * r, m, n), products(2 * r + 1, m, n)});
        }
        const bool has_sum = lane_index() % 4 == 0 && first_column() == 0;
        if (has_sum) data[part.features() + d] = features(2 * r, m, 0) + features(2 * r + 1, m, 0);
      }
    }
    return data;
  }
};

// A power of two near a number, one of zero and what is not finite.
__device__ inline float power_of_two(float x) {
  const unsigned exponent = __float_as_uint(x) & 0x7f800000u;
  return exponent == 0u || exponent == 0x7f800000u ? 1.0f : __uint_as_float(exponent);
}

__device__ inline float largest_of_warp(float x) {
  CUTE_UNROLL
  for (int distance = 1; distance < kWarpSize; distance *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, distance));
  return x;
}
template <int kWarps>
__device__ float largest_of_block(float x, float* shared) {
  x = largest_of_warp(x);
  __syncthreads();  // all reads before are done
  if (lane_index() == 0) shared[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  CUTE_UNROLL
  for (int warp = 0; warp < kWarps; ++warp) x = fmaxf(x, shared[warp]);
  __syncthreads();
  return x;
}

// A state times a factor, as an operand (features,values) in shared memory, and its sums of features as one of two
// columns. In float16 both are divided by powers of two, since sums over many tokens may be larger than any number.
template <class Tile>
struct LoadedState {
  using Element = typename Tile::Element;
  static constexpr int kDim = Tile::kDim;
  using Column = ColumnOperand<Element, kDim>;

  const float* data;
  int head_dim, value_dim;
  float factor;
  float unit = 1.0f, unit_of_sums = 1.0f;

  __device__ LoadedState(const LinearProblem& p, const float* state, float factor, Element* shared)
      : data(state), head_dim(int(p.head_dim)), value_dim(int(p.value_dim)), factor(factor) {
    if constexpr (Tile::kIsHalf) {
      float largest = 0.0f, largest_sum = 0.0f;
      for (int i = threadIdx.x; i < kDim * kDim; i += Tile::kThreads) {
        largest = fmaxf(largest, fabsf(at(i / kDim, i % kDim)));
      }
      for (int d = lane_index(); d < kDim; d += kWarpSize) largest_sum = fmaxf(largest_sum, fabsf(sum(d)));
      unit = power_of_two(largest_of_block<Tile::kWarps>(largest, reinterpret_cast<float*>(shared)));
      unit_of_sums = power_of_two(largest_of_warp(largest_sum));
    }
    const float inverse = 1.0f / unit;
    for (int i = threadIdx.x; i < kDim * kDim; i += Tile::kThreads) {
      shared[typename Tile::State::Layout{}(i / kDim, i % kDim)] = Element(at(i / kDim, i % kDim) * inverse);
    }
    __syncthreads();
  }

  __device__ float sum(int d) const {
    return d < head_dim ? data[int64_t(d) * (value_dim + 1) + value_dim] * factor : 0.0f;
  }

  __device__ Column column() const {
    const float inverse = 1.0f / unit_of_sums;
    return Column([&](int d) { return sum(d) * inverse; });
  }

  // phi . sums of the warp's tokens: those of this thread's accumulators.
  __device__ __forceinline__ void read_sums(const typename Tile::Held& tokens, const Column& column, bool allow_tf32,
                                            float (&found)[Tile::kRowsOfThread]) const {
    Accumulators<Tile::kRowTiles, 1> acc;  // (MMA,MMA_M,1)
    cute::clear(acc);
    add_column<Element, kDim>(acc, tokens, column, allow_tf32);
    CUTE_UNROLL
    for (int r = 0; r < Tile::kRowsOfThread; ++r) {
      const float both = (acc(r % 2 * 2, r / 2, 0) + acc(r % 2 * 2 + 1, r / 2, 0)) * unit_of_sums;
      found[r] = __shfl_sync(0xffffffffu, both, lane_index() / 4 * 4);
    }
  }

 private:
  __device__ float at(int d, int v) const {
    return d < head_dim && v < value_dim ? data[int64_t(d) * (value_dim + 1) + v] * factor : 0.0f;
  }
};

}  // namespace vitkernels::cuda
