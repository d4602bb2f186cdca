// What the kernels of attention in windows share: the copies of a window's tokens, its logits and their softmax.
#pragma once

#include "attention/cuda/window_slots.h"
#include "cuda/copy.h"
#include "cuda/fast_softmax.h"
#include "cuda/fragments.h"
#include "cuda/mma.h"

namespace vitkernels::cuda {

// To global memory, which the compiler cannot see that a pointer from shared memory points to.
__device__ inline void store_16_bytes(void* to, uint4 x) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

// Four warps, of which each has sixteen slots as queries, and their whole rows of logits.
template <class T, int kDim>
struct WindowTile {
  using Element = T;
  static constexpr int kWarps = 4, kThreads = kWarps * kWarpSize, kSlots = kMaxWindowTokens;
  using SharedTokens = SharedTile<Element, kSlots, kDim>;
  using Mma = TileMma<Element, kWarps>;
  using LogitShape = cute::Shape<cute::Int<kSlots>, cute::Int<kSlots>>;
  static constexpr int kRows = 2, kVector = 8, kVectors = kDim / kVector / 4;  // of a thread
  using Softmax = FastSoftmax<kRows>;
  using Logits = decltype(cute::partition_fragment_C(Mma(false), LogitShape{}));  // (MMA,MMA_M,MMA_N)

  // Of a slot: its entry in the table, but for a constant, and WindowSlot::wraps.
  struct SlotScore {
    int entry;
    unsigned wraps;
  };

  // The (query,key) of each of a thread's logits, as (rows,columns).
  static __device__ auto coordinates() {
    return by_rows(Mma(false).get_slice(threadIdx.x).partition_C(cute::make_identity_tensor(LogitShape{})));
  }

  // The thread's share of each tensor: every fourth vector of two rows. A quad has rows in common, as of accumulators.
  struct Share {
    WindowSlot slot[kRows];
    bool exists[kRows];
    int column, vector;  // of the first vector, in the tensor and in a tile; the others lie at fixed distances

    __device__ Share(const WindowCudaParams& p, const WindowTasks& tasks, Element* tile) {
      const int first = int(threadIdx.x) / kWarpSize * 16 + lane_index() / 4;
      column = lane_index() % 4 * kVector;
      vector = int(&shared_tile<SharedTokens>(tile)(first, column) - tile);
      CUTE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        int at[kMaxAxes];
        tasks.coordinates(p, first + 8 * r, at);
        slot[r] = WindowSlot(p, at);
        exists[r] = first + 8 * r < p.num_slots();
      }
    }

    // Calls f(vector in a tile, column from this thread's first on) for each vector of a row.
    template <class Function>
    __device__ void for_each(int r, Function&& f) const {
      CUTE_UNROLL
      for (int v = 0; v < kVectors; ++v) f((vector + r * 8 * kDim) ^ (v * 4 * kVector), v * 4 * kVector);
    }

    // Starts the copy of a window's rows to a tile. `tokens` are those of this thread.
    __device__ void start(const char* rows, const TokenTensor& t, const int (&tokens)[kRows], int64_t columns,
                          Element* tile) const {
      CUTE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if (!exists[r]) continue;
        const Element* const from = row_of<const Element>(rows, tokens[r], t);
        for_each(
            r, [&](int vector, int c) { copy_16_bytes(tile + vector, from + c, column + c < int(columns) ? 16 : 0); });
      }
    }

