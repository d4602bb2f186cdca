// The backward of linear attention on a GPU, for keys and values, from the gradient of the state.

#include "linear_attention/cuda/state_tile.h"

namespace vitkernels {
namespace {

using namespace cuda;

template <class T, int kDim>
struct LinearGradKeyKernel : LinearTile<T, kDim, 1> {
  using Tile = LinearTile<T, kDim, 1>;
  using Element = T;
  using Tile::kVector, Tile::kPasses;
  using typename Tile::Features, typename Tile::Held, typename Tile::State, typename Tile::Sums, typename Tile::Tokens,
      typename Tile::TokenSums, typename Tile::Vectors;
  static constexpr int kOperandBytes = (State::kElements + 2 * Tokens::kElements) * int(sizeof(Element));
  static constexpr int kSharedBytes = kOperandBytes + Sums::kElements * int(sizeof(float));
  static constexpr int kMinBlocks = kDim * sizeof(Element) <= 128 ? 2 : 1;

  static __device__ void run(const LinearGradKeyParams& params, int blocks, bool allow_tf32, Element* shared) {
    const LinearProblem& p = params.problem;
    const LinearTask task(blocks, p.kv_heads, Tile::kTokens, [&](int batch) { return p.keys(batch); });
    const auto rows_of = [&](const TokenTensor& t, int64_t columns) {
      return Tile::rows_of(t, task.batch, task.head, columns, task.first_token);
    };
    const HeadRows keys = rows_of(p.key, p.head_dim), values = rows_of(p.value, p.value_dim);
    const HeadRows grad_keys = rows_of(params.grad_key, p.head_dim);
    const HeadRows grad_values = rows_of(params.grad_value, p.value_dim);
    Element* const tokens = shared + State::kElements;   // of keys
    Element* const others = tokens + Tokens::kElements;  // of values, and then of their gradients
    float* const results = reinterpret_cast<float*>(others + Tokens::kElements);
    const LoadedState<Tile> grad_state(
        p, static_cast<const float*>(params.grad_state) + int64_t(task.pair) * p.state_size(), 1.0f, shared);
    const Features features(p, Tile::column());
    float grad_sums[kVector];  // of the features in the thread's columns
    CUTE_UNROLL
    for (int i = 0; i < kVector; ++i) grad_sums[i] = grad_state.sum(Tile::column() + i);
    const int end = task.end_tile * Tile::kTokens;
    for (int first = task.first_tile * Tile::kTokens; first < end; first += Tile::kTokens) {
      const int count = task.count - first;
      Vectors x, v;
      x.load(keys, first, count);
      v.load(values, first, count);
      Vectors phi = x;
      phi.apply(features);
      phi.store_shared(tokens);
      v.store_shared(others);
      __syncwarp();
      const Held of_values = Tile::hold(others);
      TokenSums grad_value = Tile::template times_state<Depth::kAcrossRows>(Tile::hold(tokens), shared,
                                                                            allow_tf32);  // (MMA,MMA_M,MMA_N)
      if (p.residual != 0.0) add_residual(params, grad_value, task, first, count);
      Tile::store_sums(Tile::template times_state<Depth::kAlongRows>(of_values, shared, allow_tf32),
                       results);  // (keys,features)
      __syncwarp();               // all reads of the values are done
      Tile::store_pairs(grad_value, others);
      __syncwarp();
      v.load_shared(others);
      v.store(grad_values, first, count);
      CUTE_UNROLL
      for (int pass = 0; pass < kPasses; ++pass) {
        float from[kVector], of_row[kVector], grad[kVector];
        x.widen(pass, from);
        phi.widen(pass, of_row);
        Tile::load_sums(results, pass, grad);
        CUTE_UNROLL
        for (int i = 0; i < kVector; ++i) grad[i] += grad_sums[i];
        features.differentiate(from, of_row, grad);
        x.round(pass, grad);
      }
      x.store(grad_keys, first, count);
      __syncwarp();
    }
  }

  // The token's own value is in the outputs of all heads that share it.
  static __device__ void add_residual(const LinearGradKeyParams& params, TokenSums& grad_value, const LinearTask& task,
                                      int first, int count) {
    const LinearProblem& p = params.problem;
    const Range heads = p.candidates(task.head);
    for (int head = int(heads.begin); head < int(heads.end); ++head) {
      if (p.kv_head(head) != task.head) continue;
      const HeadRows rows =
          HeadRows::of<Element>(params.grad_out, task.batch, head, p.value_dim, Tile::column_of(0), task.first_token);
      Tile::add_rows(grad_value, rows, first, count, float(p.residual));
    }
  }
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    linear_grad_key(const __grid_constant__ LinearGradKeyParams p, int blocks, bool allow_tf32) {
  extern __shared__ __align__(128) unsigned char shared[];
  Kernel::run(p, blocks, allow_tf32, reinterpret_cast<typename Kernel::Element*>(shared));
}

}  // namespace

template <DType kDType>
cudaError_t LinearLaunches<kDType>::grad_key(const LinearGradKeyParams& p, bool allow_tf32, cudaStream_t stream) {
  return dispatch_linear_dim<kDType>(p.problem, [&]<int kDim>(cute::Int<kDim>) {
    using Kernel = LinearGradKeyKernel<LinearElement<kDType>, kDim>;
    const int64_t pairs = p.problem.batch * p.problem.kv_heads;
    const int64_t blocks = linear_blocks_of_pair(pairs, p.problem.num_keys);
    return launch_tasks(linear_grad_key<Kernel>, pairs * blocks, Kernel::kThreads, Kernel::kSharedBytes, stream, p,
                        int(blocks), allow_tf32);
  });
}

template cudaError_t LinearLaunches<DType::VK_DTYPE>::grad_key(const LinearGradKeyParams&, bool, cudaStream_t);

}  // namespace vitkernels
