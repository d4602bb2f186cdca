// The machine: a launch, its blocks one after the other, their warps of 32 lanes.
#pragma once

#include <array>
#include <bit>
#include <deque>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "memory.h"
#include "program.h"
#include "races.h"
#include "report.h"

namespace emulator {

constexpr int kLanes = 32;
constexpr Mask kAllLanes = ~Mask{0};
constexpr int kBarriers = 16;

template <class F>
void for_lanes(Mask mask, F&& f) {
  if (mask == kAllLanes) {
    for (int lane = 0; lane < kLanes; ++lane) f(lane);
  } else {
    for (; mask; mask &= mask - 1) f(std::countr_zero(mask));
  }
}

struct Failure {  // thrown by an instruction; ends the launch
  std::string kind, message;
};

// A register of every lane. Bit b of `unknown`: byte b of the value has never been written, or depends on such a byte.
struct Row {
  uint64_t* value;
  uint8_t* unknown;
  void set(int lane, uint64_t v, unsigned u) const {
    value[lane] = v;
    unknown[lane] = static_cast<uint8_t>(u);
  }
};

// Bytes of memory. `unknown` has a byte each, or is null where all bytes are known and cannot become unknown.
struct Location {
  uint8_t* data;
  uint8_t* unknown;
};

struct Bytes {
  std::vector<uint8_t> data, unknown;
  void grow(size_t size) {
    data.resize(std::max(size, data.size()), 0xcd);
    unknown.resize(data.size(), 1);
  }
};

struct BankUse {  // of one instruction
  uint64_t accesses = 0, wavefronts = 0, conflicts = 0;
};

struct Launch {
  const Program& program;
  std::array<unsigned, 3> grid, block;
  size_t dynamic_shared;
  std::vector<uint8_t> parameters;
  const Options& options;
  Counters& counters;
  std::vector<uint64_t> executed;  // by position in the program, as the next
  std::vector<BankUse> bank_use;
  std::mt19937_64 random;
};

struct Frame {  // of a device function
  const Routine* routine;
  const Instruction* call;  // that made it; nullptr for the kernel's own
  int return_to;
  int base;            // its first row of registers
  int64_t local_base;  // its first byte of local memory
};

struct Copy {  // one cp.async of one lane
  size_t to;   // offset in shared memory
  std::vector<uint8_t> data, unknown;
};
using CopyGroup = std::vector<Copy>;

struct Block;

class Warp {
 public:
  Warp(Block& block, int index);

  void start_block();
  enum class Stop { exited, barrier, time_slice };
  Stop run(uint64_t instructions);  // until it ends, waits at a barrier, or has run that many instructions

  // For instructions ------------------------------------------------------------------------------------------------
  Row row(const Operand& o) { return row(o.slot); }
  Row row(int slot) {
    const size_t at = static_cast<size_t>(base_ + slot) * kLanes;
    return {&values_[at], &unknown_[at]};
  }
  uint64_t known(const Operand& o, int lane, const char* use);  // fails if a byte of it has no value
  uint64_t address(const Operand& o, int lane) {
    return (known(o, lane, "an address") & (o.width == 4 ? 0xffffffffu : ~0ull)) + o.offset;
  }

  // The memory at an address, checked for bounds, alignment and races.
  Location reach(int lane, Space space, uint64_t address, int bytes, Access access, int align = 0);
  void check_store(unsigned unknown, int lane) const;  // fails if a byte of it has no value
  // For the counters: one access of `bytes` by each lane in the mask.
  void count(Space space, const uint64_t* addresses, int bytes, Mask mask, bool written);

  [[noreturn]] void fail(const std::string& kind, const std::string& message, int lane = -1) const;

  Block& block;
  const int index;
  Mask exited = 0;
  Mask carry = 0, carry_unknown = 0;  // the carry flags
  std::array<int, kLanes> next{};     // program counters
  std::array<std::vector<Frame>, kLanes> frames;
  std::array<Bytes, kLanes> local;
  std::array<CopyGroup, kLanes> open_copies;
  std::array<std::deque<CopyGroup>, kLanes> copies;

  int position() const { return position_; }
  const Instruction& instruction() const;
  Mask present() const { return group_; }  // lanes that are at this instruction together
  void enter(int lane, const Routine& routine, const Instruction* call, int return_to);
  void leave(int lane);
  void wait_at_barrier() { at_barrier_ = true; }
  void pass_barrier() { at_barrier_ = false; }
  bool at_barrier() const { return at_barrier_; }

 private:
  bool regroup();
  void wake();
  void step();
  Mask gather(const Instruction& in, Mask lanes);
  Mask guarded(const Instruction& in, Mask lanes);
  Mask lanes_of_block() const;
  uint8_t* shared_place(int lane, uint64_t offset, int bytes, Access access);

  std::vector<uint64_t> values_;
  std::vector<uint8_t> unknown_;
  int base_ = 0;      // first row of the frame of the lanes that run now
  int position_ = 0;  // of the instruction that runs now
  Mask group_ = 0;
  int limit_ = 0;     // position at which other lanes may join
  Mask waiting_ = 0;  // lanes that wait for others to arrive at their .sync instruction
  std::array<Mask, kLanes> members_{};
  bool at_barrier_ = false;
  uint64_t executed_ = 0;
};

struct Barrier {
  int expected = 0;  // warps; 0: not in use
  int arrived = 0;
  std::vector<Warp*> waiting;
  std::vector<Mask> predicates;  // of bar.red, by waiting warp
  VectorClock clock;
};

struct Block {
  explicit Block(Launch& launch);
  void run(uint64_t linear, int& position);

  int threads() const { return static_cast<int>(launch.block[0] * launch.block[1] * launch.block[2]); }

  Launch& launch;
  std::array<unsigned, 3> index{};
  Bytes shared;
  std::optional<Races> races;
  std::array<Barrier, kBarriers> barriers;
  std::vector<std::unique_ptr<Warp>> warps;
};

struct Thread {  // what a special register may depend on
  const Warp& warp;
  int lane;
};

// Runs all blocks; throws Failure and leaves in `position` where.
void run(Launch& launch, int& position);

}  // namespace emulator
