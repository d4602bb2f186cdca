// Forward of softmax attention on a GPU with tensor cores, accumulated in float32.
//
// A thread block takes a query tile of one head, sixteen queries a warp, and iterates over KV tiles. The copy of a
// tile's values overlaps the product of queries and keys; that of the next keys overlaps the product of probabilities
// and values. Logits never leave the registers of a warp. Where there are few blocks, split-KV: each split of the keys
// has blocks of its own, and partial results are merged like those of any attention over disjoint keys.

#include "attention/cuda/forward_store.h"
#include "attention/cuda/launches.h"
#include "attention/cuda/score.h"
#include "attention/cuda/tile_sizes.h"
#include "attention/cuda/tokens.h"
#include "cuda/copy.h"
#include "cuda/fragments.h"
#include "cuda/mma.h"
#include "cuda/online_softmax.h"
#include "cuda/scheduler.h"

namespace vitkernels {
namespace {

using namespace cuda;
using namespace cute;

template <class Element, int kDim, class Keys>
struct ForwardKernel {
  static constexpr ForwardTileShape kTile = forward_tile(kDim, sizeof(Element));
  static constexpr int kThreads = kTile.threads(), kSharedBytes = kTile.shared_bytes(kDim, sizeof(Element));

  using SharedQueries = SharedTile<Element, kTile.queries, kDim>;
  using SharedKeys = SharedTile<Element, kTile.keys, kDim>;
  using Copy = typename TileCopy<Element, kThreads, kDim>::Copy;
  using Mma = TileMma<Element, kTile.warps>;

  // A query tile of one head, columns of the values, and a split of the keys.
  struct Task {
    int64_t batch, head, kv_head;
    Sequence sequence;
    Range queries;
    int64_t first_column, split;

    __device__ int num_queries() const { return int(queries.end - queries.begin); }
    __device__ int num_columns(const AttentionCudaParams& p) const {
      return int(min(p.problem.value_dim - first_column, int64_t(kDim)));
    }
  };

  static __device__ Task task_of_block(const AttentionCudaParams& p) {
    TaskIndex index(block_index());
    const int64_t tile = index.take(p.packing.query_tiles(p.problem, kTile.queries));
    const int64_t head = index.take(p.problem.heads), batch = index.take(p.packing.num_sequences(p.problem));
    const int64_t first_column = index.take(ceil_div<int64_t>(p.problem.value_dim, kDim)) * kDim;
    const Sequence sequence = p.sequence(batch);
    return {.batch = batch,
            .head = head,
            .kv_head = p.kv_head(head),
            .sequence = sequence,
            .queries = tile_of(tile, kTile.queries, sequence.axis.num_queries),
            .first_column = first_column,
            .split = index.rest()};
  }

  static int64_t tasks_of_split(const AttentionCudaParams& p) {
    const Problem& problem = p.problem;
    return p.packing.query_tiles(problem, kTile.queries) * problem.heads * p.packing.num_sequences(problem) *
           ceil_div<int64_t>(problem.value_dim, kDim);
  }

  // The KV tiles that a task goes through: its split's share.
  static __device__ Range tiles_of(const AttentionCudaParams& p, const Task& task, const Keys& keys) {
    if (task.kv_head < 0) return {0, 0};
    const Range tiles = keys.tiles(task.queries, kTile.keys);
    const int64_t count = tiles.end - tiles.begin;
    return {tiles.begin + count * task.split / p.splits, tiles.begin + count * (task.split + 1) / p.splits};
  }

  static __device__ ForwardResult result_of(const AttentionCudaParams& p, const Task& task) {
    return {.batch = task.batch,
            .head = task.head,
            .split = task.split,
            .first_row = task.sequence.first_row + task.queries.begin,
            .first_token = task.sequence.query_tokens(task.queries).begin,
            .first_column = task.first_column,
            .rows = task.num_queries(),
            .columns = task.num_columns(p)};
  }

  // Tokens of a packed batch that no sequence covers. The merge skips splits with sum 0, so their `out` need not be
  // written.
  static __device__ void clear_uncovered(const AttentionCudaParams& p, const Task& task, int columns) {
    const Range covered = task.sequence.query_tokens({0, task.sequence.axis.num_queries});
    for_uncovered(p.packing.query_slot(p.problem, task.batch), covered, [&](int64_t token) {
      if (task.first_column == 0) {
        store_statistics<OnlineSoftmax<1>>(p, task.split, token, task.head, -std::numeric_limits<float>::infinity(),
                                           0.0f);
      }
      Element* const out = p.out.at<Element>(task.batch, token, task.head) + task.first_column;
      for (int c = 0; c < columns && p.splits == 1; ++c) out[c] = Element(0);
    });
  }

