// Hands out aligned pieces of a task's scratch memory. With a null base it only measures.
#pragma once

#include <cstdint>

namespace vitkernels {

class Scratch {
 public:
  explicit Scratch(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + size_) : nullptr;
    // The odd number of cache lines keeps buffers of power-of-two size from sharing cache sets.
    size_ += ((count * int64_t(sizeof(T)) + 63) / 64 | 1) * 64;
    return piece;
  }

  int64_t size() const { return size_; }

 private:
  char* base_;
  int64_t size_ = 0;
};

}  // namespace vitkernels
