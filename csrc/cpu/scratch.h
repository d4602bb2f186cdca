// Allocates aligned buffers from a task's scratch memory. With a null base it only measures.
#pragma once

#include <cstdint>

namespace vitkernels {

class Scratch {
 public:
  explicit Scratch(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    T* buffer = base_ ? reinterpret_cast<T*>(base_ + size_) : nullptr;
    // An odd number of cache lines keeps buffers of power-of-two size in different cache sets.
    size_ += ((count * int64_t(sizeof(T)) + 63) / 64 | 1) * 64;
    return buffer;
  }

  int64_t size() const { return size_; }

 private:
  char* base_;
  int64_t size_ = 0;
};

}  // namespace vitkernels
