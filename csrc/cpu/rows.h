// Rows of a tensor as the packing reads them: row i is rows[i].
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace vitkernels::VK_ISA {

// Rows `stride` elements apart.
template <class S>
struct EvenRows {
  using Element = S;

  const S* data;
  int64_t stride;

  VK_INLINE const S* operator[](int64_t row) const { return data + row * stride; }
  EvenRows from(int64_t row) const { return {data + row * stride, stride}; }
};

// Into the second level: L1 is for the rows at hand. Always inlined: GCC drops calls of a function that only prefetches.
template <bool kWrite = false, class S>
VK_INLINE void prefetch_row(const S* row, int64_t columns) {
  constexpr int64_t kCacheLine = 64 / sizeof(S);
  constexpr int kSecondLevel = 2;
  for (int64_t c = 0; c < columns; c += kCacheLine) __builtin_prefetch(row + c, kWrite, kSecondLevel);
}

// Rows anywhere: as far from those of a list as another tensor with the same strides is.
template <class S>
struct ScatteredRows {
  using Element = S;

  const intptr_t* address;
  intptr_t distance;

  VK_INLINE const S* operator[](int64_t i) const { return reinterpret_cast<const S*>(address[i] + distance); }
  ScatteredRows from(int64_t first) const { return {address + first, distance}; }
};

}  // namespace vitkernels::VK_ISA
