// What the kernels of linear attention on a GPU share: tiles of tokens, and how threads share them.
#pragma once

#include "cuda/fast_softmax.h"
#include "cuda/vector.h"
#include "linear_attention/cuda/features.h"
#include "linear_attention/cuda/launches.h"
#include "linear_attention/cuda/products.h"

namespace vitkernels::cuda {

// Of the dtypes with the range of float: sums over many tokens leave that of float16.
template <DType kDType>
using LinearElement = std::conditional_t<kDType == DType::kFloat32, float, cutlass::bfloat16_t>;

// Without branches, behind which the compiler would take the lanes of a warp for diverged.
__device__ inline void load_16_bytes_if(bool exists, uint4& x, const void* from) {
  asm volatile("{ .reg .pred exists; setp.ne.s32 exists, %5, 0; @exists ld.global.v4.b32 {%0, %1, %2, %3}, [%4]; }"
               : "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w)
               : "l"(from), "r"(int(exists)));
}
__device__ inline void store_16_bytes_if(bool exists, void* to, uint4 x) {
  asm volatile(
      "{ .reg .pred exists; setp.ne.s32 exists, %5, 0; @exists st.global.v4.b32 [%0], {%1, %2, %3, %4}; }" ::"l"(to),
      "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(int(exists))
      : "memory");
}

// The tokens of a head from one on, from a column on that the thread chooses once.
struct HeadRows {
  char* first;
  unsigned row_bytes;
  bool is_aligned;
  int columns;  // of the head

  template <class Element>
  static __device__ HeadRows of(const TokenTensor& t, int batch, int head, int64_t columns, int column,
                                int64_t token = 0) {
    const Element* const first = t.at<Element>(batch, token, head) + column;
    return {reinterpret_cast<char*>(const_cast<Element*>(first)), unsigned(t.token_stride) * unsigned(sizeof(Element)),
            t.is_aligned, int(columns)};
  }
  template <class Element>
  __device__ Element* at(int token) const {
    return reinterpret_cast<Element*>(first + uint64_t(unsigned(token)) * row_bytes);
  }
};

// Sixteens of tokens that a warp of the forward takes at a time: two share what it reads of the state, if registers
// suffice.
template <class T, int kDim>
inline constexpr int kRowTilesOfForward = sizeof(T) == 2 && kDim <= 64 ? 2 : 1;

// Four warps, of which each copies, and multiplies as rows, some sixteens of the tokens of a tile.
template <class T, int kColumns, int kRowTilesOfWarp>
struct LinearTile {
  using Element = T;
  static constexpr int kDim = kColumns, kWarps = 4, kThreads = kWarps * kWarpSize;
  static constexpr int kRowTiles = kRowTilesOfWarp, kTokensOfWarp = 16 * kRowTiles;
  static constexpr int kTokens = kWarps * kTokensOfWarp;

  // A thread's vectors of 16 bytes: the same columns of every so many of its warp's tokens.
  static constexpr int kVector = 16 / int(sizeof(Element)), kLanesOfRow = kDim / kVector;
  static constexpr int kRowsOfPass = kWarpSize / kLanesOfRow, kPasses = kTokensOfWarp / kRowsOfPass;
  using Features = cuda::Features<kVector, kLanesOfRow>;

  static __device__ int first_token() { return int(threadIdx.x) / kWarpSize * kTokensOfWarp; }
  static __device__ int row_of(int pass) { return first_token() + pass * kRowsOfPass + lane_index() / kLanesOfRow; }
  static __device__ HeadRows rows_of(const TokenTensor& t, int batch, int head, int64_t columns, int64_t token = 0) {
    return HeadRows::of<Element>(t, batch, head, columns, column(), token);
  }
  static __device__ int column() { return lane_index() % kLanesOfRow * kVector; }

  using Tokens = SharedTile<Element, kTokens, kDim>;    // operands (tokens,columns)
  using State = SharedTile<Element, kDim, kDim>;        // operand (features,values)
  using Sums = SharedTile<float, kTokens, kDim>;        // results (tokens,columns)
  using TokenSums = Accumulators<kRowTiles, kDim / 8>;  // (MMA,MMA_M,MMA_N), of the warp's tokens

  // The thread's share of a tile in registers; zeros in the columns behind.
  struct Vectors {
    uint4 of_pass[kPasses] = {};

    __device__ void widen(int pass, float (&x)[kVector]) const {
      const Element* const elements = reinterpret_cast<const Element*>(&of_pass[pass]);
      CUTE_UNROLL
      for (int i = 0; i < kVector; ++i) x[i] = float(elements[i]);
    }
    __device__ void round(int pass, const float (&x)[kVector]) {
      Element* const elements = reinterpret_cast<Element*>(&of_pass[pass]);
      CUTE_UNROLL
      for (int i = 0; i < kVector; ++i) elements[i] = Element(x[i]);
    }

