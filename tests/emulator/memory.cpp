#include "memory.h"

#include <algorithm>
#include <cstring>
#include <sstream>
#include <utility>

namespace emulator {
namespace {

constexpr size_t kNear = 1 << 20;  // bytes within which a message names an allocation
constexpr size_t kWordBytes = 4;   // in which writes of the host are looked for

uint8_t pattern(uintptr_t address) {
  uint64_t x = (address / 8) * 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 29)) * 0xbf58476d1ce4e5b9ull;
  return static_cast<uint8_t>((x ^ (x >> 32)) >> (address % 8 * 8));
}

// A word equals the pattern by chance once in four billion; one between two that were written counts as written, and so
// do the last bytes that make no whole word.
void adopt_host_writes(Allocation& a) {
  enum State : uint8_t { known, written, untouched };
  const size_t words = (a.bytes + kWordBytes - 1) / kWordBytes;
  const auto* data = reinterpret_cast<const uint8_t*>(a.begin);
  const auto range = [&](size_t word) {
    return std::pair(word * kWordBytes, std::min((word + 1) * kWordBytes, a.bytes));
  };
  std::vector<State> states(words, known);
  for (size_t w = 0; w < words; ++w) {
    const auto [begin, end] = range(w);
    for (size_t i = begin; i < end; ++i) {
      if (a.unknown[i] && states[w] != written) states[w] = data[i] == pattern(a.begin + i) ? untouched : written;
    }
  }
  bool any_unknown = false;
  for (size_t w = 0; w < words; ++w) {
    const auto [begin, end] = range(w);
    const bool after_written = w > 0 && states[w - 1] == written;
    const bool before_written = w + 1 < words ? states[w + 1] == written : end - begin < kWordBytes;
    if (states[w] == written || (after_written && before_written))
      std::fill(&a.unknown[begin], &a.unknown[begin] + (end - begin), 0);
    else
      any_unknown |= states[w] == untouched;
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
  const auto holds = [=](const Allocation& a) {
    return address >= a.begin && bytes <= a.bytes && address - a.begin <= a.bytes - bytes;
  };
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
  if (!best || distance(*best) > kNear) return text.str() + ", where nothing is allocated";
  if (address < best->begin)
    text << ", " << best->begin - address << " bytes before an allocation of ";
  else
    text << ", byte " << address - best->begin << " of an allocation of ";
  text << best->bytes << " bytes";
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
