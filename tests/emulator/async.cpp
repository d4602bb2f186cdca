// cp.async: the data lies in shared memory only once its group has been waited for. Until then its bytes are unknown.
#include <cstring>
#include <utility>

#include "warp.h"

namespace emulator {
namespace {

// cp.async.level.shared.global [to], [from], bytes [, source bytes | ignore-source]
void cp_async(Warp& warp, const Instruction& in, Mask mask) {
  uint64_t sources[kLanes], targets[kLanes];
  const int bytes = static_cast<int>(warp.known(in.operands[2], std::countr_zero(mask), "a size"));
  Mask reading = 0;
  for_lanes(mask, [&](int lane) {
    targets[lane] = warp.address(in.operands[0], lane);
    int wanted = bytes;  // the rest is filled with zeros
    if (in.operands.size() > 3) {
      const Operand& o = in.operands[3];
      const uint64_t value = warp.known(o, lane, "a size");
      wanted = o.width == 1 ? (value & 1 ? 0 : bytes) : static_cast<int>(value & 0xffffffff);
    }
    Copy copy{targets[lane] - kSharedBase, std::vector<uint8_t>(bytes, 0), std::vector<uint8_t>(bytes, 0)};
    if (wanted > bytes || wanted < 0) warp.fail("out_of_bounds", "cp.async of more bytes than it may read", lane);
    sources[lane] = warp.address(in.operands[1], lane);
    if (wanted > 0) {
      const Location from = warp.reach(lane, Space::global, sources[lane], wanted, Access::read, bytes);
      std::memcpy(copy.data.data(), from.data, wanted);
      if (from.unknown) std::memcpy(copy.unknown.data(), from.unknown, wanted);
      reading |= Mask{1} << lane;
    }
    const Location to = warp.reach(lane, Space::shared, targets[lane], bytes, Access::write);
    std::memset(to.unknown, 1, bytes);
    warp.open_copies[lane].push_back(std::move(copy));
  });
  if (reading) warp.count(Space::global, sources, bytes, reading, false);
  warp.count(Space::shared, targets, bytes, mask, true);
}

void commit_group(Warp& warp, const Instruction&, Mask mask) {
  for_lanes(mask, [&](int lane) { warp.copies[lane].push_back(std::exchange(warp.open_copies[lane], {})); });
}

void complete(Warp& warp, int lane, const CopyGroup& group) {
  for (const Copy& c : group) {
    const Location to =
        warp.reach(lane, Space::shared, kSharedBase + c.to, static_cast<int>(c.data.size()), Access::write);
    std::memcpy(to.data, c.data.data(), c.data.size());
    std::memcpy(to.unknown, c.unknown.data(), c.data.size());
  }
}

// cp.async.wait_group n: all but the n newest groups have arrived.
void wait_group(Warp& warp, const Instruction& in, Mask mask) {
  for_lanes(mask, [&](int lane) {
    const uint64_t pending = warp.known(in.operands[0], lane, "a group count");
    for (auto& groups = warp.copies[lane]; groups.size() > pending; groups.pop_front())
      complete(warp, lane, groups.front());
  });
}

void wait_all(Warp& warp, const Instruction& in, Mask mask) {
  commit_group(warp, in, mask);
  for_lanes(mask, [&](int lane) {
    for (auto& groups = warp.copies[lane]; !groups.empty(); groups.pop_front()) complete(warp, lane, groups.front());
  });
}

const InstructionRow kRows[] = {
    {"cp.async", "ca cg shared shared::cta global L2::64B L2::128B L2::256B", always<cp_async>},
    {"cp.async.commit_group", "", always<commit_group>},
    {"cp.async.wait_group", "", always<wait_group>},
    {"cp.async.wait_all", "", always<wait_all>},
};

}  // namespace

const std::span<const InstructionRow> kAsyncRows = kRows;

}  // namespace emulator
