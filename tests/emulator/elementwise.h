// From a formula on numbers to an instruction on registers. A result depends on all bytes of all operands: if one of
// them is unknown, so is all of the result (of the half concerned, for packed types).
#pragma once

#include <utility>

#include "numbers.h"
#include "warp.h"

namespace emulator {

// d = formula(operands of types Sources...)
template <auto formula, class D, class... Sources>
void run_lanes(Warp& warp, const Instruction& in, Mask mask) {
  [&]<size_t... i>(std::index_sequence<i...>) {
    using E = typename Element<D>::type;
    const Row d = warp.row(in.operands[0]), s[] = {warp.row(in.operands[i + 1])...};
    for_lanes(mask, [&](int lane) {
      uint64_t value = 0;
      unsigned unknown = 0;
      for (int half = 0; half < Element<D>::count; ++half) {
        const auto result =
            formula(operand_number<typename Element<Sources>::type>(s[i].value[lane] >> 16 * half, in)...);
        const bool any_unknown = ((s[i].unknown[lane] >> 2 * half & kUnknown<typename Element<Sources>::type>) | ...);
        value |= result_bits<E>(result, in) << 16 * half;
        if (any_unknown) unknown |= kUnknown<E> << 2 * half;
      }
      d.set(lane, value, unknown);
    });
  }(std::index_sequence_for<Sources...>());
}

// The same with all operands and the result of type T, as many as the formula takes.
template <auto formula, class T>
constexpr Handler same_types() {
  using V = typename Computed<typename Element<T>::type>::type;
  if constexpr (std::is_invocable_v<decltype(formula), V>)
    return run_lanes<formula, T, T>;
  else if constexpr (std::is_invocable_v<decltype(formula), V, V>)
    return run_lanes<formula, T, T, T>;
  else
    return run_lanes<formula, T, T, T, T>;
}

// make<T>() for the T of the list that is the instruction's type, or nullptr.
template <class... T, class Make>
Handler choose(Type type, TypeList<T...>, Make make) {
  Handler handler = nullptr;
  ((matches<T>(type) && (handler = make.template operator()<T>())), ...);
  return handler;
}

// For a row: formula(a, b, ...) on any of the types.
template <auto formula, class Types>
Handler elementwise(const Instruction& in) {
  return choose(in.type(), Types(), []<class T> { return same_types<formula, T>(); });
}

}  // namespace emulator
