// Gradients of the terms by offset on a GPU: of tables, and of the relative logits.
//
// A block takes tiles of the logits' gradient, recomputed or stored, one after another, and adds each from shared
// memory to accumulators that no other block writes: a thread owns some of them and visits the pairs of the tile that
// belong to each, in order. Of a stored gradient, a table gets its share from the sum over the batch.

#include "attention/cuda/stored_tile.h"
#include "cuda/parts.h"

namespace vitkernels {
namespace {

using namespace cuda;
using namespace cute;

constexpr int kThreadsOfTable = 128;

// Tokens of a tile that are on the offset grid, counted from the first one there.
__device__ Range tokens_on_grid(const OffsetGrid& grid, Range tokens) {
  return intersect(relative_to(tokens, grid.num_prefix), {0, grid.num_tokens()});
}

// A block takes a part of the tiles of a head, and owns a partial table.
template <class Element>
struct TableKernel {
  using Tile = GradientTile<Element, DenseKeys>;

  struct Tiles {
    int64_t batch, query_tiles, key_tiles;

    VK_HOST_DEVICE explicit Tiles(const Problem& p)
        : batch(p.batch),
          query_tiles(ceil_div<int64_t>(p.num_queries(), Tile::kQueries)),
          key_tiles(ceil_div<int64_t>(p.num_keys(), Tile::kKeys)) {}
    VK_HOST_DEVICE int64_t count() const { return batch * query_tiles * key_tiles; }
  };

  static __device__ void run(const AttentionBackwardCudaParams& p, const TableGradient& table, Element* shared) {
    const Problem& problem = p.forward.problem;
    const OffsetTerms& terms = problem.score.by_offset;
    TaskIndex owner(blockIdx.x);
    const int64_t head = owner.take(problem.heads), part = owner.rest();
    float* sums = table.sums.part(part) + head * terms.grid.num_entries();
    const Tiles tiles(problem);
    const Tile tile{p, shared};
    const Range own = part_of(tiles.count(), part, table.sums.count);
    for (int64_t i = own.begin; i < own.end; ++i) {
      TaskIndex index(i);
      const int64_t key_tile = index.take(tiles.key_tiles), query_tile = index.take(tiles.query_tiles);
      TileTask task;
      if (!Tile::find(p, index.rest(), head, query_tile, key_tile, task)) continue;
      add(terms, tile.share(tile.gradient(task, table.factor)), task.tile, sums);
    }
  }

  // A thread takes some of the offsets between tokens of the tile, and iterates over the queries.
  template <class Shared>
  static __device__ void add(const OffsetTerms& terms, const Shared& sS, const LogitTile& tile, float* sums) {
    const Range queries = tokens_on_grid(terms.grid, tile.queries), keys = tokens_on_grid(terms.grid, tile.keys);
    if (queries.empty() || keys.empty()) return;
    const DeviceOffsetGrid& grid = terms.small;
    int first[kMaxAxes], count[kMaxAxes];
    CUTE_UNROLL
    for (int axis = 0; axis < kMaxAxes; ++axis) {
      const Range u = terms.grid.coordinates(axis, queries), v = terms.grid.coordinates(axis, keys);
      first[axis] = int(u.begin - (v.end - 1));
      count[axis] = int(u.end - 1 - v.begin) - first[axis] + 1;
    }
    const int num_keys = int(keys.end - keys.begin), num_queries = int(queries.end - queries.begin);
    const int first_row = int(queries.begin + grid.num_prefix - tile.queries.begin);
    const int first_column = int(keys.begin + grid.num_prefix - tile.keys.begin);
    const DeviceOffsetGrid::Coord first_coord = grid.coord(int(queries.begin));
    for (int i = threadIdx.x; i < count[0] * count[1] * count[2]; i += Tile::kThreads) {
      const int row = i / count[2], width = first[2] + i - row * count[2];
      const int plane = row / count[1], height = first[1] + row - plane * count[1], depth = first[0] + plane;
      const int distance = (depth * grid.size[1] + height) * grid.size[2] + width;  // from the key to the query
      int key = int(queries.begin - keys.begin) - distance;                         // in the tile, of the first query
      int x = first_coord.at[2] - width, y = first_coord.at[1] - height;            // coordinates of that key
      float sum = 0.0f;
      for (int r = 0; r < num_queries; ++r, ++key) {
        const bool exists = unsigned(x) < unsigned(grid.size[2]) && unsigned(y) < unsigned(grid.size[1]);
        if (exists && unsigned(key) < unsigned(num_keys)) sum += sS(first_row + r, first_column + key);
        if (++x == grid.size[2] - width) {  // the next query begins a row of the offset grid
          x = -width;
          if (++y == grid.size[1] - height) y = -height;
        }
      }
      sums[grid.center() + grid.entry({{depth, height, width}})] += sum;
    }
  }
};

// A block owns the rows of a query tile.
template <class Tile>
struct RelativeLogitsKernel {
  using Element = typename Tile::Element;

