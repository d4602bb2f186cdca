// Backward of softmax attention on a GPU with tensor cores, and transposed attention both ways: sums in float32, the same
// bits in every run.
//
// With P = w exp(S - lse) and dS = P * (dP - delta), dP being the product of both sides' values, blocks own keys and sum
// dS^T Q and P^T (values of the queries), or own queries and sum dS K or P (values of the keys); each computes the logits
// again. These are dK, dV and dQ of attention. Transposed attention is P^T V' and has gradients dK, dQ and P dO.
//
// Each sum has one owner, which adds in order. Where there are few owners, the other side is split, and each split has
// sums of its own in memory. All is one body: a block owns a tile of one side and streams the other past it. If it owns
// keys, the tile of logits is transposed, so that P and dS are operands of the next products where they are: in registers.

#include "attention/cuda/differentiate.h"
#include "attention/cuda/tile_sizes.h"
#include "cuda/epilogue.h"

namespace vitkernels {
namespace {

using namespace cuda;
using namespace cute;

template <class T, int kDim, Side kOwner>
struct BackwardKernel {
  using Element = T;
  static constexpr bool kOwnsKeys = kOwner == Side::kKeys;
  static constexpr Side kOther = other_side(kOwner);
  static constexpr BackwardTile kTile = backward_tile(kDim, sizeof(Element));
  static constexpr int kThreads = kTile.threads(), kSharedBytes = kTile.shared_bytes(kDim, 2, sizeof(Element));
  static constexpr int kColumns = kOwnsKeys ? kTile.columns : kDim;
  static constexpr int kKeys = kOwnsKeys ? kTile.owned : kTile.streamed;

  using Owned = SharedPair<Element, kTile.owned, kDim>;
  using Streamed = SharedPair<Element, kTile.streamed, kDim>;
  using Copy = typename TileCopy<Element, kThreads, kDim>::Copy;
  using Mma = TileMma<Element, kTile.warps, std::min(16, kTile.streamed)>;

  // In tiles of so many tokens.
  static VK_HOST_DEVICE int64_t owned_tiles(const AttentionCudaParams& p, int64_t size) {
    return kOwnsKeys ? p.key_tiles(size) : p.query_tiles(size);
  }
  static VK_HOST_DEVICE int64_t streamed_tiles(const AttentionCudaParams& p, int64_t size) {
    return kOwnsKeys ? p.query_tiles(size) : p.key_tiles(size);
  }
  static VK_HOST_DEVICE int64_t num_owned(const Axis& axis) { return kOwnsKeys ? axis.num_keys : axis.num_queries; }
  static VK_HOST_DEVICE int64_t num_streamed(const Axis& axis) { return kOwnsKeys ? axis.num_queries : axis.num_keys; }
  static VK_HOST_DEVICE bool owns_query_heads(const AttentionBackwardCudaParams& p, const OwnedSums& sums) {
    return !kOwnsKeys || (p.key_value_has_query_heads && !sums.logit_grads.is_wanted());
  }

  // How the work is cut: the fastest coordinate of a block first.
  struct Cut {
    int64_t tiles, heads, column_blocks;

    VK_HOST_DEVICE Cut(const AttentionBackwardCudaParams& p, const OwnedSums& sums)
        : tiles(owned_tiles(p, kTile.owned)), heads(owns_query_heads(p, sums) ? p.heads : p.kv_heads) {
      const int64_t width = sums.logit_grads.is_wanted() ? p.head_dim : 0;
      column_blocks = ceil_div<int64_t>(sums.probs.is_wanted() && p.value_dim > width ? p.value_dim : width, kColumns);
    }
    VK_HOST_DEVICE int64_t num_tasks(const AttentionBackwardCudaParams& p) const {
      return tiles * heads * p.num_entries() * column_blocks;
    }
  };

  // Tokens of one head, which columns of their sums, and which part of the tokens that stream past.
  struct Task {
    int64_t batch, head, kv_head;
    Range query_heads;
    Sequence sequence;
    Range tokens, streamed_tiles;
    int first_column, part;
    int64_t split;
  };