    // Tokens from `first` on, of which there are `count`; zeros behind these.
    __device__ __forceinline__ void load(const HeadRows& rows, int first, int count) {
      if (count >= kTokens && rows.is_aligned) {
        CUTE_UNROLL
        for (int pass = 0; pass < kPasses; ++pass) {
          load_16_bytes_if(column() < rows.columns, of_pass[pass],
                           rows.template at<const Element>(first + row_of(pass)));
        }
        return;
      }
      rarely();
      CUTE_UNROLL
      for (int pass = 0; pass < kPasses; ++pass) {
        Element* const elements = reinterpret_cast<Element*>(&of_pass[pass]);
        const Element* const from = rows.template at<const Element>(first + row_of(pass));
        CUTE_UNROLL
        for (int i = 0; i < kVector; ++i) {
          elements[i] = row_of(pass) < count && column() + i < rows.columns ? from[i] : Element(0);
        }
      }
    }
    __device__ __forceinline__ void store(const HeadRows& rows, int first, int count) const {
      if (count >= kTokens && rows.is_aligned) {
        CUTE_UNROLL
        for (int pass = 0; pass < kPasses; ++pass) {
          store_16_bytes_if(column() < rows.columns, rows.template at<Element>(first + row_of(pass)), of_pass[pass]);
        }
        return;
      }
      rarely();
      CUTE_UNROLL
      for (int pass = 0; pass < kPasses; ++pass) {
        const Element* const elements = reinterpret_cast<const Element*>(&of_pass[pass]);
        Element* const to = rows.template at<Element>(first + row_of(pass));
        CUTE_UNROLL
        for (int i = 0; i < kVector; ++i) {
          if (row_of(pass) < count && column() + i < rows.columns) to[i] = elements[i];
        }
      }
    }

    __device__ void load_shared(const Element* tile) {
      CUTE_UNROLL
      for (int pass = 0; pass < kPasses; ++pass) of_pass[pass] = *reinterpret_cast<const uint4*>(place(tile, pass));
    }
    __device__ void store_shared(Element* tile) const {
      CUTE_UNROLL
      for (int pass = 0; pass < kPasses; ++pass) *reinterpret_cast<uint4*>(place(tile, pass)) = of_pass[pass];
    }

    // Becomes phi of itself.
    __device__ __forceinline__ void apply(const Features& features) {
      if (features.map == FeatureMap::kIdentity) return;
      if (features.map == FeatureMap::kRelu && sizeof(Element) == 2) {
        CUTE_UNROLL
        for (int pass = 0; pass < kPasses; ++pass) relu(of_pass[pass]);
        return;
      }
      CUTE_UNROLL
      for (int pass = 0; pass < kPasses; ++pass) of_pass[pass] = mapped(of_pass[pass], features);
    }
    // Rows that are no tokens have features like others.
    __device__ void clear_behind(int count) {
      if (count >= kTokens) return;
      rarely();
      CUTE_UNROLL
      for (int pass = 0; pass < kPasses; ++pass) {
        if (row_of(pass) >= count) of_pass[pass] = uint4{};
      }
    }

    // Called: inline, the code of all vectors would be interleaved, in more registers than there are.
    static __device__ __noinline__ uint4 mapped(uint4 vector, Features features) {
      Element* const elements = reinterpret_cast<Element*>(&vector);
      float x[kVector];
      CUTE_UNROLL
      for (int i = 0; i < kVector; ++i) x[i] = float(elements[i]);
      features.apply(x);
      CUTE_UNROLL
      for (int i = 0; i < kVector; ++i) elements[i] = Element(x[i]);
      return vector;
    }

   private:
    template <class E>
    static __device__ E* place(E* tile, int pass) {
      return tile + typename Tokens::Layout{}(row_of(pass), column());
    }
    static __device__ void relu(uint4& x) {
      for (uint32_t* pair : {&x.x, &x.y, &x.z, &x.w}) {
        if constexpr (sizeof(Element) == 2) asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(*pair) : "r"(0u));
      }
    }
  };

  // Copies tokens to a tile as `map` has them, vector by vector: where registers are few.
  template <class Map>
  static __device__ __forceinline__ void copy(const HeadRows& rows, int first, int count, Element* tile, Map&& map) {
#pragma unroll 1
    for (int pass = 0; pass < kPasses; ++pass) {
      const int row = row_of(pass);
      const Element* const from = rows.template at<const Element>(first + row);
      uint4 vector{};
      if (rows.is_aligned) {
        load_16_bytes_if(row < count && column() < rows.columns, vector, from);
      } else {
        Element* const elements = reinterpret_cast<Element*>(&vector);
        CUTE_UNROLL
        for (int i = 0; i < kVector; ++i) {
          if (row < count && column() + i < rows.columns) elements[i] = from[i];
        }
      }
      vector = map(vector);  // by all lanes
      if (row >= count) vector = uint4{};
      *reinterpret_cast<uint4*>(tile + typename Tokens::Layout{}(row, column())) = vector;
    }
  }

