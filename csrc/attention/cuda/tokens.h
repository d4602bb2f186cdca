// Tiles of token tensors, and the kernel instance that takes their elements and head dimension.
#pragma once

#include <algorithm>
#include <cute/tensor.hpp>

#include "attention/cuda/launches.h"
#include "cuda/copy.h"

namespace vitkernels::cuda {

// kRows tokens of one head from `first` on, kColumns of their columns from `column` on.
template <class Element, int kRows, int kColumns>
__device__ auto token_tile(const TokenTensor& t, int64_t batch, int64_t first, int64_t head, int64_t column) {
  const Element* data = t.at<const Element>(batch, first, head) + column;
  return cute::make_tensor(cute::make_gmem_ptr(data),
                           cute::make_layout(cute::Shape<cute::Int<kRows>, cute::Int<kColumns>>{},
                                             cute::make_stride(t.token_stride, cute::_1{})));  // (rows,columns)
}

// Starts the copy of a tile's `tokens` and its columns from `column` on; those that do not exist become zero.
template <class Copy, class Shared>
__device__ void start_tile(const Shared& sT, const TokenTensor& t, int64_t batch, int64_t head, Range tokens,
                           int64_t column, int columns) {
  using Element = typename Shared::value_type;
  constexpr int kRows = decltype(cute::size<0>(sT))::value, kColumns = decltype(cute::size<1>(sT))::value;
  copy_tile(Copy{}, token_tile<Element, kRows, kColumns>(t, batch, tokens.begin, head, column), sT,
            int(tokens.end - tokens.begin), columns, t.is_aligned);
}

// Calls f(token) for those of an entry's slot that its sequence does not cover; the threads of the block share them.
template <class Function>
__device__ void for_uncovered(Range slot, Range covered, Function&& f) {
  const auto share = [&](Range tokens) {
    for (int64_t token = tokens.begin + threadIdx.x; token < tokens.end; token += blockDim.x) f(token);
  };
  share(intersect(slot, {slot.begin, covered.begin}));
  share(intersect(slot, {covered.end, slot.end}));
}

template <DType kDType>
using ElementOf =
    std::conditional_t<kDType == DType::kFloat32, float,
                       std::conditional_t<kDType == DType::kBFloat16, cutlass::bfloat16_t, cutlass::half_t>>;

// Calls f(element).
template <class Function>
auto dispatch_element(DType dtype, Function&& f) {
  if (dtype == DType::kFloat32) return f(float{});
  return dtype == DType::kBFloat16 ? f(cutlass::bfloat16_t{}) : f(cutlass::half_t{});
}

// Calls f(padded head dimension).
template <class Function>
auto dispatch_dim(const Problem& p, Function&& f) {
  const int64_t dim = std::max(p.head_dim, std::min(p.value_dim, kMaxCudaHeadDim));
  if (dim <= 32) return f(cute::Int<32>{});
  if (dim <= 64) return f(cute::Int<64>{});
  if (dim <= 128) return f(cute::Int<128>{});
  return f(cute::Int<256>{});
}

}  // namespace vitkernels::cuda
