// Comparisons.
#include "elementwise.h"

namespace emulator {
namespace {

constexpr auto eq = [](auto a, auto b) { return a == b; };
constexpr auto ne = [](auto a, auto b) { return a < b || a > b; };  // false if one is NaN
constexpr auto lt = [](auto a, auto b) { return a < b; };
constexpr auto le = [](auto a, auto b) { return a <= b; };
constexpr auto gt = [](auto a, auto b) { return a > b; };
constexpr auto ge = [](auto a, auto b) { return a >= b; };
constexpr auto num = [](auto a, auto b) { return a == a && b == b; };
constexpr auto equ = [](auto a, auto b) { return !ne(a, b); };
constexpr auto neu = [](auto a, auto b) { return a != b; };
constexpr auto ltu = [](auto a, auto b) { return !(a >= b); };
constexpr auto leu = [](auto a, auto b) { return !(a > b); };
constexpr auto gtu = [](auto a, auto b) { return !(a <= b); };
constexpr auto geu = [](auto a, auto b) { return !(a < b); };
constexpr auto nan = [](auto a, auto b) { return !num(a, b); };

// One comparison of lane `lane`; of packed types, of one half.
template <auto compare, class T>
struct Comparison {
  using E = typename Element<T>::type;
  bool value, unknown;
  Comparison(const Instruction& in, const Row& a, const Row& b, int lane, int half) {
    const unsigned bytes = kUnknown<E> << 2 * half;
    unknown = (a.unknown[lane] | b.unknown[lane]) & bytes;
    value = compare(operand_number<E>(a.value[lane] >> 16 * half, in), operand_number<E>(b.value[lane] >> 16 * half, in));
  }
};

// setp.cmp p|q, a, b; setp.cmp.and p|q, a, b, c. Of packed types p is the lower half's result and q the upper one's.
template <auto compare, class T>
void setp(Warp& warp, const Instruction& in, Mask mask) {
  const Row a = warp.row(in.operands[1]), b = warp.row(in.operands[2]);
  const std::vector<Operand>& pair = in.operands[0].parts;
  const Row p = warp.row(in.operands[0]), q = pair.empty() ? p : warp.row(pair[1]);
  const bool combines = in.operands.size() > 3;
  const Row c = combines ? warp.row(in.operands[3]) : p;
  const bool is_and = in.has("and"), is_or = in.has("or");
  for_lanes(mask, [&](int lane) {
    const auto put = [&](const Row& target, bool value, bool unknown) {
      if (combines) {
        const bool other = (c.value[lane] & 1) != in.operands[3].negated;
        unknown |= c.unknown[lane] & 1;
        value = is_and ? value && other : is_or ? value || other : value != other;
      }
      target.value[lane] = value;
      target.unknown[lane] = unknown;
    };
    const Comparison<compare, T> low(in, a, b, lane, 0), high(in, a, b, lane, Element<T>::count - 1);
    const bool packed = Element<T>::count == 2;
    if (!pair.empty()) put(q, packed ? high.value : !low.value, high.unknown);
    put(p, low.value, low.unknown);
  });
}

// set.cmp.dtype.stype d, a, b: 1.0 for float results, all ones for integer ones.
template <auto compare, class T>
void set(Warp& warp, const Instruction& in, Mask mask) {
  const Row d = warp.row(in.operands[0]), a = warp.row(in.operands[1]), b = warp.row(in.operands[2]);
  const int bytes = size_of(in.type()) / Element<T>::count;
  uint64_t yes = (uint64_t{1} << 8 * bytes) - 1;
  if (in.type() == Type::f32) yes = std::bit_cast<uint32_t>(1.0f);
  if (in.type() == Type::f16 || in.type() == Type::f16x2) yes = bits_of<Half>(1.0);
  if (in.type() == Type::bf16 || in.type() == Type::bf16x2) yes = bits_of<Bfloat>(1.0);
  for_lanes(mask, [&](int lane) {
    uint64_t value = 0;
    unsigned unknown = 0;
    for (int half = 0; half < Element<T>::count; ++half) {
      const Comparison<compare, T> result(in, a, b, lane, half);
      if (result.value) value |= yes << 8 * bytes * half;
      if (result.unknown) unknown |= ((1u << bytes) - 1) << bytes * half;
    }
    d.value[lane] = value;
    d.unknown[lane] = unknown;
  });
}

using Numbers = TypeList<int16_t, int32_t, int64_t, uint16_t, uint32_t, uint64_t, float, double, Half, Bfloat, Pair<Half>, Pair<Bfloat>>;

template <auto compare, class... T>
Handler choose_setp(Type type, TypeList<T...>) {
  Handler handler = nullptr;
  ((matches<T>(type) && (handler = setp<compare, T>)), ...);
  return handler;
}
template <auto compare, class... T>
Handler choose_set(Type type, TypeList<T...>) {
  Handler handler = nullptr;
  ((matches<T>(type) && (handler = set<compare, T>)), ...);
  return handler;
}
template <auto compare, class Types = Numbers>
Handler to_predicate(const Instruction& in) { return choose_setp<compare>(in.source_type(), Types()); }
template <auto compare, class Types = Numbers>
Handler to_value(const Instruction& in) { return choose_set<compare>(in.source_type(), Types()); }

const InstructionRow kRows[] = {
    {"setp.eq", "and or xor ftz", to_predicate<eq>},
    {"setp.ne", "and or xor ftz", to_predicate<ne>},
    {"setp.lt", "and or xor ftz", to_predicate<lt>},
    {"setp.le", "and or xor ftz", to_predicate<le>},
    {"setp.gt", "and or xor ftz", to_predicate<gt>},
    {"setp.ge", "and or xor ftz", to_predicate<ge>},
    {"setp.lo", "and or xor", to_predicate<lt, Unsigned>},
    {"setp.ls", "and or xor", to_predicate<le, Unsigned>},
    {"setp.hi", "and or xor", to_predicate<gt, Unsigned>},
    {"setp.hs", "and or xor", to_predicate<ge, Unsigned>},
    {"setp.equ", "and or xor ftz", to_predicate<equ, AllFloats>},
    {"setp.neu", "and or xor ftz", to_predicate<neu, AllFloats>},
    {"setp.ltu", "and or xor ftz", to_predicate<ltu, AllFloats>},
    {"setp.leu", "and or xor ftz", to_predicate<leu, AllFloats>},
    {"setp.gtu", "and or xor ftz", to_predicate<gtu, AllFloats>},
    {"setp.geu", "and or xor ftz", to_predicate<geu, AllFloats>},
    {"setp.num", "and or xor ftz", to_predicate<num, AllFloats>},
    {"setp.nan", "and or xor ftz", to_predicate<nan, AllFloats>},
    {"set.eq", "ftz", to_value<eq>},
    {"set.ne", "ftz", to_value<ne>},
    {"set.lt", "ftz", to_value<lt>},
    {"set.le", "ftz", to_value<le>},
    {"set.gt", "ftz", to_value<gt>},
    {"set.ge", "ftz", to_value<ge>},
    {"set.equ", "ftz", to_value<equ, AllFloats>},
    {"set.neu", "ftz", to_value<neu, AllFloats>},
    {"set.ltu", "ftz", to_value<ltu, AllFloats>},
    {"set.leu", "ftz", to_value<leu, AllFloats>},
    {"set.gtu", "ftz", to_value<gtu, AllFloats>},
    {"set.geu", "ftz", to_value<geu, AllFloats>},
    {"set.num", "ftz", to_value<num, AllFloats>},
    {"set.nan", "ftz", to_value<nan, AllFloats>},
};

}  // namespace

const std::span<const InstructionRow> kPredicateRows = kRows;

}  // namespace emulator
