// The forward's fast path for 16-bit elements (forward_path.h): all queries see all keys, and the score has a scale and
// at most one dense bias.
//
// As forward.cu, with a main loop of straight-line code: 32 queries a warp, so that a fragment of keys or values read
// from shared memory serves two rows of matrix instructions; running pointers; an online softmax of one FMA and one
// exponential for each logit. KV tiles go from the last to the first: only the last has a tail, and a mask.

#include "attention/cuda/forward_store.h"
#include "attention/cuda/launches.h"
#include "attention/cuda/plain_score.h"
#include "attention/cuda/plain_tasks.h"
#include "attention/cuda/tile_sizes.h"
#include "attention/cuda/tokens.h"
#include "cuda/fast_softmax.h"
#include "cuda/mma.h"
#include "cuda/tile_stream.h"

namespace vitkernels {
namespace {

using namespace cuda;
using namespace cute;

template <class Element, int kDim, bool kHasBias>
struct PlainForwardKernel {
  static constexpr ForwardTileShape kTile = plain_forward_tile(kDim, kHasBias);
  static constexpr int kThreads = kTile.threads(), kSharedBytes = kTile.shared_bytes(kDim, sizeof(Element));
  static constexpr bool kHoldsQueries = kDim <= 32;  // in registers; else they are read for each KV tile
  static constexpr bool kReadsInPairs = kDim <= 32;  // of the bias; above, registers do not suffice

  using SharedQueries = SharedTile<Element, kTile.queries, kDim>;
  using SharedKeys = SharedTile<Element, kTile.keys, kDim>;
  using Queries = TileStream<Element, kThreads, kTile.queries, kDim>;
  using Keys = TileStream<Element, kThreads, kTile.keys, kDim>;
  using Mma = TileMma<Element, kTile.warps>;

  static __device__ __forceinline__ void run(const AttentionCudaParams& p, const PlainTasks& tasks, Element* shared) {
    const Problem& problem = p.problem;
    const PlainTask task = tasks.task(int(blockIdx.x));
    Element* const shared_keys = shared + int{SharedQueries::kElements};
    Element* const shared_values = shared_keys + int{SharedKeys::kElements};
    Tensor sQ = shared_tile<SharedQueries>(shared);      // (queries,dim)
    Tensor sK = shared_tile<SharedKeys>(shared_keys);    // (keys,dim)
    Tensor sV = shared_tile<SharedKeys>(shared_values);  // (keys,dim)

    const int num_queries = int(problem.num_queries()) - task.tile * kTile.queries;
    const int num_tiles = ceil_div(int(problem.num_keys()), kTile.keys);
    const int first_tile = tasks.first_of_split(num_tiles, task.split);
    const int last_tile = tasks.first_of_split(num_tiles, task.split + 1) - 1;
    int tiles_before = last_tile - first_tile;
    const int last_key = last_tile * kTile.keys, num_keys = int(problem.num_keys()) - last_key;  // of the last tile
    Keys keys = stream_of<Keys>(problem.key, task.batch, last_key, task.kv_head, problem.head_dim);
    Keys values = stream_of<Keys>(problem.value, task.batch, last_key, task.kv_head, problem.value_dim);
    stream_of<Queries>(problem.query, task.batch, task.tile * kTile.queries, task.head, problem.head_dim)
        .start_some(sQ, num_queries);
    keys.start_some(sK, num_keys);
    commit_copies();

    const Mma mma(false);
    const auto thread = mma.get_slice(threadIdx.x);
    Tensor cS = make_identity_tensor(Shape<Int<kTile.queries>, Int<kTile.keys>>{});  // (queries,keys)
    const auto coordinates = by_rows(thread.partition_C(cS));                        // (rows,columns)
    Tensor out = partition_fragment_C(mma, Shape<Int<kTile.queries>, Int<kDim>>{});  // (MMA,MMA_M,MMA_N)
    Tensor out_rows = by_rows(out);                                                  // (rows,columns)
    clear(out);
    constexpr int kRows = decltype(size<0>(out_rows))::value;
    // Logits, or without a bias the products, which are scaled with the exponential.
    const float scale = problem.score.scale_of<float>(task.head);
    FastOnlineSoftmax<kRows> softmax(kHasBias ? kLog2e : scale * kLog2e);
    const ScoreTerm& term = problem.score.bias;
    BiasRows<kRows, -kTile.keys, decltype(coordinates)> bias(
        static_cast<const float*>(term.data) +
            term.strides.offset(task.batch, task.head, task.tile * kTile.queries, last_key),
        int(term.strides.query), num_queries, coordinates);

    wait_for_copies<0>();
    __syncthreads();
    const auto rQ = read_operand_a(mma, sQ);  // (MMA,MMA_M,MMA_K), unused where they are not held

    const auto step = [&]<bool kIsLast>(std::bool_constant<kIsLast>) {
      wait_for_copies<0>();
      __syncthreads();  // the keys have arrived, and all reads of the previous values are done
      kIsLast ? values.start_some(sV, num_keys) : values.start_whole(sV);
      commit_copies();
      Tensor logits = partition_fragment_C(mma, Shape<Int<kTile.queries>, Int<kTile.keys>>{});  // (MMA,MMA_M,MMA_N)
      clear(logits);
      if constexpr (kHoldsQueries) {
        multiply_held_tile(mma, logits, rQ, sK);
      } else {
        multiply_whole_tile(mma, logits, sQ, sK);
      }
      Tensor logit_rows = by_rows(logits);  // (rows,columns)
      if constexpr (kHasBias && kIsLast) bias.add_some(logit_rows, scale, num_keys);
      if constexpr (kHasBias && !kIsLast) bias.template add<kReadsInPairs>(logit_rows, scale);
      if constexpr (kIsLast) mask_tail(logit_rows, coordinates, num_keys);

      wait_for_copies<0>();
      __syncthreads();  // the values have arrived, and all reads of the keys are done
      if (tiles_before > 0) keys.start_whole(sK);
      commit_copies();
      softmax.exponentiate(logit_rows, [&](int r, float factor) {
        CUTE_UNROLL
        for (int c = 0; c < size<1>(out_rows); ++c) out_rows(r, c) *= factor;
      });
      multiply_whole_operand<StepOrder::kByColumns>(mma, out, as_operand_a(convert<Element>(logits)), sV);
    };
    step(std::true_type{});
    while (tiles_before-- > 0) step(std::false_type{});

    // What the results need is computed here, since the loop leaves no registers for it.
    const PlainTask same = tasks.task(int(block_index()));
    Tensor sO = shared_tile<SharedQueries>(computed_here(shared));  // (queries,dim)
    softmax.total(kHasBias ? 1.0f : problem.score.scale_of<float>(same.head));
    store_forward<kThreads>(p, result_of(p, same), mma, out, softmax, sO);
  }

