// Global memory: the live allocations of the host, which of their bytes have a value, and which sectors were touched.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "report.h"

namespace emulator {

constexpr size_t kSectorBytes = 32;

struct Allocation {
  uintptr_t begin = 0;
  size_t bytes = 0;
  std::vector<uint8_t> unknown;  // 1 for each byte without a value; empty: all have one
  std::vector<uint8_t> sectors;  // touched in this launch: bit 0 read, bit 1 written; empty: none
};

class Memory {
 public:
  static Memory& instance();

  // Host writes cannot be seen. Fresh memory is therefore filled with a pattern that depends on the address; what
  // differs from it when a kernel starts has been written by the host.
  void add(void* begin, size_t bytes, bool fresh);
  void remove(void* begin);

  // The allocation that holds all of [address, address + bytes), or nullptr.
  Allocation* find(uintptr_t address, size_t bytes);
  std::string nearest(uintptr_t address) const;  // for a message

  void mark_written(void* begin, size_t bytes);  // by the host, through the runtime

  void start_launch();
  void touch(uintptr_t address, size_t bytes, bool written, Counters& counters);  // for the counters
  void finish_launch();

  bool allocations_are_fresh = false;
  std::recursive_mutex mutex;  // held by whoever runs a kernel or changes the list

 private:
  std::map<uintptr_t, Allocation> allocations_;
  std::vector<Allocation*> touched_;
  Allocation* last_ = nullptr;
};

}  // namespace emulator
