// atom and red: read, combine, write, lane after lane.
#include <algorithm>
#include <cstring>

#include "elementwise.h"

namespace emulator {
namespace {

// One lane's update: new = formula(old, operand...), element by element of packed types.
template <auto formula, class T, class... Operands>
uint64_t updated(const Instruction& in, uint64_t old, Operands... operands) {
  using E = typename Element<T>::type;
  uint64_t bits = 0;
  for (int i = 0; i < Element<T>::count; ++i) {
    bits |= bits_of<E>(formula(operand_number<E>(old >> 16 * i, in), operand_number<E>(operands >> 16 * i, in)...))
            << 16 * i;
  }
  return bits;
}

// atom.op.type d, [a], b [, c]; red.op.type [a], b
template <auto formula, int operands, class T>
void run_update(Warp& warp, const Instruction& in, Mask mask) {
  const bool returns = in.words[0] == "atom";
  const Operand &target = in.operands[returns], *b = &in.operands[returns + 1];
  const Row d = warp.row(in.operands[0]), rows[2] = {warp.row(b[0]), warp.row(b[operands - 1])};
  uint64_t addresses[kLanes];
  for_lanes(mask, [&](int lane) {
    addresses[lane] = warp.address(target, lane);
    const Location location = warp.reach(lane, in.space, addresses[lane], kBytes<T>, Access::atomic);
    for (int i = 0; i < operands; ++i) warp.check_store(rows[i].unknown[lane] & kUnknown<T>, lane);
    for (int i = 0; location.unknown && i < kBytes<T>; ++i) warp.check_store(location.unknown[i], lane);
    uint64_t old = 0, value;
    std::memcpy(&old, location.data, kBytes<T>);
    if constexpr (operands == 1)
      value = updated<formula, T>(in, old, rows[0].value[lane]);
    else
      value = updated<formula, T>(in, old, rows[0].value[lane], rows[1].value[lane]);
    std::memcpy(location.data, &value, kBytes<T>);
    if (returns) d.set(lane, old, 0);
  });
  warp.count(in.space, addresses, kBytes<T>, mask, true);
}
template <auto formula, class Types, int operands = 1>
Handler update(const Instruction& in) {
  return choose(in.type(), Types(), []<class T> { return run_update<formula, operands, T>; });
}

using Integers32 = TypeList<uint32_t, uint64_t, int32_t, int64_t>;
using Addable = TypeList<uint32_t, uint64_t, int32_t, int64_t, float, double, Half, Bfloat, Pair<Half>, Pair<Bfloat>>;

constexpr auto add = [](auto a, auto b) { return a + b; };
constexpr auto smaller = [](auto a, auto b) { return std::min(a, b); };
constexpr auto larger = [](auto a, auto b) { return std::max(a, b); };
constexpr auto all_bits = [](auto a, auto b) { return a & b; };
constexpr auto any_bits = [](auto a, auto b) { return a | b; };
constexpr auto odd_bits = [](auto a, auto b) { return a ^ b; };
constexpr auto exchange = [](auto, auto b) { return b; };
constexpr auto exchange_if = [](auto a, auto expected, auto b) { return a == expected ? b : a; };
constexpr auto increment = [](auto a, auto b) { return a >= b ? 0 : a + 1; };
constexpr auto decrement = [](auto a, auto b) { return a == 0 || a > b ? b : a - 1; };

constexpr const char* kModifiers =
    "global shared shared::cta relaxed acquire release acq_rel cta gpu sys cluster noftz L2::cache_hint";

const InstructionRow kRows[] = {
    {"atom.add", kModifiers, update<add, Addable>},
    {"atom.min", kModifiers, update<smaller, Integers32>},
    {"atom.max", kModifiers, update<larger, Integers32>},
    {"atom.and", kModifiers, update<all_bits, Words>},
    {"atom.or", kModifiers, update<any_bits, Words>},
    {"atom.xor", kModifiers, update<odd_bits, Words>},
    {"atom.exch", kModifiers, update<exchange, Words>},
    {"atom.cas", kModifiers, update<exchange_if, Unsigned, 2>},
    {"atom.inc", kModifiers, update<increment, TypeList<uint32_t>>},
    {"atom.dec", kModifiers, update<decrement, TypeList<uint32_t>>},
    {"red.add", kModifiers, update<add, Addable>},
    {"red.min", kModifiers, update<smaller, Integers32>},
    {"red.max", kModifiers, update<larger, Integers32>},
    {"red.and", kModifiers, update<all_bits, Words>},
    {"red.or", kModifiers, update<any_bits, Words>},
    {"red.xor", kModifiers, update<odd_bits, Words>},
    {"red.inc", kModifiers, update<increment, TypeList<uint32_t>>},
    {"red.dec", kModifiers, update<decrement, TypeList<uint32_t>>},
};

}  // namespace

const std::span<const InstructionRow> kAtomicRows = kRows;

}  // namespace emulator