  static __device__ ForwardResult result_of(const AttentionCudaParams& p, const PlainTask& task) {
    const int first_query = task.tile * kTile.queries;
    return {.batch = task.batch,
            .head = task.head,
            .split = task.split,
            .first_row = task.batch * p.problem.num_queries() + first_query,
            .first_token = first_query,
            .first_column = 0,
            .rows = min(int(p.problem.num_queries()) - first_query, kTile.queries),
            .columns = int(p.problem.value_dim)};
  }
};

template <class Element, int kDim, bool kHasBias>
__global__ void __launch_bounds__(PlainForwardKernel<Element, kDim, kHasBias>::kThreads,
                                  PlainForwardKernel<Element, kDim, kHasBias>::kTile.min_blocks)
    attention_plain(const __grid_constant__ AttentionCudaParams p, const __grid_constant__ PlainTasks tasks) {
  extern __shared__ __align__(128) unsigned char shared[];
  PlainForwardKernel<Element, kDim, kHasBias>::run(p, tasks, reinterpret_cast<Element*>(shared));
}

int64_t query_tiles(const Problem& problem) {
  return ceil_div<int64_t>(problem.num_queries(), plain_forward_tile(0, false).queries);
}

template <class Element, int kDim, bool kHasBias>
cudaError_t launch(const AttentionCudaParams& p, int64_t blocks, cudaStream_t stream) {
  using Kernel = PlainForwardKernel<Element, kDim, kHasBias>;
  return launch_tasks(attention_plain<Element, kDim, kHasBias>, blocks, Kernel::kThreads, Kernel::kSharedBytes, stream,
                      p, plain_tasks(p.problem, query_tiles(p.problem), p.splits));
}

}  // namespace

template <DType kDType>
int64_t PlainForwardLaunches<kDType>::forward_blocks(const AttentionCudaParams& p) {
  return query_tiles(p.problem) * p.problem.heads * p.problem.batch;
}

template <DType kDType>
cudaError_t PlainForwardLaunches<kDType>::forward(const AttentionCudaParams& p, cudaStream_t stream) {
  using Element = ElementOf<kDType>;
  const int64_t blocks = forward_blocks(p) * p.splits;
  if (blocks > kMaxBlocks) return cudaErrorInvalidConfiguration;
  return dispatch_plain_dim(p.problem, [&]<int kDim>(Int<kDim>) {
    return p.problem.score.bias.data ? launch<Element, kDim, true>(p, blocks, stream)
                                     : launch<Element, kDim, false>(p, blocks, stream);
  });
}

template int64_t PlainForwardLaunches<DType::VK_DTYPE>::forward_blocks(const AttentionCudaParams&);
template cudaError_t PlainForwardLaunches<DType::VK_DTYPE>::forward(const AttentionCudaParams&, cudaStream_t);

}  // namespace vitkernels
