// Rows of token tensors, and the kernel instance for their dtype and head dimension.
#pragma once

#include <algorithm>
#include <cute/tensor.hpp>

#include "attention/cuda/launches.h"
#include "cuda/copy.h"

namespace vitkernels::cuda {

// The rows of one head's tokens from `first` on, and their columns from `column` on.
template <class Element>
__device__ StridedRows<Element> rows_of(const TokenTensor& t, int64_t batch, int64_t first, int64_t head,
                                        int64_t column) {
  return {t.at<const Element>(batch, first, head) + column, t.token_stride, t.is_aligned};
}

// Starts the copy of `tokens` and their columns from `column` on to a tile, which is zero past them.
template <class Copy, class Shared>
__device__ void start_tile(const Shared& sT, const TokenTensor& t, int64_t batch, int64_t head, Range tokens,
                           int64_t column, int columns) {
  using Element = typename Shared::value_type;
  copy_tile(Copy{}, rows_of<Element>(t, batch, tokens.begin, head, column), sT, int(tokens.end - tokens.begin),
            columns);
}

// The tiles of one head's tokens, of which the last begins with `token` (cuda/tile_stream.h).
template <class Stream>
__device__ Stream stream_of(const TokenTensor& t, int64_t batch, int64_t token, int64_t head, int64_t columns) {
  return Stream(t.at<const typename Stream::Element>(batch, token, head), t.token_stride, int(columns));
}

// Calls f(token) for those of a sequence's slot that it does not cover; the threads of the block share them.
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

// Calls f(padded head dimension), at most 128.
template <class Function>
auto dispatch_plain_dim(const Problem& p, Function&& f) {
  const int64_t dim = std::max(p.head_dim, p.value_dim);
  if (dim <= 32) return f(cute::Int<32>{});
  if (dim <= 64) return f(cute::Int<64>{});
  return f(cute::Int<128>{});
}

// Calls f(padded head dimension). Wider values pass in blocks of columns.
template <class Function>
auto dispatch_dim(const Problem& p, Function&& f) {
  const bool is_wide = std::max(p.head_dim, p.value_dim) > 128;
  return is_wide ? f(cute::Int<256>{}) : dispatch_plain_dim(p, f);
}

}  // namespace vitkernels::cuda
