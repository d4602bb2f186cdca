// The backward's fast path for 16-bit elements (backward_path.h), blocks that own keys: their gradients and those of
// their values, and where a block owns all keys of a head, the gradients of the queries too.
//
// As backward.cu, with a main loop of straight-line code: the transposed logits of a query tile, P and dS are operands
// of the next products in registers; for dQ, dS passes through shared memory. Query tiles go from the last to the
// first: only the last has a tail, and no mask, since P is zero by the statistics of queries that do not exist.

#include "attention/cuda/differentiate.h"
#include "attention/cuda/launches.h"
#include "attention/cuda/plain_backward.h"
#include "attention/cuda/plain_score.h"
#include "attention/cuda/plain_tasks.h"
#include "attention/cuda/tile_sizes.h"
#include "cuda/epilogue.h"
#include "cuda/tile_stream.h"

namespace vitkernels {
namespace {

using namespace cuda;
using namespace cute;

template <class T, int kDim, bool kHasBias, bool kSumsQueries>
struct PlainKeysKernel {
  using Element = T;
  static constexpr PlainBackwardTile kTile = kSumsQueries ? resident_backward_tile() : plain_keys_tile(kDim);
  static constexpr int kOwned = kTile.owned, kStreamed = kTile.streamed, kThreads = kTile.threads();

  using SharedKeys = SharedTile<Element, kOwned, kDim>;
  using SharedQueries = SharedTile<Element, kStreamed, kDim>;
  using SharedGrads = SharedTile<Element, kOwned, kStreamed>;  // dS
  using Keys = TileStream<Element, kThreads, kOwned, kDim>;
  using Queries = TileStream<Element, kThreads, kStreamed, kDim>;
  using Mma = TileMma<Element, kTile.warps>;
  static constexpr int kPairs = kStreamed / 2;
  // Of the keys of a thread, half of the block's: fewer take another kernel (backward_path.h).
  static constexpr int kSureKeys = kSumsQueries ? kOwned / kTile.warps / 16 : 0;
  // Keys and values, two stages of queries and dO, dS, and the statistics of the queries of both stages.
  static constexpr int kStageElements = 2 * SharedQueries::kElements, kFirstStage = 2 * SharedKeys::kElements;
  static constexpr int kFirstGrad = kFirstStage + 2 * kStageElements;
  static constexpr int kFirstStatistics = kFirstGrad + (kSumsQueries ? SharedGrads::kElements : 0);
  static constexpr int kSharedBytes =
      kFirstStatistics * int(sizeof(Element)) + kStreamed * int(sizeof(StatisticsOfPair));

  static int64_t num_owned(const Problem& p) { return p.num_keys(); }
  static int64_t num_streamed(const Problem& p) { return p.num_queries(); }

