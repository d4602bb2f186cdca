// Forward of softmax attention on a GPU with tensor cores, sums in float32.
//
// A block of threads takes some queries of one head, a warp sixteen of them, and goes through the keys in tiles. While it
// multiplies queries and keys, the values of the tile arrive; while it multiplies probabilities and values, the next keys.
// A query's logits never leave the registers of its warp.

#include "attention/attention_cuda.h"
#include "attention/score_cuda.h"
#include "attention/tiles_cuda.h"
#include "attention/tokens_cuda.h"
#include "cuda/copy.h"
#include "cuda/epilogue.h"
#include "cuda/fragments.h"
#include "cuda/mma.h"
#include "cuda/online_softmax.h"
#include "cuda/scheduler.h"

namespace vitkernels {
namespace {

using namespace cuda;
using namespace cute;

template <class Element, int kDim>
struct ForwardKernel {
  static constexpr ForwardTile kTile = forward_tile(kDim, sizeof(Element));
  static constexpr int kThreads = kTile.threads(), kSharedBytes = kTile.shared_bytes(kDim, sizeof(Element));

  using SharedQueries = SharedTile<Element, kTile.queries, kDim>;
  using SharedKeys = SharedTile<Element, kTile.keys, kDim>;
  using Copy = typename TileCopy<Element, kThreads, kDim>::Copy;
  using Mma = TileMma<Element, kTile.warps>;

  // Which queries of which head, and which columns of the values.
  struct Task {
    int64_t batch, head, kv_head;
    Sequence sequence;
    Range rows;
    int64_t first_column;
  };

  static __device__ Task task_of_block(const AttentionCudaParams& p) {
    TaskIndex index(blockIdx.x);
    const int64_t block = index.take(ceil_div<int64_t>(p.num_queries(), kTile.queries));
    const int64_t head = index.take(p.heads), batch = index.take(p.batch);
    const Sequence sequence = p.sequence(batch);
    return {.batch = batch,
            .head = head,
            .kv_head = p.kv_head(head),
            .sequence = sequence,
            .rows = tile_of(block, kTile.queries, sequence.axis.num_queries),
            .first_column = index.rest() * kDim};
  }

  static int64_t num_tasks(const AttentionCudaParams& p) {
    return ceil_div<int64_t>(p.num_queries(), kTile.queries) * p.heads * p.batch * ceil_div<int64_t>(p.value_dim, kDim);
  }

