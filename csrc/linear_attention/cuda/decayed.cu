// Decayed linear attention on a GPU, tile by tile: products of pairs inside a tile, and a running state between tiles,
// which stays float in registers. Powers of the decay only ever shrink, so that nothing overflows.
//
// A block has a share of a sequence's tiles, and some columns of the values: the columns of a state do not mix.

#include <algorithm>
#include <limits>

#include "linear_attention/cuda/decayed_launches.h"
#include "linear_attention/cuda/state_tile.h"

namespace vitkernels {
namespace {

using namespace cuda;

// Products of pairs as operand A. Of float, a thread has columns 2t and 2t + 1 for t and t + 4: PairRows reads alike.
template <class Element, class Acc>
struct PairOperand {
  const Acc& acc;  // (MMA,1,MMA_N)
  int first;       // step

  __device__ void read(uint32_t (&to)[4], int, int later) const {
    const int step = first + later;
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(Element) == 4) {
        to[i] = __float_as_uint(acc(i % 2 * 2 + i / 2, 0, step));
      } else {
        const int row = i % 2 * 2, n = 2 * step + i / 2;
        const Element pair[2] = {Element(acc(row, 0, n)), Element(acc(row + 1, 0, n))};
        to[i] = *reinterpret_cast<const uint32_t*>(pair);
      }
    }
  }
};
template <class Element, int kRows, int kColumns>
struct PairRows {
  const Element* tile;
  int first;  // step

  __device__ void read(uint32_t (&to)[4], int index, int later) const {
    if constexpr (sizeof(Element) == 2) {
      StoredOperand<Element, kRows, kColumns, Depth::kAcrossRows, false>(tile, 0).read(to, index, first + later);
    } else {
      CUTE_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int row = (first + later) * 8 + lane_index() % 4 * 2 + i % 2;
        const int column = index * 16 + lane_index() / 4 + i / 2 * 8;
        to[i] = __float_as_uint(tile[typename SharedTile<float, kRows, kColumns>::Layout{}(row, column)]);
      }
    }
  }
};

// Pairs of so many keys at a time: those of a whole tile do not fit into registers beside a large state. Rejected:
// addresses made anew for each tile, and no prefetching (both spill more).
template <class T, int kDim>
inline constexpr int kPairKeys = sizeof(T) == 4 && kDim > 32 ? 16 : 32;

template <class T, int kDim, bool kReads>
struct DecayedKernel {
  using Element = T;
  static constexpr int kValues = int(decayed_values(sizeof(T) == 4, kDim));
  using Tile = LinearTile<T, kDim, 1>;          // of queries and keys
  using ValueTile = LinearTile<T, kValues, 1>;  // of values and outputs
  using Tokens = typename Tile::Tokens;         // (tokens,columns)
  using Values = typename ValueTile::Tokens;    // (tokens,values)
  using State = SharedTile<Element, kDim, kValues>;
  static constexpr int kTokens = Tile::kTokens, kThreads = Tile::kThreads;
  static_assert(kTokens == kDecayedTile);
  static constexpr int kOperands =
      (kReads ? State::kElements + 3 * Tokens::kElements : Tokens::kElements) + Values::kElements;
  static constexpr int kOffsets = 2 * kTokens, kPowers = kTokens + 1;
  static constexpr int kSharedBytes = kOperands * int(sizeof(Element)) + (kOffsets + kPowers) * int(sizeof(float));
  static constexpr int kMinBlocks = 2;
  // Of float, and with 128 columns, the state leaves no registers for the tile to come.
  static constexpr bool kPrefetches = sizeof(Element) == 2 && kDim <= 64;
  // Warps stand below each other, sixteen features each or more, or in two columns.
  static constexpr int kWarpRows = kDim / 16 < Tile::kWarps ? kDim / 16 : Tile::kWarps;
  static constexpr int kRows = kDim / kWarpRows, kColumns = kValues * kWarpRows / Tile::kWarps;

  const DecayedParams& p;
  const int pair, split, first_value;
  const bool allow_tf32;
  Element *values, *scaled, *keys, *queries, *state;  // `scaled` are keys times powers of the decay
  float* by_offset;  // the weight of a key, by its offset from the query; zero if unseen
  float* powers;
  Accumulators<kRows / 16, kColumns / 8> acc;  // (MMA,MMA_M,MMA_N)

