// Forward of softmax attention on a GPU with tensor cores, sums in float32.
//
// A block of threads takes some queries of one head, a warp sixteen of them, and goes through the keys in tiles. While it
// multiplies queries and keys, the values of the tile arrive; while it multiplies probabilities and values, the next keys.
// A query's logits never leave the registers of its warp. Where that makes few blocks, the keys are split: each split has
// blocks of its own, whose results are joined as those of any attention over disjoint keys.

#include "attention/cuda/launches.h"
#include "attention/cuda/score.h"
#include "attention/cuda/tile_sizes.h"
#include "attention/cuda/tokens.h"
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

  // Which queries of which head, which columns of the values, and which of the splits of the keys.
  struct Task {
    int64_t batch, head, kv_head;
    Sequence sequence;
    Range rows;
    int64_t first_column, split;

    __device__ int num_rows() const { return int(rows.end - rows.begin); }
    __device__ int num_columns(const AttentionCudaParams& p) const {
      return int(min(p.value_dim - first_column, int64_t(kDim)));
    }
  };

  static __device__ Task task_of_block(const AttentionCudaParams& p) {
    TaskIndex index(block_index());
    const int64_t block = index.take(p.query_tiles(kTile.queries));
    const int64_t head = index.take(p.heads), batch = index.take(p.num_entries());
    const int64_t first_column = index.take(ceil_div<int64_t>(p.value_dim, kDim)) * kDim;
    const Sequence sequence = p.sequence(batch);
    return {.batch = batch,
            .head = head,
            .kv_head = p.kv_head(head),
            .sequence = sequence,
            .rows = tile_of(block, kTile.queries, sequence.axis.num_queries),
            .first_column = first_column,
            .split = index.rest()};
  }

  static int64_t tasks_of_split(const AttentionCudaParams& p) {
    return p.query_tiles(kTile.queries) * p.heads * p.num_entries() * ceil_div<int64_t>(p.value_dim, kDim);
  }

  // The tiles of keys that a task goes through.
  static __device__ Range tiles_of(const AttentionCudaParams& p, const Task& task, Range seen) {
    const int64_t first = seen.begin / kTile.keys, count = ceil_div<int64_t>(seen.end, kTile.keys) - first;
    return {first + count * task.split / p.splits, first + count * (task.split + 1) / p.splits};
  }

  static __device__ void store_statistics(const AttentionCudaParams& p, const Task& task, int64_t row, float max,
                                          float sum) {
    const int64_t i = (task.split * p.num_rows() + row) * p.heads + task.head;
    if (p.splits == 1) {
      static_cast<float*>(p.lse)[i] = lse_of(max, sum);
    } else {
      p.split_max[i] = max, p.split_sum[i] = sum;
    }
  }

  // Tokens of a packed batch that no sequence covers. Nothing is read of a split whose sum is that of no keys.
  static __device__ void clear_uncovered(const AttentionCudaParams& p, const Task& task, int columns) {
    const Range covered = task.sequence.query_tokens({0, task.sequence.axis.num_queries});
    for_uncovered(p.query_slot(task.batch), covered, [&](int64_t token) {
      if (task.first_column == 0) store_statistics(p, task, token, -std::numeric_limits<float>::infinity(), 0.0f);
      Element* const out = p.out.at<Element>(task.batch, token, task.head) + task.first_column;
      for (int c = 0; c < columns && p.splits == 1; ++c) out[c] = Element(0);
    });
  }

  static __device__ __forceinline__ void run(const AttentionCudaParams& p, Element* shared) {
    const Task task = task_of_block(p);
    const int columns = task.num_columns(p);
    if (p.is_packed() && task.rows.begin == 0) clear_uncovered(p, task, columns);
    if (task.rows.empty()) return;
    const Axis& axis = task.sequence.axis;

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

    const Range tiles = tiles_of(p, task, seen);
    if (!tiles.empty()) {
      start_tile<Copy>(sQ, p.query, task.batch, task.head, task.sequence.query_tokens(task.rows), 0, int(p.head_dim));
      start_keys(keys_of(tiles.begin));
    }
    for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
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
      if (tile + 1 < tiles.end) start_keys(keys_of(tile + 1));
      multiply_operand(mma, out, as_operand_a(convert<Element>(logits)), sV, columns);
    }
    softmax.total();
    finish(p, mma, out, softmax, sQ);
  }

  // out / sum, and the statistics. The block's queries in shared memory are not needed any more: the results leave
  // through them.
  template <class Out, class Softmax, class Shared>
  static __device__ void finish(const AttentionCudaParams& p, const Mma& mma, Out& out, const Softmax& softmax,
                                Shared& sO) {
    const Task task = task_of_block(p);
    const int rows = task.num_rows(), columns = task.num_columns(p);
    const auto thread = mma.get_slice(threadIdx.x);
    const int64_t first_row = task.sequence.first_row + task.rows.begin;
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
        store_statistics(p, task, first_row + row, softmax.max[r], softmax.sum[r]);
      }
    }
    if (p.splits > 1) {
      const int64_t first = (task.split * p.num_rows() + first_row) * p.heads + task.head;
      store_sums(out_rows, cO, p.split_out + first * p.value_dim + task.first_column, p.heads * p.value_dim, rows,
                 columns);
      return;
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
  return launch_tasks(attention<Element, kDim>, Kernel::tasks_of_split(p) * p.splits, Kernel::kThreads,
                      Kernel::kSharedBytes, stream, p);
}

}  // namespace

template <DType kDType>
int64_t AttentionLaunches<kDType>::forward_blocks(const AttentionCudaParams& p) {
  return dispatch_dim(p,
                      [&]<int kDim>(Int<kDim>) { return ForwardKernel<ElementOf<kDType>, kDim>::tasks_of_split(p); });
}

template <DType kDType>
cudaError_t AttentionLaunches<kDType>::forward(const AttentionCudaParams& p, cudaStream_t stream) {
  return dispatch_dim(p, [&]<int kDim>(Int<kDim>) { return launch<ElementOf<kDType>, kDim>(p, stream); });
}

template int64_t AttentionLaunches<DType::VK_DTYPE>::forward_blocks(const AttentionCudaParams&);
template cudaError_t AttentionLaunches<DType::VK_DTYPE>::forward(const AttentionCudaParams&, cudaStream_t);

}  // namespace vitkernels