    // Rounds the accumulators of a tile and stores its rows, through `tile`, of which a warp uses its own rows.
    template <class Acc>
    __device__ void store(const Acc& acc, char* rows, const TokenTensor& t, const int (&tokens)[kRows], int64_t columns,
                          Element* tile) const {
      cute::Tensor sT = shared_tile<SharedTokens>(tile);  // (slots,dim)
      __syncwarp();
      cute::copy(cute::AutoVectorizingCopy{}, convert<Element>(acc), Mma(false).get_slice(threadIdx.x).partition_C(sT));
      __syncwarp();
      CUTE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if (!exists[r]) continue;
        Element* const to = row_of<Element>(rows, tokens[r], t);
        for_each(r, [&](int vector, int c) {
          if (column + c >= int(columns)) return;
          store_16_bytes(to + c, *reinterpret_cast<const uint4*>(tile + vector));
        });
      }
    }

   private:
    template <class E>
    __device__ E* row_of(const char* rows, int token, const TokenTensor& t) const {
      const unsigned bytes = unsigned(t.token_stride) * unsigned(sizeof(Element));
      return reinterpret_cast<E*>(reinterpret_cast<uintptr_t>(rows) + uint64_t(unsigned(token)) * bytes) + column;
    }
  };

  // What a block looks up of its head and windows. What no copy writes, slots behind the last, is zeroed.
  template <class Window, class Find>
  static __device__ void prepare(const WindowCudaParams& p, const WindowTasks& tasks, Element* tiles, int tile_bytes,
                                 Window* windows, int count, Find&& find) {
    SlotScore* const slots = slots_of(windows);
    if (int(threadIdx.x) < count) find(windows[threadIdx.x], int(threadIdx.x));
    if (threadIdx.x < kSlots) {
      int at[kMaxAxes];
      tasks.coordinates(p, int(threadIdx.x), at);
      slots[threadIdx.x] = {p.grid.entry({{at[0], at[1], at[2]}}), WindowSlot(p, at).wraps};
    }
    for (int i = threadIdx.x; i < tile_bytes / 16; i += kThreads) reinterpret_cast<uint4*>(tiles)[i] = uint4{};
    __syncthreads();
  }
  template <class Window>
  static __device__ SlotScore* slots_of(Window* windows) {
    return reinterpret_cast<SlotScore*>(windows + kMaxWindowsOfBlock);
  }
  template <class Window>
  static constexpr int kTaskBytes = kMaxWindowsOfBlock * int(sizeof(Window)) + kSlots * int(sizeof(SlotScore));

  // What products of queries and keys are added to, before they are scaled: -inf for slots without a key.
  template <class Coordinates>
  static __device__ Logits bias_of(const WindowCudaParams& p, const SlotScore* slots, int head, const Coordinates& at,
                                   float scale) {
    Logits bias;
    cute::Tensor rows = by_rows(bias);  // (rows,columns)
    const float* const table = p.table ? p.table + head * p.table_head_stride + p.grid.center() : nullptr;
    const float inverse = 1.0f / scale;
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const int query = min(int(cute::get<0>(at(r, 0))), p.num_slots() - 1);
      CUTE_UNROLL
      for (int c = 0; c < cute::size<1>(at); ++c) {
        const int key = cute::get<1>(at(r, c));
        const bool exists = key < p.num_slots();
        rows(r, c) = exists ? 0.0f : -std::numeric_limits<float>::infinity();
        if (table && exists) rows(r, c) = table[slots[query].entry - slots[key].entry] * inverse;
      }
    }
    return bias;
  }

  // For each axis, a bit for each of the thread's logits: whether one of query and key lies behind the shift.
  template <class Coordinates>
  static __device__ void find_differing(const SlotScore* slots, const Coordinates& at, unsigned (&differ)[kMaxAxes]) {
    CUTE_UNROLL
    for (int a = 0; a < kMaxAxes; ++a) differ[a] = 0;
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      CUTE_UNROLL
      for (int c = 0; c < cute::size<1>(at); ++c) {
        const unsigned bits = slots[cute::get<0>(at(r, c))].wraps ^ slots[cute::get<1>(at(r, c))].wraps;
        CUTE_UNROLL
        for (int a = 0; a < kMaxAxes; ++a) differ[a] |= (bits >> a & 1) << (r * cute::size<1>(at) + c);
      }
    }
  }

  // Queries and keys on different sides of a shift do not see each other, in the windows that are last on `axes`.
  template <class Numbers>
  static __device__ void hide(Numbers& numbers, const unsigned (&differ)[kMaxAxes], unsigned axes) {
    rarely();
    unsigned hidden = 0;
    CUTE_UNROLL
    for (int a = 0; a < kMaxAxes; ++a) hidden |= (axes >> a & 1) ? differ[a] : 0;
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      CUTE_UNROLL
      for (int c = 0; c < cute::size<1>(numbers); ++c) {
        if (hidden >> (r * cute::size<1>(numbers) + c) & 1) numbers(r, c) = -std::numeric_limits<float>::infinity();
      }
    }
  }

  // Logits before the scale become exponentials relative to the maximum of their row.
  template <class Numbers>
  static __device__ Softmax exponentiate(Numbers& numbers, float scale) {
    Softmax softmax(scale * kLog2e);
    Softmax::raise(softmax.max, numbers);
    Softmax::combine(softmax.max);
    softmax.find_offsets([&](int r, float x) {
      CUTE_UNROLL
      for (int c = 0; c < cute::size<1>(numbers); ++c) numbers(r, c) -= x;
    });
    softmax.exponentiate(numbers);
    softmax.total(scale);
    return softmax;
  }
};

}  // namespace vitkernels::cuda