  __device__ DecayedKernel(const DecayedParams& p, int pair, int split, int slice, bool allow_tf32, Element* shared)
      : p(p),
        pair(pair),
        split(split),
        first_value(slice * kValues),
        allow_tf32(allow_tf32),
        values(shared),
        scaled(values + Values::kElements),
        keys(scaled + Tokens::kElements),
        queries(keys + Tokens::kElements),
        state(queries + Tokens::kElements),
        by_offset(reinterpret_cast<float*>(shared + kOperands)),
        powers(by_offset + kOffsets) {
    const float decay = static_cast<const float*>(p.decay)[pair % p.heads];
    const bool is_taken = decay >= 0.0f && decay <= 1.0f;
    const auto power_of = [&](int distance) {
      double power = is_taken ? 1.0 : double(std::numeric_limits<float>::quiet_NaN());
      for (int n = 0; n < distance; ++n) power *= double(decay);
      return float(power);
    };
    for (int i = threadIdx.x; i < kOffsets; i += kThreads) {
      const int offset = i - (kTokens - 1), distance = p.is_reversed ? -offset : offset;
      by_offset[i] = distance < (p.includes_self ? 0 : 1) ? 0.0f : power_of(distance);
      if (offset >= 0) powers[offset] = power_of(offset);
    }
  }

  __device__ void run(int splits) {
    const DecayedShare share(p, split, splits);
    const int batch = pair / int(p.heads), head = pair - batch * int(p.heads);
    const int left_values = min(int(p.value_dim) - first_value, kValues);
    const HeadRows from_values =
        HeadRows::of<Element>(p.value, batch, head, left_values, first_value + ValueTile::column());
    const HeadRows to_outputs =
        HeadRows::of<Element>(p.out, batch, head, left_values, first_value + ValueTile::column());
    const HeadRows from_keys = Tile::rows_of(p.key, batch, head, p.head_dim);
    const HeadRows from_queries = Tile::rows_of(p.query, batch, head, p.head_dim);
    load_state();
    typename Tile::Vectors q, k;
    typename ValueTile::Vectors v;
    const auto load = [&](int tile) {
      const int first = int(share.first_token(tile)), count = int(p.tokens) - first;
      if constexpr (kReads) q.load(from_queries, first, count);
      k.load(from_keys, first, count);
      v.load(from_values, first, count);
    };
    if (kPrefetches && share.first < share.end) load(share.first);
    for (int tile = share.first; tile < share.end; ++tile) {
      const int first = int(share.first_token(tile)), count = int(share.num_tokens(tile));
      __syncthreads();  // all reads of the tile before are done
      if constexpr (kReads) {
        store_operand();
        if (!kPrefetches) q.load(from_queries, first, count);
        q.store_shared(queries);
      }
      if (!kPrefetches) k.load(from_keys, first, count);
      if constexpr (kReads) k.store_shared(keys);
      scale(k, count);
      k.store_shared(scaled);
      if (!kPrefetches) v.load(from_values, first, count);
      v.store_shared(values);
      __syncthreads();
      if (kPrefetches && tile + 1 < share.end) load(tile + 1);
      const int exponent = tile == 0 ? int(p.initial_exponent) : 1;
      if constexpr (kReads) read(to_outputs, first, count, exponent);
      const float kept = powers[count - 1 + exponent];
      CUTE_UNROLL
      for (int i = 0; i < cute::size(acc); ++i) acc(i) *= kept;
      const StoredOperand<Element, kTokens, kDim, Depth::kAcrossRows, true> a(scaled, first_row());
      const StoredOperand<Element, kTokens, kValues, Depth::kAcrossRows, false> b(values, first_column());
      add_products<Element, kTokens>(acc, a, b, allow_tf32);
    }
    store_state();
  }

 private:
  static __device__ int first_row() { return int(threadIdx.x) / kWarpSize % kWarpRows * kRows; }
  static __device__ int first_column() { return int(threadIdx.x) / kWarpSize / kWarpRows * kColumns; }