  static __device__ void run(const AttentionCudaParams& p, Element* shared) {
    const Task task = task_of_block(p);
    if (task.rows.empty()) return;
    const Axis& axis = task.sequence.axis;
    const int rows = int(task.rows.end - task.rows.begin);
    const int columns = int(min(p.value_dim - task.first_column, int64_t(kDim)));

    Element* const shared_keys = shared + int{SharedQueries::kElements};
    Element* const shared_values = shared_keys + int{SharedKeys::kElements};
    Tensor sQ = make_tensor(make_smem_ptr(shared), typename SharedQueries::Layout{});      // (queries,dim)
    Tensor sK = make_tensor(make_smem_ptr(shared_keys), typename SharedKeys::Layout{});    // (keys,dim)
    Tensor sV = make_tensor(make_smem_ptr(shared_values), typename SharedKeys::Layout{});  // (keys,dim)

    const Range seen = task.kv_head < 0 ? Range{0, 0} : axis.any_keys(task.rows);
    const auto keys_of = [&](int64_t tile) { return tile_of(tile, kTile.keys, axis.num_keys); };
    const auto start_keys = [&](Range keys) {
      start_tile<Copy>(sK, p.key, task.batch, task.kv_head, task.sequence.key_tokens(keys), 0, int(p.head_dim));
      commit_copies();
    };
    const auto start_values = [&](Range keys) {
      start_tile<Copy>(sV, p.value, task.batch, task.kv_head, task.sequence.key_tokens(keys), task.first_column,
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

    const int64_t first_tile = seen.begin / kTile.keys, end_tile = ceil_div<int64_t>(seen.end, kTile.keys);
    if (!seen.empty()) {
      start_tile<Copy>(sQ, p.query, task.batch, task.head, task.sequence.query_tokens(task.rows), 0, int(p.head_dim));
      start_keys(keys_of(first_tile));
    }
    for (int64_t tile = first_tile; tile < end_tile; ++tile) {
      const Range keys = keys_of(tile);
      wait_for_copies<0>();
      __syncthreads();  // the keys are there, and nobody reads the last values any more
      start_values(keys);
      Tensor logits = partition_fragment_C(mma, Shape<Int<kTile.queries>, Int<kTile.keys>>{});  // (MMA,MMA_M,MMA_N)
      clear(logits);
      multiply_tile(mma, logits, sQ, sK, int(p.head_dim));

      Tensor logit_rows = by_rows(logits);  // (rows,columns)
      apply_score<kTile.keys>(logit_rows, coordinates, p.score, axis, task.batch, task.head, task.rows, keys);
      softmax.exponentiate(logit_rows, [&](int r, float factor) {
        CUTE_UNROLL
        for (int c = 0; c < size<1>(out_rows); ++c) out_rows(r, c) *= factor;
      });
      wait_for_copies<0>();
      __syncthreads();  // the values are there, and nobody reads the keys any more
      if (tile + 1 < end_tile) start_keys(keys_of(tile + 1));
      multiply_operand(mma, out, as_operand_a(convert<Element>(logits)), sV, columns);
    }
    softmax.total();
    finish(p, task, mma, out, softmax, sQ, rows, columns);
  }

  // out / sum and lse. The block's queries in shared memory are not needed any more: the results leave through them.
  template <class Out, class Softmax, class Shared>
  static __device__ void finish(const AttentionCudaParams& p, const Task& task, const Mma& mma, Out& out,
                                const Softmax& softmax, Shared& sO, int rows, int columns) {
    const auto thread = mma.get_slice(threadIdx.x);
    Tensor out_rows = by_rows(out);  // (rows,columns)
    Tensor cO =
        by_rows(thread.partition_C(make_identity_tensor(product_each(shape(sO)))));  // (rows,columns) -> (row,column)
    CUTE_UNROLL
    for (int r = 0; r < size<0>(out_rows); ++r) {
      const float factor = softmax.sum[r] == 0.0f ? 0.0f : 1.0f / softmax.sum[r];
      CUTE_UNROLL
      for (int c = 0; c < size<1>(out_rows); ++c) {
        // A row that saw no key is zero, whatever its sums hold.
        out_rows(r, c) = softmax.sum[r] == 0.0f ? 0.0f : out_rows(r, c) * factor;
      }
      const int row = get<0>(cO(r, 0));
      if (get<1>(cO(r, 0)) == 0 && row < rows && task.first_column == 0) {
        static_cast<float*>(p.lse)[(task.sequence.first_row + task.rows.begin + row) * p.heads + task.head] =
            softmax.lse(r);
      }
    }
    const int64_t first = task.sequence.query_tokens(task.rows).begin;
    store_tile<kThreads>(mma, out, sO, p.out.at<Element>(task.batch, first, task.head) + task.first_column,
                         p.out.token_stride, rows, columns, p.out.is_aligned);
  }
};

template <class Element, int kDim>
__global__ void __launch_bounds__(ForwardKernel<Element, kDim>::kThreads)
    attention(const __grid_constant__ AttentionCudaParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  ForwardKernel<Element, kDim>::run(p, reinterpret_cast<Element*>(shared));
}

template <class Element, int kDim>
cudaError_t launch(const AttentionCudaParams& p, cudaStream_t stream) {
  using Kernel = ForwardKernel<Element, kDim>;
  return launch_tasks(attention<Element, kDim>, Kernel::num_tasks(p), Kernel::kThreads, Kernel::kSharedBytes, stream,
                      p);
}

}  // namespace

cudaError_t launch_attention(const AttentionCudaParams& p, cudaStream_t stream) {
  return dispatch_tile(p,
                       [&]<class Element, int kDim>(Element, Int<kDim>) { return launch<Element, kDim>(p, stream); });
}

}  // namespace vitkernels
