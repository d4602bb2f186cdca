// Gradients of the score terms on a GPU: biases and multiplier, each in its own broadcast shape, the same bits in every
// run.
//
// A block owns a tile of the term's elements. For each (batch, head, queries, keys) that they serve it computes a tile of
// the logits' gradient again and adds it in registers, in order; at the end it adds the rows or columns of that tile
// which the term does not tell apart. Nothing but the term's gradient is written.

#include "attention/differentiate_cuda.h"
#include "attention/tiles_cuda.h"

namespace vitkernels {
namespace {

using namespace cuda;
using namespace cute;

// Along one axis: what an element of the term serves, and how many owners there are.
struct TermAxis {
  int64_t count;
  bool is_shared;

  VK_HOST_DEVICE int64_t num_owners() const { return is_shared ? 1 : count; }
  VK_HOST_DEVICE Range served(int64_t owner) const { return is_shared ? Range{0, count} : Range{owner, owner + 1}; }
};

template <class Element, int kDim>
struct TermKernel {
  static constexpr BackwardTile kTile = backward_tile(kDim, sizeof(Element));
  static constexpr int kQueries = kTile.owned, kKeys = kTile.streamed;
  static constexpr int kThreads = kTile.threads(), kSharedBytes = kTile.shared_bytes(kDim, 1, sizeof(Element));
  static_assert(kQueries * kKeys * int(sizeof(float)) <= kSharedBytes, "the sums leave through the operands' place");

  using Queries = SharedPair<Element, kQueries, kDim>;
  using Keys = SharedPair<Element, kKeys, kDim>;
  using Copy = typename TileCopy<Element, kThreads, kDim>::Copy;
  using Mma = TileMma<Element, kTile.warps, std::min(16, kTile.streamed)>;

  struct Axes {
    TermAxis batch, head, query_tile, key_tile;

    VK_HOST_DEVICE Axes(const AttentionParams& p, const ScoreStrides& strides)
        : batch{p.batch, strides.batch == 0},
          head{p.heads, strides.head == 0},
          query_tile{ceil_div<int64_t>(p.num_queries(), kQueries), strides.query == 0},
          key_tile{ceil_div<int64_t>(p.num_keys(), kKeys), strides.key == 0} {}

    VK_HOST_DEVICE int64_t num_tasks() const {
      return batch.num_owners() * head.num_owners() * query_tile.num_owners() * key_tile.num_owners();
    }
  };

  static __device__ void run(const AttentionBackwardCudaParams& p, const TermGradient& term, unsigned char* shared) {
    const Axes axes(p, term.strides);
    TaskIndex index(blockIdx.x);
    const int64_t key_tile = index.take(axes.key_tile.num_owners());
    const int64_t query_tile = index.take(axes.query_tile.num_owners());
    const int64_t of_head = index.take(axes.head.num_owners()), of_batch = index.rest();
    const Range batches = axes.batch.served(of_batch), heads = axes.head.served(of_head);
    const Range query_tiles = axes.query_tile.served(query_tile), key_tiles = axes.key_tile.served(key_tile);

    const Mma mma(p.allow_tf32);
    Tensor sums = partition_fragment_C(mma, Shape<Int<kQueries>, Int<kKeys>>{});  // (MMA,MMA_M,MMA_N)
    clear(sums);
    for (int64_t batch = batches.begin; batch < batches.end; ++batch) {
      const Sequence sequence = p.sequence(batch);
      for (int64_t head = heads.begin; head < heads.end; ++head) {
        const int64_t kv_head = p.kv_head(head);
        if (kv_head < 0) continue;
        for (int64_t q = query_tiles.begin; q < query_tiles.end; ++q) {
          const Range rows = tile_of(q, kQueries, sequence.axis.num_queries);
          if (rows.empty()) break;
          const Range seen = sequence.axis.any_keys(rows);
          for (int64_t k = key_tiles.begin; k < key_tiles.end; ++k) {
            const Range keys = tile_of(k, kKeys, sequence.axis.num_keys);
            if (keys.empty()) break;
            if (!intersect(seen, keys).empty()) {
              add_tile(p, term, mma, sums, reinterpret_cast<Element*>(shared), sequence, batch, head, kv_head, rows,
                       keys);
            }
          }
        }
      }
    }
    // Where rows or columns are summed, those that do not exist are zero.
    const Range rows = term.strides.query == 0 ? Range{0, kQueries} : tile_of(query_tile, kQueries, p.num_queries());
    const Range keys = term.strides.key == 0 ? Range{0, kKeys} : tile_of(key_tile, kKeys, p.num_keys());
    finish(term, mma, sums, reinterpret_cast<float*>(shared), of_batch, of_head, rows, keys);
  }

