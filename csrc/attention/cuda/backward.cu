// Backward of softmax attention on a GPU with tensor cores, and transposed attention both ways: accumulated in float32,
// the same bits in every run.
//
// With P = w exp(S - lse) and dS = P * (dP - delta), dP being the product of both sides' values, blocks own keys and
// accumulate dS^T Q and P^T (values of the queries), or own queries and accumulate dS K or P (values of the keys); each
// recomputes the logits. These are dK, dV and dQ of attention. Transposed attention is P^T V', with gradients dK, dQ, P
// dO.
//
// Each accumulator has one owner, which adds in a fixed order. Where there are few owners, the other side is split, and
// each split has partial sums in memory. One body serves all: a block owns a tile of one side and streams the other
// side past it. If it owns keys, the logit tile is transposed, so that P and dS are operands of the next products
// without leaving registers.

#include "attention/cuda/differentiate.h"
#include "attention/cuda/owned_tokens.h"
#include "attention/cuda/tile_sizes.h"

namespace vitkernels {
namespace {

using namespace cuda;
using namespace cute;

template <class T, int kDim, Side kOwner, class Keys>
struct BackwardKernel {
  using Element = T;
  static constexpr bool kOwnsKeys = kOwner == Side::kKeys;
  static constexpr Side kOther = other_side(kOwner);
  static constexpr BackwardTileShape kTile = backward_tile(kDim, sizeof(Element));
  static constexpr int kThreads = kTile.threads(), kSharedBytes = kTile.shared_bytes(kDim, 2, sizeof(Element));
  static constexpr int kColumns = kOwnsKeys ? kTile.columns : kDim;
  static constexpr int kKeys = kOwnsKeys ? kTile.owned : kTile.streamed;

  using Owned = SharedPair<Element, kTile.owned, kDim>;
  using Streamed = SharedPair<Element, kTile.streamed, kDim>;
  using Copy = typename TileCopy<Element, kThreads, kDim>::Copy;
  using Mma = TileMma<Element, kTile.warps, std::min(16, kTile.streamed)>;
  using OwnedShape = Shape<Int<kTile.owned>, Int<kColumns>>;

  // In tiles of `size` tokens.
  static VK_HOST_DEVICE int64_t owned_tiles(const AttentionCudaParams& p, int64_t size) {
    return kOwnsKeys ? p.packing.key_tiles(p.problem, size) : p.packing.query_tiles(p.problem, size);
  }
  static VK_HOST_DEVICE int64_t streamed_tiles(const AttentionCudaParams& p, int64_t size) {
    return kOwnsKeys ? p.packing.query_tiles(p.problem, size) : p.packing.key_tiles(p.problem, size);
  }
  static VK_HOST_DEVICE int64_t num_owned(const Axis& axis) { return kOwnsKeys ? axis.num_keys : axis.num_queries; }
  static VK_HOST_DEVICE int64_t num_streamed(const Axis& axis) { return kOwnsKeys ? axis.num_queries : axis.num_keys; }
  static VK_HOST_DEVICE bool owns_query_heads(const AttentionBackwardCudaParams& p, const OwnedGrads& grads) {
    return !kOwnsKeys || (p.key_value_has_query_heads && !grads.logit_grads.data);
  }

  // The launch grid: the fastest-varying coordinate of a block first.
  struct Cut {
    int64_t tiles, heads, column_blocks;

    VK_HOST_DEVICE Cut(const AttentionBackwardCudaParams& p, const OwnedGrads& grads)
        : tiles(owned_tiles(p.forward, kTile.owned)) {
      const Problem& problem = p.forward.problem;
      heads = owns_query_heads(p, grads) ? problem.heads : problem.kv_heads;
      const int64_t width = grads.logit_grads.data ? problem.head_dim : 0, value_width = problem.value_dim;
      column_blocks = ceil_div<int64_t>(grads.probs.data && value_width > width ? value_width : width, kColumns);
    }
    VK_HOST_DEVICE int64_t num_tasks(const AttentionBackwardCudaParams& p) const {
      return tiles * heads * p.forward.packing.num_sequences(p.forward.problem) * column_blocks;
    }
  };

