// Integer arithmetic.
#include <algorithm>

#include "elementwise.h"

namespace emulator {
namespace {

using i128 = __int128;

template <class T>
using Wide = std::conditional_t<sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>,
                                std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;

constexpr auto high = [](auto a, auto b) {
  return static_cast<decltype(a)>((static_cast<i128>(a) * static_cast<i128>(b)) >> (8 * sizeof(a)));
};
constexpr auto unsigned_high = [](uint64_t a, uint64_t b) {
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
};
constexpr auto any_high = [](auto a, auto b) {
  if constexpr (std::is_same_v<decltype(a), uint64_t>)
    return unsigned_high(a, b);
  else
    return high(a, b);
};

// Division by zero gives all ones on a GPU, and a remainder of the dividend; the smallest number by -1 itself.
constexpr auto quotient = [](auto a, auto b) {
  using T = decltype(a);
  if (b == 0) return static_cast<T>(-1);
  return std::is_signed_v<T> && b == static_cast<T>(-1) ? static_cast<T>(0 - a) : static_cast<T>(a / b);
};
constexpr auto remainder = [](auto a, auto b) {
  using T = decltype(a);
  if (b == 0) return a;
  return std::is_signed_v<T> && b == static_cast<T>(-1) ? T{0} : static_cast<T>(a % b);
};

template <class T>
T clamp(i128 value) {
  return static_cast<T>(std::clamp<i128>(value, std::numeric_limits<T>::min(), std::numeric_limits<T>::max()));
}

// mul.wide and mad.wide
template <class T>
Handler wide_product_of(size_t operands) {
  using W = Wide<T>;
  if (operands == 2) return run_lanes<[](T a, T b) { return static_cast<W>(a) * static_cast<W>(b); }, W, T, T>;
  return run_lanes<[](T a, T b, W c) { return static_cast<W>(a) * static_cast<W>(b) + c; }, W, T, T, W>;
}
template <size_t operands>
Handler wide_product(const Instruction& in) {
  using Types = TypeList<int16_t, uint16_t, int32_t, uint32_t>;
  return choose(in.type(), Types(), []<class T> { return wide_product_of<T>(operands); });
}

// bfind looks for the first bit that differs from the sign.
template <class T>
auto magnitude(T a) {
  return static_cast<std::make_unsigned_t<T>>(a < 0 ? ~a : a);
}
template <class T>
constexpr unsigned kLastBit = 8 * sizeof(T) - 1;
using Longs = TypeList<int32_t, int64_t, uint32_t, uint64_t>;

template <class T>
int sum_of_products(uint32_t a, uint32_t b) {
  int sum = 0;
  for (int i = 0; i < 32; i += 8) sum += static_cast<T>(a >> i) * static_cast<T>(b >> i);
  return sum;
}
template <class T>
constexpr auto dot_product =
    [](uint32_t a, uint32_t b, uint32_t c) { return c + static_cast<uint32_t>(sum_of_products<T>(a, b)); };
Handler dp4a(const Instruction& in) {
  const bool is_signed = in.type() == Type::s32;
  return is_signed ? same_types<dot_product<int8_t>, uint32_t>() : same_types<dot_product<uint8_t>, uint32_t>();
}

// .cc leaves the bit above the result in the lane's carry flag, addc, subc and madc take it from there.
template <auto formula, int operands, class T, bool takes, bool leaves>
void run_carrying(Warp& warp, const Instruction& in, Mask mask) {
  const Row d = warp.row(in.operands[0]), a = warp.row(in.operands[1]), b = warp.row(in.operands[2]);
  const Row c = warp.row(in.operands[operands]);
  for_lanes(mask, [&](int lane) {
    const Mask bit = Mask{1} << lane;
    const uint64_t carry = takes && warp.carry & bit;
    const auto sum = formula(number<T>(a.value[lane]), number<T>(b.value[lane]), number<T>(c.value[lane]), carry);
    bool unknown = (a.unknown[lane] | b.unknown[lane] | c.unknown[lane]) & kUnknown<T>;
    if (takes) unknown |= (warp.carry_unknown & bit) != 0;
    if (leaves) {
      warp.carry = sum >> 8 * sizeof(T) & 1 ? warp.carry | bit : warp.carry & ~bit;
      warp.carry_unknown = unknown ? warp.carry_unknown | bit : warp.carry_unknown & ~bit;
    }
    d.set(lane, static_cast<T>(sum), unknown ? kUnknown<T> : 0);
  });
}
template <auto formula, int operands>
Handler carrying(const Instruction& in) {
  const bool takes = in.words[0].back() == 'c', leaves = in.has("cc");
  return choose(in.type(), TypeList<uint32_t, uint64_t, int32_t, int64_t>(), [=]<class S> {
    using T = std::make_unsigned_t<S>;
    if (!takes) return run_carrying<formula, operands, T, false, true>;
    return leaves ? run_carrying<formula, operands, T, true, true> : run_carrying<formula, operands, T, true, false>;
  });
}
using u128 = unsigned __int128;
constexpr auto carrying_sum = [](auto a, auto b, auto, uint64_t carry) { return u128{a} + b + carry; };
constexpr auto carrying_difference = [](auto a, auto b, auto, uint64_t carry) { return u128{a} - b - carry; };
constexpr auto carrying_low = [](auto a, auto b, auto c, uint64_t carry) {
  return u128{static_cast<decltype(a)>(a * b)} + c + carry;
};
constexpr auto carrying_high = [](auto a, auto b, auto c, uint64_t carry) {
  return (u128{a} * b >> 8 * sizeof(a)) + c + carry;
};

const InstructionRow kRows[] = {
    {"add", "", elementwise<[](auto a, auto b) { return a + b; }, Integers>},
    {"sub", "", elementwise<[](auto a, auto b) { return a - b; }, Integers>},
    {"add.sat", "", elementwise<[](auto a, auto b) { return clamp<decltype(a)>(i128{a} + b); }, TypeList<int32_t>>},
    {"sub.sat", "", elementwise<[](auto a, auto b) { return clamp<decltype(a)>(i128{a} - b); }, TypeList<int32_t>>},
    {"add.cc", "", carrying<carrying_sum, 2>},
    {"addc", "cc", carrying<carrying_sum, 2>},
    {"sub.cc", "", carrying<carrying_difference, 2>},
    {"subc", "cc", carrying<carrying_difference, 2>},
    {"mad.lo.cc", "", carrying<carrying_low, 3>},
    {"mad.hi.cc", "", carrying<carrying_high, 3>},
    {"madc.lo", "cc", carrying<carrying_low, 3>},
    {"madc.hi", "cc", carrying<carrying_high, 3>},
    {"mul.lo", "",
     elementwise<[](auto a, auto b) { return static_cast<uint64_t>(a) * static_cast<uint64_t>(b); }, Integers>},
    {"mul.hi", "", elementwise<any_high, Integers>},
    {"mul.wide", "", wide_product<2>},
    {"mul24.lo", "",
     elementwise<[](auto a, auto b) { return (a << 8 >> 8) * (b << 8 >> 8); }, TypeList<int32_t, uint32_t>>},
    {"mad.lo", "",
     elementwise<[](auto a, auto b, auto c) { return static_cast<uint64_t>(a) * static_cast<uint64_t>(b) + c; },
                 Integers>},
    {"mad.hi", "", elementwise<[](auto a, auto b, auto c) { return any_high(a, b) + c; }, Integers>},
    {"mad.wide", "", wide_product<3>},
    {"sad", "", elementwise<[](auto a, auto b, auto c) { return (a > b ? a - b : b - a) + c; }, Integers>},
    {"div", "", elementwise<quotient, Integers>},
    {"rem", "", elementwise<remainder, Integers>},
    {"abs", "", elementwise<[](auto a) { return a < 0 ? -a : a; }, Signed>},
    {"neg", "", elementwise<[](auto a) { return -a; }, Signed>},
    {"min", "", elementwise<[](auto a, auto b) { return std::min(a, b); }, Integers>},
    {"max", "", elementwise<[](auto a, auto b) { return std::max(a, b); }, Integers>},
    {"popc", "", elementwise<[](auto a) { return std::popcount(a); }, Words>},
    {"clz", "", elementwise<[](auto a) { return std::countl_zero(a); }, Words>},
    {"bfind", "",
     elementwise<[](auto a) { return magnitude(a) ? kLastBit<decltype(a)> - std::countl_zero(magnitude(a)) : ~0u; },
                 Longs>},
    {"bfind.shiftamt", "",
     elementwise<[](auto a) { return magnitude(a) ? std::countl_zero(magnitude(a)) : ~0u; }, Longs>},
    {"dp4a", "", dp4a},
};

}  // namespace

const std::span<const InstructionRow> kIntegerRows = kRows;

}  // namespace emulator
