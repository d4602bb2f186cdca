#include "warp.h"

#include <algorithm>
#include <cfenv>
#include <climits>
#include <sstream>

namespace emulator {
namespace {

constexpr uint64_t kPoison = 0x7ff7dead7fb7deadull;  // a NaN as float and as double

std::string in_words(const std::array<unsigned, 3>& v) {
  return "(" + std::to_string(v[0]) + "," + std::to_string(v[1]) + "," + std::to_string(v[2]) + ")";
}

}  // namespace

Warp::Warp(Block& block, int index) : block(block), index(index) {}

Mask Warp::lanes_of_block() const {
  const int threads = block.threads() - index * kLanes;
  return threads >= kLanes ? kAllLanes : (Mask{1} << threads) - 1;
}

void Warp::start_block() {
  exited = ~lanes_of_block();
  waiting_ = 0;
  group_ = 0;
  at_barrier_ = false;
  std::fill(unknown_.begin(), unknown_.end(), 0xff);
  for_lanes(~exited, [&](int lane) {
    frames[lane].clear();
    open_copies[lane].clear();
    copies[lane].clear();
    std::fill(local[lane].unknown.begin(), local[lane].unknown.end(), 1);
    enter(lane, *block.launch.program.kernel, nullptr, -1);
  });
}

void Warp::enter(int lane, const Routine& routine, const Instruction* call, int return_to) {
  Frame frame{&routine, call, return_to, 0, 0};
  if (!frames[lane].empty()) {
    const Frame& caller = frames[lane].back();
    frame.base = caller.base + caller.routine->slots;
    frame.local_base = caller.local_base + caller.routine->frame_bytes;
  }
  const size_t rows = static_cast<size_t>(frame.base + routine.slots) * kLanes;
  if (values_.size() < rows) values_.resize(rows, kPoison), unknown_.resize(rows, 0xff);
  for (int slot = 0; call && slot < routine.slots; ++slot) {
    unknown_[static_cast<size_t>(frame.base + slot) * kLanes + lane] = 0xff;
  }
  for (const Constant& c : routine.constants) {
    const size_t at = static_cast<size_t>(frame.base + c.slot) * kLanes + lane;
    values_[at] = c.special ? c.special({*this, lane}) : c.bits + (c.in_frame ? frame.local_base : 0);
    unknown_[at] = 0;
  }
  local[lane].grow(frame.local_base + routine.frame_bytes);
  if (call) std::fill_n(local[lane].unknown.begin() + frame.local_base, routine.frame_bytes, 1);
  frames[lane].push_back(frame);
  next[lane] = routine.entry;
}

void Warp::leave(int lane) {
  next[lane] = frames[lane].back().return_to;
  frames[lane].pop_back();
  if (frames[lane].empty()) exited |= Mask{1} << lane;
}

// Chooses the lanes to run: of those that do not wait, the ones at the lowest position, in the same frame of registers.
bool Warp::regroup() {
  const Mask runnable = ~exited & ~waiting_;
  if (!runnable) return false;
  position_ = INT_MAX;
  for_lanes(runnable, [&](int lane) { position_ = std::min(position_, next[lane]); });
  group_ = 0;
  limit_ = INT_MAX;
  for_lanes(runnable, [&](int lane) {
    const int base = frames[lane].back().base;
    if (next[lane] != position_) {
      limit_ = std::min(limit_, next[lane]);
    } else if (!group_ || base == base_) {
      base_ = base;
      group_ |= Mask{1} << lane;
    }
  });
  return true;
}

Warp::Stop Warp::run(uint64_t instructions) {
  for (const uint64_t end = executed_ + instructions; executed_ < end;) {
    if (!regroup()) {
      if (!waiting_) return Stop::exited;
      wake();
    } else {
      step();
    }
    if (at_barrier_) return Stop::barrier;
  }
  if (executed_ > block.launch.options.instruction_limit) {
    fail("deadlock", "a warp executed " + std::to_string(executed_) + " instructions; it seems to wait forever");
  }
  return Stop::time_slice;
}

// No lane can run, some wait: for lanes that have exited since, or for ever.
void Warp::wake() {
  const int lane = std::countr_zero(waiting_);
  position_ = next[lane];
  Mask together = 0;
  for_lanes(waiting_, [&](int other) {
    if (next[other] == position_ && members_[other] == members_[lane]) together |= Mask{1} << other;
  });
  if (together == (members_[lane] & ~exited)) {
    waiting_ &= ~together;
    return;
  }
  std::ostringstream text;
  text << std::hex << "lanes 0x" << together << " wait for lanes 0x" << (members_[lane] & ~exited & ~together)
       << ", which never arrive";
  fail(instruction().row->lanes == Lanes::warp ? "divergent_barrier" : "deadlock", text.str(), lane);
}

// Runs the group until its lanes part, meet others, or wait.
void Warp::step() {
  const std::vector<Instruction>& code = block.launch.program.code;
  do {
    const Instruction& in = code[position_];
    ++executed_;
    ++block.launch.executed[position_];
    const Lanes lanes = in.row->lanes;
    if (lanes == Lanes::present) {
      const Mask mask = guarded(in, group_);
      if (mask) in.run(*this, in, mask);
      ++position_;
      continue;
    }
    for_lanes(group_, [&](int lane) { next[lane] = position_ + 1; });
    const Mask mask = guarded(in, group_);
    if (lanes == Lanes::flow) {
      if (mask) in.run(*this, in, mask);
    } else if (const Mask complete = mask ? gather(in, mask) : 0) {
      waiting_ &= ~complete;
      for_lanes(complete, [&](int lane) { next[lane] = position_ + 1; });
      in.run(*this, in, complete);
    }
    return;
  } while (position_ < limit_);
  for_lanes(group_, [&](int lane) { next[lane] = position_; });
}

// The lanes a .sync instruction runs for, or none while some have yet to arrive: those here then wait.
Mask Warp::gather(const Instruction& in, Mask lanes) {
  const bool whole = in.row->lanes == Lanes::warp;
  if (whole && exited & lanes_of_block()) {
    fail("divergent_barrier", "needs the whole warp, but some of its lanes have exited");
  }
  const auto members_of = [&](int lane) {
    return whole ? lanes_of_block() : static_cast<Mask>(known(in.operands.back(), lane, "a member mask"));
  };
  const int first = std::countr_zero(lanes);
  const Mask members = members_of(first);
  if (!(members >> first & 1)) fail("divergent_barrier", "the lane is not in its own member mask", first);
  Mask here = 0;
  for_lanes(lanes, [&](int lane) {
    if (members_of(lane) == members) {
      here |= Mask{1} << lane;
    } else {
      next[lane] = position_;  // comes back to it once the first lanes have passed or wait
    }
  });
  Mask arrived = here;
  for_lanes(waiting_, [&](int lane) {
    if (next[lane] == position_ && members_[lane] == members) arrived |= Mask{1} << lane;
  });
  if (arrived == (members & ~exited)) return arrived;
  for_lanes(here, [&](int lane) {
    next[lane] = position_;
    members_[lane] = members;
  });
  waiting_ |= here;
  return 0;
}

Mask Warp::guarded(const Instruction& in, Mask lanes) {
  if (in.guard.slot < 0) return lanes;
  const Row guard = row(in.guard);
  Mask mask = 0;
  for_lanes(lanes, [&](int lane) {
    if (guard.unknown[lane] & 1) known(in.guard, lane, "a branch");
    mask |= static_cast<Mask>((guard.value[lane] & 1) != in.guard.negated) << lane;
  });
  return mask;
}

uint64_t Warp::known(const Operand& o, int lane, const char* use) {
  const Row r = row(o);
  if (r.unknown[lane] & ((1 << o.width) - 1) && block.launch.options.check_uninitialised) {
    fail("uninitialised", std::string(use) + " depends on bytes that were never written", lane);
  }
  return r.value[lane];
}

void Warp::check_store(unsigned unknown, int lane) const {
  if (unknown && block.launch.options.check_uninitialised) {
    fail("uninitialised", "stores bytes that were never written, or depend on such bytes", lane);
  }
}

const Instruction& Warp::instruction() const { return block.launch.program.code[position_]; }

void Warp::fail(const std::string& kind, const std::string& message, int lane) const {
  std::string where = "block " + in_words(block.index) + ", warp " + std::to_string(index);
  if (lane >= 0) {
    const unsigned t = index * kLanes + lane, x = block.launch.block[0], y = block.launch.block[1];
    where = "block " + in_words(block.index) + ", thread " + in_words({t % x, t / x % y, t / x / y});
  }
  throw Failure{kind, message + " (" + where + ")"};
}

}  // namespace emulator
