// The windows that a block walks through, and their slots: the places of tokens in a window, in row-major order.
#pragma once

#include <algorithm>
#include <cute/tensor.hpp>
#include <initializer_list>

#include "attention/cuda/windows.h"
#include "common/divisor.h"
#include "cuda/fast_softmax.h"

namespace vitkernels::cuda {

// Which windows a block takes, of which head. Heads vary fastest, since their rows lie beside each other.
struct WindowTasks {
  static constexpr int kMaxTensors = 7;

  int heads, num_windows, windows_of_block;
  unsigned row_bytes[kMaxTensors] = {};  // of each tensor, from a token to the next
  Divisor by_heads, by_windows[kMaxAxes], by_class[kMaxAxes], by_size[kMaxAxes];

  WindowTasks(const WindowCudaParams& p, std::initializer_list<const TokenTensor*> tensors)
      : heads(int(p.heads)), num_windows(int(p.num_windows())), windows_of_block(int(vitkernels::windows_of_block(p))) {
    by_heads = Divisor(heads);
    std::transform(tensors.begin(), tensors.end(), row_bytes,
                   [](const TokenTensor* t) { return unsigned(t->token_stride) * 2; });
    for (int a = 0; a < kMaxAxes; ++a) {
      by_windows[a] = Divisor(p.axis[a].num_windows());
      by_class[a] = Divisor(p.axis[a].num_of_class());
      by_size[a] = Divisor(p.axis[a].size);
    }
  }

  __device__ void coordinates(const WindowCudaParams& p, int slot, int (&at)[kMaxAxes]) const {
    CUTE_UNROLL
    for (int a = kMaxAxes - 1; a >= 0; --a) {
      const int next = by_size[a].divide(slot);
      at[a] = slot - next * p.axis[a].size;
      slot = next;
    }
  }
};

// A slot: its token, counted from that of the window's first slot, and on which axes it lies behind the shift.
struct WindowSlot {
  int token = 0;
  unsigned wraps = 0;  // a bit for each axis

  WindowSlot() = default;
  __device__ WindowSlot(const WindowCudaParams& p, const int (&at)[kMaxAxes]) {
    CUTE_UNROLL
    for (int a = 0; a < kMaxAxes; ++a) {
      token = token * p.axis[a].tokens + at[a] * p.axis[a].step;
      wraps |= unsigned(at[a] >= p.axis[a].size - p.axis[a].shift) << a;
    }
  }
};

// A window, as a block looks it up in shared memory: where the rows of its head begin in each tensor, and which tokens
// are its.
template <int kTensors>
struct alignas(16) Window {
  char* rows[kTensors];
  int64_t statistics;  // of the head's first token, as in lse
  int token;           // of the first slot, on the map
  unsigned is_last;    // a bit for each axis with a shift, on which it is the last of its class

  // Returns the batch.
  __device__ int find(const WindowCudaParams& p, const WindowTasks& tasks, int index, int head) {
    int at[kMaxAxes];
    CUTE_UNROLL
    for (int a = kMaxAxes - 1; a >= 0; --a) {
      const int next = tasks.by_windows[a].divide(index);
      at[a] = index - next * p.axis[a].num_windows();
      index = next;
    }
    token = 0, is_last = 0;
    CUTE_UNROLL
    for (int a = 0; a < kMaxAxes; ++a) {
      const WindowAxis& axis = p.axis[a];
      const int of_class = tasks.by_class[a].divide(at[a]), i = at[a] - of_class * axis.num_of_class();
      token = token * axis.tokens + ((i * axis.size + axis.shift) * axis.step + of_class);
      is_last |= unsigned(axis.shift > 0 && i == axis.num_of_class() - 1) << a;
    }
    statistics = int64_t(index) * p.num_tokens() * p.heads + head;
    return index;
  }

  // Where the rows of the first kCount tensors begin, two a load. Read before a copy starts: one that follows a load
  // from shared memory waits for it.
  template <int kCount>
  __device__ void find_rows(char* (&found)[kCount]) const {
    static_assert(kCount % 2 == 0);
    CUTE_UNROLL
    for (int t = 0; t < kCount; t += 2) {
      asm volatile("ld.shared.v2.b64 {%0, %1}, [%2];"
                   : "=l"(found[t]), "=l"(found[t + 1])
                   : "r"(cute::cast_smem_ptr_to_uint(&rows[t]))
                   : "memory");
    }
  }

  // The tokens of some slots, on the map.
  template <int kSlots>
  __device__ void find_tokens(const WindowCudaParams& p, const WindowSlot (&slots)[kSlots],
                              int (&tokens)[kSlots]) const {
    CUTE_UNROLL
    for (int i = 0; i < kSlots; ++i) tokens[i] = token + slots[i].token;
    if (is_last == 0) return;
    rarely();
    int size = 1;
    CUTE_UNROLL
    for (int a = kMaxAxes - 1; a >= 0; --a) {
      size *= p.axis[a].tokens;
      CUTE_UNROLL
      for (int i = 0; i < kSlots; ++i) {
        if ((is_last & slots[i].wraps) >> a & 1) tokens[i] -= size;
      }
    }
  }
};

}  // namespace vitkernels::cuda
