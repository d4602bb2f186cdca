// Gradients of the score terms on a GPU: biases and multiplier, each in its own broadcast shape, the same bits in every
// run.
//
// A block owns a tile of the term's elements. For each (batch, head, queries, keys) that they serve it takes a tile of
// the logits' gradient, recomputed or stored, and accumulates it in a fixed order; at the end it reduces the axes of
// that tile along which the term is broadcast. Where few elements serve many pairs, several blocks share them
// (cuda/parts.h).

#include "attention/cuda/stored_tile.h"
#include "cuda/parts.h"

namespace vitkernels {
namespace {

using namespace cuda;
using namespace cute;

// One axis: how many owners there are, and how much an element of the term serves.
struct TermAxis {
  int64_t count;
  bool is_shared;

  VK_HOST_DEVICE int64_t num_owners() const { return is_shared ? 1 : count; }
  VK_HOST_DEVICE int64_t num_served() const { return is_shared ? count : 1; }
  VK_HOST_DEVICE int64_t at(int64_t owner, int64_t served) const { return is_shared ? served : owner; }
};

template <class Tile>
struct TermKernel {
  using Element = typename Tile::Element;

  struct Axes {
    TermAxis batch, head, query_tile, key_tile;

    // An element has an owner even where no sequence of a packed batch is that long.
    VK_HOST_DEVICE Axes(const AttentionCudaParams& p, const ScoreStrides& strides)
        : batch{p.problem.batch, strides.batch == 0},
          head{p.problem.heads, strides.head == 0},
          query_tile{strides.query == 0 ? p.packing.query_tiles(p.problem, Tile::kQueries)
                                        : ceil_div<int64_t>(p.problem.num_queries(), Tile::kQueries),
                     strides.query == 0},
          key_tile{strides.key == 0 ? p.packing.key_tiles(p.problem, Tile::kKeys)
                                    : ceil_div<int64_t>(p.problem.num_keys(), Tile::kKeys),
                   strides.key == 0} {}

    VK_HOST_DEVICE int64_t num_owners() const {
      return batch.num_owners() * head.num_owners() * query_tile.num_owners() * key_tile.num_owners();
    }
    VK_HOST_DEVICE int64_t num_served() const {
      return batch.num_served() * head.num_served() * query_tile.num_served() * key_tile.num_served();
    }

    // What a block serves, one after the other.
    struct Served {
      int batch, head, query_tile, key_tile;
    };
    __device__ Served served(int64_t i) const {
      TaskIndex index(i);
      Served at;
      at.key_tile = int(index.take(key_tile.num_served())), at.query_tile = int(index.take(query_tile.num_served()));
      at.head = int(index.take(head.num_served())), at.batch = int(index.rest());
      return at;
    }
    __device__ void advance(Served& at) const {
      if (++at.key_tile < key_tile.num_served()) return;
      at.key_tile = 0;
      if (++at.query_tile < query_tile.num_served()) return;
      at.query_tile = 0;
      if (++at.head < head.num_served()) return;
      at.head = 0, ++at.batch;
    }
  };

  static __device__ void run(const AttentionBackwardCudaParams& p, const TermGradient& term, Element* shared) {
    const Axes axes(p.forward, term.strides);
    TaskIndex owner(blockIdx.x);
    const int64_t part = owner.take(term.sums.count);
    const int64_t own_keys = owner.take(axes.key_tile.num_owners());
    const int64_t own_queries = owner.take(axes.query_tile.num_owners());
    const int64_t own_head = owner.take(axes.head.num_owners()), own_batch = owner.rest();

    const Problem& problem = p.forward.problem;
    const Tile tile{p, shared};
    Tensor acc = tile.accumulator();  // this thread's
    clear(acc);
    const Range served = part_of(axes.num_served(), part, term.sums.count);
    typename Axes::Served at = axes.served(served.begin);
    for (int64_t i = served.begin; i < served.end; ++i, axes.advance(at)) {
      TileTask task;
      if (!Tile::find(p, axes.batch.at(own_batch, at.batch), axes.head.at(own_head, at.head),
                      axes.query_tile.at(own_queries, at.query_tile), axes.key_tile.at(own_keys, at.key_tile), task)) {
        continue;
      }
      const Tensor grads = tile.gradient(task, term.factor);
      CUTE_UNROLL
      for (int j = 0; j < size(grads); ++j) acc(j) += grads(j);
    }
    // Where rows or columns are reduced, those that do not exist are zero.
    const Range rows = axes.query_tile.is_shared ? Range{0, Tile::kQueries}
                                                 : tile_of(own_queries, Tile::kQueries, problem.num_queries());
    const Range keys =
        axes.key_tile.is_shared ? Range{0, Tile::kKeys} : tile_of(own_keys, Tile::kKeys, problem.num_keys());
    finish(term, tile.share(acc), term.sums.part(part), own_batch, own_head, rows, keys);
  }

  // Writes the elements of the tile `rows` x `keys`, summed over the axes that have no stride.
  template <class Acc>
  static __device__ void finish(const TermGradient& term, const Acc& acc, float* target, int64_t batch, int64_t head,
                                Range rows, Range keys) {
    const int num_rows = int(rows.end - rows.begin), num_keys = int(keys.end - keys.begin);
    const int rows_of_element = term.strides.query == 0 ? num_rows : 1;
    const int keys_of_element = term.strides.key == 0 ? num_keys : 1;
    const int width = num_keys / keys_of_element, count = num_rows / rows_of_element * width;
    for (int i = threadIdx.x; i < count; i += Tile::kThreads) {
      const int first_row = i / width, first_key = i % width;
      double total = 0.0;
      for (int r = 0; r < rows_of_element; ++r) {
        for (int c = 0; c < keys_of_element; ++c) total += double(acc(first_row + r, first_key + c));
      }
      target[term.strides.offset(batch, head, rows.begin + first_row, keys.begin + first_key)] = float(total);
    }
  }
};

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    attention_backward_term(const __grid_constant__ AttentionBackwardCudaParams p,
                            const __grid_constant__ TermGradient term) {
  extern __shared__ __align__(128) unsigned char shared[];
  TermKernel<Tile>::run(p, term, reinterpret_cast<typename Tile::Element*>(shared));
}

}  // namespace

int64_t parts_of_term(const AttentionBackwardCudaParams& p, const ScoreStrides& strides, int64_t elements) {
  return dispatch_tile(p, [&]<class Tile>() {
    const typename TermKernel<Tile>::Axes axes(p.forward, strides);
    return parts_for(axes.num_owners(), axes.num_served(), elements);
  });
}

cudaError_t launch_attention_backward_term(const AttentionBackwardCudaParams& p, const TermGradient& term,
                                           cudaStream_t stream) {
  return dispatch_tile(p, [&]<class Tile>() {
    const typename TermKernel<Tile>::Axes axes(p.forward, term.strides);
    return launch_tasks(attention_backward_term<Tile>, axes.num_owners() * term.sums.count, Tile::kThreads,
                        Tile::kSharedBytes, stream, p, term);
  });
}

}  // namespace vitkernels
