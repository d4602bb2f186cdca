// The backward of linear attention on a GPU, for the queries and the state.
//
// With n = phi(q) . z + eps and o = phi(q) S: the gradient of o is dO / n, that of n is -(dO / n) . o / n. A block walks
// through a share of the queries of all heads that read a state, and leaves a part of the state's gradient.

#include "linear_attention/cuda/state_tile.h"

namespace vitkernels {
namespace {

using namespace cuda;

template <class T, int kDim>
struct LinearGradQueryKernel : LinearTile<T, kDim, 1> {
  using Tile = LinearTile<T, kDim, 1>;
  using Element = T;
  using Tile::kVector, Tile::kPasses, Tile::kRowsOfThread, Tile::kTokens;
  using typename Tile::Features, typename Tile::Held, typename Tile::Pair, typename Tile::State, typename Tile::Sums,
      typename Tile::Tokens, typename Tile::TokenSums, typename Tile::Vectors;
  static constexpr int kOperandBytes = (State::kElements + 2 * Tokens::kElements) * int(sizeof(Element));
  static constexpr int kSharedBytes = kOperandBytes + (Sums::kElements + 2 * kTokens) * int(sizeof(float));
  static constexpr int kMinBlocks = kDim * sizeof(Element) <= 128 ? 2 : 1;

  static constexpr float kMaxFloat = std::numeric_limits<float>::max();

  const LinearProblem& p;
  const bool allow_tf32;
  // (features,values), (queries,features), (queries,values), (queries,features)
  Element *shared_state, *queries, *grads;
  float* results;
  float *factors, *grad_sums;  // of the queries: 1 / n, and the gradient of n
  LoadedState<Tile> state;
  StateSums<Tile> sums;
  float features[kVector] = {};  // the sums of features: of the thread's queries

  __device__ LinearGradQueryKernel(const LinearGradQueryParams& params, const LinearTask& task, bool allow_tf32,
                                   Element* shared)
      : p(params.problem),
        allow_tf32(allow_tf32),
        shared_state(shared),
        queries(shared + State::kElements),
        grads(queries + Tokens::kElements),
        results(reinterpret_cast<float*>(grads + Tokens::kElements)),
        factors(results + Sums::kElements),
        grad_sums(factors + kTokens),
        state(p, static_cast<const float*>(params.state) + int64_t(task.pair) * p.state_size(), float(p.scale),
              shared) {}

  __device__ void run(const LinearGradQueryParams& params, const LinearTask& task) {
    const Range heads = p.candidates(task.head);
    for (int head = int(heads.begin); head < int(heads.end); ++head) {
      if (p.kv_head(head) != task.head) continue;
      const HeadRows from = Tile::rows_of(p.query, task.batch, head, p.head_dim, task.first_token);
      const HeadRows grad_out = Tile::rows_of(params.grad_out, task.batch, head, p.value_dim, task.first_token);
      const HeadRows to = Tile::rows_of(params.grad_query, task.batch, head, p.head_dim, task.first_token);
      for (int tile = task.first_tile; tile < task.end_tile; ++tile) {
        const int first = tile * kTokens, count = task.count - first;
        Vectors x, grad;
        x.load(from, first, count);
        grad.load(grad_out, first, count);
        add(x, grad).store(to, first, count);
      }
    }
    store(params.parts, task);
  }

  // Returns the gradients of queries `x`.
  __device__ __forceinline__ Vectors add(const Vectors& x, const Vectors& grad_out) {
    const Features of_row(p, Tile::column());
    Vectors phi = x;
    phi.apply(of_row);
    __syncthreads();  // all reads of the tile before are done
    phi.store_shared(queries);
    grad_out.store_shared(grads);
    __syncwarp();
    float factor[kRowsOfThread];
    normalize(factor);
    if (p.normalizes) scale_features(factor);
    __syncthreads();
    sums.add(queries, grads, allow_tf32);
    Tile::store_sums(Tile::template times_state<Depth::kAlongRows>(Tile::hold(grads), shared_state, allow_tf32),
                     results);  // (queries,features)
    __syncwarp();
    Vectors grad_query;
    CUTE_UNROLL
    for (int pass = 0; pass < kPasses; ++pass) {
      const int row = Tile::row_of(pass);
      float from[kVector], of_row_phi[kVector], grad[kVector];
      x.widen(pass, from);
      phi.widen(pass, of_row_phi);
      Tile::load_sums(results, pass, grad);
      CUTE_UNROLL
      for (int i = 0; i < kVector; ++i) {
        grad[i] *= factors[row];
        if (!p.normalizes) continue;
        grad[i] = fmaf(state.sum(Tile::column() + i), grad_sums[row], grad[i]);
        features[i] = fmaf(of_row_phi[i], grad_sums[row], features[i]);
      }
      of_row.differentiate(from, of_row_phi, grad);
      grad_query.round(pass, grad);
    }
    return grad_query;
  }

