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
  template <bool kIsA>
  using Operand = StoredOperand<Element, Tile::kTokens, kDim, Depth::kAcrossRows, kIsA>;

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
    const Operand<true> a(tokens, first_row());
    const Operand<false> b(values, first_column());
    add_products<Element, Tile::kTokens>(products, a, b, allow_tf32);
  }
  // Adds the features; `ones` are a column of ones.
  template <class Column>
  __device__ __forceinline__ void add_features(const Element* tokens, const Column& ones, bool allow_tf32) {
    const Operand<true> a(tokens, first_row());
    add_column<Element>(features, a, ones, allow_tf32);
  }

  __device__ void store(const LinearProblem& p, void* parts, const LinearTask& task) const {
    float* const sums = store_products(p, parts, task) + LinearPart{p.head_dim, p.value_dim}.features();
    if (lane_index() % 4 > 0 || first_column() > 0) return;
    CUTE_UNROLL
    for (int m = 0; m < kRows / 16; ++m) {
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int d = feature_of(m, r);
        if (d < p.head_dim) sums[d] = features(2 * r, m, 0) + features(2 * r + 1, m, 0);
      }
    }
  }
  // Returns where the part is.
  __device__ float* store_products(const LinearProblem& p, void* parts, const LinearTask& task) const {
    const LinearPart part{p.head_dim, p.value_dim};
    float* const data = static_cast<float*>(parts) + (task.block * p.batch * p.kv_heads + task.pair) * part.size();
    CUTE_UNROLL
    for (int m = 0; m < kRows / 16; ++m) {
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int d = feature_of(m, r);
        if (d >= p.head_dim) continue;
        CUTE_UNROLL
        for (int n = 0; n < kColumns / 8; ++n) {
          const int v = first_column() + n * 8 + lane_index() % 4 * 2;
          if (v >= part.pitch()) continue;
          __stcg(reinterpret_cast<float2*>(data + d * part.pitch() + v),
                 float2{products(2 * r, m, n), products(2 * r + 1, m, n)});
        }
      }
    }
    return data;
  }

 private:
  static __device__ int feature_of(int m, int r) { return first_row() + m * 16 + lane_index() / 4 + r * 8; }
};

// A state times a factor, as an operand (features,values) in shared memory, and its sums of features as one of two
// columns.
template <class Tile>
struct LoadedState {
  using Element = typename Tile::Element;
  static constexpr int kDim = Tile::kDim;
  struct Sum {
    const LoadedState& state;
    __device__ float operator()(int d) const { return state.sum(d); }
  };
  using Column = ColumnOperand<Element, kDim, Sum>;

  const float* data;
  int head_dim, value_dim;
  float factor;

  __device__ LoadedState(const LinearProblem& p, const float* state, float factor, Element* shared)
      : data(state), head_dim(int(p.head_dim)), value_dim(int(p.value_dim)), factor(factor) {
    for (int i = threadIdx.x; i < kDim * kDim; i += Tile::kThreads) {
      const int d = i / kDim, v = i % kDim;
      const bool exists = d < head_dim && v < value_dim;
      shared[typename Tile::State::Layout{}(d, v)] = Element(exists ? data[d * pitch() + v] * factor : 0.0f);
    }
    __syncthreads();
  }

  __device__ float sum(int d) const { return d < head_dim ? data[d * pitch() + value_dim] * factor : 0.0f; }

  __device__ Column column() const { return {{*this}}; }

  // phi . sums of the warp's tokens: those of this thread's accumulators.
  template <class AnyColumn>
  __device__ __forceinline__ void read_sums(const typename Tile::Held& tokens, const AnyColumn& column, bool allow_tf32,
                                            float (&found)[Tile::kRowsOfThread]) const {
    Accumulators<Tile::kRowTiles, 1> acc;  // (MMA,MMA_M,1)
    cute::clear(acc);
    add_column<Element>(acc, tokens, column, allow_tf32);
    CUTE_UNROLL
    for (int r = 0; r < Tile::kRowsOfThread; ++r) {
      const float both = acc(r % 2 * 2, r / 2, 0) + acc(r % 2 * 2 + 1, r / 2, 0);
      found[r] = __shfl_sync(0xffffffffu, both, lane_index() / 4 * 4);
    }
  }

 private:
  __device__ int pitch() const { return value_dim + 1; }
};

}  // namespace vitkernels::cuda
