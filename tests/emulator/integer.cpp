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
  if constexpr (std::is_same_v<decltype(a), uint64_t>) return unsigned_high(a, b);
  else return high(a, b);
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

template <class T>
struct WideProduct {
  static void run(Warp& warp, const Instruction& in, Mask mask) {
    using W = Wide<T>;
    if (in.operands.size() == 3) {
      typed_lanes<[](T a, T b) { return static_cast<W>(static_cast<W>(a) * static_cast<W>(b)); }, W, T, T>(warp, in, mask);
    } else {
      typed_lanes<[](T a, T b, W c) { return static_cast<W>(static_cast<W>(a) * static_cast<W>(b) + c); }, W, T, T, W>(warp, in, mask);
    }
  }
};
Handler wide_product(const Instruction& in) {
  return choose<WideProduct>(in.type(), TypeList<int16_t, uint16_t, int32_t, uint32_t>());
}

template <class T>
int sum_of_products(uint32_t a, uint32_t b) {
  int sum = 0;
  for (int i = 0; i < 32; i += 8) sum += static_cast<T>(a >> i) * static_cast<T>(b >> i);
  return sum;
}
template <class T>
Handler dp4a(const Instruction&) {
  return typed_lanes<[](uint32_t a, uint32_t b, uint32_t c) { return c + static_cast<uint32_t>(sum_of_products<T>(a, b)); },
                     uint32_t, uint32_t, uint32_t, uint32_t>;
}

const InstructionRow kRows[] = {
    {"add", "", elementwise<[](auto a, auto b) { return a + b; }, Integers>},
    {"sub", "", elementwise<[](auto a, auto b) { return a - b; }, Integers>},
    {"add.sat", "", elementwise<[](auto a, auto b) { return clamp<decltype(a)>(i128{a} + b); }, TypeList<int32_t>>},
    {"sub.sat", "", elementwise<[](auto a, auto b) { return clamp<decltype(a)>(i128{a} - b); }, TypeList<int32_t>>},
    {"mul.lo", "", elementwise<[](auto a, auto b) { return static_cast<uint64_t>(a) * static_cast<uint64_t>(b); }, Integers>},
    {"mul.hi", "", elementwise<any_high, Integers>},
    {"mul.wide", "", wide_product},
    {"mul24.lo", "", elementwise<[](auto a, auto b) { return (a << 8 >> 8) * (b << 8 >> 8); }, TypeList<int32_t, uint32_t>>},
    {"mad.lo", "", elementwise<[](auto a, auto b, auto c) { return static_cast<uint64_t>(a) * static_cast<uint64_t>(b) + c; }, Integers>},
    {"mad.hi", "", elementwise<[](auto a, auto b, auto c) { return any_high(a, b) + c; }, Integers>},
    {"mad.wide", "", wide_product},
    {"sad", "", elementwise<[](auto a, auto b, auto c) { return (a > b ? a - b : b - a) + c; }, Integers>},
    {"div", "", elementwise<quotient, Integers>},
    {"rem", "", elementwise<remainder, Integers>},
    {"abs", "", elementwise<[](auto a) { return a < 0 ? -a : a; }, Signed>},
    {"neg", "", elementwise<[](auto a) { return -a; }, Signed>},
    {"min", "", elementwise<[](auto a, auto b) { return std::min(a, b); }, Integers>},
    {"max", "", elementwise<[](auto a, auto b) { return std::max(a, b); }, Integers>},
    {"popc", "", elementwise<[](auto a) { return std::popcount(a); }, Words>},
    {"clz", "", elementwise<[](auto a) { return std::countl_zero(a); }, Words>},
    {"bfind", "", elementwise<[](auto a) { return std::countl_zero(a) == 8 * sizeof(a) ? ~0u : 8 * sizeof(a) - 1 - std::countl_zero(a); }, Words>},
    {"bfind.shiftamt", "", elementwise<[](auto a) { return a ? static_cast<uint32_t>(std::countl_zero(a)) : ~0u; }, Words>},
    {"dp4a", "", [](const Instruction& in) { return in.type() == Type::s32 ? dp4a<int8_t>(in) : dp4a<uint8_t>(in); }},
};

}  // namespace

const std::span<const InstructionRow> kIntegerRows = kRows;

}  // namespace emulator
