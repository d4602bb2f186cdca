// The backward's fast path for 16-bit elements (backward_path.h), blocks that own queries and sum their gradients over
// the keys.
//
// As backward_plain_keys.cu, with the logits as they are. KV tiles go from the last to the first: only the last has a
// tail, and a mask.

#include "attention/cuda/launches.h"
#include "attention/cuda/plain_backward.h"
#include "attention/cuda/plain_score.h"
#include "attention/cuda/plain_tasks.h"
#include "attention/cuda/tile_sizes.h"
#include "attention/cuda/tokens.h"
#include "cuda/epilogue.h"
#include "cuda/mma.h"
#include "cuda/tile_stream.h"

namespace vitkernels {
namespace {

using namespace cuda;
using namespace cute;

template <class T, int kDim, bool kHasBias>
struct PlainQueriesKernel {
  using Element = T;
  static constexpr PlainBackwardTile kTile = plain_queries_tile(kDim);
  static constexpr int kOwned = kTile.owned, kStreamed = kTile.streamed, kThreads = kTile.threads();

  using SharedQueries = SharedTile<Element, kOwned, kDim>;
  using SharedKeys = SharedTile<Element, kStreamed, kDim>;
  using Queries = TileStream<Element, kThreads, kOwned, kDim>;
  using Keys = TileStream<Element, kThreads, kStreamed, kDim>;
  using Mma = TileMma<Element, kTile.warps>;
  // Queries and dO, two stages of keys and values, and the statistics of the queries.
  static constexpr int kStage = 2 * SharedKeys::kElements, kFirstStage = 2 * SharedQueries::kElements;
  static constexpr int kFirstStatistics = kFirstStage + 2 * kStage;
  static constexpr int kSharedBytes =
      kFirstStatistics * int(sizeof(Element)) + kOwned / 2 * int(sizeof(StatisticsOfPair));
  static_assert(kOwned == kThreads && kOwned % QueryStatistics::kTile == 0, "a thread copies half a pair");

  static int64_t num_owned(const Problem& p) { return p.num_queries(); }
  static int64_t num_streamed(const Problem& p) { return p.num_keys(); }

  static __device__ __forceinline__ void run(const AttentionBackwardCudaParams& p, const OwnedGrads& targets,
                                             const PlainTasks& tasks, Element* shared) {
    const Problem& problem = p.forward.problem;
    const PlainTask task = tasks.task(int(blockIdx.x));
    Tensor sQ = shared_tile<SharedQueries>(shared);                             // (queries,dim)
    Tensor sD = shared_tile<SharedQueries>(shared + SharedQueries::kElements);  // (queries,dim)
    Element* const stages = shared + kFirstStage;
    StatisticsOfPair* const statistics = reinterpret_cast<StatisticsOfPair*>(shared + kFirstStatistics);

    const int first_query = task.tile * kOwned, num_queries = int(problem.num_queries()) - first_query;
    const int num_tiles = ceil_div(int(problem.num_keys()), kStreamed);
    const int first_tile = tasks.first_of_split(num_tiles, task.split);
    const int last_tile = tasks.first_of_split(num_tiles, task.split + 1) - 1;
    const int last_key = last_tile * kStreamed, num_keys = int(problem.num_keys()) - last_key;  // of the last tile
    int tiles_before = last_tile - first_tile, stage = 0;
    stream_of<Queries>(problem.query, task.batch, first_query, task.head, problem.head_dim).start_some(sQ, num_queries);
    stream_of<Queries>(p.query_value, task.batch, first_query, task.head, problem.value_dim)
        .start_some(sD, num_queries);
    const int row = QueryStatistics::index(problem, task.batch, task.head, first_query) + int(threadIdx.x);
    const bool has_statistics = first_query + int(threadIdx.x) < QueryStatistics::pitch(problem);
    copy_16_bytes(reinterpret_cast<float4*>(statistics) + threadIdx.x,
                  reinterpret_cast<const float4*>(p.statistics.data) + row, has_statistics ? 16 : 0);
    Keys keys = stream_of<Keys>(problem.key, task.batch, last_key, task.kv_head, problem.head_dim);
    Keys values = stream_of<Keys>(p.key_value, task.batch, last_key, task.kv_head, problem.value_dim);
    const auto start = [&](int to, auto&& start_tile) {
      start_tile(keys, shared_tile<SharedKeys>(stages + to * kStage));
      start_tile(values, shared_tile<SharedKeys>(stages + to * kStage + SharedKeys::kElements));
      commit_copies();
    };
    start(0, [&](Keys& of, const auto& sT) { of.start_some(sT, num_keys); });

    const Mma mma(false);
    const auto thread = mma.get_slice(threadIdx.x);
    const auto coordinates =
        by_rows(thread.partition_C(make_identity_tensor(Shape<Int<kOwned>, Int<kStreamed>>{})));  // (rows,columns)
    Tensor grad = partition_fragment_C(mma, Shape<Int<kOwned>, Int<kDim>>{});                     // (MMA,MMA_M,MMA_N)
    clear(grad);
    constexpr int kRows = decltype(size<0>(coordinates))::value;
    const float scale = problem.score.scale.template as<float>();
    const ScoreTerm& term = problem.score.bias;
    BiasRows<kRows, -kStreamed, decltype(coordinates)> bias(
        static_cast<const float*>(term.data) + term.strides.offset(task.batch, task.head, first_query, last_key),
        int(term.strides.query), num_queries, coordinates);

    const auto step = [&]<bool kIsLast>(std::bool_constant<kIsLast>) {
      wait_for_copies<0>();
      __syncthreads();  // this stage has arrived, and all reads of the other one are done
      if (tiles_before > 0) start(stage ^ 1, [&](Keys& of, const auto& sT) { of.start_whole(sT); });
      Tensor sK = shared_tile<SharedKeys>(stages + stage * kStage);                          // (keys,dim)
      Tensor sV = shared_tile<SharedKeys>(stages + stage * kStage + SharedKeys::kElements);  // (keys,dim)
      Tensor probs = partition_fragment_C(mma, Shape<Int<kOwned>, Int<kStreamed>>{});        // (MMA,MMA_M,MMA_N)
      Tensor grads = partition_fragment_C(mma, Shape<Int<kOwned>, Int<kStreamed>>{});        // (MMA,MMA_M,MMA_N)
      Tensor logits = by_rows(probs);                                                        // (rows,columns)
      clear(probs);
      multiply_whole_tile(mma, probs, sQ, sK);
      if constexpr (kHasBias && kIsLast) bias.add_some(logits, scale, num_keys);
      if constexpr (kHasBias && !kIsLast) bias.template add<true>(logits, scale);
      if constexpr (kIsLast) mask_tail(logits, coordinates, num_keys);
      // Read for each tile, since the loop leaves no registers for them.
      const RowStatistics of{statistics};
      float minus_lse_log2[kRows];
      Tensor minus_delta = make_tensor<float>(Layout<Shape<Int<kRows>>>{});  // (rows)
      CUTE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        minus_lse_log2[r] = of.pair(r).minus_lse_log2[of.row % 2];
        minus_delta(r) = of.pair(r).minus_delta[of.row % 2];
      }
      const auto lse = [&](int r) { return of.pair(r).lse[of.row % 2]; };
      exponentiate_plain<kHasBias>(logits, minus_lse_log2, lse, scale, is_any_large(minus_lse_log2));
      const auto of_rows = make_layout(shape(grads), Stride<Stride<_0, _1>, _2, _0>{});  // (MMA,MMA_M,MMA_N)
      multiply_whole_tile(mma, grads, make_tensor(minus_delta.data(), of_rows), sD, sV);
      CUTE_UNROLL
      for (int i = 0; i < size(grads); ++i) grads(i) *= probs(i);
      multiply_whole_operand<StepOrder::kByRows>(mma, grad, as_operand_a(convert<Element>(grads)), sK);
      stage ^= 1;
    };
    step(std::true_type{});
    while (tiles_before-- > 0) step(std::false_type{});

