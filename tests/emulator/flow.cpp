// Branches, calls, exits, fences, and the special registers.
#include <map>

#include "warp.h"

namespace emulator {
namespace {

void bra(Warp& warp, const Instruction& in, Mask mask) {
  for_lanes(mask, [&](int lane) { warp.next[lane] = in.targets[0]; });
}

void brx_idx(Warp& warp, const Instruction& in, Mask mask) {
  for_lanes(mask, [&](int lane) {
    const uint64_t i = warp.known(in.operands[0], lane, "a branch") & 0xffffffff;
    if (i >= in.targets.size()) warp.fail("out_of_bounds", "branch target " + std::to_string(i), lane);
    warp.next[lane] = in.targets[i];
  });
}

void copy_parameters(Bytes& local, const std::vector<Instruction::Copy>& copies, int64_t from, int64_t to) {
  for (const Instruction::Copy& c : copies) {
    std::copy_n(local.data.begin() + from + c.from, c.size, local.data.begin() + to + c.to);
    std::copy_n(local.unknown.begin() + from + c.from, c.size, local.unknown.begin() + to + c.to);
  }
}

void call(Warp& warp, const Instruction& in, Mask mask) {
  if (in.callee->function->is_defined) {
    for_lanes(mask, [&](int lane) {
      const int64_t caller = warp.frames[lane].back().local_base;
      warp.enter(lane, *in.callee, &in, warp.position() + 1);
      copy_parameters(warp.local[lane], in.arguments, caller, warp.frames[lane].back().local_base);
    });
  } else if (in.callee->function->name == "vprintf") {
    return;  // what a kernel prints is not shown
  } else if (in.callee->function->name == "__assertfail") {
    warp.fail("trap", "an assertion failed", std::countr_zero(mask));
  } else {
    warp.fail("unknown_instruction", in.callee->function->name + " has no body", std::countr_zero(mask));
  }
}

void ret(Warp& warp, const Instruction&, Mask mask) {
  for_lanes(mask, [&](int lane) {
    const Frame frame = warp.frames[lane].back();
    warp.leave(lane);
    if (frame.call) {
      copy_parameters(warp.local[lane], frame.call->results, frame.local_base, warp.frames[lane].back().local_base);
    }
  });
}

void exit(Warp& warp, const Instruction&, Mask mask) {
  for_lanes(mask, [&](int lane) {
    while (!warp.frames[lane].empty()) warp.leave(lane);
  });
}

void trap(Warp& warp, const Instruction&, Mask mask) {
  warp.fail("trap", "the kernel trapped", std::countr_zero(mask));
}

// Lanes run one instruction at a time and memory is always consistent: fences and hints have nothing to do.
void nothing(Warp&, const Instruction&, Mask) {}

const InstructionRow kRows[] = {
    {"bra", "uni", always<bra>, Lanes::flow},
    {"brx.idx", "uni", always<brx_idx>, Lanes::flow},
    {"call", "uni", always<call>, Lanes::flow},
    {"ret", "uni", always<ret>, Lanes::flow},
    {"exit", "", always<exit>, Lanes::flow},
    {"trap", "", always<trap>, Lanes::flow},
    {"membar", "cta gl sys", always<nothing>},
    {"fence", "sc acq_rel cta gpu sys cluster proxy async shared::cta global", always<nothing>},
    {"nanosleep", "", always<nothing>},
    {"prefetch", "global local L1 L2", always<nothing>},
    {"griddepcontrol", "launch_dependents wait", always<nothing>},
};

template <int axis>
unsigned thread_index(const Thread& t) {
  const auto& block = t.warp.block.launch.block;
  const unsigned linear = t.warp.index * kLanes + t.lane;
  return axis == 0 ? linear % block[0] : axis == 1 ? linear / block[0] % block[1] : linear / block[0] / block[1];
}

using Of = const Thread&;
const std::map<std::string_view, Special> kSpecialRegisters = {
    {"%tid.x", [](Of t) -> uint64_t { return thread_index<0>(t); }},
    {"%tid.y", [](Of t) -> uint64_t { return thread_index<1>(t); }},
    {"%tid.z", [](Of t) -> uint64_t { return thread_index<2>(t); }},
    {"%ntid.x", [](Of t) -> uint64_t { return t.warp.block.launch.block[0]; }},
    {"%ntid.y", [](Of t) -> uint64_t { return t.warp.block.launch.block[1]; }},
    {"%ntid.z", [](Of t) -> uint64_t { return t.warp.block.launch.block[2]; }},
    {"%ctaid.x", [](Of t) -> uint64_t { return t.warp.block.index[0]; }},
    {"%ctaid.y", [](Of t) -> uint64_t { return t.warp.block.index[1]; }},
    {"%ctaid.z", [](Of t) -> uint64_t { return t.warp.block.index[2]; }},
    {"%nctaid.x", [](Of t) -> uint64_t { return t.warp.block.launch.grid[0]; }},
    {"%nctaid.y", [](Of t) -> uint64_t { return t.warp.block.launch.grid[1]; }},
    {"%nctaid.z", [](Of t) -> uint64_t { return t.warp.block.launch.grid[2]; }},
    {"%laneid", [](Of t) -> uint64_t { return t.lane; }},
    {"%warpid", [](Of t) -> uint64_t { return t.warp.index; }},
    {"%nwarpid", [](Of t) -> uint64_t { return t.warp.block.warps.size(); }},
    {"%smid", [](Of) -> uint64_t { return 0; }},
    {"%nsmid", [](Of t) -> uint64_t { return t.warp.block.launch.options.multiprocessors; }},
    {"%lanemask_eq", [](Of t) -> uint64_t { return 1u << t.lane; }},
    {"%lanemask_lt", [](Of t) -> uint64_t { return (1u << t.lane) - 1; }},
    {"%lanemask_le", [](Of t) -> uint64_t { return (2u << t.lane) - 1; }},
    {"%lanemask_gt", [](Of t) -> uint64_t { return static_cast<Mask>(-2 << t.lane); }},
    {"%lanemask_ge", [](Of t) -> uint64_t { return static_cast<Mask>(-1 << t.lane); }},
    {"%dynamic_smem_size", [](Of t) -> uint64_t { return t.warp.block.launch.dynamic_shared; }},
    {"%total_smem_size",
     [](Of t) -> uint64_t { return t.warp.block.launch.program.static_shared + t.warp.block.launch.dynamic_shared; }},
    {"WARP_SZ", [](Of) -> uint64_t { return kLanes; }},
    // Clocks stand still: a kernel's results must not depend on them.
    {"%clock", [](Of) -> uint64_t { return 0; }},
    {"%clock64", [](Of) -> uint64_t { return 0; }},
    {"%globaltimer", [](Of) -> uint64_t { return 0; }},
};

}  // namespace

const std::span<const InstructionRow> kFlowRows = kRows;

Special special_register(std::string_view name) {
  const auto found = kSpecialRegisters.find(name);
  return found == kSpecialRegisters.end() ? nullptr : found->second;
}

}  // namespace emulator
