// Instructions by which the lanes of a warp exchange values: shfl, vote, match, redux, activemask.
#include <algorithm>
#include <map>

#include "elementwise.h"

namespace emulator {
namespace {

enum class Shuffle : uint8_t { up, down, butterfly, index };

// shfl.sync.mode.b32 d|p, a, b, c, members. c: the clamp in bits 0-4, the mask of the segment in bits 8-12.
template <Shuffle mode>
void shfl(Warp& warp, const Instruction& in, Mask mask) {
  const Operand& result = in.operands[0];
  const Row d = warp.row(result), a = warp.row(in.operands[1]);
  uint64_t values[kLanes];
  uint8_t unknown[kLanes];
  std::copy_n(a.value, kLanes, values);
  std::copy_n(a.unknown, kLanes, unknown);
  for_lanes(mask, [&](int lane) {
    const int b = static_cast<int>(warp.known(in.operands[2], lane, "a lane") & 0x1f);
    const int c = static_cast<int>(warp.known(in.operands[3], lane, "a segment"));
    const int clamp = c & 0x1f, segment = c >> 8 & 0x1f, last = (lane & segment) | (clamp & ~segment), first = lane & segment;
    int from = 0;
    bool inside = false;
    switch (mode) {
      case Shuffle::up: from = lane - b, inside = from >= last; break;
      case Shuffle::down: from = lane + b, inside = from <= last; break;
      case Shuffle::butterfly: from = lane ^ b, inside = from <= last; break;
      case Shuffle::index: from = first | (b & ~segment), inside = from <= last; break;
    }
    if (!inside) from = lane;
    const bool present = mask >> from & 1;  // a value from a lane outside is undefined
    d.value[lane] = values[from] & 0xffffffff;
    d.unknown[lane] = present ? unknown[from] & 0xf : 0xf;
    if (result.parts.size() == 2) {
      const Row p = warp.row(result.parts[1]);
      p.value[lane] = inside;
      p.unknown[lane] = 0;
    }
  });
}

// The lanes whose predicate is true; in `unknown` those where it has no value.
Mask votes(Warp& warp, const Operand& o, Mask mask, Mask& unknown) {
  const Row p = warp.row(o);
  Mask yes = 0;
  for_lanes(mask, [&](int lane) {
    yes |= static_cast<Mask>((p.value[lane] & 1) != o.negated) << lane;
    unknown |= static_cast<Mask>(p.unknown[lane] & 1) << lane;
  });
  return yes;
}

// vote.sync.mode d, p, members
template <auto formula>  // (votes, members) -> result
void vote(Warp& warp, const Instruction& in, Mask mask) {
  Mask unknown = 0;
  const uint64_t result = formula(votes(warp, in.operands[1], mask, unknown), mask);
  const Row d = warp.row(in.operands[0]);
  for_lanes(mask, [&](int lane) {
    d.value[lane] = result;
    d.unknown[lane] = unknown ? 0xf : 0;
  });
}

// match.sync.any d, a, members: the lanes with the same value. match.all d|p: all lanes if all have the same, else none.
template <bool all>
void match(Warp& warp, const Instruction& in, Mask mask) {
  const int bytes = size_of(in.type());
  const Row d = warp.row(in.operands[0]), a = warp.row(in.operands[1]);
  const uint64_t width = bytes == 8 ? ~uint64_t{0} : 0xffffffff;
  std::map<uint64_t, Mask> lanes;
  bool unknown = false;
  for_lanes(mask, [&](int lane) {
    lanes[a.value[lane] & width] |= Mask{1} << lane;
    unknown |= a.unknown[lane] & ((1 << bytes) - 1);
  });
  std::array<uint64_t, kLanes> result{};
  for_lanes(mask, [&](int lane) { result[lane] = lanes[a.value[lane] & width]; });
  for_lanes(mask, [&](int lane) {
    d.value[lane] = all && lanes.size() > 1 ? 0 : result[lane];
    d.unknown[lane] = unknown ? 0xf : 0;
    if (all && in.operands[0].parts.size() == 2) {
      const Row p = warp.row(in.operands[0].parts[1]);
      p.value[lane] = lanes.size() == 1;
      p.unknown[lane] = unknown;
    }
  });
}

// redux.sync.op.type d, a, members
template <auto formula>
struct Reduce {
  template <class T>
  struct For {
    static void run(Warp& warp, const Instruction& in, Mask mask) {
      const Row d = warp.row(in.operands[0]), a = warp.row(in.operands[1]);
      bool unknown = false, first = true;
      T total{};
      for_lanes(mask, [&](int lane) {
        const T value = number<T>(a.value[lane]);
        total = first ? value : static_cast<T>(formula(total, value));
        first = false;
        unknown |= a.unknown[lane] & kUnknown<T>;
      });
      for_lanes(mask, [&](int lane) {
        d.value[lane] = bits_of<T>(total);
        d.unknown[lane] = unknown ? kUnknown<T> : 0;
      });
    }
  };
};
template <auto formula>
Handler redux(const Instruction& in) {
  return choose<Reduce<formula>::template For>(in.type(), TypeList<uint32_t, int32_t>());
}

void activemask(Warp& warp, const Instruction& in, Mask mask) {
  const Row d = warp.row(in.operands[0]);
  for_lanes(mask, [&](int lane) { d.value[lane] = warp.present(), d.unknown[lane] = 0; });
}

// One lane of those present: the lowest. elect.sync d|p, members
void elect(Warp& warp, const Instruction& in, Mask mask) {
  const Row d = warp.row(in.operands[0].parts.at(0)), p = warp.row(in.operands[0].parts.at(1));
  const int leader = std::countr_zero(mask);
  for_lanes(mask, [&](int lane) {
    d.value[lane] = leader, d.unknown[lane] = 0;
    p.value[lane] = lane == leader, p.unknown[lane] = 0;
  });
}

void nothing(Warp&, const Instruction&, Mask) {}

const InstructionRow kRows[] = {
    {"shfl.sync.up", "", always<shfl<Shuffle::up>>, Lanes::members},
    {"shfl.sync.down", "", always<shfl<Shuffle::down>>, Lanes::members},
    {"shfl.sync.bfly", "", always<shfl<Shuffle::butterfly>>, Lanes::members},
    {"shfl.sync.idx", "", always<shfl<Shuffle::index>>, Lanes::members},
    {"vote.sync.ballot", "", always<vote<[](Mask yes, Mask) { return yes; }>>, Lanes::members},
    {"vote.sync.any", "", always<vote<[](Mask yes, Mask) { return yes != 0; }>>, Lanes::members},
    {"vote.sync.all", "", always<vote<[](Mask yes, Mask members) { return yes == members; }>>, Lanes::members},
    {"vote.sync.uni", "", always<vote<[](Mask yes, Mask members) { return yes == 0 || yes == members; }>>, Lanes::members},
    {"match.any.sync", "", always<match<false>>, Lanes::members},
    {"match.all.sync", "", always<match<true>>, Lanes::members},
    {"redux.sync.add", "", redux<[](auto a, auto b) { return a + b; }>, Lanes::members},
    {"redux.sync.min", "", redux<[](auto a, auto b) { return std::min(a, b); }>, Lanes::members},
    {"redux.sync.max", "", redux<[](auto a, auto b) { return std::max(a, b); }>, Lanes::members},
    {"redux.sync.and", "", redux<[](auto a, auto b) { return a & b; }>, Lanes::members},
    {"redux.sync.or", "", redux<[](auto a, auto b) { return a | b; }>, Lanes::members},
    {"redux.sync.xor", "", redux<[](auto a, auto b) { return a ^ b; }>, Lanes::members},
    {"elect.sync", "", always<elect>, Lanes::members},
    {"bar.warp.sync", "", always<nothing>, Lanes::members},
    {"activemask", "", always<activemask>},
};

}  // namespace

const std::span<const InstructionRow> kWarpRows = kRows;

}  // namespace emulator