    // What the results need is computed here, since the loop leaves no registers for it.
    const PlainTask same = tasks.task(int(block_index()));
    const int first = same.tile * kOwned, rows = min(int(problem.num_queries()) - first, kOwned);
    multiply_all(grad, scale);
    const OwnedTokens tokens{same.batch, same.head, same.split, first, rows, int(problem.head_dim)};
    if (p.relative_grad_query && same.split == 0) {
      add_relative_grad(grad, owned_coordinates(mma, Shape<Int<kOwned>, Int<kDim>>{}), p, tokens);
    }
    Tensor sO = shared_tile<SharedQueries>(computed_here(shared));  // (queries,dim)
    store_owned<kThreads>(mma, grad, sO, targets.logit_grads, targets.logit_grad_parts, tokens);
  }

  // Of the thread's rows, in shared memory.
  struct RowStatistics {
    const StatisticsOfPair* pairs;
    int row = thread_index() / kWarpSize * 16 + thread_index() % kWarpSize / 4;  // the first one

    __device__ const StatisticsOfPair& pair(int r) const {
      return pairs[(row + r % 2 * 8 + r / 2 * 16 * kTile.warps) / 2];
    }
  };
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kTile.min_blocks)
    attention_backward_queries(const __grid_constant__ AttentionBackwardCudaParams p,
                               const __grid_constant__ OwnedGrads grads, const __grid_constant__ PlainTasks tasks) {
  extern __shared__ __align__(128) unsigned char shared[];
  Kernel::run(p, grads, tasks, reinterpret_cast<typename Kernel::Element*>(shared));
}

// Calls f(kernel).
template <class Element, class Function>
auto dispatch_kernel(const Problem& p, Function&& f) {
  if (p.score.bias.data) return f(PlainQueriesKernel<Element, 64, true>{});
  return dispatch_plain_dim(p, [&]<int kDim>(Int<kDim>) { return f(PlainQueriesKernel<Element, kDim, false>{}); });
}

}  // namespace

template <DType kDType, Side kOwner>
int64_t PlainBackwardLaunches<kDType, kOwner>::backward_splits(const AttentionBackwardCudaParams& p, const OwnedGrads&,
                                                               Side) {
  return dispatch_kernel<ElementOf<kDType>>(
      p.forward.problem, [&]<class Kernel>(Kernel) { return splits_of_streamed<Kernel>(p.forward.problem); });
}

template <DType kDType, Side kOwner>
cudaError_t PlainBackwardLaunches<kDType, kOwner>::backward(const AttentionBackwardCudaParams& p,
                                                            const OwnedGrads& grads, Side, cudaStream_t stream) {
  return dispatch_kernel<ElementOf<kDType>>(p.forward.problem, [&]<class Kernel>(Kernel) {
    return launch_owners<Kernel>(attention_backward_queries<Kernel>, p, grads, grads.splits, stream);
  });
}

template struct PlainBackwardLaunches<DType::VK_DTYPE, Side::kQueries>;

}  // namespace vitkernels
