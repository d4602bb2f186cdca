#include "memory.h"

#include <algorithm>
#include <cstring>
#include <sstream>

namespace emulator {
namespace {

// Writes of the host are found in words: one that by chance equals the pattern in all four bytes is too rare to meet.
constexpr size_t kWordBytes = 4;

uint8_t pattern(uintptr_t address) {
  uint64_t x = (address / 8) * 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 29)) * 0xbf58476d1ce4e5b9ull;
  return static_cast<uint8_t>((x ^ (x >> 32)) >> (address % 8 * 8));
}

void adopt_host_writes(Allocation& a) {
  const auto* data = reinterpret_cast<const uint8_t*>(a.begin);
  bool any_unknown = false;
  for (size_t word = 0; word < a.bytes; word += kWordBytes) {
    const size_t end = std::min(word + kWordBytes, a.bytes);
    bool written = false;
    for (size_t i = word; i < end; ++i) written |= a.unknown[i] && data[i] != pattern(a.begin + i);
    for (size_t i = word; i < end; ++i) {
      if (written) a.unknown[i] = 0;
      any_unknown |= a.unknown[i];
    }
  }
  if (!any_unknown) a.unknown.clear();
}

}  // namespace

Memory& Memory::instance() {
  static Memory* memory = new Memory;  // outlives every tensor
  return *memory;
}

void Memory::add(void* begin, size_t bytes, bool fresh) {
  const std::lock_guard lock(mutex);
  Allocation a{reinterpret_cast<uintptr_t>(begin), bytes, {}, {}};
  if (fresh) {
    for (size_t i = 0; i < bytes; ++i) static_cast<uint8_t*>(begin)[i] = pattern(a.begin + i);
    a.unknown.assign(bytes, 1);
  }
  allocations_[a.begin] = std::move(a);
}

void Memory::remove(void* begin) {
  const std::lock_guard lock(mutex);
  allocations_.erase(reinterpret_cast<uintptr_t>(begin));
  last_ = nullptr;
}

Allocation* Memory::find(uintptr_t address, size_t bytes) {
  const auto holds = [=](const Allocation& a) { return address >= a.begin && address + bytes <= a.begin + a.bytes; };
  if (last_ && holds(*last_)) return last_;
  auto next = allocations_.upper_bound(address);
  if (next == allocations_.begin() || !holds((--next)->second)) return nullptr;
  return last_ = &next->second;
}

std::string Memory::nearest(uintptr_t address) const {
  std::ostringstream text;
  text << "0x" << std::hex << address << std::dec;
  const Allocation* best = nullptr;
  const auto distance = [&](const Allocation& a) {
    return address < a.begin ? a.begin - address : address - std::min(address, a.begin + a.bytes);
  };
  for (const auto& [begin, a] : allocations_) {
    if (!best || distance(a) < distance(*best)) best = &a;
  }
  if (!best) return text.str() + ", and no memory is allocated";
  if (address < best->begin) {
    text << ", " << best->begin - address << " bytes before";
  } else {
    text << ", at byte " << address - best->begin << " of";
  }
  text << " the nearest allocation of " << best->bytes << " bytes";
  return text.str();
}

void Memory::start_launch() {
  for (auto& [begin, a] : allocations_) {
    if (!a.unknown.empty()) adopt_host_writes(a);
  }
}

void Memory::mark_written(void* begin, size_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(begin);
  Allocation* a = find(address, bytes);
  if (a && !a->unknown.empty()) std::fill_n(a->unknown.begin() + (address - a->begin), bytes, 0);
}

void Memory::touch(uintptr_t address, size_t bytes, bool written, Counters& counters) {
  Allocation* found = find(address, 1);
  if (!found) return;  // a copy that reads fewer bytes than it fills
  Allocation& a = *found;
  bytes = std::min(bytes, a.begin + a.bytes - address);
  if (a.sectors.empty()) {
    a.sectors.assign((a.begin + a.bytes - 1) / kSectorBytes - a.begin / kSectorBytes + 1, 0);
    touched_.push_back(&a);
  }
  const uint8_t bit = written ? 2 : 1;
  Traffic& traffic = written ? counters.written : counters.read;
  const size_t first = a.begin / kSectorBytes;
  for (size_t s = address / kSectorBytes; s <= (address + bytes - 1) / kSectorBytes; ++s) {
    if (!(a.sectors[s - first] & bit)) traffic.distinct += kSectorBytes;
    a.sectors[s - first] |= bit;
  }
}

void Memory::finish_launch() {
  for (Allocation* a : touched_) a->sectors.clear();
  touched_.clear();
}

}  // namespace emulator