  // The thread's vector of a row of results.
  static __device__ void load_sums(const float* tile, int pass, float (&x)[kVector]) {
    CUTE_UNROLL
    for (int i = 0; i < kVector; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(tile + typename Sums::Layout{}(row_of(pass), column() + i));
      x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
    }
  }

  // A thread's accumulators are pairs of columns of two tokens: where they lie.
  static constexpr int kRowsOfThread = 2 * kRowTiles;
  static __device__ int token_of(int r) { return first_token() + lane_index() / 4 + 8 * r; }
  static __device__ int column_of(int n) { return lane_index() % 4 * 2 + 8 * n; }

  static __device__ void store_sums(const TokenSums& acc, float* tile) {
    CUTE_UNROLL
    for (int n = 0; n < kDim / 8; ++n) {
      CUTE_UNROLL
      for (int r = 0; r < kRowsOfThread; ++r) {
        *reinterpret_cast<float2*>(tile + typename Sums::Layout{}(token_of(r), column_of(n))) =
            float2{acc(r % 2 * 2, r / 2, n), acc(r % 2 * 2 + 1, r / 2, n)};
      }
    }
  }

  struct alignas(2 * sizeof(Element)) Pair {
    Element x, y;
  };
  static __device__ Pair& pair_at(Element* tile, int r, int n) {
    return *reinterpret_cast<Pair*>(tile + typename Tokens::Layout{}(token_of(r), column_of(n)));
  }
  // Rounded.
  static __device__ void store_pairs(const TokenSums& acc, Element* tile) {
    CUTE_UNROLL
    for (int n = 0; n < kDim / 8; ++n) {
      CUTE_UNROLL
      for (int r = 0; r < kRowsOfThread; ++r) {
        pair_at(tile, r, n) = {Element(acc(r % 2 * 2, r / 2, n)), Element(acc(r % 2 * 2 + 1, r / 2, n))};
      }
    }
  }

  // Adds rows, from the thread's first column on, times a factor.
  static __device__ void add_rows(TokenSums& out, const HeadRows& rows, int first, int count, float factor) {
    rarely();
    CUTE_UNROLL
    for (int r = 0; r < kRowsOfThread; ++r) {
      if (token_of(r) >= count) continue;
      const Element* const row = rows.at<const Element>(first + token_of(r));
      CUTE_UNROLL
      for (int n = 0; n < kDim / 8; ++n) {
        CUTE_UNROLL
        for (int i = 0; i < 2; ++i) {
          float& x = out(r % 2 * 2 + i, r / 2, n);
          if (column_of(n) + i < rows.columns) x = fmaf(float(row[8 * n + i]), factor, x);
        }
      }
    }
  }

  // The warp's tokens in a tile as operand A, and their products with a state (features,values), or its transpose.
  using Rows = StoredOperand<Element, kTokens, kDim, Depth::kAlongRows, true>;
  using Held = std::conditional_t<sizeof(Element) == 2, HeldOperand<Element, kRowTiles, kDim>, Rows>;
  static __device__ Held hold(const Element* tokens) { return Held(Rows(tokens, first_token())); }
  template <Depth kFeatures>
  static __device__ __forceinline__ TokenSums times_state(const Held& tokens, const Element* state, bool allow_tf32) {
    const StoredOperand<Element, kDim, kDim, kFeatures, false> b(state, 0);
    TokenSums acc;
    cute::clear(acc);
    add_products<Element, kDim>(acc, tokens, b, allow_tf32);
    return acc;
  }
};

// The (batch, head) pair of a block and its share of tiles, one of `blocks`. Tiles count from the batch's first token.
struct LinearTask {
  int pair, block, batch, head;
  int64_t first_token;
  int count, first_tile, end_tile;

  // `find_tokens(batch)` is the range of its tokens.
  template <class FindTokens>
  __device__ LinearTask(int blocks, int64_t heads, int tokens_of_tile, FindTokens&& find_tokens) {
    pair = int(blockIdx.x) / blocks, block = int(blockIdx.x) - pair * blocks;
    batch = pair / int(heads), head = pair - batch * int(heads);
    const Range tokens = find_tokens(batch);
    first_token = tokens.begin, count = int(tokens.end - tokens.begin);
    const int64_t tiles = (int64_t(count) + tokens_of_tile - 1) / tokens_of_tile;
    first_tile = int(tiles * block / blocks), end_tile = int(tiles * (block + 1) / blocks);
  }
};

// Calls f(padded head dimension).
template <DType kDType, class Function>
auto dispatch_linear_dim(const LinearProblem& p, Function&& f) {
  const int64_t dim = std::max(p.head_dim, p.value_dim);
  if (dim <= 32) return f(cute::Int<32>{});
  if constexpr (kDType != DType::kFloat32) {
    if (dim > 64) return f(cute::Int<128>{});
  }
  return f(cute::Int<64>{});
}

}  // namespace vitkernels::cuda
