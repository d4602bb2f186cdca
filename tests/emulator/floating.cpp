// Floating-point arithmetic. Roundings other than to nearest are set in the host's control word around the instruction;
// .approx and .full functions are the correctly rounded ones of the host, which lie within the bounds PTX gives.
#include "elementwise.h"

namespace emulator {
namespace {

template <Handler handler>
void in_rounding(Warp& warp, const Instruction& in, Mask mask) {
  const HostRounding scope(in.rounding);
  handler(warp, in, mask);
}

// The formula evaluated in the rounding the instruction names; narrow formats round when their result is encoded.
template <auto formula, class Types>
Handler rounded(const Instruction& in) {
  return choose(in.type(), Types(), [&]<class T> {
    const bool by_host = in.rounding != Rounding::nearest && std::is_floating_point_v<T>;
    return by_host ? in_rounding<same_types<formula, T>()> : same_types<formula, T>();
  });
}

// a * b + c, rounded once. Of narrow formats, which are doubles here, a * b is exact and the sum is rounded to odd, so
// that the rounding that follows sees on which side of a tie it lies.
constexpr auto multiply_add = [](auto a, auto b, auto c) { return std::fma(a, b, c); };
constexpr auto narrow_multiply_add = [](double a, double b, double c) {
  const double product = a * b, sum = product + c;
  const double part_of_c = sum - product, error = (product - (sum - part_of_c)) + (c - part_of_c);
  if (error == 0 || !std::isfinite(sum) || (std::bit_cast<uint64_t>(sum) & 1)) return sum;
  return std::nextafter(sum, error > 0 ? HUGE_VAL : -HUGE_VAL);
};
Handler fma(const Instruction& in) {
  const Handler handler = rounded<multiply_add, Floats>(in);
  return handler ? handler : elementwise<narrow_multiply_add, Halves>(in);
}

// Of two numbers the smaller one, -0 below +0; NaN only if both are, or with .NaN if either is.
template <bool larger>
constexpr auto extreme = [](auto a, auto b) {
  if (std::isnan(a)) return b;
  if (std::isnan(b)) return a;
  if (a == b) return std::signbit(a) == larger ? b : a;
  return (a < b) != larger ? a : b;
};
template <bool larger>
constexpr auto extreme_or_nan = [](auto a, auto b) {
  return std::isnan(a) ? a : std::isnan(b) ? b : extreme<larger>(a, b);
};

const InstructionRow kRows[] = {
    {"add", "rn rz rm rp ftz sat noftz", rounded<[](auto a, auto b) { return a + b; }, AllFloats>},
    {"sub", "rn rz rm rp ftz sat noftz", rounded<[](auto a, auto b) { return a - b; }, AllFloats>},
    {"mul", "rn rz rm rp ftz sat noftz", rounded<[](auto a, auto b) { return a * b; }, AllFloats>},
    {"fma", "rn rz rm rp ftz sat relu noftz", fma},
    {"mad", "rn rz rm rp ftz sat", fma},
    {"div", "rn rz rm rp ftz approx full", rounded<[](auto a, auto b) { return a / b; }, Floats>},
    {"rcp", "rn rz rm rp ftz approx", rounded<[](auto a) { return decltype(a){1} / a; }, Floats>},
    {"sqrt", "rn rz rm rp ftz approx", rounded<[](auto a) { return std::sqrt(a); }, Floats>},
    {"rsqrt", "ftz approx",
     elementwise<[](auto a) { return static_cast<decltype(a)>(1 / std::sqrt(static_cast<double>(a))); }, Floats>},
    {"ex2", "ftz approx",
     elementwise<[](auto a) { return static_cast<decltype(a)>(std::exp2(static_cast<double>(a))); },
                 TypeList<float, Half, Bfloat, Pair<Half>, Pair<Bfloat>>>},
    {"lg2", "ftz approx",
     elementwise<[](auto a) { return static_cast<float>(std::log2(static_cast<double>(a))); }, TypeList<float>>},
    {"sin", "ftz approx",
     elementwise<[](auto a) { return static_cast<float>(std::sin(static_cast<double>(a))); }, TypeList<float>>},
    {"cos", "ftz approx",
     elementwise<[](auto a) { return static_cast<float>(std::cos(static_cast<double>(a))); }, TypeList<float>>},
    {"tanh", "approx",
     elementwise<[](auto a) { return static_cast<decltype(a)>(std::tanh(static_cast<double>(a))); },
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
