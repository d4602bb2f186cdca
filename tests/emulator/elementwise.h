// From a formula on numbers to an instruction on registers. A result depends on all bytes of all operands: if one of
// them is unknown, so is all of the result (of the half concerned, for packed types).
#pragma once

#include <utility>

#include "numbers.h"
#include "warp.h"

namespace emulator {

template <auto formula, class T, int arity = 1>
constexpr int arity_of() {
  using V = typename Computed<T>::type;
  if constexpr (arity == 1 && std::is_invocable_v<decltype(formula), V>) return 1;
  else if constexpr (arity == 1 && std::is_invocable_v<decltype(formula), V, V>) return 2;
  else if constexpr (arity == 1 && std::is_invocable_v<decltype(formula), V, V, V>) return 3;
  else return 4;
}

// d = formula(operands of type Sources...)
template <auto formula, class D, class... Sources, size_t... i>
void run_lanes(Warp& warp, const Instruction& in, Mask mask, std::index_sequence<i...>) {
  const Row d = warp.row(in.operands[0]);
  const Row s[] = {warp.row(in.operands[i + 1])...};
  for_lanes(mask, [&](int lane) {
    const bool unknown = ((s[i].unknown[lane] & kUnknown<Sources>) | ...);
    d.value[lane] = result_bits<D>(formula(operand_number<Sources>(s[i].value[lane], in)...), in);
    d.unknown[lane] = unknown ? kUnknown<D> : 0;
  });
}

template <auto formula, class T, size_t... i>
void run_pairs(Warp& warp, const Instruction& in, Mask mask, std::index_sequence<i...>) {
  const Row d = warp.row(in.operands[0]);
  const Row s[] = {warp.row(in.operands[i + 1])...};
  for_lanes(mask, [&](int lane) {
    uint64_t value = 0;
    uint8_t unknown = 0;
    for (int half = 0; half < 2; ++half) {
      const uint8_t bytes = static_cast<uint8_t>(3 << 2 * half);
      if (((s[i].unknown[lane] & bytes) | ...)) unknown |= bytes;
      value |= result_bits<T>(formula(operand_number<T>(s[i].value[lane] >> 16 * half & 0xffff, in)...), in) << 16 * half;
    }
    d.value[lane] = value;
    d.unknown[lane] = unknown;
  });
}

template <auto formula, class T>
struct Elementwise {
  static constexpr auto indices = std::make_index_sequence<arity_of<formula, typename Element<T>::type>()>();

  template <size_t... i>
  static void same_types(Warp& warp, const Instruction& in, Mask mask, std::index_sequence<i...> sequence) {
    run_lanes<formula, T, std::enable_if_t<(i >= 0), T>...>(warp, in, mask, sequence);
  }
  static void run(Warp& warp, const Instruction& in, Mask mask) {
    if constexpr (Element<T>::count == 2) {
      run_pairs<formula, typename Element<T>::type>(warp, in, mask, indices);
    } else {
      same_types(warp, in, mask, indices);
    }
  }
};

// The handler for the instruction's first type, if it is one of the list.
template <template <class> class Handlers, class... T>
Handler choose(Type type, TypeList<T...>) {
  Handler handler = nullptr;
  ((matches<T>(type) && (handler = Handlers<T>::run)), ...);
  return handler;
}

template <auto formula, class... T>
Handler choose_elementwise(Type type, TypeList<T...>) {
  Handler handler = nullptr;
  ((matches<T>(type) && (handler = Elementwise<formula, T>::run)), ...);
  return handler;
}

// For a row: formula(a, b, ...) on any of the types, all operands and the result of the same type.
template <auto formula, class Types>
Handler elementwise(const Instruction& in) {
  return choose_elementwise<formula>(in.type(), Types());
}

// For a row: operands and result of the given types, whatever the instruction says.
template <auto formula, class D, class... Sources>
void typed_lanes(Warp& warp, const Instruction& in, Mask mask) {
  run_lanes<formula, D, Sources...>(warp, in, mask, std::index_sequence_for<Sources...>());
}
template <Type type, auto formula, class D, class... Sources>
Handler typed(const Instruction& in) {
  return in.type() == type ? typed_lanes<formula, D, Sources...> : nullptr;
}

}  // namespace emulator