  // Finds 1 / n and the gradients of n, for this thread's queries and, in shared memory, the warp's.
  __device__ __forceinline__ void normalize(float (&factor)[kRowsOfThread]) {
    float grad_sum[kRowsOfThread] = {};
    CUTE_UNROLL
    for (int r = 0; r < kRowsOfThread; ++r) factor[r] = 1.0f;
    if (p.normalizes) {
      const Held phi = Tile::hold(queries);
      state.read_sums(phi, state.column(), allow_tf32, factor);
      const TokenSums out =
          Tile::template times_state<Depth::kAcrossRows>(phi, shared_state, allow_tf32);  // (MMA,MMA_M,MMA_N)
      CUTE_UNROLL
      for (int r = 0; r < kRowsOfThread; ++r) {
        const float n = factor[r] + float(p.eps);
        // Infinity, of the smallest numbers, would make NaN of features that are zero.
        factor[r] = n == 0.0f ? 0.0f : fminf(fmaxf(1.0f / n, -kMaxFloat), kMaxFloat);
        float dot = 0.0f;
        CUTE_UNROLL
        for (int c = 0; c < kDim / 8; ++c) {
          const Pair pair = Tile::pair_at(grads, r, c);
          dot = fmaf(float(pair.x), out(r % 2 * 2, r / 2, c), dot);
          dot = fmaf(float(pair.y), out(r % 2 * 2 + 1, r / 2, c), dot);
        }
        dot = combine_quad(dot, [](float a, float b) { return a + b; });
        grad_sum[r] = -(dot * factor[r]) * factor[r];
      }
    }
    CUTE_UNROLL
    for (int r = 0; r < kRowsOfThread; ++r) {
      if (lane_index() % 4 == 0) factors[Tile::token_of(r)] = factor[r], grad_sums[Tile::token_of(r)] = grad_sum[r];
    }
  }

  // Features are multiplied with 1 / n, for their products with gradients.
  __device__ __forceinline__ void scale_features(const float (&factor)[kRowsOfThread]) {
    __syncwarp();  // all reads of the warp's features are done
    CUTE_UNROLL
    for (int r = 0; r < kRowsOfThread; ++r) {
      CUTE_UNROLL
      for (int c = 0; c < kDim / 8; ++c) {
        Pair& pair = Tile::pair_at(queries, r, c);
        pair = {Element(float(pair.x) * factor[r]), Element(float(pair.y) * factor[r])};
      }
    }
  }

  __device__ void store(void* parts, const LinearTask& task) {
    const LinearPart part{p.head_dim, p.value_dim};
    float* const data = sums.store_products(p, parts, task);
    CUTE_UNROLL
    for (int i = 0; i < kVector; ++i) {
      CUTE_UNROLL
      for (int distance = Tile::kLanesOfRow; distance < kWarpSize; distance *= 2) {
        features[i] += __shfl_xor_sync(0xffffffffu, features[i], distance);
      }
    }
    __syncthreads();  // all reads of results are done
    if (lane_index() < Tile::kLanesOfRow) {
      CUTE_UNROLL
      for (int i = 0; i < kVector; ++i) {
        results[int(threadIdx.x) / kWarpSize * kDim + Tile::column() + i] = features[i];
      }
    }
    __syncthreads();
    for (int d = threadIdx.x; d < p.head_dim; d += Tile::kThreads) {
      float sum = 0.0f;
      CUTE_UNROLL
      for (int warp = 0; warp < Tile::kWarps; ++warp) sum += results[warp * kDim + d];
      data[part.features() + d] = sum;
    }
  }
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    linear_grad_query(const __grid_constant__ LinearGradQueryParams p, bool allow_tf32) {
  extern __shared__ __align__(128) unsigned char shared[];
  const LinearTask task(int(p.splits), p.problem.kv_heads, Kernel::kTokens,
                        [&](int batch) { return p.problem.queries(batch); });
  Kernel(p, task, allow_tf32, reinterpret_cast<typename Kernel::Element*>(shared)).run(p, task);
}

}  // namespace

template <DType kDType>
cudaError_t LinearLaunches<kDType>::grad_query(const LinearGradQueryParams& p, bool allow_tf32, cudaStream_t stream) {
  return dispatch_linear_dim<kDType>(p.problem, [&]<int kDim>(cute::Int<kDim>) {
    using Kernel = LinearGradQueryKernel<LinearElement<kDType>, kDim>;
    return launch_tasks(linear_grad_query<Kernel>, p.problem.batch * p.problem.kv_heads * p.splits, Kernel::kThreads,
                        Kernel::kSharedBytes, stream, p, allow_tf32);
  });
}

template cudaError_t LinearLaunches<DType::VK_DTYPE>::grad_query(const LinearGradQueryParams&, bool, cudaStream_t);

}  // namespace vitkernels
