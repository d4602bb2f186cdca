// What queries read from the state of linear attention on a GPU.
//
// A block has the state of a (batch, head) pair as an operand, and walks through a share of its queries. A warp copies
// the queries that it multiplies, and no warp waits for another.

#include "linear_attention/cuda/state_tile.h"

namespace vitkernels {
namespace {

using namespace cuda;

template <class T, int kDim>
struct LinearOutputKernel : LinearTile<T, kDim, kRowTilesOfForward<T, kDim>> {
  using Tile = LinearTile<T, kDim, kRowTilesOfForward<T, kDim>>;
  using Element = T;
  using typename Tile::Features, typename Tile::State, typename Tile::Tokens, typename Tile::TokenSums,
      typename Tile::Vectors;
  static constexpr int kSharedBytes = (State::kElements + Tokens::kElements) * int(sizeof(Element));
  // Of float, the products leave no registers for the tile to come.
  static constexpr bool kPrefetches = sizeof(Element) == 2;
  static constexpr int kMinBlocks = kDim * sizeof(Element) <= 64 ? 3 : 2;

  static __device__ void run(const LinearOutputParams& params, int blocks, bool allow_tf32, Element* shared) {
    const LinearProblem& p = params.problem;
    const LinearTask task(blocks, p.heads, Tile::kTokens, [&](int batch) { return p.queries(batch); });
    const int kv_head = int(p.kv_head(task.head));
    if (kv_head < 0) return;
    const HeadRows queries = Tile::rows_of(p.query, task.batch, task.head, p.head_dim, task.first_token);
    const HeadRows outputs = Tile::rows_of(params.out, task.batch, task.head, p.value_dim, task.first_token);
    // With 128 columns it is found where it is read, to save registers.
    const auto find_own = [&] {
      return HeadRows::of<Element>(p.value, task.batch, kv_head, p.value_dim, Tile::column_of(0), task.first_token);
    };
    const HeadRows own = find_own();
    const int64_t state_of_pair = (int64_t(task.batch) * p.kv_heads + kv_head) * p.state_size();
    Element* const tokens = shared + State::kElements;  // of queries, and then of outputs
    const LoadedState<Tile> state(p, static_cast<const float*>(params.state) + state_of_pair, float(p.scale), shared);
    using Column = typename LoadedState<Tile>::Column;
    const std::conditional_t<sizeof(Element) == 2, HeldColumn<Element, kDim>, Column> column(state.column());
    const float eps = float(p.eps), residual = float(p.residual);
    const Features features(p, Tile::column());
    Vectors q;
    int first = task.first_tile * Tile::kTokens, count = task.count - first;
    const int end = task.end_tile * Tile::kTokens;
    if (kPrefetches && first < end) q.load(queries, first, count);
    while (first < end) {
      if constexpr (kPrefetches) {
        q.apply(features);
        q.store_shared(tokens);
      } else {
        Tile::copy(queries, first, count, tokens, [&](uint4 x) { return Vectors::mapped(x, features); });
      }
      __syncwarp();
      const auto phi = Tile::hold(tokens);
      if (kPrefetches && first + Tile::kTokens < end) {
        q.load(queries, first + Tile::kTokens, count - Tile::kTokens);
      }
      TokenSums out = Tile::template times_state<Depth::kAcrossRows>(phi, shared, allow_tf32);
      if (p.normalizes) {
        float sums[Tile::kRowsOfThread];
        state.read_sums(phi, column, allow_tf32, sums);
        divide(out, sums, eps);
      }
      if (residual != 0.0f) {
        Tile::add_rows(out, kDim <= 64 ? own : find_own(), first, count, residual);
      }
      __syncwarp();  // all reads of the queries are done
      Tile::store_pairs(out, tokens);
      __syncwarp();
      Vectors rounded;
      rounded.load_shared(tokens);
      rounded.store(outputs, first, count);
      __syncwarp();
      first += Tile::kTokens, count -= Tile::kTokens;
    }
  }

  // Rows are divided by their sums plus eps: zero where that is.
  static __device__ void divide(TokenSums& out, const float (&sums)[Tile::kRowsOfThread], float eps) {
    constexpr float kSmall = 1e-30f, kUp = 0x1p100f;  // the reciprocal of a small number is infinite
    bool has_small = false;
    CUTE_UNROLL
    for (int r = 0; r < Tile::kRowsOfThread; ++r) {
      const float divisor = sums[r] + eps;
      const bool is_small = fabsf(divisor) < kSmall;
      multiply_row(out, r, divisor == 0.0f ? 0.0f : reciprocal(is_small ? divisor * kUp : divisor));
      has_small |= is_small && divisor != 0.0f;
    }
    if (!__any_sync(0xffffffffu, has_small)) return;
    rarely();
    CUTE_UNROLL
    for (int r = 0; r < Tile::kRowsOfThread; ++r) {
      if (fabsf(sums[r] + eps) < kSmall) multiply_row(out, r, kUp);
    }
  }
  static __device__ float reciprocal(float x) { return sizeof(Element) == 2 ? approximate_reciprocal(x) : 1.0f / x; }
  static __device__ void multiply_row(TokenSums& out, int r, float factor) {
    CUTE_UNROLL
    for (int n = 0; n < kDim / 8; ++n) {
      CUTE_UNROLL
      for (int i = 0; i < 2; ++i) out(r % 2 * 2 + i, r / 2, n) *= factor;
    }
  }
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    linear_output(const __grid_constant__ LinearOutputParams p, int blocks, bool allow_tf32) {
  extern __shared__ __align__(128) unsigned char shared[];
  Kernel::run(p, blocks, allow_tf32, reinterpret_cast<typename Kernel::Element*>(shared));
}

}  // namespace

template <DType kDType>
cudaError_t LinearLaunches<kDType>::output(const LinearOutputParams& p, bool allow_tf32, cudaStream_t stream) {
  return dispatch_linear_dim<kDType>(p.problem, [&]<int kDim>(cute::Int<kDim>) {
    using Kernel = LinearOutputKernel<LinearElement<kDType>, kDim>;
    const int64_t pairs = p.problem.batch * p.problem.heads;
    const int64_t blocks = linear_blocks_of_pair(pairs, p.problem.num_queries);
    return launch_tasks(linear_output<Kernel>, pairs * blocks, Kernel::kThreads, Kernel::kSharedBytes, stream, p,
                        int(blocks), allow_tf32);
  });
}

template cudaError_t LinearLaunches<DType::VK_DTYPE>::output(const LinearOutputParams&, bool, cudaStream_t);

}  // namespace vitkernels
