// Instructions that move bits. Unknown bytes are followed exactly: `and` with a known zero is known, a shift moves them.
#include "elementwise.h"

namespace emulator {
namespace {

// A value with those of its bits that are unknown.
template <class T>
struct Tracked {
  T value, unknown;

  static Tracked all_unknown() { return {0, static_cast<T>(~T{0})}; }
};
template <class T>
Tracked<T> operator&(Tracked<T> a, Tracked<T> b) {
  const T one_sided = (a.unknown & b.value) | (b.unknown & a.value) | (a.unknown & b.unknown);
  return {static_cast<T>(a.value & b.value), one_sided};
}
template <class T>
Tracked<T> operator~(Tracked<T> a) { return {static_cast<T>(~a.value), a.unknown}; }
template <class T>
Tracked<T> operator|(Tracked<T> a, Tracked<T> b) { return ~(~a & ~b); }
template <class T>
Tracked<T> operator^(Tracked<T> a, Tracked<T> b) {
  return {static_cast<T>(a.value ^ b.value), static_cast<T>(a.unknown | b.unknown)};
}

// Applies what moves bits about to the value and to the mask alike. The amounts must be known, else nothing is.
template <class T, class Move, class... Amount>
Tracked<T> moved(Tracked<T> a, Move move, Amount... amount) {
  if (((amount.unknown & 0xff) | ...)) return Tracked<T>::all_unknown();
  return {static_cast<T>(move(a.value)), static_cast<T>(move(a.unknown))};
}

template <class T>
constexpr unsigned kWidth = 8 * sizeof(T);

template <class T>
T left(T a, uint64_t by) { return by < kWidth<T> ? static_cast<T>(a << by) : T{0}; }
template <class T>
T right(T a, uint64_t by) { return by < kWidth<T> ? static_cast<T>(a >> by) : T{0}; }
template <class T>
T signed_right(T a, uint64_t by) {
  return static_cast<T>(static_cast<std::make_signed_t<T>>(a) >> std::min<uint64_t>(by, kWidth<T> - 1));
}
template <class T>
T reversed(T a) {
  T r = 0;
  for (unsigned i = 0; i < kWidth<T>; ++i) r |= static_cast<T>((a >> i & 1) << (kWidth<T> - 1 - i));
  return r;
}
template <class T>
T field_mask(unsigned position, unsigned length) {
  const T ones = length >= kWidth<T> ? static_cast<T>(~T{0}) : static_cast<T>((T{1} << length) - 1);
  return left(ones, position);
}

constexpr auto shift_left = [](auto a, auto by) { return moved(a, [&](auto x) { return left(x, by.value & 0xffffffff); }, by); };
constexpr auto shift_right = [](auto a, auto by) { return moved(a, [&](auto x) { return right(x, by.value & 0xffffffff); }, by); };
constexpr auto shift_right_signed = [](auto a, auto by) {
  return moved(a, [&](auto x) { return signed_right(x, by.value & 0xffffffff); }, by);
};

// bfe: a field of `length` bits, zero- or sign-extended from the last bit of it that lies in the register.
template <bool is_signed>
constexpr auto extract_field = [](auto a, auto position, auto length) {
  using T = decltype(a.value);
  const unsigned p = position.value & 0xff, n = length.value & 0xff;
  return moved(a, [&](T x) {
    const T field = right(x, p) & field_mask<T>(0, n);
    const unsigned last = std::min(p + n, kWidth<T>) - 1;
    const bool fill = is_signed && n && (x >> last & 1);
    return static_cast<T>(fill && n < kWidth<T> ? field | ~field_mask<T>(0, p > last ? 0 : last - p + 1) : field);
  }, position, length);
};
constexpr auto insert_field = [](auto a, auto b, auto position, auto length) {
  using T = decltype(a.value);
  const T mask = field_mask<T>(position.value & 0xff, length.value & 0xff);
  const auto field = moved(a, [&](T x) { return left(x, position.value & 0xff); }, position, length);
  return (field & Tracked<T>{mask, 0}) | (b & Tracked<T>{static_cast<T>(~mask), 0});
};

constexpr auto lookup = [](auto a, auto b, auto c, auto table) {
  auto result = a ^ a;
  for (int i = 0; i < 8; ++i) {
    if (table.value >> i & 1) result = result | ((i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c));
  }
  return result;
};

// prmt: each nibble of the selector picks one of the eight bytes of b:a, or spreads its sign bit.
constexpr auto permute = [](auto a, auto b, auto selector) {
  const Tracked<uint64_t> both{a.value | static_cast<uint64_t>(b.value) << 32, a.unknown | static_cast<uint64_t>(b.unknown) << 32};
  const auto picked = moved(both, [&](uint64_t x) {
    uint64_t r = 0;
    for (int i = 0; i < 4; ++i) {
      const unsigned nibble = selector.value >> 4 * i & 0xf, byte = x >> 8 * (nibble & 7) & 0xff;
      r |= static_cast<uint64_t>(nibble & 8 ? (byte & 0x80 ? 0xff : 0) : byte) << 8 * i;
    }
    return r;
  }, selector);
  return Tracked<uint32_t>{static_cast<uint32_t>(picked.value), static_cast<uint32_t>(picked.unknown)};
};

template <bool to_left, bool wraps>
constexpr auto funnel = [](auto low, auto high, auto by) {
  const unsigned n = wraps ? by.value & 31 : std::min<uint32_t>(by.value, 32);
  const Tracked<uint64_t> both{low.value | static_cast<uint64_t>(high.value) << 32,
                               low.unknown | static_cast<uint64_t>(high.unknown) << 32};
  const auto r = moved(both, [&](uint64_t x) { return to_left ? x << n >> 32 : x >> n; }, by);
  return Tracked<uint32_t>{static_cast<uint32_t>(r.value), static_cast<uint32_t>(r.unknown)};
};

// Bits of unknown bytes, and back.
template <class T>
T spread(uint8_t bytes) {
  T mask = 0;
  for (unsigned i = 0; i < sizeof(T); ++i) mask |= static_cast<T>(bytes >> i & 1 ? T{0xff} << 8 * i : T{0});
  return mask;
}
template <class T>
uint8_t gather(T mask) {
  uint8_t bytes = 0;
  for (unsigned i = 0; i < sizeof(T); ++i) bytes |= static_cast<uint8_t>((mask >> 8 * i & 0xff ? 1 : 0) << i);
  return bytes;
}

template <auto formula, class T, size_t... i>
void run_tracked(Warp& warp, const Instruction& in, Mask mask, std::index_sequence<i...>) {
  using U = std::conditional_t<std::is_same_v<T, Predicate>, uint8_t, T>;
  const Row d = warp.row(in.operands[0]);
  const Row s[] = {warp.row(in.operands[i + 1])...};
  for_lanes(mask, [&](int lane) {
    const bool any = (s[i].unknown[lane] | ...);
    const auto result = formula(Tracked<U>{static_cast<U>(s[i].value[lane]), any ? spread<U>(s[i].unknown[lane]) : U{0}}...);
    d.value[lane] = std::is_same_v<T, Predicate> ? result.value & 1 : result.value;
    d.unknown[lane] = any ? gather<U>(result.unknown) : 0;
  });
}
template <auto formula, int operands>
struct TrackedLanes {
  template <class T>
  struct For {
    static void run(Warp& warp, const Instruction& in, Mask mask) {
      run_tracked<formula, T>(warp, in, mask, std::make_index_sequence<operands>());
    }
  };
};
template <auto formula, int operands, class Types>
Handler tracked(const Instruction& in) {
  return choose<TrackedLanes<formula, operands>::template For>(in.type(), Types());
}
using Unsigned32 = TypeList<uint32_t>;

template <auto for_unsigned, auto for_signed, int operands>
Handler tracked_by_sign(const Instruction& in) {
  switch (in.type()) {
    case Type::s16: return TrackedLanes<for_signed, operands>::template For<uint16_t>::run;
    case Type::s32: return TrackedLanes<for_signed, operands>::template For<uint32_t>::run;
    case Type::s64: return TrackedLanes<for_signed, operands>::template For<uint64_t>::run;
    default: return tracked<for_unsigned, operands, Unsigned>(in);
  }
}

uint64_t mask_of(int bytes) { return bytes >= 8 ? ~uint64_t{0} : (uint64_t{1} << 8 * bytes) - 1; }

// mov d, a; also between a register and the list of its parts.
void mov(Warp& warp, const Instruction& in, Mask mask) {
  const int bytes = size_of(in.type());
  const Operand &to = in.operands[0], &from = in.operands[1];
  const int parts = std::max<int>({1, static_cast<int>(to.parts.size()), static_cast<int>(from.parts.size())});
  const int part = bytes / parts;
  const auto row_of = [&](const Operand& o, int i) { return warp.row(o.parts.empty() ? o : o.parts[i]); };
  Row source[8], target[8];
  for (int i = 0; i < parts; ++i) source[i] = row_of(from, i), target[i] = row_of(to, i);
  for_lanes(mask, [&](int lane) {
    uint64_t value = 0;
    unsigned unknown = 0;
    for (int i = 0; i < (from.parts.empty() ? 1 : parts); ++i) {
      value |= (source[i].value[lane] & mask_of(from.parts.empty() ? bytes : part)) << 8 * part * i;
      unknown |= (source[i].unknown[lane] & ((1u << (from.parts.empty() ? bytes : part)) - 1)) << part * i;
    }
    for (int i = 0; i < (to.parts.empty() ? 1 : parts); ++i) {
      target[i].value[lane] = value >> 8 * part * i & mask_of(to.parts.empty() ? bytes : part);
      target[i].unknown[lane] = unknown >> part * i & ((1u << (to.parts.empty() ? bytes : part)) - 1);
    }
  });
}

// selp d, a, b, p
void selp(Warp& warp, const Instruction& in, Mask mask) {
  const Row d = warp.row(in.operands[0]), a = warp.row(in.operands[1]), b = warp.row(in.operands[2]), p = warp.row(in.operands[3]);
  const int bytes = size_of(in.type());
  for_lanes(mask, [&](int lane) {
    const Row& chosen = (p.value[lane] & 1) != in.operands[3].negated ? a : b;
    d.value[lane] = chosen.value[lane] & mask_of(bytes);
    d.unknown[lane] = p.unknown[lane] & 1 ? (1 << bytes) - 1 : chosen.unknown[lane];
  });
}

const InstructionRow kRows[] = {
    {"mov", "", always<mov>},
    {"selp", "", always<selp>},
    {"and", "", tracked<[](auto a, auto b) { return a & b; }, 2, Bits>},
    {"or", "", tracked<[](auto a, auto b) { return a | b; }, 2, Bits>},
    {"xor", "", tracked<[](auto a, auto b) { return a ^ b; }, 2, Bits>},
    {"not", "", tracked<[](auto a) { return ~a; }, 1, Bits>},
    {"cnot", "", elementwise<[](auto a) { return a == 0; }, Unsigned>},
    {"lop3", "", tracked<lookup, 4, Unsigned32>},
    {"shl", "", tracked<shift_left, 2, Unsigned>},
    {"shr", "", tracked_by_sign<shift_right, shift_right_signed, 2>},
    {"shf.l.wrap", "", tracked<funnel<true, true>, 3, Unsigned32>},
    {"shf.l.clamp", "", tracked<funnel<true, false>, 3, Unsigned32>},
    {"shf.r.wrap", "", tracked<funnel<false, true>, 3, Unsigned32>},
    {"shf.r.clamp", "", tracked<funnel<false, false>, 3, Unsigned32>},
    {"bfe", "", tracked_by_sign<extract_field<false>, extract_field<true>, 3>},
    {"bfi", "", tracked<insert_field, 4, Words>},
    {"brev", "", tracked<[](auto a) { return moved(a, [](auto x) { return reversed(x); }, Tracked<uint8_t>{}); }, 1, Words>},
    {"prmt", "", tracked<permute, 3, Unsigned32>},
};

}  // namespace

const std::span<const InstructionRow> kBitRows = kRows;

}  // namespace emulator