  // Tokens of one head, columns of their accumulators, and a part of the tokens that stream past.
  struct Task {
    int64_t batch, head, kv_head;
    Range query_heads;
    Sequence sequence;
    Range tokens, streamed_tiles;
    int first_column, part;
    int64_t split;
  };

  static __device__ Task task_of_block(const AttentionBackwardCudaParams& p, const OwnedGrads& grads) {
    const Cut cut(p, grads);
    TaskIndex index(blockIdx.x);
    const int64_t tile = index.take(cut.tiles), head = index.take(cut.heads);
    const int64_t batch = index.take(p.forward.packing.num_sequences(p.forward.problem));
    const int64_t part = index.rest(), column_block = index.take(cut.column_blocks), split = index.rest();
    const bool is_query_head = owns_query_heads(p, grads);
    const int64_t kv_head = is_query_head ? p.forward.kv_head(head) : head;
    Range query_heads{0, p.forward.problem.heads};
    if (is_query_head) query_heads = {head, kv_head < 0 ? head : head + 1};
    const Sequence sequence = p.forward.sequence(batch);
    const int64_t tiles = ceil_div<int64_t>(num_streamed(sequence.axis), kTile.streamed);
    return {.batch = batch,
            .head = head,
            .kv_head = kv_head,
            .query_heads = query_heads,
            .sequence = sequence,
            .tokens = tile_of(tile, kTile.owned, num_owned(sequence.axis)),
            .streamed_tiles = {tiles * split / grads.splits, tiles * (split + 1) / grads.splits},
            .first_column = int(column_block) * kColumns,
            .part = int(part),
            .split = split};
  }

  static __device__ Range tokens_of(const Sequence& sequence, Range owned) {
    return kOwnsKeys ? sequence.key_tokens(owned) : sequence.query_tokens(owned);
  }

  // Clears the gradients of a packed batch's tokens that no sequence covers.
  static __device__ void clear_uncovered(const AttentionBackwardCudaParams& p, const OwnedGrads& grads,
                                         const Task& task, int columns, int value_columns) {
    const AttentionCudaParams& f = p.forward;
    const Range slot =
        kOwnsKeys ? f.packing.key_slot(f.problem, task.batch) : f.packing.query_slot(f.problem, task.batch);
    for_uncovered(slot, tokens_of(task.sequence, {0, num_owned(task.sequence.axis)}), [&](int64_t token) {
      clear_row(grads.logit_grads, grads.logit_grad_parts, task, token, columns);
      clear_row(grads.probs, grads.prob_parts, task, token, value_columns);
      if (grads.dots.data) grads.dots.part(task.part)[token * f.problem.heads + task.head] = 0.0f;
    });
  }

  static __device__ void clear_row(const TokenTensor& target, const PartialSums& parts, const Task& task, int64_t token,
                                   int columns) {
    const int64_t first = target.offset(0, token, task.head) + task.first_column;
    for (int c = 0; c < min(columns, kColumns); ++c) {
      if (parts.data) {
        parts.part(task.split)[first + c] = 0.0f;
      } else {
        static_cast<Element*>(target.data)[first + c] = Element(0);
      }
    }
  }

  // The tiles that stream past an owned tile, in order, for each query head that reads its keys.
  struct Step {
    int64_t head, tile;  // query head
  };

  static __device__ bool advance(const AttentionCudaParams& p, const Task& task, const Keys& keys, Step& step) {
    const Axis& axis = task.sequence.axis;
    for (++step.tile; step.head < task.query_heads.end; ++step.head, step.tile = task.streamed_tiles.begin) {
      if (p.kv_head(step.head) != task.kv_head) continue;
      for (; step.tile < task.streamed_tiles.end; ++step.tile) {
        const Range streamed = tile_of(step.tile, kTile.streamed, num_streamed(axis));
        if (keys.is_visible(kOwnsKeys ? streamed : task.tokens, kOwnsKeys ? task.tokens : streamed)) return true;
      }
    }
    return false;
  }

