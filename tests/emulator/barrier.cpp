// bar, barrier: named and counted barriers, with and without a reduction.
#include <bit>

#include "warp.h"

namespace emulator {
namespace {

enum class Reduction : uint8_t { none, count, all, any };

int uniform(Warp& warp, const Operand& o, Mask mask) {
  const int first = std::countr_zero(mask);
  const auto value = static_cast<int>(warp.known(o, first, "a barrier"));
  for_lanes(mask, [&](int lane) {
    if (static_cast<int>(warp.known(o, lane, "a barrier")) != value) {
      warp.fail("divergent_barrier", "lanes of a warp name different barriers or thread counts", lane);
    }
  });
  return value;
}

Barrier& arrive(Warp& warp, const Instruction& in, Mask mask, const Operand* id, const Operand* threads) {
  Block& block = warp.block;
  const int which = id ? uniform(warp, *id, mask) : 0;
  if (which < 0 || which >= kBarriers) warp.fail("divergent_barrier", "there is no barrier " + std::to_string(which));
  const int count = threads ? uniform(warp, *threads, mask) : 0;
  if (count % kLanes) warp.fail("divergent_barrier", std::to_string(count) + " threads are no multiple of the warp size");
  const int expected = threads ? count / kLanes : static_cast<int>(block.warps.size());
  Barrier& barrier = block.barriers[which];
  if (barrier.expected && barrier.expected != expected) {
    warp.fail("divergent_barrier", in.statement->text + " expects " + std::to_string(expected) + " warps, others " +
                                       std::to_string(barrier.expected));
  }
  barrier.expected = expected;
  ++barrier.arrived;
  if (block.races) block.races->release(warp.index, barrier.clock);
  return barrier;
}

template <Reduction reduction>
void release(Warp& last, const Instruction& in, Barrier& barrier) {
  if (barrier.arrived < barrier.expected) return;
  int trues = 0, lanes = 0;
  for (size_t i = 0; i < barrier.waiting.size(); ++i) {
    trues += std::popcount(barrier.predicates[i]);
    lanes += std::popcount(~barrier.waiting[i]->exited);
  }
  for (Warp* warp : barrier.waiting) {
    warp->pass_barrier();
    if (last.block.races) last.block.races->acquire(warp->index, barrier.clock);
    if constexpr (reduction != Reduction::none) {
      const Row d = warp->row(in.operands[0]);
      for_lanes(~warp->exited, [&](int lane) {
        d.value[lane] = reduction == Reduction::count ? trues : reduction == Reduction::all ? trues == lanes : trues > 0;
        d.unknown[lane] = 0;
      });
    }
  }
  barrier = {};
}

void bar_arrive(Warp& warp, const Instruction& in, Mask mask) {
  release<Reduction::none>(warp, in, arrive(warp, in, mask, &in.operands.at(0), &in.operands.at(1)));
}

// bar.sync [a [, b]]; bar.red d, a [, b], p
template <Reduction reduction>
void bar_wait(Warp& warp, const Instruction& in, Mask mask) {
  constexpr int first = reduction == Reduction::none ? 0 : 1;
  const int operands = static_cast<int>(in.operands.size()) - 2 * first;  // the barrier and its thread count
  Barrier& barrier = arrive(warp, in, mask, operands > 0 ? &in.operands[first] : nullptr,
                            operands > 1 ? &in.operands[first + 1] : nullptr);
  Mask predicate = 0;
  if constexpr (reduction != Reduction::none) {
    for_lanes(mask, [&](int lane) {
      const Operand& p = in.operands.back();
      predicate |= static_cast<Mask>((warp.known(p, lane, "a barrier") & 1) != p.negated) << lane;
    });
  }
  barrier.waiting.push_back(&warp);
  barrier.predicates.push_back(predicate);
  warp.wait_at_barrier();
  release<reduction>(warp, in, barrier);
}

const InstructionRow kRows[] = {
    {"bar.sync", "cta aligned", always<bar_wait<Reduction::none>>, Lanes::warp},
    {"bar.arrive", "cta aligned", always<bar_arrive>, Lanes::warp},
    {"bar.red.popc", "cta aligned", always<bar_wait<Reduction::count>>, Lanes::warp},
    {"bar.red.and", "cta aligned", always<bar_wait<Reduction::all>>, Lanes::warp},
    {"bar.red.or", "cta aligned", always<bar_wait<Reduction::any>>, Lanes::warp},
    {"barrier.sync", "cta aligned", always<bar_wait<Reduction::none>>, Lanes::warp},
    {"barrier.arrive", "cta aligned", always<bar_arrive>, Lanes::warp},
    {"barrier.red.popc", "cta aligned", always<bar_wait<Reduction::count>>, Lanes::warp},
    {"barrier.red.and", "cta aligned", always<bar_wait<Reduction::all>>, Lanes::warp},
    {"barrier.red.or", "cta aligned", always<bar_wait<Reduction::any>>, Lanes::warp},
};

}  // namespace

const std::span<const InstructionRow> kBarrierRows = kRows;

}  // namespace emulator