  template <class Sums>
  static __device__ void add_tile(const AttentionBackwardCudaParams& p, const TermGradient& term, const Mma& mma,
                                  Sums& sums, Element* shared, const Sequence& sequence, int64_t batch, int64_t head,
                                  int64_t kv_head, Range rows, Range keys) {
    const Queries of_queries{shared};
    const Keys of_keys{shared + int{Queries::kElements}};
    __syncthreads();  // nobody reads the last tile any more
    const TokensOfHead queries{sequence, batch, head, kv_head, rows},
        keys_of_head{sequence, batch, head, kv_head, keys};
    of_queries.template copy<Side::kQueries, Copy>(p, queries);
    of_keys.template copy<Side::kKeys, Copy>(p, keys_of_head);
    wait_for_copies<0>();
    __syncthreads();

    Tensor probs = partition_fragment_C(mma, Shape<Int<kQueries>, Int<kKeys>>{});  // (MMA,MMA_M,MMA_N)
    Tensor grads = partition_fragment_C(mma, Shape<Int<kQueries>, Int<kKeys>>{});  // (MMA,MMA_M,MMA_N)
    clear(probs);
    clear(grads);
    multiply_tile(mma, probs, of_queries.first(), of_keys.first(), int(p.head_dim));
    multiply_values<Side::kQueries, Copy>(mma, grads, p, of_queries, queries, of_keys, keys_of_head, false);
    Tensor products = make_fragment_like(probs);  // (MMA,MMA_M,MMA_N)
    cute::copy(probs, products);

    const auto coordinates = coordinates_of<Side::kQueries, kQueries, kKeys>(mma);  // (queries,keys)
    Tensor logits = by_rows(probs);                                                 // (queries,keys)
    Tensor logit_grads = by_rows(grads);                                            // (queries,keys)
    apply_score<kKeys>(logits, coordinates, p.score, sequence.axis, batch, head, rows, keys);
    differentiate<true>(logits, logit_grads, coordinates, p, sequence, batch, head, rows);
    const float scale = term.factor == TermFactor::kScaledProduct ? p.score.scale_of<float>(head) : 1.0f;
    CUTE_UNROLL
    for (int i = 0; i < size(sums); ++i) {
      sums(i) += term.factor == TermFactor::kOne ? grads(i) : grads(i) * (products(i) * scale);
    }
  }

  // Writes the elements of the tile `rows` x `keys`, or the sums over what has no stride.
  template <class Sums>
  static __device__ void finish(const TermGradient& term, const Mma& mma, const Sums& sums, float* shared,
                                int64_t batch, int64_t head, Range rows, Range keys) {
    Tensor sS = make_tensor(make_smem_ptr(shared), Layout<Shape<Int<kQueries>, Int<kKeys>>, Stride<Int<kKeys>, _1>>{});
    __syncthreads();
    cute::copy(sums, mma.get_slice(threadIdx.x).partition_C(sS));
    __syncthreads();
    const int num_rows = int(rows.end - rows.begin), num_keys = int(keys.end - keys.begin);
    const int rows_of_element = term.strides.query == 0 ? num_rows : 1;
    const int keys_of_element = term.strides.key == 0 ? num_keys : 1;
    const int width = num_keys / keys_of_element, count = num_rows / rows_of_element * width;
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const int first_row = i / width, first_key = i % width;
      double total = 0.0;
      for (int r = 0; r < rows_of_element; ++r) {
        for (int c = 0; c < keys_of_element; ++c) total += double(sS(first_row + r, first_key + c));
      }
      term.data[term.strides.offset(batch, head, rows.begin + first_row, keys.begin + first_key)] = float(total);
    }
  }
};

template <class Element, int kDim>
__global__ void __launch_bounds__(TermKernel<Element, kDim>::kThreads)
    attention_backward_term(const __grid_constant__ AttentionBackwardCudaParams p,
                            const __grid_constant__ TermGradient term) {
  extern __shared__ __align__(128) unsigned char shared[];
  TermKernel<Element, kDim>::run(p, term, shared);
}

}  // namespace

cudaError_t launch_attention_backward_term(const AttentionBackwardCudaParams& p, const TermGradient& term,
                                           cudaStream_t stream) {
  return dispatch_tile(p, [&]<class Element, int kDim>(Element, Int<kDim>) {
    using Kernel = TermKernel<Element, kDim>;
    return launch_tasks(attention_backward_term<Element, kDim>, typename Kernel::Axes(p, term.strides).num_tasks(),
                        Kernel::kThreads, Kernel::kSharedBytes, stream, p, term);
  });
}

}  // namespace vitkernels