  static VK_HOST_DEVICE int64_t query_tiles(const Problem& p) {
    return ceil_div<int64_t>(p.num_queries(), Tile::kQueries);
  }

  static __device__ void run(const AttentionBackwardCudaParams& p, float* grads, Element* shared) {
    const Problem& problem = p.forward.problem;
    const OffsetTerms& terms = problem.score.by_offset;
    TaskIndex owner(blockIdx.x);
    const int64_t query_tile = owner.take(query_tiles(problem)), head = owner.take(problem.heads);
    const int64_t batch = owner.rest();
    float* sums = grads + batch * terms.relative.batch_stride + head * terms.relative.head_stride;
    const Tile tile{p, shared};
    for (int64_t key_tile = 0; key_tile < ceil_div<int64_t>(problem.num_keys(), Tile::kKeys); ++key_tile) {
      TileTask task;
      if (!Tile::find(p, batch, head, query_tile, key_tile, task)) continue;
      add(terms, tile.share(tile.gradient(task, TermFactor::kBias)), task.tile, sums);
    }
  }

  // A thread takes some of the pairs (query, coordinate of keys), and iterates over the keys that have the coordinate.
  template <class Shared>
  static __device__ void add(const OffsetTerms& terms, const Shared& sS, const LogitTile& tile, float* sums) {
    const OffsetGrid& grid = terms.grid;
    const Range queries = tokens_on_grid(grid, tile.queries), keys = tokens_on_grid(grid, tile.keys);
    if (queries.empty() || keys.empty()) return;
    const int first_row = int(queries.begin + grid.num_prefix - tile.queries.begin);
    const int64_t first_key = tile.keys.begin - grid.num_prefix;
    int64_t inner = 1;  // consecutive tokens with the same coordinate
    for (int axis = kMaxAxes - 1; axis >= 0; inner *= grid.size[axis], --axis) {
      if (!terms.rel_pos[axis].data) continue;
      const Range range = grid.coordinates(axis, keys);
      const int count = int(range.end - range.begin), num_pairs = int(queries.end - queries.begin) * count;
      const int64_t period = inner * grid.size[axis], first_period = keys.begin / period * period;
      for (int i = threadIdx.x; i < num_pairs; i += Tile::kThreads) {
        const int row = i / count, coordinate = int(range.begin) + i - row * count;
        float sum = 0.0f;
        for (int64_t begin = first_period + coordinate * inner; begin < keys.end; begin += period) {
          const Range run = intersect({begin, begin + inner}, keys);
          for (int64_t key = run.begin; key < run.end; ++key) sum += sS(first_row + row, int(key - first_key));
        }
        sums[(queries.begin + row) * terms.relative.width + terms.relative.first[axis] + coordinate] += sum;
      }
    }
  }
};

template <class Element>
__global__ void __launch_bounds__(GradientTile<Element, DenseKeys>::kThreads)
    attention_backward_table(const __grid_constant__ AttentionBackwardCudaParams p,
                             const __grid_constant__ TableGradient table) {
  extern __shared__ __align__(128) unsigned char shared[];
  TableKernel<Element>::run(p, table, reinterpret_cast<Element*>(shared));
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    relative_logits_backward(const __grid_constant__ AttentionBackwardCudaParams p, float* grads) {
  extern __shared__ __align__(128) unsigned char shared[];
  RelativeLogitsKernel<Tile>::run(p, grads, reinterpret_cast<typename Tile::Element*>(shared));
}

// A thread owns an entry of a head's table, and visits the queries that have a key at this offset.
__global__ void __launch_bounds__(kThreadsOfTable)
    attention_backward_table_of_sum(const __grid_constant__ Problem p, const float* grads, float* table) {
  const OffsetGrid& grid = p.score.by_offset.grid;
  const DeviceOffsetGrid& small = p.score.by_offset.small;
  const int entries = int(grid.num_entries()), blocks = ceil_div(entries, kThreadsOfTable);
  const int head = int(blockIdx.x) / blocks, entry = (int(blockIdx.x) - head * blocks) * kThreadsOfTable + threadIdx.x;
  if (entry >= entries) return;
  const int row = entry / small.num_offsets(2), plane = row / small.num_offsets(1);
  const int depth = plane - (small.size[0] - 1), height = row - plane * small.num_offsets(1) - (small.size[1] - 1);
  const int width = entry - row * small.num_offsets(2) - (small.size[2] - 1);
  const int distance = (depth * small.size[1] + height) * small.size[2] + width;  // from the key to the query
  const int num_keys = int(p.num_keys());
  const float* const of_head = grads + head * p.num_queries() * num_keys;
  float sum = 0.0f;
  for (int z = max(0, depth); z < min(0, depth) + small.size[0]; ++z) {
    for (int y = max(0, height); y < min(0, height) + small.size[1]; ++y) {
      const int first = (z * small.size[1] + y) * small.size[2] + small.num_prefix;
      for (int x = max(0, width); x < min(0, width) + small.size[2]; ++x) {
        sum += of_head[int64_t(first + x) * num_keys + (first + x - distance)];
      }
    }
  }
  table[int64_t(head) * entries + entry] = sum;
}

}  // namespace

int64_t parts_of_table(const AttentionBackwardCudaParams& p) {
  const Problem& problem = p.forward.problem;
  return dispatch_element(problem.dtype, [&]<class Element>(Element) {
    return parts_for(problem.heads, typename TableKernel<Element>::Tiles(problem).count(),
                     problem.heads * problem.score.by_offset.grid.num_entries());
  });
}

cudaError_t launch_attention_backward_table(const AttentionBackwardCudaParams& p, const TableGradient& table,
                                            cudaStream_t stream) {
  return dispatch_element(p.forward.problem.dtype, [&]<class Element>(Element) {
    using Tile = GradientTile<Element, DenseKeys>;
    return launch_tasks(attention_backward_table<Element>, p.forward.problem.heads * table.sums.count, Tile::kThreads,
                        Tile::kSharedBytes, stream, p, table);
  });
}

cudaError_t launch_attention_backward_table(const Problem& p, const float* grads, float* table, cudaStream_t stream) {
  const int64_t blocks = p.heads * ceil_div<int64_t>(p.score.by_offset.grid.num_entries(), kThreadsOfTable);
  return launch_tasks(attention_backward_table_of_sum, blocks, kThreadsOfTable, 0, stream, p, grads, table);
}

cudaError_t launch_relative_logits_backward(const AttentionBackwardCudaParams& p, float* grads, cudaStream_t stream) {
  return dispatch_tile(p, [&]<class Tile>() {
    const Problem& problem = p.forward.problem;
    const int64_t tasks = RelativeLogitsKernel<Tile>::query_tiles(problem) * problem.heads * problem.batch;
    return launch_tasks(relative_logits_backward<Tile>, tasks, Tile::kThreads, Tile::kSharedBytes, stream, p, grads);
  });
}

}  // namespace vitkernels