  static __device__ __forceinline__ void run(const AttentionBackwardCudaParams& p, const OwnedGrads& targets,
                                             Element* shared) {
    const Problem& problem = p.forward.problem;
    const Task task = task_of_block(p, targets);
    const int columns = targets.logit_grads.data ? int(problem.head_dim) - task.first_column : 0;
    const int value_columns = targets.probs.data ? int(problem.value_dim) - task.first_column : 0;
    if (p.forward.packing && task.tokens.begin == 0) clear_uncovered(p, targets, task, columns, value_columns);
    if (task.tokens.empty()) return;
    const Sequence& sequence = task.sequence;
    const Axis& axis = sequence.axis;
    const Keys keys = Keys::of(sequence);
    const Owned owned{shared};
    const auto stage = [&](int i) { return Streamed{shared + int{Owned::kElements} + i * int{Streamed::kElements}}; };
    const auto owner_of = [&](int64_t head) {
      return TokensOfHead{sequence, task.batch, head, task.kv_head, task.tokens};
    };
    const auto streamed_at = [&](const Step& step) {
      return TokensOfHead{sequence, task.batch, step.head, task.kv_head,
                          tile_of(step.tile, kTile.streamed, num_streamed(axis))};
    };
    // The first column of the values in shared memory: 0 where the gradient of P is needed.
    const int column = task.first_column / kDim * kDim;

    const Mma mma(p.forward.allow_tf32);
    const auto coordinates = coordinates_of<kOwner, kTile.owned, kTile.streamed>(mma);  // (queries,keys)
    Tensor grad = partition_fragment_C(mma, Shape<Int<kTile.owned>, Int<kColumns>>{});  // (MMA,MMA_M,MMA_N)
    Tensor more = make_fragment_like(grad);                                             // (MMA,MMA_M,MMA_N)
    auto& grad_value = *(kOwnsKeys ? &more : &grad);                                    // (MMA,MMA_M,MMA_N)
    clear(grad);
    clear(grad_value);
    const HeadFactors factors(problem.score, p.forward, kOwnsKeys ? task.query_heads : Range{}, task.kv_head);

    Step step{.head = task.query_heads.begin, .tile = task.streamed_tiles.begin - 1};
    bool exists = advance(p.forward, task, keys, step);
    int64_t owned_head = step.head;  // of the owner's values in shared memory
    if (exists) {
      owned.template copy<kOwner, Copy>(p, owner_of(step.head), column);
      stage(0).template copy<kOther, Copy>(p, streamed_at(step), column);
    }
    for (int i = 0; exists; i ^= 1) {
      const Step now = step;
      wait_for_copies<0>();
      __syncthreads();  // this stage has arrived, and all reads of the other one are done
      exists = advance(p.forward, task, keys, step);
      if (exists) stage(i ^ 1).template copy<kOther, Copy>(p, streamed_at(step), column);

      const Range streamed = tile_of(now.tile, kTile.streamed, num_streamed(axis));
      const LogitTile tile{task.batch, now.head, kOwnsKeys ? streamed : task.tokens,
                           kOwnsKeys ? task.tokens : streamed};
      Tensor probs = partition_fragment_C(mma, Shape<Int<kTile.owned>, Int<kTile.streamed>>{});  // (MMA,MMA_M,MMA_N)
      Tensor grads = partition_fragment_C(mma, Shape<Int<kTile.owned>, Int<kTile.streamed>>{});  // (MMA,MMA_M,MMA_N)
      clear(probs);
      clear(grads);
      multiply_tile(mma, probs, owned.first(), stage(i).first(), int(problem.head_dim));
      if (columns > 0) {
        const bool is_stale = kOwnsKeys && p.key_value_has_query_heads && now.head != owned_head;
        multiply_values<kOwner, Copy>(mma, grads, p, owned, owner_of(now.head), stage(i), streamed_at(now), is_stale);
        owned_head = now.head;
      }

      Tensor logits = queries_by_keys<kOwner>(by_rows(probs));       // (queries,keys)
      Tensor logit_grads = queries_by_keys<kOwner>(by_rows(grads));  // (queries,keys)
      apply_score<kKeys>(logits, coordinates, problem.score, keys, tile);
      differentiate<kOwnsKeys>(logits, logit_grads, coordinates, p, sequence, tile);
      // Factors that all logits of the owner share are applied in the epilogue: fp16 operands would underflow.
      const float factor = kOwnsKeys ? factors.relative(problem.score, now.head) : 1.0f;
      multiply_grads(logit_grads, coordinates, problem.score, factor, tile);

      if (columns > 0) {
        multiply_operand(mma, grad, as_operand_a(convert<Element>(grads)),
                         stage(i).template part<kColumns>(0, task.first_column), columns);
      }
      if (value_columns > 0) {
        multiply_operand(mma, grad_value, as_operand_a(convert<Element>(probs)),
                         stage(i).template part<kColumns>(1, task.first_column - column), value_columns);
      }
    }

    if constexpr (kOwnsKeys) {
      CUTE_UNROLL
      for (int i = 0; i < size(grad); ++i) grad(i) *= problem.score.scale.template as<float>() * factors.largest;
      if (columns > 0) {
        auto sK = owned.template part<kColumns>(0);  // (keys,columns)
        store_owned<kThreads>(mma, grad, sK, targets.logit_grads, targets.logit_grad_parts,
                              owned_tokens(task, columns));
      }
      if (value_columns > 0) {
        auto sV = owned.template part<kColumns>(1);  // (keys,columns)
        store_owned<kThreads>(mma, grad_value, sV, targets.probs, targets.prob_parts,
                              owned_tokens(task, value_columns));
      }
    } else {
      const bool is_logit_grad = columns > 0, has_arrived = owned_head < task.query_heads.end;
      auto sT = owned.part(is_logit_grad ? 0 : 1);  // (queries,columns)
      const OwnedTokens tokens = owned_tokens(task, is_logit_grad ? columns : value_columns);
      if (targets.dots.data) write_dots(mma, grad, sT, has_arrived, p.forward, targets, task);
      scale_rows(mma, grad, p, task, is_logit_grad ? problem.score.template scale_of<float>(task.head) : 1.0f);
      if (p.relative_grad_query && task.split == 0) {
        add_relative_grad(grad, owned_coordinates(mma, OwnedShape{}), p, tokens);
      }
      store_owned<kThreads>(mma, grad, sT, is_logit_grad ? targets.logit_grads : targets.probs,
                            is_logit_grad ? targets.logit_grad_parts : targets.prob_parts, tokens);
    }
  }

