// The products of query's and key's channels over the tokens on a GPU, and the sums of squares of these channels.
//
// A block sums a share of the tokens of a (batch, head) pair; the sums of the blocks are added in order.

#include "linear_attention/cuda/channel_launches.h"
#include "linear_attention/cuda/state_tile.h"

namespace vitkernels {
namespace {

using namespace cuda;

// The squares of sixteen channels are the diagonal of their products with each other, which tensor cores find in fewer
// instructions than it takes to widen the elements.
template <class Tile>
struct ChannelSquares {
  using Element = typename Tile::Element;
  static constexpr int kOfTensor = Tile::kDim / 16, kOfWarp = 2 * kOfTensor / Tile::kWarps;
  template <bool kIsA>
  using Operand = StoredOperand<Element, Tile::kTokens, Tile::kDim, Depth::kAcrossRows, kIsA>;

  Accumulators<1, 2> acc[kOfWarp];  // (MMA,1,MMA_N), of sixteen channels each: first of query's, then of key's

  __device__ ChannelSquares() {
    CUTE_UNROLL
    for (int i = 0; i < kOfWarp; ++i) cute::clear(acc[i]);
  }

  __device__ __forceinline__ void add(const Element* queries, const Element* keys, bool allow_tf32) {
    CUTE_UNROLL
    for (int i = 0; i < kOfWarp; ++i) {
      const Element* const tile = is_of_key(i) ? keys : queries;
      const Operand<true> a(tile, first_channel(i));
      const Operand<false> b(tile, first_channel(i));
      add_products<Element, Tile::kTokens>(acc[i], a, b, allow_tf32);
    }
  }

  // Calls f(is of key, channel, sum of squares) for those on the diagonals.
  template <class Function>
  __device__ void for_each(Function&& f) const {
    const int row = lane_index() / 4;
    if (row / 2 != lane_index() % 4) return;
    CUTE_UNROLL
    for (int i = 0; i < kOfWarp; ++i) {
      CUTE_UNROLL
      for (int n = 0; n < 2; ++n) {
        const float even = acc[i](2 * n, 0, n), odd = acc[i](2 * n + 1, 0, n);
        f(is_of_key(i), first_channel(i) + 8 * n + row, row % 2 == 0 ? even : odd);
      }
    }
  }

 private:
  static __device__ int index(int i) { return int(threadIdx.x) / kWarpSize + i * Tile::kWarps; }
  static __device__ bool is_of_key(int i) { return index(i) >= kOfTensor; }
  static __device__ int first_channel(int i) { return index(i) % kOfTensor * 16; }
};

template <class T, int kDim>
struct ChannelSumKernel : LinearTile<T, kDim, kRowTilesOfForward<T, kDim>> {
  using Tile = LinearTile<T, kDim, kRowTilesOfForward<T, kDim>>;
  using Element = T;
  using typename Tile::Tokens, typename Tile::Vectors;
  static constexpr int kSharedBytes = 2 * Tokens::kElements * int(sizeof(Element));
  static constexpr int kMinBlocks = kDim * sizeof(Element) <= 64 ? 3 : 2;
  // Of float, and with 128 columns, the sums leave no registers for the tile to come.
  static constexpr bool kPrefetches = sizeof(Element) == 2 && kDim <= 64;

  static __device__ void run(const ChannelProblem& p, bool allow_tf32, Element* shared) {
    const LinearTask task(int(p.splits), p.heads, Tile::kTokens, [&](int) { return Range{0, p.num_tokens}; });
    const HeadRows queries = Tile::rows_of(p.query, task.batch, task.head, p.head_dim);
    const HeadRows keys = Tile::rows_of(p.key, task.batch, task.head, p.value_dim);
    Element* const shared_queries = shared;
    Element* const shared_keys = shared + Tokens::kElements;
    StateSums<Tile> sums;
    ChannelSquares<Tile> squares;
    Vectors q, k;
    int first = task.first_tile * Tile::kTokens, count = task.count - first;
    const int end = task.end_tile * Tile::kTokens;
    if (kPrefetches && first < end) q.load(queries, first, count), k.load(keys, first, count);
    while (first < end) {
      __syncthreads();  // all reads of the tile before are done
      if constexpr (kPrefetches) {
        q.store_shared(shared_queries);
        k.store_shared(shared_keys);
      } else {
        const auto as_it_is = [](uint4 x) { return x; };
        Tile::copy(queries, first, count, shared_queries, as_it_is);
        Tile::copy(keys, first, count, shared_keys, as_it_is);
      }
      __syncthreads();
      first += Tile::kTokens, count -= Tile::kTokens;
      if (kPrefetches && first < end) q.load(queries, first, count), k.load(keys, first, count);
      sums.add(shared_queries, shared_keys, allow_tf32);
      if (p.normalizes) squares.add(shared_queries, shared_keys, allow_tf32);
    }
    store(p, task, sums, squares);
  }

  static __device__ void store(const ChannelProblem& p, const LinearTask& task, const StateSums<Tile>& sums,
                               const ChannelSquares<Tile>& squares) {
    const LinearPart part = channel_part(p);
    float* const data = sums.store_products(linear_problem(p, part.head_dim, part.value_dim), p.parts, task);
    __syncthreads();  // which has left zeros in the last row
    float* const of_keys = data + p.head_dim * part.pitch();
    float* const of_queries = data + part.features();
    squares.for_each([&](bool is_of_key, int channel, float sum) {
      if (channel < (is_of_key ? p.value_dim : p.head_dim)) (is_of_key ? of_keys : of_queries)[channel] = sum;
    });
    if (threadIdx.x == 0) of_queries[p.head_dim] = 0.0f;
  }
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    channel_sum(const __grid_constant__ ChannelProblem p, bool allow_tf32) {
  extern __shared__ __align__(128) unsigned char shared[];
  Kernel::run(p, allow_tf32, reinterpret_cast<typename Kernel::Element*>(shared));
}

}  // namespace

template <DType kDType>
cudaError_t ChannelLaunches<kDType>::sum(const ChannelProblem& p, bool allow_tf32, cudaStream_t stream) {
  return dispatch_linear_dim<kDType>(linear_problem(p, p.head_dim, p.value_dim), [&]<int kDim>(cute::Int<kDim>) {
    using Kernel = ChannelSumKernel<LinearElement<kDType>, kDim>;
    return launch_tasks(channel_sum<Kernel>, p.num_pairs() * p.splits, Kernel::kThreads, Kernel::kSharedBytes, stream,
                        p, allow_tf32);
  });
}

template cudaError_t ChannelLaunches<DType::VK_DTYPE>::sum(const ChannelProblem&, bool, cudaStream_t);

}  // namespace vitkernels