  static __device__ Task task_of_block(const AttentionBackwardCudaParams& p, const OwnedSums& sums) {
    const Cut cut(p, sums);
    TaskIndex index(blockIdx.x);
    const int64_t tile = index.take(cut.tiles), head = index.take(cut.heads), batch = index.take(p.num_entries());
    const int64_t part = index.rest(), column_block = index.take(cut.column_blocks), split = index.rest();
    const bool is_query_head = owns_query_heads(p, sums);
    const int64_t kv_head = is_query_head ? p.kv_head(head) : head;
    Range query_heads{0, p.heads};
    if (is_query_head) query_heads = {head, kv_head < 0 ? head : head + 1};
    const Sequence sequence = p.sequence(batch);
    const int64_t tiles = ceil_div<int64_t>(num_streamed(sequence.axis), kTile.streamed);
    return {.batch = batch,
            .head = head,
            .kv_head = kv_head,
            .query_heads = query_heads,
            .sequence = sequence,
            .tokens = tile_of(tile, kTile.owned, num_owned(sequence.axis)),
            .streamed_tiles = {tiles * split / sums.splits, tiles * (split + 1) / sums.splits},
            .first_column = int(column_block) * kColumns,
            .part = int(part),
            .split = split};
  }

  static __device__ Range tokens_of(const Sequence& sequence, Range owned) {
    return kOwnsKeys ? sequence.key_tokens(owned) : sequence.query_tokens(owned);
  }

  // Sums of a packed batch's tokens that no sequence covers.
  static __device__ void clear_uncovered(const AttentionBackwardCudaParams& p, const OwnedSums& sums, const Task& task,
                                         int columns, int value_columns) {
    const Range slot = kOwnsKeys ? p.key_slot(task.batch) : p.query_slot(task.batch);
    for_uncovered(slot, tokens_of(task.sequence, {0, num_owned(task.sequence.axis)}), [&](int64_t token) {
      clear_row(sums.logit_grads, task, token, columns);
      clear_row(sums.probs, task, token, value_columns);
      if (sums.dots) sums.dots[(task.part * p.num_rows() + token) * p.heads + task.head] = 0.0f;
    });
  }

  static __device__ void clear_row(const SumTarget& target, const Task& task, int64_t token, int columns) {
    const int64_t first = target.tensor.offset(0, token, task.head) + task.first_column;
    for (int c = 0; c < min(columns, kColumns); ++c) {
      if (target.parts) {
        target.parts[task.split * target.size + first + c] = 0.0f;
      } else {
        static_cast<Element*>(target.tensor.data)[first + c] = Element(0);
      }
    }
  }

  // The tiles that stream past an owner, in order, for each query head that reads its keys.
  struct Step {
    int64_t head, tile;  // query head
  };

  static __device__ bool advance(const AttentionCudaParams& p, const Task& task, Step& step) {
    const Axis& axis = task.sequence.axis;
    for (++step.tile; step.head < task.query_heads.end; ++step.head, step.tile = task.streamed_tiles.begin) {
      if (p.kv_head(step.head) != task.kv_head) continue;
      for (; step.tile < task.streamed_tiles.end; ++step.tile) {
        const Range streamed = tile_of(step.tile, kTile.streamed, num_streamed(axis));
        const Range rows = kOwnsKeys ? streamed : task.tokens, keys = kOwnsKeys ? task.tokens : streamed;
        if (!intersect(axis.any_keys(rows), keys).empty()) return true;
      }
    }
    return false;
  }

