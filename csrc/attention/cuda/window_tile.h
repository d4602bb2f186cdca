// What the kernels of attention in windows share: the copies of a window's tokens, its logits and their softmax.
#pragma once

#include "attention/cuda/window_slots.h"
#include "cuda/copy.h"
#include "cuda/fast_softmax.h"
#include "cuda/fragments.h"
#include "cuda/mma.h"
#include "cuda/shared_fragments.h"

namespace vitkernels::cuda {

// Without a branch, behind which the compiler would take the lanes of a warp for diverged.
__device__ inline void store_16_bytes_if(bool exists, void* to, uint4 x) {
  asm volatile(
      "{ .reg .pred exists; setp.ne.s32 exists, %5, 0; @exists st.global.v4.b32 [%0], {%1, %2, %3, %4}; }" ::"l"(to),
      "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(int(exists))
      : "memory");
}
__device__ inline uint4 load_shared_16_bytes(unsigned address) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}
__device__ inline void store_shared_16_bytes(unsigned address, uint4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}
__device__ inline uint32_t load_shared(unsigned address) {
  uint32_t x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}
__device__ inline void store_shared(unsigned address, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}
__device__ inline void copy_16_bytes(unsigned shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
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
  using Sums = decltype(cute::partition_fragment_C(
      Mma(false), cute::Shape<cute::Int<kSlots>, cute::Int<kDim>>{}));  // (MMA,MMA_M,MMA_N)

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
    int column;       // of the first vector
    unsigned vector;  // where it lies in a tile, in bytes; the others lie at fixed distances
    unsigned pair;    // where the thread's first accumulators do

    __device__ Share(const WindowCudaParams& p, const WindowTasks& tasks) {
      const int first = int(threadIdx.x) / kWarpSize * 16 + lane_index() / 4;
      column = lane_index() % 4 * kVector;
      vector = bytes_to<SharedTokens>(first, column);
      pair = bytes_to<SharedTokens>(first, lane_index() % 4 * 2);
      CUTE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        int at[kMaxAxes];
        tasks.coordinates(p, first + 8 * r, at);
        slot[r] = WindowSlot(p, at);
        exists[r] = first + 8 * r < p.num_slots();
      }
    }

    // Starts the copy of a window's rows to a tile. `tokens` are those of this thread.
    __device__ void start(char* rows, unsigned row_bytes, const int (&tokens)[kRows], int columns,
                          unsigned tile) const {
      char* const first = from_column(rows);
      CUTE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        CUTE_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          copy_16_bytes(vector_of(tile, r, v), first + uint64_t(unsigned(tokens[r])) * row_bytes + v * kBytesToNext,
                        has_vector(r, v, columns) ? 16 : 0);
        }
      }
    }

    // Rounds the accumulators of a tile and stores its rows, through `tile`, of which a warp uses its own rows.
    template <class Acc>
    __device__ void store(const Acc& acc, char* rows, unsigned row_bytes, const int (&tokens)[kRows], int columns,
                          unsigned tile) const {
      const auto rounded = convert<Element>(acc);                        // (MMA,MMA_M,MMA_N)
      const cute::Tensor pairs = cute::recast<const uint32_t>(rounded);  // (MMA,MMA_M,MMA_N)
      __syncwarp();
      CUTE_UNROLL
      for (int n = 0; n < cute::size<2>(pairs); ++n) {
        CUTE_UNROLL
        for (int r = 0; r < kRows; ++r) {
          store_shared(pair_of(tile, r, n), pairs(r, 0, n));
        }
      }
      __syncwarp();
      char* const first = from_column(rows);
      CUTE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        char* const to = first + uint64_t(unsigned(tokens[r])) * row_bytes;
        CUTE_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          store_16_bytes_if(has_vector(r, v, columns), to + v * kBytesToNext,
                            load_shared_16_bytes(vector_of(tile, r, v)));
        }
      }
    }

    // Where a tile has the thread's vectors, and its accumulators.
    __device__ unsigned vector_of(unsigned tile, int r, int v) const {
      return ((tile + vector) ^ unsigned(v * kBytesToNext)) + unsigned(r * 8 * kRowBytes<SharedTokens>);
    }
    __device__ unsigned pair_of(unsigned tile, int r, int n) const {
      return ((tile + pair) ^ unsigned(n * 16)) + unsigned(r * 8 * kRowBytes<SharedTokens>);
    }

   private:
    static constexpr int kBytesToNext = 4 * kVector * int(sizeof(Element));

    __device__ bool has_vector(int r, int v, int columns) const {
      return exists[r] && column + v * 4 * kVector < columns;
    }
    // The rest of an address is a product, which one instruction adds.
    __device__ char* from_column(char* rows) const {
      return computed_here(rows + unsigned(column) * unsigned(sizeof(Element)));
    }
  };

  // logits = first + products of the warp's rows of a tile and all rows of another.
  static __device__ __forceinline__ void multiply_rows(Logits& logits, const Logits& first, unsigned queries,
                                                       unsigned keys) {
    const FragmentAddress<SharedTokens, MatrixOrder::kByRows> a(int(threadIdx.x) / kWarpSize * 16);
    const FragmentAddress<SharedTokens, MatrixOrder::kByColumns> b;
    multiply_fragments<Element, kDim / 16>(
        logits, first, [&](auto& to, int k) { load_matrices(to, a(queries, 0, k)); },
        [&](auto& to, int j, int k) { load_matrices(to, b(keys, j, k)); });
  }
  // Of the warp's rows of rounded logits (queries,keys), the product with tokens of the keys.
  template <class Rounded>
  static __device__ __forceinline__ Sums multiply_values(const Rounded& rounded, unsigned values) {
    const FragmentAddress<SharedTokens, MatrixOrder::kByRows> b;
    return sum_of_products([&](auto& to, int k) { operand_a_of(to, rounded, k); },
                           [&](auto& to, int j, int k) { load_transposed_matrices(to, b(values, k, j)); });
  }

  template <class ReadA, class ReadB>
  static __device__ __forceinline__ Sums sum_of_products(ReadA&& read_a, ReadB&& read_b) {
    Sums sums, zeros;
    cute::clear(zeros);
    multiply_fragments<Element, kSlots / 16>(sums, zeros, read_a, read_b);
    return sums;
  }

  // What a block looks up of its head and windows.
  template <class Window, class Find>
  static __device__ void prepare(const WindowCudaParams& p, const WindowTasks& tasks, Window* windows, int count,
                                 Find&& find) {
    SlotScore* const slots = slots_of(windows);
    if (int(threadIdx.x) < count) find(windows[threadIdx.x], int(threadIdx.x));
    if (threadIdx.x < kSlots) {
      int at[kMaxAxes];
      tasks.coordinates(p, int(threadIdx.x), at);
      slots[threadIdx.x] = {p.grid.entry({{at[0], at[1], at[2]}}), WindowSlot(p, at).wraps};
    }
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
      const int query = cute::get<0>(at(r, 0));
      CUTE_UNROLL
      for (int c = 0; c < cute::size<1>(at); ++c) {
        const int key = cute::get<1>(at(r, c));
        const bool exists = key < p.num_slots();
        rows(r, c) = exists ? 0.0f : -std::numeric_limits<float>::infinity();
        if (table && exists && query < p.num_slots()) {
          rows(r, c) = unscaled(table[slots[query].entry - slots[key].entry], inverse);
        }
      }
    }
    return bias;
  }

  // The product of an entry and a factor. Finite ones stay finite, and so do they when they are scaled again: the lowest
  // of all may be a mask.
  static __device__ float unscaled(float entry, float inverse) {
    constexpr float kMax = std::numeric_limits<float>::max();
    const float x = entry * inverse, largest = kMax * (1.0f - 0x1p-22f) * fminf(inverse, 1.0f);
    return fabsf(entry) <= kMax ? fminf(fmaxf(x, -largest), largest) : x;
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
    softmax.exponentiate_from_max(numbers);
    softmax.total(scale);
    return softmax;
  }

  // Logits before the scale become probabilities, by the log-sum-exps of their rows. Those do not hold the sums of rows
  // whose logits are huge: such sums are found again.
  template <class Numbers>
  static __device__ void exponentiate_from(const float (&lse)[kRows], Numbers& numbers, float scale) {
    float offset[kRows];
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) offset[r] = lse[r] * kLog2e;
    if (__any_sync(kAllLanes, !(fmaxf(fabsf(offset[0]), fabsf(offset[1])) <= kMaxExpOffset))) {
      rarely();
      const Softmax softmax = exponentiate(numbers, scale);
      CUTE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const float factor = Softmax::factor_of(softmax.sum[r]);
        CUTE_UNROLL
        for (int c = 0; c < cute::size<1>(numbers); ++c) numbers(r, c) *= factor;
      }
      return;
    }
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      CUTE_UNROLL
      for (int c = 0; c < cute::size<1>(numbers); ++c) {
        numbers(r, c) = exp2_of(fmaf(numbers(r, c), scale * kLog2e, -offset[r]));
      }
    }
  }
};

}  // namespace vitkernels::cuda
