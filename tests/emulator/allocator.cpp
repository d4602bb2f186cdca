#include "allocator.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <cstring>
#include <new>

#include "memory.h"

namespace emulator {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kGuard = 64;  // bytes on both sides that belong to nobody, so that the next allocation does not adjoin

void release(void* data) {
  if (!data) return;
  Memory::instance().remove(data);
  std::free(static_cast<char*>(data) - kGuard);
}

class Allocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &release, c10::Device(c10::DeviceType::CPU)};
    void* block = nullptr;
    if (posix_memalign(&block, kAlignment, bytes + 2 * kGuard)) throw std::bad_alloc();
    void* data = static_cast<char*>(block) + kGuard;
    Memory& memory = Memory::instance();
    memory.add(data, bytes, memory.allocations_are_fresh);
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

}  // namespace

void install_allocator() {
  static auto* allocator = new Allocator;
  c10::SetCPUAllocator(allocator, /*priority=*/255);
}

}  // namespace emulator
