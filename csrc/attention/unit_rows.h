// Params of the kernels that divide queries and keys on a map by their norms (cosine attention). Plain data, no torch.
#pragma once

#include "attention/spatial.h"

namespace vitkernels {

struct UnitRowsParams {
  DType dtype = DType::kFloat32;
  int64_t batch = 0, size[kMaxAxes] = {1, 1, 1}, heads = 0, dim = 0;
  MapTensor rows;         // [batch, *map, heads, dim]
  void* units = nullptr;  // as rows, contiguous: those of norm 1, or null
  void* grad = nullptr;   // as rows, contiguous: of the units, becomes that of the rows; or null

  DType element_type() const { return dtype; }
  VK_HOST_DEVICE int64_t num_rows() const { return batch * size[0] * size[1] * size[2] * heads; }

  template <class S>
  VK_HOST_DEVICE const S* row(int64_t index) const {
    const int64_t token = index / heads;
    const int64_t line = token / size[2], plane = line / size[1], image = plane / size[0];
    const Coord coord{{plane - image * size[0], line - plane * size[1], token - line * size[2]}};
    return rows.at<S>(image, coord, index - token * heads);
  }
};

// What a vector is multiplied with. As torch.nn.functional.normalize, but the vector of zeros stays as it is, with a
// gradient of finite numbers. Vectors of less than the smallest norm become none of norm 1.
inline constexpr double kSmallestNorm = 1e-12;
template <class T>
VK_HOST_DEVICE T unit_factor(T norm) {
  return norm == T(0) ? T(1) : T(1) / (norm < T(kSmallestNorm) ? T(kSmallestNorm) : norm);
}

}  // namespace vitkernels
