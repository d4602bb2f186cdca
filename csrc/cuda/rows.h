// Where the rows of a tile lie in global memory. Copies are templates over this: row i begins at rows[i].
#pragma once

#include <cstdint>

namespace vitkernels::cuda {

// Rows `stride` elements apart.
template <class T>
struct StridedRows {
  using Element = T;

  const Element* data;
  int64_t stride;
  bool is_aligned;  // rows begin at multiples of 16 bytes and are whole numbers of them

  __device__ const Element* operator[](int row) const { return data + row * stride; }
  __device__ StridedRows from(int row) const { return {data + row * stride, stride, is_aligned}; }
};

}  // namespace vitkernels::cuda
