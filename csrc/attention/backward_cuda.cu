// Backward of softmax attention on a GPU with tensor cores, sums in float32, the same bits in every run.
//
// One kernel owns keys and sums dK and dV over the queries, the other owns queries and sums dQ over the keys; both
// compute the logits again. Each element of a gradient has one owner, which adds in order, so nothing is added up in
// global memory. They are one body: a block owns a tile of one side and streams the other past it. In the first the tile
// of logits is transposed, so that P and dS are operands of the next products where they are: in registers.

#include "attention/differentiate_cuda.h"
#include "attention/tiles_cuda.h"
#include "cuda/epilogue.h"

namespace vitkernels {
namespace {

using namespace cuda;
using namespace cute;

template <class Element, int kDim, Side kOwner>
struct BackwardKernel {
  static constexpr bool kOwnsKeys = kOwner == Side::kKeys;
  static constexpr Side kOther = kOwnsKeys ? Side::kQueries : Side::kKeys;
  static constexpr BackwardTile kTile = backward_tile(kDim, sizeof(Element));
  static constexpr int kThreads = kTile.threads(), kSharedBytes = kTile.shared_bytes(kDim, 2, sizeof(Element));
  static constexpr int kColumns = kOwnsKeys ? kTile.columns : kDim;
  static constexpr int kKeys = kOwnsKeys ? kTile.owned : kTile.streamed;

  using Owned = SharedPair<Element, kTile.owned, kDim>;
  using Streamed = SharedPair<Element, kTile.streamed, kDim>;
  using Copy = typename TileCopy<Element, kThreads, kDim>::Copy;
  using Mma = TileMma<Element, kTile.warps, std::min(16, kTile.streamed)>;

  static VK_HOST_DEVICE int64_t num_owned(const Axis& axis) { return kOwnsKeys ? axis.num_keys : axis.num_queries; }
  static VK_HOST_DEVICE int64_t num_streamed(const Axis& axis) { return kOwnsKeys ? axis.num_queries : axis.num_keys; }
  static VK_HOST_DEVICE int64_t num_owners(const AttentionParams& p) { return kOwnsKeys ? p.kv_heads : p.heads; }

  // Tokens of one head, and the columns of their gradients.
  struct Task {
    int64_t batch, head;
    Sequence sequence;
    Range tokens;
    int first_column;
  };

  static __device__ Task task_of_block(const AttentionCudaParams& p) {
    TaskIndex index(blockIdx.x);
    const int64_t block = index.take(ceil_div<int64_t>(num_owned(p.pattern.axis[0]), kTile.owned));
    const int64_t head = index.take(num_owners(p)), batch = index.take(p.batch);
    const Sequence sequence = p.sequence(batch);
    return {.batch = batch,
            .head = head,
            .sequence = sequence,
            .tokens = tile_of(block, kTile.owned, num_owned(sequence.axis)),
            .first_column = int(index.rest()) * kColumns};
  }

  static int64_t num_tasks(const AttentionParams& p) {
    return ceil_div<int64_t>(num_owned(p.pattern.axis[0]), kTile.owned) * num_owners(p) * p.batch *
           ceil_div<int64_t>(std::max(p.head_dim, p.value_dim), kColumns);
  }

  // The tiles that stream past an owner, in order: for each query head that reads its keys, or for its own query head.
  struct Step {
    int64_t head, tile;  // query head
  };

  static __device__ Step first_step(const Task& task) { return {.head = kOwnsKeys ? 0 : task.head, .tile = -1}; }

  static __device__ bool advance(const AttentionCudaParams& p, const Task& task, Step& step) {
    const Axis& axis = task.sequence.axis;
    const int64_t tiles = ceil_div<int64_t>(num_streamed(axis), kTile.streamed);
    const int64_t end_head = kOwnsKeys ? p.heads : task.head + 1;
    for (++step.tile; step.head < end_head; ++step.head, step.tile = 0) {
      const int64_t kv_head = p.kv_head(step.head);
      if (kOwnsKeys ? kv_head != task.head : kv_head < 0) continue;
      for (; step.tile < tiles; ++step.tile) {
        const Range streamed = tile_of(step.tile, kTile.streamed, num_streamed(axis));
        const Range rows = kOwnsKeys ? streamed : task.tokens, keys = kOwnsKeys ? task.tokens : streamed;
        if (!intersect(axis.any_keys(rows), keys).empty()) return true;
      }
    }
    return false;
  }

