// Floating-point arithmetic. Roundings other than to nearest are set in the host's control word around the instruction;
// .approx and .full functions are the correctly rounded ones of the host, which lie within the bounds PTX gives.
#include <cfenv>

#include "elementwise.h"

namespace emulator {
namespace {

int host_rounding(Rounding rounding) {
  switch (rounding) {
    case Rounding::zero: return FE_TOWARDZERO;
    case Rounding::down: return FE_DOWNWARD;
    case Rounding::up: return FE_UPWARD;
    default: return FE_TONEAREST;
  }
}

template <Handler handler>
void rounded(Warp& warp, const Instruction& in, Mask mask) {
  std::fesetround(host_rounding(in.rounding));
  handler(warp, in, mask);
  std::fesetround(FE_TONEAREST);
}
template <auto formula, class T>
struct Rounded : Elementwise<formula, T> {
  static void run(Warp& warp, const Instruction& in, Mask mask) { rounded<Elementwise<formula, T>::run>(warp, in, mask); }
};

// The formula evaluated in the rounding the instruction names; narrow formats round when their result is encoded.
template <auto formula, class... T>
Handler choose_rounded(const Instruction& in, TypeList<T...>) {
  Handler handler = nullptr;
  const bool host = in.rounding != Rounding::nearest;
  ((matches<T>(in.type()) && (handler = host && (std::is_same_v<T, float> || std::is_same_v<T, double>)
                                            ? Rounded<formula, T>::run
                                            : Elementwise<formula, T>::run)), ...);
  return handler;
}
template <auto formula, class Types>
Handler rounding_op(const Instruction& in) {
  return choose_rounded<formula>(in, Types());
}

// a * b + c, rounded once. For narrow formats, which come here as doubles, a * b is exact and the sum is rounded to odd,
// so that the rounding that follows sees on which side of a tie it lies.
template <class T>
struct Fused {
  static void run(Warp& warp, const Instruction& in, Mask mask) {
    constexpr auto formula = [](auto a, auto b, auto c) {
      if constexpr (is_narrow<typename Element<T>::type>) {
        const double product = a * b, sum = product + c;
        const double rounded_c = sum - product, error = (product - (sum - rounded_c)) + (c - rounded_c);
        if (error == 0 || !std::isfinite(sum) || (std::bit_cast<uint64_t>(sum) & 1)) return sum;
        return std::nextafter(sum, error > 0 ? HUGE_VAL : -HUGE_VAL);
      } else {
        return std::fma(a, b, c);
      }
    };
    if (in.rounding == Rounding::nearest) return Elementwise<formula, T>::run(warp, in, mask);
    rounded<Elementwise<formula, T>::run>(warp, in, mask);
  }
};
Handler fma(const Instruction& in) { return choose<Fused>(in.type(), AllFloats()); }

// Of two numbers the smaller one, -0 below +0; NaN only if both are, or with .NaN if either is.
template <bool larger>
constexpr auto extreme = [](auto a, auto b) {
  if (std::isnan(a)) return b;
  if (std::isnan(b)) return a;
  if (a == b) return std::signbit(a) == larger ? b : a;
  return (a < b) != larger ? a : b;
};
template <bool larger>
constexpr auto extreme_or_nan = [](auto a, auto b) { return std::isnan(a) ? a : std::isnan(b) ? b : extreme<larger>(a, b); };

const InstructionRow kRows[] = {
    {"add", "rn rz rm rp ftz sat noftz", rounding_op<[](auto a, auto b) { return a + b; }, AllFloats>},
    {"sub", "rn rz rm rp ftz sat noftz", rounding_op<[](auto a, auto b) { return a - b; }, AllFloats>},
    {"mul", "rn rz rm rp ftz sat noftz", rounding_op<[](auto a, auto b) { return a * b; }, AllFloats>},
    {"fma", "rn rz rm rp ftz sat relu noftz", fma},
    {"mad", "rn rz rm rp ftz sat", fma},
    {"div", "rn rz rm rp ftz approx full", rounding_op<[](auto a, auto b) { return a / b; }, Floats>},
    {"rcp", "rn rz rm rp ftz approx", rounding_op<[](auto a) { return decltype(a){1} / a; }, Floats>},
    {"sqrt", "rn rz rm rp ftz approx", rounding_op<[](auto a) { return std::sqrt(a); }, Floats>},
    {"rsqrt", "ftz approx", elementwise<[](auto a) { return static_cast<decltype(a)>(1 / std::sqrt(static_cast<double>(a))); }, Floats>},
    {"ex2", "ftz approx", elementwise<[](auto a) { return static_cast<decltype(a)>(std::exp2(static_cast<double>(a))); },
                                      TypeList<float, Half, Bfloat, Pair<Half>, Pair<Bfloat>>>},
    {"lg2", "ftz approx", elementwise<[](auto a) { return static_cast<float>(std::log2(static_cast<double>(a))); }, TypeList<float>>},
    {"sin", "ftz approx", elementwise<[](auto a) { return static_cast<float>(std::sin(static_cast<double>(a))); }, TypeList<float>>},
    {"cos", "ftz approx", elementwise<[](auto a) { return static_cast<float>(std::cos(static_cast<double>(a))); }, TypeList<float>>},
    {"tanh", "approx", elementwise<[](auto a) { return static_cast<decltype(a)>(std::tanh(static_cast<double>(a))); },
                                   TypeList<float, Half, Bfloat, Pair<Half>, Pair<Bfloat>>>},
    {"abs", "ftz", elementwise<[](auto a) { return std::fabs(a); }, AllFloats>},
    {"neg", "ftz", elementwise<[](auto a) { return -a; }, AllFloats>},
    {"copysign", "", elementwise<[](auto a, auto b) { return std::copysign(b, a); }, Floats>},
    {"min", "ftz", elementwise<extreme<false>, AllFloats>},
    {"max", "ftz", elementwise<extreme<true>, AllFloats>},
    {"min.NaN", "ftz", elementwise<extreme_or_nan<false>, AllFloats>},
    {"max.NaN", "ftz", elementwise<extreme_or_nan<true>, AllFloats>},
};

}  // namespace

const std::span<const InstructionRow> kFloatRows = kRows;

}  // namespace emulator