  // The dot product of each query (or its values), in shared memory, with its accumulator.
  template <class Acc, class Shared>
  static __device__ void write_dots(const Mma& mma, const Acc& grad, const Shared& sT, bool has_arrived,
                                    const AttentionCudaParams& p, const OwnedGrads& targets, const Task& task) {
    Tensor rows = by_rows(grad);                           // (rows,columns)
    const auto at = owned_coordinates(mma, OwnedShape{});  // (rows,columns)
    CUTE_UNROLL
    for (int r = 0; r < size<0>(rows); ++r) {
      const int row = get<0>(at(r, 0));
      float dot = 0.0f;
      if (has_arrived) {  // else nothing was copied, and the accumulators are zero
        CUTE_UNROLL
        for (int c = 0; c < size<1>(rows); ++c) dot += rows(r, c) * float(sT(row, get<1>(at(r, c))));
      }
      dot = combine_quad(dot, [](float a, float b) { return a + b; });
      const int64_t query = task.tokens.begin + row;
      if (get<1>(at(r, 0)) == 0 && query < task.tokens.end) {
        targets.dots.part(task.part)[(task.sequence.first_row + query) * p.problem.heads + task.head] = dot;
      }
    }
  }

  template <class Acc>
  static __device__ void scale_rows(const Mma& mma, Acc& grad, const AttentionBackwardCudaParams& p, const Task& task,
                                    float factor) {
    Tensor rows = by_rows(grad);                           // (rows,columns)
    const auto at = owned_coordinates(mma, OwnedShape{});  // (rows,columns)
    CUTE_UNROLL
    for (int r = 0; r < size<0>(rows); ++r) {
      const int64_t query = min(task.tokens.begin + get<0>(at(r, 0)), task.tokens.end - 1);
      const float factor_of_row = factor * p.weight(task.batch, query, task.head);
      CUTE_UNROLL
      for (int c = 0; c < size<1>(rows); ++c) rows(r, c) *= factor_of_row;
    }
  }