  // How many tokens of the tile the state passes after this one.
  __device__ int later(int row, int count) const { return max(p.is_reversed ? row : count - 1 - row, 0); }

  __device__ void scale(typename Tile::Vectors& k, int count) const {
    CUTE_UNROLL
    for (int pass = 0; pass < Tile::kPasses; ++pass) {
      const float factor = powers[later(Tile::row_of(pass), count)];
      float x[Tile::kVector];
      k.widen(pass, x);
      CUTE_UNROLL
      for (int i = 0; i < Tile::kVector; ++i) x[i] *= factor;
      k.round(pass, x);
    }
  }

  // Calls f(d, v, x, y) for this thread's pairs of neighbours in the state.
  template <class Function>
  __device__ __forceinline__ void for_each_pair(Function&& f) {
    CUTE_UNROLL
    for (int m = 0; m < kRows / 16; ++m) {
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        CUTE_UNROLL
        for (int n = 0; n < kColumns / 8; ++n) {
          f(first_row() + m * 16 + lane_index() / 4 + r * 8, first_column() + n * 8 + lane_index() % 4 * 2,
            acc(2 * r, m, n), acc(2 * r + 1, m, n));
        }
      }
    }
  }

  __device__ float* chunk_state() const {
    const int64_t size = p.head_dim * p.value_dim;
    return static_cast<float*>(p.chunk_states) + (split * p.num_pairs() + pair) * size;
  }

  // Whether neighbours in a state of float are one vector.
  __device__ bool are_pairs(const float* data) const {
    return p.value_dim % 2 == 0 && reinterpret_cast<uintptr_t>(data) % sizeof(float2) == 0;
  }

  __device__ void load_state() {
    const int64_t at = pair * p.head_dim * p.value_dim;
    const float* const from = p.stage == DecayedStage::kRead ? chunk_state()
                              : p.stage == DecayedStage::kSum || !p.initial_state
                                  ? nullptr
                                  : static_cast<const float*>(p.initial_state) + at;
    const bool by_pairs = are_pairs(from);
    for_each_pair([&](int d, int v, float& x, float& y) {
      const int column = first_value + v;
      const float* const row = from + d * p.value_dim + column;
      x = y = 0.0f;
      if (!from || d >= p.head_dim || column >= p.value_dim) return;
      if (by_pairs) {
        const float2 both = *reinterpret_cast<const float2*>(row);
        x = both.x, y = both.y;
      } else {
        x = row[0];
        if (column + 1 < p.value_dim) y = row[1];
      }
    });
    __syncthreads();  // the powers are there
  }
  __device__ void store_state() {
    if (p.stage == DecayedStage::kRead) return;
    float* const to =
        p.stage == DecayedStage::kSum ? chunk_state() : static_cast<float*>(p.state) + pair * p.head_dim * p.value_dim;
    const bool by_pairs = are_pairs(to);
    for_each_pair([&](int d, int v, float x, float y) {
      const int column = first_value + v;
      float* const row = to + d * p.value_dim + column;
      if (d >= p.head_dim || column >= p.value_dim) return;
      if (by_pairs) {
        *reinterpret_cast<float2*>(row) = float2{x, y};
      } else {
        row[0] = x;
        if (column + 1 < p.value_dim) row[1] = y;
      }
    });
  }
  // The state as an operand (features,values).
  __device__ void store_operand() {
    using Pair = typename Tile::Pair;
    for_each_pair([&](int d, int v, float x, float y) {
      *reinterpret_cast<Pair*>(state + typename State::Layout{}(d, v)) = Pair{Element(x), Element(y)};
    });
  }

  __device__ __forceinline__ void read(const HeadRows& to, int first, int count, int exponent) {
    const typename Tile::Held q = Tile::hold(queries);
    typename ValueTile::TokenSums out;  // (MMA,1,MMA_N)
    cute::clear(out);
    const StoredOperand<Element, kDim, kValues, Depth::kAcrossRows, false> of_state(state, 0);
    add_products<Element, kDim>(out, q, of_state, allow_tf32);
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int row = Tile::token_of(r);
      const float factor = powers[max(p.is_reversed ? count - 1 - row : row, 0) + exponent];
      CUTE_UNROLL
      for (int n = 0; n < kValues / 8; ++n) out(2 * r, 0, n) *= factor, out(2 * r + 1, 0, n) *= factor;
    }
