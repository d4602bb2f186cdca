// Feature maps of linear attention on a GPU: of a row that some lanes of a warp have in common.
#pragma once

#include <cute/tensor.hpp>
#include <limits>

#include "cuda/launch.h"
#include "linear_attention/linear_attention.h"

namespace vitkernels::cuda {

// kLanes neighbouring lanes have kVector columns each, of which the row has `columns`. NaN stays NaN.
template <int kVector, int kLanes>
struct Features {
  static constexpr bool kHasFocused = kVector == 4;  // of float: 16 bits are few for its gradient

  FeatureMap map;
  int power, columns, column;  // column: the first of this thread

  __device__ Features(const LinearProblem& p, int column)
      : map(p.feature_map), power(int(p.power)), columns(int(p.head_dim)), column(column) {}

  // x becomes phi(x), and zero in the columns behind.
  __device__ __forceinline__ void apply(float (&x)[kVector]) const {
    switch (map) {
      case FeatureMap::kIdentity: return;
      case FeatureMap::kRelu: return each(x, [](float x) { return x < 0.0f ? 0.0f : x; });
      case FeatureMap::kElu: return each(x, [](float x) { return x > 0.0f ? x + 1.0f : expf(x); });
      case FeatureMap::kExp: return each(x, [](float x) { return expf(x); });
      case FeatureMap::kFocused: break;
    }
    if constexpr (!kHasFocused) return;
    const FocusedRow row(*this, x);
    CUTE_UNROLL
    for (int i = 0; i < kVector; ++i) x[i] = exists(i) ? row.raised(row.u[i], power) * row.factor * row.largest : 0.0f;
  }

  // The gradient of phi(x) becomes that of x.
  __device__ __forceinline__ void differentiate(const float (&x)[kVector], const float (&phi)[kVector],
                                                float (&grad)[kVector]) const {
    switch (map) {
      case FeatureMap::kIdentity: return;
      case FeatureMap::kRelu: return each(grad, phi, [](float grad, float phi) { return phi > 0.0f ? grad : 0.0f; });
      case FeatureMap::kElu:
        return each(grad, phi, [](float grad, float phi) { return phi < 1.0f ? grad * phi : grad; });
      case FeatureMap::kExp: return each(grad, phi, [](float grad, float phi) { return grad * phi; });
      case FeatureMap::kFocused: break;
    }
    if constexpr (!kHasFocused) return;
    const FocusedRow row(*this, x);
    float dot = 0.0f;  // of u^p and its gradient
    CUTE_UNROLL
    for (int i = 0; i < kVector; ++i) dot = fmaf(grad[i], row.raised(row.u[i], power), dot);
    dot = sum_of_row(dot) * row.factor;
    const float by_power = dot / row.of_power, by_u = dot / row.of_u;
    CUTE_UNROLL
    for (int i = 0; i < kVector; ++i) {
      const float slope = row.raised(row.u[i], power - 1) * float(power);
      const float of_u = slope * (grad[i] * row.factor - row.raised(row.u[i], power) * by_power) + row.u[i] * by_u;
      grad[i] = x[i] > 0.0f ? of_u : 0.0f;
    }
  }

  static __device__ float sum_of_row(float x) {
    CUTE_UNROLL
    for (int distance = 1; distance < kLanes; distance *= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
    return x;
  }

 private:
  __device__ bool exists(int i) const { return column + i < columns; }

  template <class Map>
  __device__ void each(float (&x)[kVector], Map&& phi) const {
    CUTE_UNROLL
    for (int i = 0; i < kVector; ++i) x[i] = exists(i) ? phi(x[i]) : 0.0f;
  }
  template <class Map>
  __device__ void each(float (&grad)[kVector], const float (&phi)[kVector], Map&& map) const {
    CUTE_UNROLL
    for (int i = 0; i < kVector; ++i) grad[i] = map(grad[i], phi[i]);
  }

  // phi = u^p |u| / |u^p|, of numbers that are divided by the row's largest first: their powers overflow no more.
  struct FocusedRow {
    float u[kVector], largest, of_u = 0.0f, of_power = 0.0f, factor;

    __device__ FocusedRow(const Features& features, const float (&x)[kVector]) {
      constexpr float kEps = 1e-6f;
      largest = 0.0f;
      CUTE_UNROLL
      for (int i = 0; i < kVector; ++i) largest = fmaxf(largest, x[i]);
      CUTE_UNROLL
      for (int distance = 1; distance < kLanes; distance *= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
      }
      largest += kEps;
      CUTE_UNROLL
      for (int i = 0; i < kVector; ++i) {
        u[i] = features.exists(i) ? ((x[i] < 0.0f ? 0.0f : x[i]) + kEps) / largest : 0.0f;
        const float w = raised(u[i], features.power);
        of_u = fmaf(u[i], u[i], of_u), of_power = fmaf(w, w, of_power);
      }
      of_u = sum_of_row(of_u), of_power = sum_of_row(of_power);
      factor = sqrtf(of_u / of_power);
    }

    static __device__ float raised(float u, int exponent) {
      float result = 1.0f;
      for (int i = 0; i < exponent; ++i) result *= u;
      return result;
    }
  };
};

}  // namespace vitkernels::cuda