  static __device__ __forceinline__ void run(const AttentionBackwardCudaParams& p, const OwnedGrads& targets,
                                             const PlainTasks& tasks, Element* shared) {
    const Problem& problem = p.forward.problem;
    const PlainTask task = tasks.task(int(blockIdx.x));
    Tensor sK = shared_tile<SharedKeys>(shared);                          // (keys,dim)
    Tensor sV = shared_tile<SharedKeys>(shared + SharedKeys::kElements);  // (keys,dim)
    Element* const stages = shared + kFirstStage;
    StatisticsOfPair* const statistics = reinterpret_cast<StatisticsOfPair*>(shared + kFirstStatistics);

    const int first_key = kSumsQueries ? 0 : task.tile * kOwned;
    const int num_keys = kSumsQueries ? int(problem.num_keys()) : min(int(problem.num_keys()) - first_key, kOwned);
    stream_of<Keys>(problem.key, task.batch, first_key, task.kv_head, problem.head_dim).start_some(sK, num_keys);
    stream_of<Keys>(p.key_value, task.batch, first_key, task.kv_head, problem.value_dim).start_some(sV, num_keys);

    const Mma mma(false);
    const auto coordinates = coordinates_of<Side::kKeys, kOwned, kStreamed>(mma);    // (queries,keys)
    Tensor grad_key = partition_fragment_C(mma, Shape<Int<kOwned>, Int<kDim>>{});    // (MMA,MMA_M,MMA_N)
    Tensor grad_value = partition_fragment_C(mma, Shape<Int<kOwned>, Int<kDim>>{});  // (MMA,MMA_M,MMA_N)
    clear(grad_key);
    clear(grad_value);
    const float scale = problem.score.scale.template as<float>();
    const int num_tiles = ceil_div(int(problem.num_queries()), kStreamed);
    const int last_query = (tasks.first_of_split(num_tiles, task.split + 1) - 1) * kStreamed;
    int tiles_before = last_query / kStreamed - tasks.first_of_split(num_tiles, task.split);
    int rest = int(problem.num_queries()) - last_query;  // from the first of the tile on
    const ScoreTerm& term = problem.score.bias;
    BiasColumns<kSureKeys, decltype(coordinates)> bias(
        static_cast<const float*>(term.data) + term.strides.offset(task.batch, task.head, last_query, first_key),
        int(term.strides.query), num_keys, coordinates);
    Element* grad_query = nullptr;  // of the thread's first query and column in the next tile
    if constexpr (kSumsQueries) {
      const ShareOfQueries share;
      grad_query = targets.query_grads.at<Element>(task.batch, last_query + share.row(), task.head) + share.column();
    }
    Queries queries = stream_of<Queries>(problem.query, task.batch, last_query, task.head, problem.head_dim);
    Queries values = stream_of<Queries>(p.query_value, task.batch, last_query, task.head, problem.value_dim);
    int row = p.statistics.index(problem, task.batch, task.head, last_query);
    const auto start = [&](int stage, int row, auto&& start_tile) {
      start_tile(queries, shared_tile<SharedQueries>(stages + stage * kStageElements));
      start_tile(values, shared_tile<SharedQueries>(stages + stage * kStageElements + SharedQueries::kElements));
      if (const int thread = thread_index(); thread < kStreamed) {  // two threads a pair copy its two halves
        copy_16_bytes(reinterpret_cast<float4*>(statistics + stage * kPairs) + thread,
                      reinterpret_cast<const float4*>(p.statistics.data) + (row + thread), 16);
      }
      commit_copies();
    };
    start(tiles_before % 2, row, [&](Queries& of, const auto& sT) { of.start_some(sT, rest); });

    for (; tiles_before >= 0; --tiles_before, rest += kStreamed, row -= kStreamed) {
      const int stage = tiles_before % 2;
      wait_for_copies<0>();
      __syncthreads();  // this stage has arrived, and all reads of the other one are done
      if (tiles_before > 0) {
        start(stage ^ 1, row - kStreamed, [&](Queries& of, const auto& sT) { of.start_whole(sT); });
      }
      Tensor sQ = shared_tile<SharedQueries>(stages + stage * kStageElements);  // (queries,dim)
      Tensor sD =
          shared_tile<SharedQueries>(stages + stage * kStageElements + SharedQueries::kElements);  // (queries,dim)

      Tensor probs = partition_fragment_C(mma, Shape<Int<kOwned>, Int<kStreamed>>{});  // (MMA,MMA_M,MMA_N)
      Tensor logits = queries_by_keys<Side::kKeys>(by_rows(probs));                    // (queries,keys)
      if constexpr (kSumsQueries) {
        multiply_whole_tile(mma, probs, first_products(probs, coordinates, num_keys), sK, sQ);
      } else {
        clear(probs);
        multiply_whole_tile(mma, probs, sK, sQ);
      }
      if constexpr (kHasBias) {
        bias.add(logits, scale, rest);
        bias.advance(kStreamed);
      }
      // A thread has two neighbouring queries of every eight. From an index of its own, as it would live in a register.
      const StatisticsOfPair* const pairs = statistics + stage * kPairs + thread_index() % 4;
      exponentiate_tile(logits, pairs, scale);
      multiply_whole_operand<StepOrder::kByRows>(mma, grad_value, as_operand_a(convert<Element>(probs)), sD);
      Tensor grads = partition_fragment_C(mma, Shape<Int<kOwned>, Int<kStreamed>>{});  // (MMA,MMA_M,MMA_N)
      multiply_whole_tile(mma, grads, minus_delta(grads, pairs), sV, sD);
      CUTE_UNROLL
      for (int j = 0; j < size(grads); ++j) grads(j) *= probs(j);
      const auto rS = convert<Element>(grads);  // (MMA,MMA_M,MMA_N)
      if constexpr (kHasBias) {
        if (p.logit_grads.data) store_grads(p, tasks.tile(int(block_index())) * kOwned, row, rS);
      }
      multiply_whole_operand<StepOrder::kByRows>(mma, grad_key, as_operand_a(rS), sQ);
      if constexpr (kSumsQueries) {
        Tensor sS = shared_tile<SharedGrads>(shared + kFirstGrad);  // (keys,queries)
        cute::copy(AutoVectorizingCopy{}, rS, mma.get_slice(threadIdx.x).partition_C(sS));
        __syncthreads();
        sum_queries(problem, targets.query_grads.token_stride, grad_query, rest, sS, sK);
        grad_query -= kStreamed * targets.query_grads.token_stride;
      }
    }

    // What the results need is computed here, since the loop leaves no registers for it.
    const PlainTask same = tasks.task(int(block_index()));
    const int first = same.tile * kOwned;
    // Heads that share keys have parts of their gradients.
    const int part = same.split * tasks.heads_of_group + tasks.member(same);
    OwnedTokens tokens{same.batch, same.kv_head, part, first, min(int(problem.num_keys()) - first, kOwned)};
    Element* const data = computed_here(shared);
    Tensor sOK = shared_tile<SharedKeys>(data);                          // (keys,dim)
    Tensor sOV = shared_tile<SharedKeys>(data + SharedKeys::kElements);  // (keys,dim)
    multiply_all(grad_key, scale);
    tokens.columns = int(problem.head_dim);
    store_owned<kThreads>(mma, grad_key, sOK, targets.logit_grads, targets.logit_grad_parts, tokens);
    tokens.columns = int(problem.value_dim);
    store_owned<kThreads>(mma, grad_value, sOV, targets.probs, targets.prob_parts, tokens);
  }