  static __device__ __forceinline__ void run(const AttentionBackwardCudaParams& p, const OwnedSums& sums,
                                             Element* shared) {
    const Task task = task_of_block(p, sums);
    const int columns = sums.logit_grads.is_wanted() ? int(p.head_dim) - task.first_column : 0;
    const int value_columns = sums.probs.is_wanted() ? int(p.value_dim) - task.first_column : 0;
    if (p.is_packed() && task.tokens.begin == 0) clear_uncovered(p, sums, task, columns, value_columns);
    if (task.tokens.empty()) return;
    const Sequence& sequence = task.sequence;
    const Axis& axis = sequence.axis;
    const Owned owned{shared};
    const auto stage = [&](int i) { return Streamed{shared + int{Owned::kElements} + i * int{Streamed::kElements}}; };
    const auto owner_of = [&](int64_t head) {
      return TokensOfHead{sequence, task.batch, head, task.kv_head, task.tokens};
    };
    const auto streamed_at = [&](const Step& step) {
      return TokensOfHead{sequence, task.batch, step.head, task.kv_head,
                          tile_of(step.tile, kTile.streamed, num_streamed(axis))};
    };
    // The columns of the values that are in shared memory. Where the gradient of P is needed, they begin at 0.
    const int column = task.first_column / kDim * kDim;

    const Mma mma(p.allow_tf32);
    const auto coordinates = coordinates_of<kOwner, kTile.owned, kTile.streamed>(mma);  // (queries,keys)
    Tensor grad = partition_fragment_C(mma, Shape<Int<kTile.owned>, Int<kColumns>>{});  // (MMA,MMA_M,MMA_N)
    Tensor more = make_fragment_like(grad);                                             // (MMA,MMA_M,MMA_N)
    auto& grad_value = *(kOwnsKeys ? &more : &grad);                                    // (MMA,MMA_M,MMA_N)
    clear(grad);
    clear(grad_value);

    Step step{.head = task.query_heads.begin, .tile = task.streamed_tiles.begin - 1};
    bool exists = advance(p, task, step);
    int64_t owned_head = step.head;  // of the owner's values in shared memory
    if (exists) {
      owned.template copy<kOwner, Copy>(p, owner_of(step.head), column);
      stage(0).template copy<kOther, Copy>(p, streamed_at(step), column);
    }
    for (int i = 0; exists; i ^= 1) {
      const Step now = step;
      wait_for_copies<0>();
      __syncthreads();  // this stage is there, and nobody reads the other one any more
      exists = advance(p, task, step);
      if (exists) stage(i ^ 1).template copy<kOther, Copy>(p, streamed_at(step), column);

      const Range streamed = tile_of(now.tile, kTile.streamed, num_streamed(axis));
      const Range rows = kOwnsKeys ? streamed : task.tokens, keys = kOwnsKeys ? task.tokens : streamed;
      Tensor probs = partition_fragment_C(mma, Shape<Int<kTile.owned>, Int<kTile.streamed>>{});  // (MMA,MMA_M,MMA_N)
      Tensor grads = partition_fragment_C(mma, Shape<Int<kTile.owned>, Int<kTile.streamed>>{});  // (MMA,MMA_M,MMA_N)
      clear(probs);
      clear(grads);
      multiply_tile(mma, probs, owned.first(), stage(i).first(), int(p.head_dim));
      if (columns > 0) {
        const bool is_stale = kOwnsKeys && p.key_value_has_query_heads && now.head != owned_head;
        multiply_values<kOwner, Copy>(mma, grads, p, owned, owner_of(now.head), stage(i), streamed_at(now), is_stale);
        owned_head = now.head;
      }

      Tensor logits = queries_by_keys<kOwner>(by_rows(probs));       // (queries,keys)
      Tensor logit_grads = queries_by_keys<kOwner>(by_rows(grads));  // (queries,keys)
      apply_score<kKeys>(logits, coordinates, p.score, axis, task.batch, now.head, rows, keys);
      differentiate<kOwnsKeys>(logits, logit_grads, coordinates, p, sequence, task.batch, now.head, rows);
      // What all logits of the owner share waits for the end: small gradients would leave the range of fp16.
      const float factor = kOwnsKeys ? p.score.head_factor<float>(now.head) : 1.0f;
      multiply_grads(logit_grads, coordinates, p.score, factor, task.batch, now.head, rows, keys);

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
      for (int i = 0; i < size(grad); ++i) grad(i) *= float(p.score.scale);
      if (columns > 0) store(mma, grad, owned.template part<kColumns>(0), sums.logit_grads, task, columns);
      if (value_columns > 0) store(mma, grad_value, owned.template part<kColumns>(1), sums.probs, task, value_columns);
    } else {
      const int index = columns > 0 ? 0 : 1;
      const bool is_there = owned_head < task.query_heads.end;
      const auto sT = owned.part(index);  // (queries,columns)
      if (sums.dots) write_dots(mma, grad, sT, is_there, p, sums, task);
      scale_rows(mma, grad, p, task, index == 0 ? p.score.scale_of<float>(task.head) : 1.0f);
      if (p.relative_grad_query && task.split == 0) add_relative_grad(mma, grad, p, task);
      store(mma, grad, sT, index == 0 ? sums.logit_grads : sums.probs, task, index == 0 ? columns : value_columns);
    }
  }

