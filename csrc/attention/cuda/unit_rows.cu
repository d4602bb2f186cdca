// Divides queries and keys on a map by their norms, and the gradient of that, where the kernel that reads them does not:
// a warp takes a row, its lanes the columns.

#include "attention/unit_rows.h"

#include "attention/cuda/spatial_launches.h"
#include "attention/cuda/tokens.h"

namespace vitkernels {
namespace {

using namespace cuda;

constexpr int kWarps = 4;  // of a block

template <class Element>
__global__ void __launch_bounds__(kWarps* kWarpSize) unit_rows(const __grid_constant__ UnitRowsParams p) {
  for (int64_t i = warp_of_grid(); i < p.num_rows(); i += warps_in_grid()) {
    const Element* const row = p.row<Element>(i);
    Element* const grad = static_cast<Element*>(p.grad) + i * p.dim;
    float squares = 0.0f, dot = 0.0f;
    for (int64_t c = lane_index(); c < p.dim; c += kWarpSize) {
      const float x = float(row[c]);
      squares = fmaf(x, x, squares);
      if (p.grad) dot = fmaf(x, float(grad[c]), dot);
    }
    const float norm = sqrtf(warp_sum(squares)), factor = unit_factor(norm);
    const float along = norm < float(kSmallestNorm) ? 0.0f : warp_sum(dot) * factor * factor;
    for (int64_t c = lane_index(); c < p.dim; c += kWarpSize) {
      const float x = float(row[c]);
      if (p.units) static_cast<Element*>(p.units)[i * p.dim + c] = Element(x * factor);
      if (p.grad) grad[c] = Element(fmaf(-x, along, float(grad[c])) * factor);
    }
  }
}

}  // namespace

cudaError_t launch_unit_rows(const UnitRowsParams& p, cudaStream_t stream) {
  return dispatch_element(p.dtype, [&]<class Element>(Element) {
    return launch_tasks(unit_rows<Element>, blocks_for(p.num_rows(), kWarps), kWarps * kWarpSize, 0, stream, p);
  });
}

}  // namespace vitkernels