  static __device__ OwnedTokens owned_tokens(const Task& task, int columns) {
    const Range tokens = tokens_of(task.sequence, task.tokens);
    const int rows = int(tokens.end - tokens.begin);
    return {task.batch, task.head, task.split, tokens.begin, rows, columns, int(task.first_column)};
  }
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kTile.min_blocks)
    attention_backward(const __grid_constant__ AttentionBackwardCudaParams p,
                       const __grid_constant__ OwnedGrads grads) {
  extern __shared__ __align__(128) unsigned char shared[];
  Kernel::run(p, grads, reinterpret_cast<typename Kernel::Element*>(shared));
}

template <class Element, class Function>
auto dispatch_kernel(const AttentionBackwardCudaParams& p, Side owner, Function&& f) {
  // Fewer instances: heads of at most 32 columns take those of 64. In 16 bits most calls have fast paths.
  return dispatch_dim(p.forward.problem, [&]<int kNarrow>(Int<kNarrow>) {
    constexpr int kDim = std::max(kNarrow, 64);
    if (owner == Side::kKeys) return f(BackwardKernel<Element, kDim, Side::kKeys, DenseKeys>{});
    return f(BackwardKernel<Element, kDim, Side::kQueries, DenseKeys>{});
  });
}

}  // namespace

template <DType kDType>
int64_t AttentionLaunches<kDType>::backward_splits(const AttentionBackwardCudaParams& p, const OwnedGrads& grads,
                                                   Side owner) {
  return dispatch_kernel<ElementOf<kDType>>(p, owner, [&]<class Kernel>(Kernel) {
    return splits_of(typename Kernel::Cut(p, grads).num_tasks(p), Kernel::streamed_tiles(p.forward, 1));
  });
}

template <DType kDType>
int64_t AttentionLaunches<kDType>::backward_dot_parts(const AttentionBackwardCudaParams& p, const OwnedGrads& grads) {
  return dispatch_kernel<ElementOf<kDType>>(p, Side::kQueries, [&]<class Kernel>(Kernel) {
    return typename Kernel::Cut(p, grads).column_blocks * grads.splits;
  });
}

template <DType kDType>
cudaError_t AttentionLaunches<kDType>::backward(const AttentionBackwardCudaParams& p, const OwnedGrads& grads,
                                                Side owner, cudaStream_t stream) {
  return dispatch_kernel<ElementOf<kDType>>(p, owner, [&]<class Kernel>(Kernel) {
    return launch_tasks(attention_backward<Kernel>, typename Kernel::Cut(p, grads).num_tasks(p) * grads.splits,
                        Kernel::kThreads, Kernel::kSharedBytes, stream, p, grads);
  });
}

template int64_t AttentionLaunches<DType::VK_DTYPE>::backward_splits(const AttentionBackwardCudaParams&,
                                                                     const OwnedGrads&, Side);
template int64_t AttentionLaunches<DType::VK_DTYPE>::backward_dot_parts(const AttentionBackwardCudaParams&,
                                                                        const OwnedGrads&);
template cudaError_t AttentionLaunches<DType::VK_DTYPE>::backward(const AttentionBackwardCudaParams&, const OwnedGrads&,
                                                                  Side, cudaStream_t);

}  // namespace vitkernels