  // For a thread, the (row,column) of each sum of the owned tile, as (rows,columns).
  static __device__ auto owned_coordinates(const Mma& mma) {
    return by_rows(mma.get_slice(threadIdx.x)
                       .partition_C(make_identity_tensor(Shape<Int<kTile.owned>, Int<kColumns>>{})));  // (rows,columns)
  }

  // The dot product of each query (or its values), in shared memory, with its sums.
  template <class Sums, class Shared>
  static __device__ void write_dots(const Mma& mma, const Sums& grad, const Shared& sT, bool is_there,
                                    const AttentionBackwardCudaParams& p, const OwnedSums& sums, const Task& task) {
    Tensor rows = by_rows(grad);             // (rows,columns)
    const auto at = owned_coordinates(mma);  // (rows,columns)
    CUTE_UNROLL
    for (int r = 0; r < size<0>(rows); ++r) {
      const int row = get<0>(at(r, 0));
      float dot = 0.0f;
      if (is_there) {  // else nothing was copied, and the sums are zero
        CUTE_UNROLL
        for (int c = 0; c < size<1>(rows); ++c) dot += rows(r, c) * float(sT(row, get<1>(at(r, c))));
      }
      dot = combine_quad(dot, [](float a, float b) { return a + b; });
      const int64_t query = task.tokens.begin + row;
      if (get<1>(at(r, 0)) == 0 && query < task.tokens.end) {
        sums.dots[(task.part * p.num_rows() + task.sequence.first_row + query) * p.heads + task.head] = dot;
      }
    }
  }

  template <class Sums>
  static __device__ void scale_rows(const Mma& mma, Sums& grad, const AttentionBackwardCudaParams& p, const Task& task,
                                    float factor) {
    Tensor rows = by_rows(grad);             // (rows,columns)
    const auto at = owned_coordinates(mma);  // (rows,columns)
    CUTE_UNROLL
    for (int r = 0; r < size<0>(rows); ++r) {
      const int64_t query = min(task.tokens.begin + get<0>(at(r, 0)), task.tokens.end - 1);
      const float factor_of_row = factor * p.weight(task.batch, query, task.head);
      CUTE_UNROLL
      for (int c = 0; c < size<1>(rows); ++c) rows(r, c) *= factor_of_row;
    }
  }

  // What reaches the queries through the relative logits.
  template <class Sums>
  static __device__ void add_relative_grad(const Mma& mma, Sums& grad, const AttentionBackwardCudaParams& p,
                                           const Task& task) {
    const Grid& grid = p.score.on_grid.grid;
    const float* relative = p.relative_grad_query + (task.batch * p.heads + task.head) * grid.num_tokens() * p.head_dim;
    Tensor rows = by_rows(grad);             // (rows,columns)
    const auto at = owned_coordinates(mma);  // (rows,columns)
    CUTE_UNROLL
    for (int r = 0; r < size<0>(rows); ++r) {
      const int64_t query = task.tokens.begin + get<0>(at(r, 0)), token = query - grid.num_prefix;
      if (query >= task.tokens.end || token < 0) continue;
      CUTE_UNROLL
      for (int c = 0; c < size<1>(rows); ++c) {
        const int column = task.first_column + get<1>(at(r, c));
        if (column < p.head_dim) rows(r, c) += relative[token * p.head_dim + column];
      }
    }
  }

