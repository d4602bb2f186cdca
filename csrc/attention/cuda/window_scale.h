// The scale of a head of attention in windows, and the rows of queries and keys that it is multiplied with: as they are
// copied, or unit vectors (cosine attention).
#pragma once

#include "attention/cuda/window_tile.h"

namespace vitkernels::cuda {

// The kernels take a positive scale: what they subtract and clamp before they scale keeps its order. The sign of a
// scale goes to the queries.
struct WindowScale {
  float size, sign = 1.0f;

  __device__ WindowScale(const WindowCudaParams& p, int head) : size(p.scale) {
    if (!p.head_scale) return;
    size *= p.head_scale[head];
    if (size < 0.0f) size = -size, sign = -1.0f;
    if (size < kMinWindowScale) size = kMinWindowScale;  // NaN stays NaN
  }
};

__device__ inline float approximate_reciprocal_root(float x) {
  float y;
  asm("rsqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// What a thread's rows are multiplied with before they meet others.
template <class Tile>
struct RowFactors {
  using Element = typename Tile::Element;
  static constexpr int kRows = Tile::kRows;
  static constexpr float kLargest = 1e12f;  // as torch.nn.functional.normalize has it: norms are at least 1e-12

  float factor[kRows];

  // Multiplies the rows of a tile that this quad has copied. The other threads see it behind the next barrier.
  __device__ void apply(const typename Tile::Share& share, unsigned tile, float sign, bool normalizes) {
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      cute::Tensor elements = cute::make_tensor<Element>(cute::Shape<cute::Int<8>, cute::Int<Tile::kVectors>>{});
      const cute::Tensor vectors = cute::recast<uint4>(elements);  // (1,vectors)
      CUTE_UNROLL
      for (int v = 0; v < Tile::kVectors; ++v) vectors(0, v) = load_shared_16_bytes(share.vector_of(tile, r, v));
      factor[r] = sign;
      if (normalizes) {
        float squares = 0.0f;
        CUTE_UNROLL
        for (int i = 0; i < cute::size(elements); ++i) {
          squares = fmaf(float(elements(i)), float(elements(i)), squares);
        }
        squares = combine_quad(squares, [](float a, float b) { return a + b; });
        const float inverse = approximate_reciprocal_root(squares);
        factor[r] *= squares == 0.0f ? 1.0f : inverse > kLargest ? kLargest : inverse;
      }
      CUTE_UNROLL
      for (int i = 0; i < cute::size(elements); ++i) elements(i) = Element(float(elements(i)) * factor[r]);
      CUTE_UNROLL
      for (int v = 0; v < Tile::kVectors; ++v) store_shared_16_bytes(share.vector_of(tile, r, v), vectors(0, v));
    }
  }

  // Makes a gradient of the rows that apply() left in `tile` one of those that it found: what points along a unit vector
  // is taken out. Returns the products of the rows and their gradients, summed over this quad's rows.
  template <class Sums>
  __device__ float differentiate(const typename Tile::Share& share, unsigned tile, Sums& grad, bool normalizes) const {
    cute::Tensor rows = cute::make_tensor<Element>(grad.layout());  // (MMA,MMA_M,MMA_N)
    cute::Tensor pairs = cute::recast<uint32_t>(rows);              // (MMA,MMA_M,MMA_N)
    float total = 0.0f;
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      float dot = 0.0f;
      CUTE_UNROLL
      for (int n = 0; n < cute::size<2>(pairs); ++n) {
        pairs(r, 0, n) = load_shared(share.pair_of(tile, r, n));
        CUTE_UNROLL
        for (int i = 2 * r; i < 2 * r + 2; ++i) dot = fmaf(float(rows(i, 0, n)), grad(i, 0, n), dot);
      }
      dot = combine_quad(dot, [](float a, float b) { return a + b; });
      total += dot;
      // Vectors of less than the smallest norm are no unit vectors.
      const float along = normalizes && fabsf(factor[r]) != kLargest ? dot : 0.0f;
      CUTE_UNROLL
      for (int n = 0; n < cute::size<2>(pairs); ++n) {
        CUTE_UNROLL
        for (int i = 2 * r; i < 2 * r + 2; ++i) {
          grad(i, 0, n) = fmaf(-along, float(rows(i, 0, n)), grad(i, 0, n)) * factor[r];
        }
      }
    }
    return total;
  }
};

}  // namespace vitkernels::cuda
