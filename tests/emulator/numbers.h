// Values as PTX types see them: how a register's bits become a number and back, with rounding to narrow formats.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "program.h"

namespace emulator {

// A float format that the host has no type for. Arithmetic on it is done in double and rounded once: exact, because
// double has more than twice its digits (fused multiply-adds take care of themselves, see `fused`).
template <int exponent, int mantissa, int shift>
struct Narrow {
  static constexpr int exponent_bits = exponent, mantissa_bits = mantissa, register_shift = shift;
};
using Half = Narrow<5, 10, 0>;
using Bfloat = Narrow<8, 7, 0>;
using Tfloat = Narrow<8, 10, 13>;  // tf32: the upper 19 bits of a float
template <class T>
struct Pair {};  // two of them in 32 bits, f16x2 and bf16x2
struct Predicate {};

template <class T>
constexpr bool is_narrow = false;
template <int e, int m, int s>
constexpr bool is_narrow<Narrow<e, m, s>> = true;

template <class T> struct Element { using type = T; static constexpr int count = 1; };
template <class T> struct Element<Pair<T>> { using type = T; static constexpr int count = 2; };

// What arithmetic is done in.
template <class T> struct Computed { using type = T; };
template <int e, int m, int s> struct Computed<Narrow<e, m, s>> { using type = double; };
template <> struct Computed<Predicate> { using type = bool; };

template <class T> constexpr int kBytes = sizeof(T);
template <int e, int m, int s> constexpr int kBytes<Narrow<e, m, s>> = s ? 4 : 2;
template <class T> constexpr int kBytes<Pair<T>> = 4;
template <> constexpr int kBytes<Predicate> = 1;

template <class T> constexpr uint8_t kUnknown = static_cast<uint8_t>((1 << kBytes<T>) - 1);  // all bytes

template <class T>
constexpr bool matches(Type type) {
  switch (type) {
    case Type::pred: return std::is_same_v<T, Predicate>;
    case Type::b8: case Type::u8: return std::is_same_v<T, uint8_t>;
    case Type::b16: case Type::u16: return std::is_same_v<T, uint16_t>;
    case Type::b32: case Type::u32: return std::is_same_v<T, uint32_t>;
    case Type::b64: case Type::u64: return std::is_same_v<T, uint64_t>;
    case Type::s8: return std::is_same_v<T, int8_t>;
    case Type::s16: return std::is_same_v<T, int16_t>;
    case Type::s32: return std::is_same_v<T, int32_t>;
    case Type::s64: return std::is_same_v<T, int64_t>;
    case Type::f16: return std::is_same_v<T, Half>;
    case Type::bf16: return std::is_same_v<T, Bfloat>;
    case Type::tf32: return std::is_same_v<T, Tfloat>;
    case Type::f16x2: return std::is_same_v<T, Pair<Half>>;
    case Type::bf16x2: return std::is_same_v<T, Pair<Bfloat>>;
    case Type::f32: return std::is_same_v<T, float>;
    case Type::f64: return std::is_same_v<T, double>;
    case Type::none: return false;
  }
  return false;
}

template <class... T> struct TypeList {};
using Signed = TypeList<int16_t, int32_t, int64_t>;
using Unsigned = TypeList<uint16_t, uint32_t, uint64_t>;
using Integers = TypeList<int16_t, int32_t, int64_t, uint16_t, uint32_t, uint64_t>;
using Words = TypeList<uint32_t, uint64_t>;
using Bits = TypeList<Predicate, uint16_t, uint32_t, uint64_t>;
using Floats = TypeList<float, double>;
using Halves = TypeList<Half, Bfloat, Pair<Half>, Pair<Bfloat>>;
using AllFloats = TypeList<float, double, Half, Bfloat, Pair<Half>, Pair<Bfloat>>;

template <class T>
constexpr double smallest_normal() {
  if constexpr (is_narrow<T>) {
    return T::exponent_bits == 8 ? 0x1p-126 : 0x1p-14;
  } else {
    return std::numeric_limits<T>::min();
  }
}

template <class T>
double narrow_to_double(uint32_t bits) {
  bits >>= T::register_shift;
  constexpr int bias = (1 << (T::exponent_bits - 1)) - 1, top = (1 << T::exponent_bits) - 1;
  const int exponent = static_cast<int>(bits >> T::mantissa_bits) & top;
  const int mantissa = static_cast<int>(bits) & ((1 << T::mantissa_bits) - 1);
  const bool negative = bits >> (T::exponent_bits + T::mantissa_bits) & 1;
  double value;
  if (exponent == top) {
    value = mantissa ? NAN : INFINITY;
  } else if (exponent == 0) {
    value = std::ldexp(mantissa, 1 - bias - T::mantissa_bits);
  } else {
    const uint64_t wide = static_cast<uint64_t>(exponent - bias + 1023) << 52 | static_cast<uint64_t>(mantissa) << (52 - T::mantissa_bits);
    value = std::bit_cast<double>(wide);
  }
  return negative ? -value : value;
}

template <class T>
uint32_t double_to_narrow(double value, Rounding rounding) {
  constexpr int bias = (1 << (T::exponent_bits - 1)) - 1;
  constexpr uint32_t infinity = ((1u << T::exponent_bits) - 1) << T::mantissa_bits;
  constexpr uint32_t nan = (1u << (T::exponent_bits + T::mantissa_bits)) - 1;
  if (std::isnan(value)) return T::register_shift ? 0x7fffffff : nan;
  const bool negative = std::signbit(value);
  uint32_t bits = infinity;
  if (!std::isinf(value)) {
    const double magnitude = std::fabs(value);
    // The spacing of the format around the value is 2^spacing.
    const int exponent = static_cast<int>(std::bit_cast<uint64_t>(magnitude) >> 52) - 1023;
    const int spacing = std::max(exponent, 1 - bias) - T::mantissa_bits;
    const double scaled = std::ldexp(magnitude, -spacing), whole = std::floor(scaled), rest = scaled - whole;
    uint64_t n = static_cast<uint64_t>(whole);
    switch (rounding) {
      case Rounding::nearest: n += rest > 0.5 || (rest == 0.5 && (n & 1)); break;
      case Rounding::nearest_away: n += rest >= 0.5; break;
      case Rounding::zero: break;
      case Rounding::down: n += rest > 0 && negative; break;
      case Rounding::up: n += rest > 0 && !negative; break;
    }
    // n carries into the exponent by itself: mantissa overflow is the next exponent with mantissa 0.
    const uint64_t encoded = n + (static_cast<uint64_t>(spacing + T::mantissa_bits + bias - 1) << T::mantissa_bits);
    bits = static_cast<uint32_t>(std::min<uint64_t>(encoded, infinity));
    const bool to_infinity = rounding == Rounding::nearest || rounding == Rounding::nearest_away ||
                             (rounding == Rounding::up && !negative) || (rounding == Rounding::down && negative);
    if (bits == infinity && !to_infinity) bits = infinity - 1;
  }
  return (bits | static_cast<uint32_t>(negative) << (T::exponent_bits + T::mantissa_bits)) << T::register_shift;
}

// The number in the low bits of a register.
template <class T>
auto number(uint64_t bits) {
  if constexpr (is_narrow<T>) {
    return narrow_to_double<T>(static_cast<uint32_t>(bits));
  } else if constexpr (std::is_same_v<T, Predicate>) {
    return static_cast<bool>(bits & 1);
  } else if constexpr (std::is_same_v<T, float>) {
    return std::bit_cast<float>(static_cast<uint32_t>(bits));
  } else if constexpr (std::is_same_v<T, double>) {
    return std::bit_cast<double>(bits);
  } else {
    return static_cast<T>(bits);
  }
}

// Its bits, zero-extended. Results that are no number are the one NaN that GPUs give.
template <class T, class Value>
uint64_t bits_of(Value value, Rounding rounding = Rounding::nearest) {
  if constexpr (is_narrow<T>) {
    return double_to_narrow<T>(value, rounding);
  } else if constexpr (std::is_same_v<T, Predicate>) {
    return value ? 1 : 0;
  } else if constexpr (std::is_same_v<T, float>) {
    return std::isnan(value) ? 0x7fffffffu : std::bit_cast<uint32_t>(static_cast<float>(value));
  } else if constexpr (std::is_same_v<T, double>) {
    return std::bit_cast<uint64_t>(static_cast<double>(value));
  } else {
    return static_cast<std::make_unsigned_t<T>>(value);
  }
}

// The operand of an instruction, subnormals flushed under .ftz.
template <class T>
auto operand_number(uint64_t bits, const Instruction& in) {
  auto value = number<T>(bits);
  if constexpr (std::is_floating_point_v<decltype(value)>) {
    if (in.ftz && std::fabs(value) < smallest_normal<T>()) value = std::copysign(decltype(value){0}, value);
  }
  return value;
}

// The result of an instruction under its modifiers .relu, .sat, .ftz and its rounding.
template <class T, class Value>
uint64_t result_bits(Value value, const Instruction& in) {
  if constexpr (std::is_floating_point_v<Value>) {
    if (in.relu && value < 0) value = 0;
    if (in.saturate) value = value > 0 ? std::min(value, Value{1}) : Value{0};  // NaN becomes 0
    if (in.ftz && std::fabs(value) < smallest_normal<T>()) value = std::copysign(Value{0}, value);
  }
  return bits_of<T>(value, in.rounding);
}

}  // namespace emulator