  // Sums leave through the owned tile, those of a split as they are.
  template <class Sums, class Shared>
  static __device__ void store(const Mma& mma, const Sums& grad, Shared sT, const SumTarget& target, const Task& task,
                               int columns) {
    const Range tokens = tokens_of(task.sequence, task.tokens);
    const int rows = int(tokens.end - tokens.begin);
    const int64_t offset = target.tensor.offset(task.batch, tokens.begin, task.head) + task.first_column;
    if (target.parts) {
      store_sums(by_rows(grad), owned_coordinates(mma), target.parts + task.split * target.size + offset,
                 target.tensor.token_stride, rows, columns);
    } else {
      store_tile<kThreads>(mma, grad, sT, static_cast<Element*>(target.tensor.data) + offset,
                           target.tensor.token_stride, rows, columns, target.tensor.is_aligned);
    }
  }
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads)
    attention_backward(const __grid_constant__ AttentionBackwardCudaParams p, const __grid_constant__ OwnedSums sums) {
  extern __shared__ __align__(128) unsigned char shared[];
  Kernel::run(p, sums, reinterpret_cast<typename Kernel::Element*>(shared));
}

template <class Element, class Function>
auto dispatch_kernel(const AttentionBackwardCudaParams& p, Side owner, Function&& f) {
  return dispatch_dim(p, [&]<int kDim>(Int<kDim>) {
    if (owner == Side::kKeys) return f(BackwardKernel<Element, kDim, Side::kKeys>{});
    return f(BackwardKernel<Element, kDim, Side::kQueries>{});
  });
}

}  // namespace

template <DType kDType>
int64_t AttentionLaunches<kDType>::backward_splits(const AttentionBackwardCudaParams& p, const OwnedSums& sums,
                                                   Side owner) {
  return dispatch_kernel<ElementOf<kDType>>(p, owner, [&]<class Kernel>(Kernel) {
    return splits_of(typename Kernel::Cut(p, sums).num_tasks(p), Kernel::streamed_tiles(p, 1));
  });
}

template <DType kDType>
int64_t AttentionLaunches<kDType>::backward_dot_parts(const AttentionBackwardCudaParams& p, const OwnedSums& sums) {
  return dispatch_kernel<ElementOf<kDType>>(p, Side::kQueries, [&]<class Kernel>(Kernel) {
    return typename Kernel::Cut(p, sums).column_blocks * sums.splits;
  });
}

template <DType kDType>
cudaError_t AttentionLaunches<kDType>::backward(const AttentionBackwardCudaParams& p, const OwnedSums& sums, Side owner,
                                                cudaStream_t stream) {
  return dispatch_kernel<ElementOf<kDType>>(p, owner, [&]<class Kernel>(Kernel) {
    return launch_tasks(attention_backward<Kernel>, typename Kernel::Cut(p, sums).num_tasks(p) * sums.splits,
                        Kernel::kThreads, Kernel::kSharedBytes, stream, p, sums);
  });
}

template int64_t AttentionLaunches<DType::VK_DTYPE>::backward_splits(const AttentionBackwardCudaParams&,
                                                                     const OwnedSums&, Side);
template int64_t AttentionLaunches<DType::VK_DTYPE>::backward_dot_parts(const AttentionBackwardCudaParams&,
                                                                        const OwnedSums&);
template cudaError_t AttentionLaunches<DType::VK_DTYPE>::backward(const AttentionBackwardCudaParams&, const OwnedSums&,
                                                                  Side, cudaStream_t);

}  // namespace vitkernels
