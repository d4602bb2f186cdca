// Accumulator fragments: viewed as rows and columns, and as operands of the next MMA.
#pragma once

#include <cutlass/numeric_conversion.h>

#include <cute/tensor.hpp>
#include <type_traits>

namespace vitkernels::cuda {

// (MMA,MMA_M,MMA_N), of which a thread has ((2 columns, 2 rows),..), as (rows,columns).
template <class Fragment>
__device__ auto by_rows(Fragment&& fragment) {
  const auto divided = cute::logical_divide(fragment.layout(), cute::Shape<cute::_2>{});  // ((2,2),MMA_M,MMA_N)
  return cute::make_tensor(
      fragment.data(),
      cute::make_layout(cute::make_layout(cute::get<0, 1>(divided), cute::get<1>(divided)),
                        cute::make_layout(cute::get<0, 0>(divided), cute::get<2>(divided))));  // ((2,MMA_M),(2,MMA_N))
}

// A C fragment read as the next MMA's A operand: its N becomes K. With 16-bit elements the N of two instructions make
// one K. With float the N of one do, permuted: a thread holds columns 2t and 2t + 1, which operand A takes for t and t
// + 4.
template <class Fragment>
__device__ auto as_operand_a(Fragment&& fragment) {
  if constexpr (sizeof(typename std::remove_cvref_t<Fragment>::value_type) == 4) {
    const auto layout = fragment.layout();  // ((columns,rows),MMA_M,MMA_N)
    return cute::make_tensor(fragment.data(),
                             cute::make_layout(cute::make_layout(cute::get<0, 1>(layout), cute::get<0, 0>(layout)),
                                               cute::get<1>(layout), cute::get<2>(layout)));  // ((2,2),MMA_M,MMA_K)
  } else {
    const auto divided = cute::logical_divide(
        fragment.layout(), cute::Shape<cute::Underscore, cute::Underscore, cute::_2>{});  // (4,MMA_M,(2,MMA_N/2))
    return cute::make_tensor(
        fragment.data(), cute::make_layout(cute::make_layout(cute::get<0>(divided), cute::get<2, 0>(divided)),
                                           cute::get<1>(divided), cute::get<2, 1>(divided)));  // ((4,2),MMA_M,MMA_K)
  }
}

template <class Element, class Fragment>
__device__ auto convert(const Fragment& fragment) {
  cute::Tensor result = cute::make_tensor<Element>(fragment.layout());
  const cutlass::NumericArrayConverter<Element, float, decltype(cute::size(fragment))::value> rounded;
  const auto& source =
      *reinterpret_cast<const cutlass::Array<float, decltype(cute::size(fragment))::value>*>(fragment.data());
  const auto converted = rounded(source);
  CUTE_UNROLL
  for (int i = 0; i < cute::size(fragment); ++i) result(i) = converted[i];
  return result;
}

}  // namespace vitkernels::cuda