#pragma unroll 1
    for (int first_key = 0; first_key < kTokens; first_key += kPairKeys<T, kDim>) add_pairs(out, q, first_key);
    __syncwarp();  // all reads of the warp's queries are done, in whose place the outputs are: rows of fewer columns
    constexpr int kRow =
        std::min(kDim, 128 / int(sizeof(Element)));  // a tile of more columns has them beside each other
    Element* const outputs = queries + Tile::first_token() * (kRow - kValues);
    ValueTile::store_pairs(out, outputs);
    __syncwarp();
    typename ValueTile::Vectors rounded;
    rounded.load_shared(outputs);
    rounded.store(to, first, count);
  }

  // Adds what the warp's queries read of some keys of the tile.
  __device__ __forceinline__ void add_pairs(typename ValueTile::TokenSums& out, const typename Tile::Held& q,
                                            int first_key) const {
    constexpr int kKeys = kPairKeys<T, kDim>;
    using Pairs = Accumulators<1, kKeys / 8>;
    Pairs pairs;  // (MMA,1,MMA_N)
    cute::clear(pairs);
    const StoredOperand<Element, kTokens, kDim, Depth::kAlongRows, false> of_keys(keys, first_key);
    add_products<Element, kDim>(pairs, q, of_keys, allow_tf32);
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float* const weights = by_offset + (kTokens - 1) + Tile::token_of(r) - first_key - Tile::column_of(0);
      CUTE_UNROLL
      for (int n = 0; n < kKeys / 8; ++n) {
        CUTE_UNROLL
        for (int i = 0; i < 2; ++i) pairs(2 * r + i, 0, n) *= weights[-8 * n - i];
      }
    }
    constexpr int kStep = 32 / int(sizeof(Element));
    CUTE_UNROLL
    for (int step = 0; step < kKeys / kStep; ++step) {  // pairs are in registers: no index may be variable
      add_products<Element, kStep>(out, PairOperand<Element, Pairs>{pairs, step},
                                   PairRows<Element, kTokens, kValues>{values, first_key / kStep + step}, allow_tf32);
    }
  }
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    decayed_linear(const __grid_constant__ DecayedParams p, int splits, int slices, bool allow_tf32) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int task = int(blockIdx.x) / slices, slice = int(blockIdx.x) - task * slices;
  const int pair = task / splits, split = task - pair * splits;
  Kernel(p, pair, split, slice, allow_tf32, reinterpret_cast<typename Kernel::Element*>(shared)).run(splits);
}

template <class Kernel>
cudaError_t launch(const DecayedParams& p, int64_t splits, bool allow_tf32, cudaStream_t stream) {
  const int64_t slices = ceil_div<int64_t>(p.value_dim, Kernel::kValues);
  return launch_tasks(decayed_linear<Kernel>, p.num_pairs() * splits * slices, Kernel::kThreads, Kernel::kSharedBytes,
                      stream, p, int(splits), int(slices), allow_tf32);
}

}  // namespace

template <DType kDType>
cudaError_t DecayedLaunches<kDType>::run(const DecayedParams& p, int64_t splits, bool allow_tf32, cudaStream_t stream) {
  LinearProblem problem;
  problem.head_dim = p.head_dim, problem.value_dim = 1;  // columns of the values are divided among blocks
  return dispatch_linear_dim<kDType>(problem, [&]<int kDim>(cute::Int<kDim>) {
    using T = LinearElement<kDType>;
    if (p.stage == DecayedStage::kSum) return launch<DecayedKernel<T, kDim, false>>(p, splits, allow_tf32, stream);
    return launch<DecayedKernel<T, kDim, true>>(p, splits, allow_tf32, stream);
  });
}

template cudaError_t DecayedLaunches<DType::VK_DTYPE>::run(const DecayedParams&, int64_t, bool, cudaStream_t);

}  // namespace vitkernels