  // What the products of keys and queries are added to: zero, and -inf for keys that do not exist, since the gradients
  // of their logits reach the queries.
  template <class Products, class Coordinates>
  static __device__ auto first_products(const Products& like, const Coordinates& coordinates, int num_keys) {
    const auto of_keys = make_layout(shape(like), Stride<Stride<_0, _1>, _2, _0>{});  // (MMA,MMA_M,MMA_N)
    Tensor first = make_tensor<float>(of_keys);                                       // (MMA,MMA_M,MMA_N)
    CUTE_UNROLL
    for (int c = 0; c < size<1>(coordinates); ++c) {
      const bool exists = c < kSureKeys || get<1>(coordinates(0, c)) < num_keys;
      first.data()[c] = exists ? 0.0f : -std::numeric_limits<float>::infinity();
    }
    return first;
  }

  // dS of a tile, whose statistics begin with `index`.
  template <class Grads>
  static __device__ void store_grads(const AttentionBackwardCudaParams& p, int first_key, int index, const Grads& rS) {
    static_assert(kStreamed == LogitGrads::kQueries);
    const Problem& problem = p.forward.problem;
    const int first_row = thread_index() / kWarpSize * 16 + thread_index() % kWarpSize / 4;
    Element* const to =
        p.logit_grads.row<Element>(problem, index, first_key) + thread_index() % 4 * LogitGrads::kLaneQueries;
    const Tensor pairs = recast<uint32_t>(rS);  // ((1,2),MMA_M,MMA_N)
    CUTE_UNROLL
    for (int r = 0; r < 2 * size<1>(pairs); ++r) {
      const int row = first_row + r % 2 * 8 + r / 2 * 16 * kTile.warps;
      const auto at = [&](int n) { return pairs(make_coord(0, r % 2), r / 2, n); };
      if (first_key + row < int(problem.num_keys())) {
        store_16_bytes(to + row * LogitGrads::kQueries, at(0), at(1), at(2), at(3));
      }
    }
  }

  // In one instruction; the compiler would take four.
  static __device__ void store_16_bytes(Element* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
  }

  // What the products of the values of keys and queries are added to.
  template <class Products>
  static __device__ auto minus_delta(const Products& like, const StatisticsOfPair* pairs) {
    const auto of_queries = make_layout(shape(like), Stride<Stride<_1, _2>, _0, _4>{});  // (MMA,MMA_M,MMA_N)
    Tensor first = make_tensor<float>(of_queries);                                       // (MMA,MMA_M,MMA_N)
    CUTE_UNROLL
    for (int n = 0; n < size<2>(first); ++n) {
      const float4 quad = *reinterpret_cast<const float4*>(pairs[4 * n].minus_delta);
      first.data()[4 * n] = quad.x, first.data()[4 * n + 1] = quad.y;
      first.data()[4 * n + 2] = quad.z, first.data()[4 * n + 3] = quad.w;
    }
    return first;
  }

  template <class Logits>
  static __device__ __forceinline__ void exponentiate_tile(Logits& logits, const StatisticsOfPair* pairs, float scale) {
    constexpr int kQueries = decltype(size<0>(logits))::value;
    float minus_lse_log2[kQueries];
    CUTE_UNROLL
    for (int r = 0; r < kQueries; r += 2) {
      const float2 both = *reinterpret_cast<const float2*>(pairs[r / 2 * 4].minus_lse_log2);
      minus_lse_log2[r] = both.x, minus_lse_log2[r + 1] = both.y;
    }
    const auto lse = [&](int r) { return pairs[r / 2 * 4].lse[r % 2]; };
    exponentiate_plain<kHasBias>(logits, minus_lse_log2, lse, scale, is_any_large(minus_lse_log2));
  }