  static __device__ void run(const AttentionBackwardCudaParams& p, Element* shared) {
    const Task task = task_of_block(p);
    if (task.tokens.empty()) return;
    const Sequence& sequence = task.sequence;
    const Axis& axis = sequence.axis;
    const Owned owned{shared};
    const auto stage = [&](int i) { return Streamed{shared + int{Owned::kElements} + i * int{Streamed::kElements}}; };
    const auto start = [&](const Step& step, int i) {
      stage(i).template copy<kOther, Copy>(p, sequence, task.batch, kOwnsKeys ? step.head : p.kv_head(step.head),
                                           tile_of(step.tile, kTile.streamed, num_streamed(axis)));
    };
    const int columns = int(p.head_dim) - task.first_column, value_columns = int(p.value_dim) - task.first_column;

    const Mma mma(p.allow_tf32);
    const auto coordinates = coordinates_of<kOwner, kTile.owned, kTile.streamed>(mma);        // (queries,keys)
    Tensor grad = partition_fragment_C(mma, Shape<Int<kTile.owned>, Int<kColumns>>{});        // (MMA,MMA_M,MMA_N)
    Tensor grad_value = partition_fragment_C(mma, Shape<Int<kTile.owned>, Int<kColumns>>{});  // (MMA,MMA_M,MMA_N)
    clear(grad);
    clear(grad_value);

    Step step = first_step(task);
    bool exists = advance(p, task, step);
    if (exists) {
      owned.template copy<kOwner, Copy>(p, sequence, task.batch, task.head, task.tokens);
      start(step, 0);
    }
    for (int i = 0; exists; i ^= 1) {
      const Step now = step;
      wait_for_copies<0>();
      __syncthreads();  // this stage is there, and nobody reads the other one any more
      exists = advance(p, task, step);
      if (exists) start(step, i ^ 1);

      const Range streamed = tile_of(now.tile, kTile.streamed, num_streamed(axis));
      const Range rows = kOwnsKeys ? streamed : task.tokens, keys = kOwnsKeys ? task.tokens : streamed;
      Tensor probs = partition_fragment_C(mma, Shape<Int<kTile.owned>, Int<kTile.streamed>>{});  // (MMA,MMA_M,MMA_N)
      Tensor grads = partition_fragment_C(mma, Shape<Int<kTile.owned>, Int<kTile.streamed>>{});  // (MMA,MMA_M,MMA_N)
      clear(probs);
      clear(grads);
      multiply_tile(mma, probs, owned.first(), stage(i).first(), int(p.head_dim));
      multiply_tile(mma, grads, owned.second(), stage(i).second(), int(p.value_dim));

      Tensor logits = queries_by_keys<kOwner>(by_rows(probs));       // (queries,keys)
      Tensor logit_grads = queries_by_keys<kOwner>(by_rows(grads));  // (queries,keys)
      apply_score<kKeys>(logits, coordinates, p.score, axis, task.batch, now.head, rows, keys);
      differentiate(logits, logit_grads, coordinates, p, sequence.first_row, now.head, rows);
      // The scale of all heads waits for the end: small gradients would leave the range of fp16.
      const float head_scale = p.score.head_scale ? static_cast<const float*>(p.score.head_scale)[now.head] : 1.0f;
      multiply_grads(logit_grads, coordinates, p.score.multiplier, head_scale, task.batch, now.head, rows, keys);

      multiply_operand(mma, grad, as_operand_a(convert<Element>(grads)),
                       stage(i).template part<kColumns>(0, task.first_column), columns);
      if constexpr (kOwnsKeys) {
        multiply_operand(mma, grad_value, as_operand_a(convert<Element>(probs)),
                         stage(i).template part<kColumns>(1, task.first_column), value_columns);
      }
    }
    CUTE_UNROLL
    for (int i = 0; i < size(grad); ++i) grad(i) *= float(p.score.scale);

    // The gradients leave through the owned tile.
    const auto finish = [&](int index, const auto& result, const TokenTensor& target, int width) {
      auto sT = owned.template part<kColumns>(index);  // (owned,columns)
      const Range tokens = kOwnsKeys ? sequence.key_tokens(task.tokens) : sequence.query_tokens(task.tokens);
      store_tile<kThreads>(mma, result, sT, target.at<Element>(task.batch, tokens.begin, task.head) + task.first_column,
                           target.token_stride, int(tokens.end - tokens.begin), width, target.is_aligned);
    };
    finish(0, grad, kOwnsKeys ? p.grad_key : p.grad_query, columns);
    if constexpr (kOwnsKeys) finish(1, grad_value, p.grad_value, value_columns);
  }
};

template <class Element, int kDim>
__global__ void __launch_bounds__(BackwardKernel<Element, kDim, Side::kKeys>::kThreads)
    attention_backward_keys(const __grid_constant__ AttentionBackwardCudaParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  BackwardKernel<Element, kDim, Side::kKeys>::run(p, reinterpret_cast<Element*>(shared));
}

template <class Element, int kDim>
__global__ void __launch_bounds__(BackwardKernel<Element, kDim, Side::kQueries>::kThreads)
    attention_backward_queries(const __grid_constant__ AttentionBackwardCudaParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  BackwardKernel<Element, kDim, Side::kQueries>::run(p, reinterpret_cast<Element*>(shared));
}

// A warp takes a row.
template <class Element>
__global__ void attention_backward_delta(const __grid_constant__ AttentionBackwardCudaParams p) {
  for (int64_t row = warp_of_grid(); row < p.num_rows() * p.heads; row += warps_in_grid()) {
    TaskIndex index(row);
    const int64_t head = index.take(p.heads), token = index.take(p.is_packed() ? p.packed_queries : p.num_queries());
    const Element* out = p.out.at<const Element>(index.rest(), token, head);
    const Element* grad_out = p.grad_out.at<const Element>(index.rest(), token, head);
    float sum = 0.0f;
    for (int64_t c = lane_index(); c < p.value_dim; c += kWarpSize) sum += float(out[c]) * float(grad_out[c]);
    sum = warp_sum(sum);
    if (lane_index() == 0) p.delta[row] = p.grad_lse ? sum - p.grad_lse[row] : sum;
  }
}

}  // namespace

cudaError_t launch_attention_backward_keys(const AttentionBackwardCudaParams& p, cudaStream_t stream) {
  return dispatch_tile(p, [&]<class Element, int kDim>(Element, Int<kDim>) {
    using Kernel = BackwardKernel<Element, kDim, Side::kKeys>;
    return launch_tasks(attention_backward_keys<Element, kDim>, Kernel::num_tasks(p), Kernel::kThreads,
                        Kernel::kSharedBytes, stream, p);
  });
}

cudaError_t launch_attention_backward_queries(const AttentionBackwardCudaParams& p, cudaStream_t stream) {
  return dispatch_tile(p, [&]<class Element, int kDim>(Element, Int<kDim>) {
    using Kernel = BackwardKernel<Element, kDim, Side::kQueries>;
    return launch_tasks(attention_backward_queries<Element, kDim>, Kernel::num_tasks(p), Kernel::kThreads,
                        Kernel::kSharedBytes, stream, p);
  });
}

cudaError_t launch_attention_backward_delta(const AttentionBackwardCudaParams& p, cudaStream_t stream) {
  constexpr int kWarps = 4;
  const unsigned blocks = blocks_for(p.num_rows() * p.heads, kWarps);
  return dispatch_element(p.dtype, [&]<class Element>(Element) {
    return launch_tasks(attention_backward_delta<Element>, p.num_rows() == 0 ? 0 : blocks, kWarps * kWarpSize, 0,
                        stream, p);
  });
}

}  // namespace vitkernels
