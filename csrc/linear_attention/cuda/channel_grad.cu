// The backward of channel attention on a GPU, for query and key, from the gradient of their channels' products.
//
// With A, the gradient of the products over the norms: dq = k A^T - q a, dk = q A - k b; a and b are zero without norms.

#include "linear_attention/cuda/channel_launches.h"
#include "linear_attention/cuda/state_tile.h"

namespace vitkernels {
namespace {

using namespace cuda;

template <class T, int kDim>
struct ChannelGradKernel : LinearTile<T, kDim, kRowTilesOfForward<T, kDim>> {
  using Tile = LinearTile<T, kDim, kRowTilesOfForward<T, kDim>>;
  using Element = T;
  using typename Tile::Held, typename Tile::Pair, typename Tile::State, typename Tile::Tokens, typename Tile::TokenSums,
      typename Tile::Vectors;
  static constexpr int kOperandBytes = (State::kElements + 3 * Tokens::kElements) * int(sizeof(Element));
  static constexpr int kSharedBytes = kOperandBytes + 2 * kDim * int(sizeof(float));
  static constexpr int kMinBlocks = 2;
  // Of float, and with 128 columns, the products leave no registers for the tile to come.
  static constexpr bool kPrefetches = sizeof(Element) == 2 && kDim <= 64;

  static __device__ void run(const ChannelTokensParams& params, int blocks, bool allow_tf32, Element* shared) {
    const ChannelProblem& p = params.problem;
    const LinearTask task(blocks, p.heads, Tile::kTokens, [&](int) { return Range{0, p.num_tokens}; });
    const HeadRows queries = Tile::rows_of(p.query, task.batch, task.head, p.head_dim);
    const HeadRows keys = Tile::rows_of(p.key, task.batch, task.head, p.value_dim);
    const HeadRows grad_queries = Tile::rows_of(params.grad_query, task.batch, task.head, p.head_dim);
    const HeadRows grad_keys = Tile::rows_of(params.grad_key, task.batch, task.head, p.value_dim);
    Element* const tokens = shared + State::kElements;    // of query, and then of its gradient
    Element* const others = tokens + Tokens::kElements;   // of key
    Element* const results = others + Tokens::kElements;  // the gradient of key
    float* const of_queries = reinterpret_cast<float*>(results + Tokens::kElements);
    float* const of_keys = of_queries + kDim;
    const float* const grads = params.grads + task.pair * p.state_size();
    for (int c = threadIdx.x; c < kDim; c += Tile::kThreads) {
      of_queries[c] = c < p.head_dim ? grads[c * (p.value_dim + 1) + p.value_dim] : 0.0f;
      of_keys[c] = c < p.value_dim ? grads[p.head_dim * (p.value_dim + 1) + c] : 0.0f;
    }
    const LoadedState<Tile> matrix(linear_problem(p, p.head_dim, p.value_dim), grads, 1.0f, shared);
    Vectors q, k;
    int first = task.first_tile * Tile::kTokens, count = task.count - first;
    const int end = task.end_tile * Tile::kTokens;
    if (kPrefetches && first < end) q.load(queries, first, count), k.load(keys, first, count);
    while (first < end) {
      if constexpr (sizeof(Element) == 2) {
        if (!kPrefetches) q.load(queries, first, count), k.load(keys, first, count);
        q.store_shared(tokens);
        k.store_shared(others);
      } else {
        const auto as_it_is = [](uint4 x) { return x; };
        Tile::copy(queries, first, count, tokens, as_it_is);
        Tile::copy(keys, first, count, others, as_it_is);
      }
      __syncwarp();
      const int at = first, left = count;
      first += Tile::kTokens, count -= Tile::kTokens;
      if (kPrefetches && first < end) q.load(queries, first, count), k.load(keys, first, count);
      TokenSums grad = Tile::template times_state<Depth::kAcrossRows>(Tile::hold(tokens), shared,
                                                                      allow_tf32);  // (MMA,MMA_M,MMA_N)
      store_rounded(grad, others, of_keys, p.normalizes, results);
      grad = Tile::template times_state<Depth::kAlongRows>(Tile::hold(others), shared, allow_tf32);
      __syncwarp();
      store(results, grad_keys, at, left);
      store_rounded(grad, tokens, of_queries, p.normalizes, tokens);
      __syncwarp();
      store(tokens, grad_queries, at, left);
      __syncwarp();
    }
  }

  // Rounded, after `source` times its factors is taken away.
  static __device__ __forceinline__ void store_rounded(const TokenSums& acc, Element* source, const float* factors,
                                                       bool loses, Element* tile) {
    CUTE_UNROLL
    for (int n = 0; n < kDim / 8; ++n) {
      const float2 factor = *reinterpret_cast<const float2*>(factors + Tile::column_of(n));
      CUTE_UNROLL
      for (int r = 0; r < Tile::kRowsOfThread; ++r) {
        float x = acc(r % 2 * 2, r / 2, n), y = acc(r % 2 * 2 + 1, r / 2, n);
        if (loses) {
          const Pair of_source = Tile::pair_at(source, r, n);
          x = fmaf(-factor.x, float(of_source.x), x), y = fmaf(-factor.y, float(of_source.y), y);
        }
        Tile::pair_at(tile, r, n) = {Element(x), Element(y)};
      }
    }
  }

  static __device__ void store(const Element* tile, const HeadRows& rows, int first, int count) {
    Vectors rounded;
    rounded.load_shared(tile);
    rounded.store(rows, first, count);
  }
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    channel_grad(const __grid_constant__ ChannelTokensParams p, int blocks, bool allow_tf32) {
  extern __shared__ __align__(128) unsigned char shared[];
  Kernel::run(p, blocks, allow_tf32, reinterpret_cast<typename Kernel::Element*>(shared));
}

}  // namespace

template <DType kDType>
cudaError_t ChannelLaunches<kDType>::grad(const ChannelTokensParams& params, bool allow_tf32, cudaStream_t stream) {
  const ChannelProblem& p = params.problem;
  return dispatch_linear_dim<kDType>(linear_problem(p, p.head_dim, p.value_dim), [&]<int kDim>(cute::Int<kDim>) {
    using Kernel = ChannelGradKernel<LinearElement<kDType>, kDim>;
    const int64_t blocks = linear_blocks_of_pair(p.num_pairs(), p.num_tokens);
    return launch_tasks(channel_grad<Kernel>, p.num_pairs() * blocks, Kernel::kThreads, Kernel::kSharedBytes, stream,
                        params, int(blocks), allow_tf32);
  });
}

template cudaError_t ChannelLaunches<DType::VK_DTYPE>::grad(const ChannelTokensParams&, bool, cudaStream_t);

}  // namespace vitkernels