  // Of a tile of queries, a warp sums sixteen and some of the columns.
  struct ShareOfQueries {
    static constexpr int kRowTiles = kStreamed / 16, kColumns = kDim * kRowTiles / kTile.warps;

    // An index of its own, since the loop around leaves no registers for what would be derived from threadIdx.
    int thread = thread_index(), lane = thread % kWarpSize, warp = thread / kWarpSize;
    int row_tile = warp % kRowTiles, column_tile = warp / kRowTiles;

    __device__ int row() const { return row_tile * 16 + lane / 4; }
    __device__ int column() const { return column_tile * kColumns + lane % 4 * 2; }
  };

  // dQ of a query tile = dS K, `rest` queries before the end. The thread's first is written to `to`.
  template <class Grads, class SharedK>
  static __device__ __forceinline__ void sum_queries(const Problem& problem, int64_t stride, Element* to, int rest,
                                                     const Grads& sS, const SharedK& sK) {
    constexpr int kColumns = ShareOfQueries::kColumns;
    const TileMma<Element, 1> mma(false);
    const ShareOfQueries share;
    Tensor grad = partition_fragment_C(mma, Shape<_16, Int<kColumns>>{});  // (MMA,MMA_M,MMA_N)
    clear(grad);
    multiply_transposed(
        mma, share.lane, grad, local_tile(transposed(sS), Shape<_16, Int<kOwned>>{}, make_coord(share.row_tile, 0)),
        local_tile(transposed(sK), Shape<Int<kColumns>, Int<kOwned>>{}, make_coord(share.column_tile, 0)),
        int(problem.num_keys()));
    Tensor rows = by_rows(grad);  // (rows,columns)
    const float scale = problem.score.scale.template as<float>();
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      CUTE_UNROLL
      for (int c = 0; c < size<1>(rows); c += 2) {
        const bool exists = share.row() + 8 * r < rest && share.column() + 4 * c < problem.head_dim;
        store_pair_if(exists, to + 8 * r * stride + 4 * c, rows(r, c) * scale, rows(r, c + 1) * scale);
      }
    }
  }
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kTile.min_blocks)
    attention_backward_keys(const __grid_constant__ AttentionBackwardCudaParams p,
                            const __grid_constant__ OwnedGrads grads, const __grid_constant__ PlainTasks tasks) {
  extern __shared__ __align__(128) unsigned char shared[];
  Kernel::run(p, grads, tasks, reinterpret_cast<typename Kernel::Element*>(shared));
}

// Calls f(kernel).
template <class Element, class Function>
auto dispatch_kernel(const AttentionBackwardCudaParams& p, const OwnedGrads& grads, Function&& f) {
  const bool has_bias = p.forward.problem.score.bias.data;
  if (grads.query_grads.data) {
    return has_bias ? f(PlainKeysKernel<Element, 64, true, true>{}) : f(PlainKeysKernel<Element, 64, false, true>{});
  }
  if (has_bias) return f(PlainKeysKernel<Element, 64, true, false>{});
  return dispatch_plain_dim(p.forward.problem,
                            [&]<int kDim>(Int<kDim>) { return f(PlainKeysKernel<Element, kDim, false, false>{}); });
}

// The gradients of heads that share keys are partial sums.
int64_t heads_of_group(const Problem& p) { return p.heads / p.kv_heads; }

}  // namespace

template <DType kDType, Side kOwner>
int64_t PlainBackwardLaunches<kDType, kOwner>::backward_splits(const AttentionBackwardCudaParams& p,
                                                               const OwnedGrads& grads, Side) {
  return dispatch_kernel<ElementOf<kDType>>(p, grads, [&]<class Kernel>(Kernel) {
    return splits_of_streamed<Kernel>(p.forward.problem) * heads_of_group(p.forward.problem);
  });
}

template <DType kDType, Side kOwner>
cudaError_t PlainBackwardLaunches<kDType, kOwner>::backward(const AttentionBackwardCudaParams& p,
                                                            const OwnedGrads& grads, Side, cudaStream_t stream) {
  return dispatch_kernel<ElementOf<kDType>>(p, grads, [&]<class Kernel>(Kernel) {
    return launch_owners<Kernel>(attention_backward_keys<Kernel>, p, grads,
                                 grads.splits / heads_of_group(p.forward.problem), stream);
  });
}

template struct PlainBackwardLaunches<DType::VK_DTYPE, Side::kKeys>;

}  // namespace vitkernels
