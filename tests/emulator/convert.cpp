// cvt between all types, and cvta between address spaces.
#include <algorithm>
#include <cfenv>

#include "elementwise.h"

namespace emulator {
namespace {

template <class T>
constexpr bool is_float = std::is_floating_point_v<typename Computed<T>::type>;

class HostRounding {
 public:
  explicit HostRounding(Rounding r) {
    std::fesetround(r == Rounding::zero ? FE_TOWARDZERO : r == Rounding::down ? FE_DOWNWARD : r == Rounding::up ? FE_UPWARD : FE_TONEAREST);
  }
  ~HostRounding() { std::fesetround(FE_TONEAREST); }
};

// To an integer: rounded as the instruction says, clamped to the range; NaN becomes 0.
template <class D>
D to_integer(double value) {
  if (std::isnan(value)) return 0;
  const double whole = std::nearbyint(value), end = std::ldexp(1.0, 8 * sizeof(D) - std::is_signed_v<D>);
  if (whole >= end) return std::numeric_limits<D>::max();
  if (whole <= (std::is_signed_v<D> ? -end : 0.0)) return std::numeric_limits<D>::min();
  return static_cast<D>(whole);
}

template <class D, class S>
uint64_t converted(uint64_t bits, const Instruction& in) {
  const auto value = operand_number<S>(bits, in);
  using V = std::remove_const_t<decltype(value)>;
  if constexpr (!is_float<D> && !is_float<S>) {
    using Limits = std::numeric_limits<D>;
    if (!in.saturate) return static_cast<uint64_t>(static_cast<D>(value));
    return static_cast<uint64_t>(static_cast<D>(std::clamp<__int128>(value, Limits::min(), Limits::max())));
  } else if constexpr (!is_float<D>) {
    return static_cast<uint64_t>(to_integer<D>(value));
  } else if constexpr (is_narrow<D>) {
    return result_bits<D>(in.to_integer ? std::nearbyint(static_cast<double>(value)) : static_cast<double>(value), in);
  } else if constexpr (is_float<S>) {
    return result_bits<D>(static_cast<D>(in.to_integer ? std::nearbyint(value) : V{value}), in);
  } else {
    return result_bits<D>(static_cast<D>(value), in);
  }
}

// Widening keeps known what was known; every other conversion mixes all bytes of its operand.
template <class D, class S>
uint8_t unknown_after(uint8_t unknown) {
  unknown &= kUnknown<S>;
  if constexpr (is_float<D> || is_float<S>) {
    return unknown ? kUnknown<D> : 0;
  } else {
    const bool extends = std::is_signed_v<S> && unknown >> (sizeof(S) - 1) & 1;
    return extends ? static_cast<uint8_t>(unknown | ~kUnknown<S>) : unknown;
  }
}

uint64_t register_mask(const Operand& o) { return o.width >= 8 ? ~uint64_t{0} : (uint64_t{1} << 8 * o.width) - 1; }

template <class D, class S>
void cvt(Warp& warp, const Instruction& in, Mask mask) {
  const Row d = warp.row(in.operands[0]), a = warp.row(in.operands[1]);
  const uint64_t width = register_mask(in.operands[0]);
  const HostRounding scope(in.rounding);
  for_lanes(mask, [&](int lane) {
    d.value[lane] = converted<D, S>(a.value[lane], in) & width;
    d.unknown[lane] = unknown_after<D, S>(a.unknown[lane]);
  });
}

// cvt.rn.f16x2.f32 d, a, b: a above b.
template <class T, class S>
void cvt_pair(Warp& warp, const Instruction& in, Mask mask) {
  const Row d = warp.row(in.operands[0]), a = warp.row(in.operands[1]), b = warp.row(in.operands[2]);
  for_lanes(mask, [&](int lane) {
    d.value[lane] = converted<T, S>(a.value[lane], in) << 16 | converted<T, S>(b.value[lane], in);
    d.unknown[lane] = (a.unknown[lane] & kUnknown<S> ? 0xc : 0) | (b.unknown[lane] & kUnknown<S> ? 0x3 : 0);
  });
}

using Values = TypeList<uint8_t, uint16_t, uint32_t, uint64_t, int8_t, int16_t, int32_t, int64_t, float, double, Half, Bfloat, Tfloat>;

template <class D, class... S>
Handler from(Type source, TypeList<S...>) {
  Handler handler = nullptr;
  ((matches<S>(source) && (handler = cvt<D, S>)), ...);
  return handler;
}
template <class... D>
Handler between(Type to, Type source, TypeList<D...>) {
  Handler handler = nullptr;
  ((matches<D>(to) && (handler = from<D>(source, Values()))), ...);
  return handler;
}
Handler convert(const Instruction& in) {
  if (in.types.size() != 2) return nullptr;
  if (in.type() == Type::f16x2) return in.source_type() == Type::f32 ? cvt_pair<Half, float> : nullptr;
  if (in.type() == Type::bf16x2) return in.source_type() == Type::f32 ? cvt_pair<Bfloat, float> : nullptr;
  return between(in.type(), in.source_type(), Values());
}

// Between an address in a window and a generic one. Global, constant and parameter addresses are generic already.
template <bool to_space>
void cvta(Warp& warp, const Instruction& in, Mask mask) {
  const Row d = warp.row(in.operands[0]), a = warp.row(in.operands[1]);
  const uint64_t window = in.space == Space::shared ? kSharedWindow : in.space == Space::local ? kLocalWindow : 0;
  for_lanes(mask, [&](int lane) {
    d.value[lane] = to_space ? a.value[lane] - window : a.value[lane] + window;
    d.unknown[lane] = a.unknown[lane];
  });
}

// isspacep.space p, a
void isspacep(Warp& warp, const Instruction& in, Mask mask) {
  const uint64_t window = in.space == Space::shared  ? kSharedWindow
                          : in.space == Space::local ? kLocalWindow
                          : in.space == Space::param ? kParameterWindow
                                                     : 0;
  const Row d = warp.row(in.operands[0]);
  for_lanes(mask, [&](int lane) {
    d.value[lane] = (warp.known(in.operands[1], lane, "an address") & kWindowMask) == window;
    d.unknown[lane] = 0;
  });
}

const InstructionRow kRows[] = {
    {"cvt", "rn rz rm rp rna rni rzi rmi rpi ftz sat relu", convert},
    {"cvta", "global const shared shared::cta local param", always<cvta<false>>},
    {"cvta.to", "global const shared shared::cta local param", always<cvta<true>>},
    {"isspacep", "global const shared shared::cta local param", always<isspacep>},
};

}  // namespace

const std::span<const InstructionRow> kConvertRows = kRows;

}  // namespace emulator
