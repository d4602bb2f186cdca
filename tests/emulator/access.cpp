// Memory as instructions reach it: checks, traffic and bank conflicts; ld and st.
#include <algorithm>
#include <cstring>

#include "warp.h"

namespace emulator {
namespace {

constexpr int kBankBytes = 4, kBanks = 32;

Space window_of(uint64_t address) {
  switch (address & kWindowMask) {
    case kSharedWindow: return Space::shared;
    case kLocalWindow: return Space::local;
    case kParameterWindow: return Space::param;
    default: return Space::global;
  }
}

std::string range(int64_t begin, int bytes) {
  return "bytes [" + std::to_string(begin) + ", " + std::to_string(begin + bytes) + ")";
}

// How often shared memory must be read to serve lanes that each want `bytes`: a bank gives one word at a time. Wide
// accesses are served a half or a quarter of a warp at a time.
struct Wavefronts {
  int needed = 0, least = 0;
};
Wavefronts wavefronts(const uint64_t* addresses, int bytes, Mask mask) {
  const int lanes_at_once = kLanes / std::max(1, bytes / kBankBytes);
  Wavefronts result;
  for (int first = 0; first < kLanes; first += lanes_at_once) {
    uint64_t words[kLanes];
    int count = 0, depth[kBanks] = {}, deepest = 0;
    for (int lane = first; lane < first + lanes_at_once; ++lane) {
      if (!(mask >> lane & 1)) continue;
      for (int b = 0; b < std::max(bytes, kBankBytes); b += kBankBytes)
        words[count++] = (addresses[lane] + b) / kBankBytes;
    }
    if (!count) continue;
    std::sort(words, words + count);
    const auto end = std::unique(words, words + count);
    for (auto w = words; w != end; ++w) deepest = std::max(deepest, ++depth[*w % kBanks]);
    result.needed += deepest;
    result.least += 1;
  }
  return result;
}

}  // namespace

uint8_t* Warp::shared_place(int lane, uint64_t offset, int bytes, Access access) {
  if (block.races) {
    const Races::Conflict conflict = block.races->touch(index, offset, bytes, access, position_);
    if (conflict.warp >= 0) {
      const Instruction& other = block.launch.program.code[conflict.position];
      const auto [file, line] = block.launch.program.module->location(other.statement->source);
      fail("race",
           "shared byte " + std::to_string(conflict.byte) + " was touched by warp " + std::to_string(conflict.warp) +
               " at " + file + ":" + std::to_string(line) + " (" + other.statement->text +
               ") with no barrier in between",
           lane);
    }
  }
  return block.shared.data.data() + offset;
}

Location Warp::reach(int lane, Space space, uint64_t address, int bytes, Access access, int align) {
  if (address % (align ? align : bytes)) {
    fail("misaligned", std::to_string(bytes) + " bytes at address " + std::to_string(address), lane);
  }
  const Space found = window_of(address);
  if (space == Space::generic || space == Space::param) {
    space = found;
    address &= found == Space::global ? ~uint64_t{0} : ~kWindowMask;
  } else if (found != Space::global) {
    fail("out_of_bounds", "a generic address of another space", lane);
  }
  const auto check = [&](uint64_t begin, uint64_t end, const char* what) {
    const uint64_t size = end - begin, width = bytes;
    if (address < begin || width > size || address - begin > size - width) {
      fail("out_of_bounds", range(address - begin, bytes) + " of " + std::to_string(end - begin) + " bytes of " + what,
           lane);
    }
  };
  switch (space) {
    case Space::shared: {
      check(kSharedBase, kSharedBase + block.shared.data.size(), "shared memory");
      const uint64_t offset = address - kSharedBase;
      return {shared_place(lane, offset, bytes, access), block.shared.unknown.data() + offset};
    }
    case Space::local: {
      Bytes& stack = local[lane];
      const Frame& frame = frames[lane].back();
      check(0, frame.local_base + frame.routine->frame_bytes, "local memory");
      return {stack.data.data() + address, stack.unknown.data() + address};
    }
    case Space::param:
      check(0, block.launch.parameters.size(), "kernel parameters");
      if (access != Access::read) fail("out_of_bounds", "kernel parameters cannot be written", lane);
      return {block.launch.parameters.data() + address, nullptr};
    default: break;
  }
  Allocation* a = Memory::instance().find(address, bytes);
  if (!a) {
    fail("out_of_bounds",
         std::string(access == Access::read ? "reads " : "writes ") + std::to_string(bytes) + " bytes at " +
             Memory::instance().nearest(address),
         lane);
  }
  return {reinterpret_cast<uint8_t*>(address), a->unknown.empty() ? nullptr : a->unknown.data() + (address - a->begin)};
}

void Warp::count(Space space, const uint64_t* addresses, int bytes, Mask mask, bool written) {
  if (space == Space::generic) space = window_of(addresses[std::countr_zero(mask)]);
  if (space == Space::shared) {
    const Wavefronts w = wavefronts(addresses, bytes, mask);
    BankUse& use = block.launch.bank_use[position_];
    ++use.accesses;
    use.wavefronts += w.needed;
    use.conflicts += w.needed - w.least;
  } else if (space == Space::global || space == Space::constant) {
    Counters& counters = block.launch.counters;
    uint64_t sectors[2 * kLanes];
    int sector_count = 0;
    for_lanes(mask, [&](int lane) {
      Memory::instance().touch(addresses[lane], bytes, written, counters);
      const uint64_t sector = addresses[lane] / kSectorBytes;
      if (!sector_count || sectors[sector_count - 1] != sector) sectors[sector_count++] = sector;
    });
    std::sort(sectors, sectors + sector_count);
    (written ? counters.written : counters.read).total +=
        (std::unique(sectors, sectors + sector_count) - sectors) * kSectorBytes;
  }
}

namespace {

struct Elements {  // of a vector access
  std::vector<Row> rows;
  int bytes;  // of one
  int total() const { return static_cast<int>(rows.size()) * bytes; }
};
Elements elements(Warp& warp, const Instruction& in, const Operand& o) {
  Elements e{{}, size_of(in.type())};
  if (o.parts.empty()) e.rows.push_back(warp.row(o));
  for (const Operand& part : o.parts) e.rows.push_back(warp.row(part));
  return e;
}

bool is_signed(Type type) { return type == Type::s8 || type == Type::s16 || type == Type::s32 || type == Type::s64; }

// ld.space.type d, [a]. Signed types are extended to the width of the register.
void ld(Warp& warp, const Instruction& in, Mask mask) {
  const Elements to = elements(warp, in, in.operands[0]);
  const int width = in.operands[0].parts.empty() ? in.operands[0].width : in.operands[0].parts[0].width;
  const int shift = is_signed(in.type()) ? 64 - 8 * to.bytes : 0;
  const uint64_t register_mask = width >= 8 ? ~uint64_t{0} : (uint64_t{1} << 8 * width) - 1;
  uint64_t addresses[kLanes];
  for_lanes(mask, [&](int lane) {
    addresses[lane] = warp.address(in.operands[1], lane);
    const Location location = warp.reach(lane, in.space, addresses[lane], to.total(), Access::read);
    for (size_t i = 0; i < to.rows.size(); ++i) {
      uint64_t value = 0;
      unsigned unknown = 0;
      std::memcpy(&value, location.data + i * to.bytes, to.bytes);
      if (shift) value = static_cast<uint64_t>(static_cast<int64_t>(value << shift) >> shift) & register_mask;
      for (int b = 0; location.unknown && b < to.bytes; ++b) unknown |= location.unknown[i * to.bytes + b] << b;
      if (shift && unknown >> (to.bytes - 1) & 1) unknown |= 0xffu << to.bytes;
      to.rows[i].value[lane] = value;
      to.rows[i].unknown[lane] = static_cast<uint8_t>(unknown);
    }
  });
  warp.count(in.space, addresses, to.total(), mask, false);
}

// st.space.type [a], b. What goes to global memory must be known; elsewhere unknown bytes are stored as such.
void st(Warp& warp, const Instruction& in, Mask mask) {
  const Elements from = elements(warp, in, in.operands[1]);
  uint64_t addresses[kLanes];
  for_lanes(mask, [&](int lane) {
    addresses[lane] = warp.address(in.operands[0], lane);
    const Location location = warp.reach(lane, in.space, addresses[lane], from.total(), Access::write);
    const bool global =
        in.space == Space::global || (in.space == Space::generic && window_of(addresses[lane]) == Space::global);
    for (size_t i = 0; i < from.rows.size(); ++i) {
      const uint8_t unknown = from.rows[i].unknown[lane];
      if (global) warp.check_store(unknown & ((1u << from.bytes) - 1), lane);
      std::memcpy(location.data + i * from.bytes, &from.rows[i].value[lane], from.bytes);
      for (int b = 0; location.unknown && b < from.bytes; ++b) location.unknown[i * from.bytes + b] = unknown >> b & 1;
    }
  });
  warp.count(in.space, addresses, from.total(), mask, true);
}

constexpr const char* kModifiers =
    "global const shared shared::cta local param param::entry param::func v2 v4 v8 volatile weak relaxed acquire "
    "release "
    "cta gpu sys cluster ca cg cs lu cv wb wt nc L1::no_allocate L1::evict_first L1::evict_last L1::evict_normal "
    "L1::evict_unchanged L2::64B L2::128B L2::256B";

const InstructionRow kRows[] = {
    {"ld", kModifiers, always<ld>},
    {"ldu", kModifiers, always<ld>},
    {"st", kModifiers, always<st>},
};

}  // namespace

const std::span<const InstructionRow> kMemoryRows = kRows;

}  // namespace emulator