  static __device__ __forceinline__ void run(const AttentionCudaParams& p, Element* shared) {
    const Problem& problem = p.problem;
    const Task task = task_of_block(p);
    const int columns = task.num_columns(p);
    if (p.packing && task.queries.begin == 0) clear_uncovered(p, task, columns);
    if (task.queries.empty()) return;
    const Keys keys = Keys::of(task.sequence);

    Element* const shared_keys = shared + int{SharedQueries::kElements};
    Element* const shared_values = shared_keys + int{SharedKeys::kElements};
    Tensor sQ = make_tensor(make_smem_ptr(shared), typename SharedQueries::Layout{});      // (queries,dim)
    Tensor sK = make_tensor(make_smem_ptr(shared_keys), typename SharedKeys::Layout{});    // (keys,dim)
    Tensor sV = make_tensor(make_smem_ptr(shared_values), typename SharedKeys::Layout{});  // (keys,dim)

    const auto start_keys = [&](Range tile) {
      start_tile<Copy>(sK, problem.key, task.batch, task.kv_head, task.sequence.key_tokens(tile), 0,
                       int(problem.head_dim));
      commit_copies();
    };
    const auto start_values = [&](Range tile) {
      start_tile<Copy>(sV, problem.value, task.batch, task.kv_head, task.sequence.key_tokens(tile), task.first_column,
                       columns);
      commit_copies();
    };

    const Mma mma(p.allow_tf32);
    const auto thread = mma.get_slice(threadIdx.x);
    Tensor out = partition_fragment_C(mma, Shape<Int<kTile.queries>, Int<kDim>>{});  // (MMA,MMA_M,MMA_N)
    Tensor cS = make_identity_tensor(Shape<Int<kTile.queries>, Int<kTile.keys>>{});  // (queries,keys)
    Tensor coordinates = by_rows(thread.partition_C(cS));                            // (rows,columns)
    Tensor out_rows = by_rows(out);                                                  // (rows,columns)
    OnlineSoftmax<decltype(size<0>(out_rows))::value> softmax;
    clear(out);

    const Range tiles = tiles_of(p, task, keys);
    if (!tiles.empty()) {
      start_tile<Copy>(sQ, problem.query, task.batch, task.head, task.sequence.query_tokens(task.queries), 0,
                       int(problem.head_dim));
      start_keys(keys.rows(tiles.begin, kTile.keys));
    }
    for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
      const Range tile_keys = keys.rows(tile, kTile.keys);
      wait_for_copies<0>();
      __syncthreads();  // the keys have arrived, and all reads of the previous values are done
      start_values(tile_keys);
      Tensor logits = partition_fragment_C(mma, Shape<Int<kTile.queries>, Int<kTile.keys>>{});  // (MMA,MMA_M,MMA_N)
      clear(logits);
      multiply_tile(mma, logits, sQ, sK, int(problem.head_dim));

      Tensor logit_rows = by_rows(logits);  // (rows,columns)
      apply_score<kTile.keys>(logit_rows, coordinates, problem.score, keys,
                              {task.batch, task.head, task.queries, tile_keys});
      softmax.exponentiate(logit_rows, [&](int r, float factor) {
        CUTE_UNROLL
        for (int c = 0; c < size<1>(out_rows); ++c) out_rows(r, c) *= factor;
      });
      wait_for_copies<0>();
      __syncthreads();  // the values have arrived, and all reads of the keys are done
      if (tile + 1 < tiles.end) start_keys(keys.rows(tile + 1, kTile.keys));
      multiply_operand(mma, out, as_operand_a(convert<Element>(logits)), sV, columns);
    }
    softmax.total();
    store_forward<kThreads>(p, result_of(p, task_of_block(p)), mma, out, softmax, sQ);
  }
};

template <class Element, int kDim, class Keys>
__global__ void __launch_bounds__(ForwardKernel<Element, kDim, Keys>::kThreads,
                                  ForwardKernel<Element, kDim, Keys>::kTile.min_blocks)
    attention(const __grid_constant__ AttentionCudaParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  ForwardKernel<Element, kDim, Keys>::run(p, reinterpret_cast<Element*>(shared));
}

template <class Element, int kDim, class Keys>
cudaError_t launch(const AttentionCudaParams& p, cudaStream_t stream) {
  using Kernel = ForwardKernel<Element, kDim, Keys>;
  return launch_tasks(attention<Element, kDim, Keys>, Kernel::tasks_of_split(p) * p.splits, Kernel::kThreads,
                      Kernel::kSharedBytes, stream, p);
}

// Fewer instances: heads of at most 32 columns take those of 64. In 16 bits most calls have fast paths.
template <class Function>
auto dispatch_kernel(const AttentionCudaParams& p, Function&& f) {
  return dispatch_dim(p.problem, [&]<int kNarrow>(Int<kNarrow>) { return f(Int<std::max(kNarrow, 64)>{}); });
}

}  // namespace

template <DType kDType>
int64_t AttentionLaunches<kDType>::forward_blocks(const AttentionCudaParams& p) {
  return dispatch_kernel(
      p, [&]<int kDim>(Int<kDim>) { return ForwardKernel<ElementOf<kDType>, kDim, DenseKeys>::tasks_of_split(p); });
}

template <DType kDType>
cudaError_t AttentionLaunches<kDType>::forward(const AttentionCudaParams& p, cudaStream_t stream) {
  return dispatch_kernel(p, [&]<int kDim>(Int<kDim>) { return launch<ElementOf<kDType>, kDim, DenseKeys>(p, stream); });
}

template int64_t AttentionLaunches<DType::VK_DTYPE>::forward_blocks(const AttentionCudaParams&);
template cudaError_t AttentionLaunches<DType::VK_DTYPE>::forward(const AttentionCudaParams&, cudaStream_t);

}  // namespace vitkernels
