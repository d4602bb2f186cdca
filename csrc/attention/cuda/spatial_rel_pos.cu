// Relative logits of a map on a GPU: products of queries with embeddings of all offsets of an axis, and the gradients of
// both. They are computed before the attention kernels, and their gradients after them.

#include "attention/cuda/spatial_launches.h"
#include "attention/cuda/tokens.h"
#include "cuda/float_product.h"
#include "cuda/parts.h"
#include "cuda/scheduler.h"

namespace vitkernels {
namespace {

using namespace cuda;

constexpr int kRows = FloatProduct::kRows, kColumns = FloatProduct::kColumns, kDepth = FloatProduct::kDepth;

// A query of the map.
template <class Element>
__device__ const Element* query_of(const SpatialCudaParams& p, int64_t batch, int64_t head, int64_t token) {
  Coord coord;
  for (int a = kMaxAxes - 1; a >= 0; --a) {
    const int64_t size = p.rule(a).num_queries, next = token / size, of_map = token - next * size;
    coord.at[a] = p.is_shared_query ? of_map % p.rule(a).size : of_map;
    token = next;
  }
  return p.query.at<const Element>(batch, coord, head);
}

// An embedding among those of all axes.
__device__ const float* embedding_of(const OffsetTerms& terms, int64_t head, int index) {
  int axis = kMaxAxes - 1;
  while (!terms.rel_pos[axis].data || index < terms.relative.first[axis]) --axis;
  const RelPosTerm& term = terms.rel_pos[axis];
  return static_cast<const float*>(term.data) + head * term.head_stride +
         (index - terms.relative.first[axis]) * term.row_stride;
}

struct RowTile {
  int64_t batch, head;
  Range tokens;

  __device__ RowTile(const SpatialCudaParams& p, TaskIndex<unsigned> index) {
    const int64_t tile = index.take(ceil_div<int64_t>(p.num_queries(), kRows));
    head = index.take(p.heads);
    batch = index.rest();
    tokens = tile_of(tile, kRows, p.num_queries());
  }
  static int64_t count(const SpatialCudaParams& p) {
    return ceil_div<int64_t>(p.num_queries(), kRows) * p.heads * p.batch;
  }
};

__device__ int64_t row_of(const DeviceRelativeLogits& relative, int64_t batch, int64_t head, int64_t token) {
  return batch * relative.batch_stride + head * relative.head_stride + token * relative.width;
}

template <class Element>
__global__ void __launch_bounds__(FloatProduct::kThreads, FloatProduct::kBlocks)
    spatial_relative_logits(const __grid_constant__ SpatialCudaParams p, float* logits) {
  __shared__ FloatProduct::Shared shared;
  const OffsetTerms& terms = p.score.by_offset;
  TaskIndex<unsigned> index(blockIdx.x);
  const int first = int(index.take(ceil_div(terms.relative.width, kColumns))) * kColumns;
  const RowTile tile(p, index);
  FloatProduct product;  // (queries,embeddings)
  for (int64_t column = 0; column < p.head_dim; column += kDepth) {
    const auto query = [&](int row, int depth) {
      const int64_t token = tile.tokens.begin + row;
      const bool exists = token < tile.tokens.end && column + depth < p.head_dim;
      return exists ? float(query_of<Element>(p, tile.batch, tile.head, token)[column + depth]) : 0.0f;
    };
    const auto embedding = [&](int depth, int i) {
      const bool exists = first + i < terms.relative.width && column + depth < p.head_dim;
      return exists ? embedding_of(terms, tile.head, first + i)[column + depth] : 0.0f;
    };
    product.add<true, true>(shared, query, embedding);
  }
  product.for_each([&](int row, int i, float sum) {
    const int64_t token = tile.tokens.begin + row;
    if (token < tile.tokens.end && first + i < terms.relative.width) {
      logits[row_of(terms.relative, tile.batch, tile.head, token) + first + i] = sum;
    }
  });
}

__global__ void __launch_bounds__(FloatProduct::kThreads, FloatProduct::kBlocks)
    spatial_relative_grad_query(const __grid_constant__ SpatialBackwardCudaParams p) {
  __shared__ FloatProduct::Shared shared;
  const SpatialCudaParams& f = p.forward;
  const OffsetTerms& terms = f.score.by_offset;
  TaskIndex<unsigned> index(blockIdx.x);
  const int64_t first_column = index.take(ceil_div<int64_t>(f.head_dim, kColumns)) * kColumns;
  const RowTile tile(f, index);
  FloatProduct product;  // (queries,dim)
  for (int first = 0; first < terms.relative.width; first += kDepth) {
    const auto grad = [&](int row, int depth) {
      const int64_t token = tile.tokens.begin + row;
      const bool exists = token < tile.tokens.end && first + depth < terms.relative.width;
      return exists ? p.relative_grad[row_of(terms.relative, tile.batch, tile.head, token) + first + depth] : 0.0f;
    };
    const auto embedding = [&](int depth, int column) {
      const bool exists = first + depth < terms.relative.width && first_column + column < f.head_dim;
      return exists ? embedding_of(terms, tile.head, first + depth)[first_column + column] : 0.0f;
    };
    product.add<true, false>(shared, grad, embedding);
  }
  product.for_each([&](int row, int column, float sum) {
    const int64_t token = tile.tokens.begin + row;
    if (token >= tile.tokens.end || first_column + column >= f.head_dim) return;
    p.float_grad_query[((tile.batch * f.num_queries() + token) * f.heads + tile.head) * f.head_dim + first_column +
                       column] += sum;
  });
}

// Blocks own columns of some embeddings, for a share of the queries.
struct EmbeddingWork {
  int64_t embeddings, embedding_tiles, column_tiles, chunks;  // a chunk: kDepth queries of a batch

  VK_HOST_DEVICE EmbeddingWork(const SpatialCudaParams& p, int axis)
      : embeddings(p.score.by_offset.grid.num_offsets(axis)),
        embedding_tiles(ceil_div<int64_t>(embeddings, kRows)),
        column_tiles(ceil_div<int64_t>(p.head_dim, kColumns)),
        chunks(ceil_div<int64_t>(p.num_queries(), kDepth)) {}

  VK_HOST_DEVICE int64_t num_owners(const SpatialCudaParams& p) const {
    return embedding_tiles * column_tiles * p.heads;
  }
};

template <class Element>
__global__ void __launch_bounds__(FloatProduct::kThreads, FloatProduct::kBlocks)
    spatial_relative_grad_embedding(const __grid_constant__ SpatialBackwardCudaParams p,
                                    const __grid_constant__ EmbeddingGradient gradient) {
  __shared__ FloatProduct::Shared shared;
  const SpatialCudaParams& f = p.forward;
  const DeviceRelativeLogits& relative = f.score.by_offset.relative;
  const EmbeddingWork work(f, gradient.axis);
  TaskIndex<unsigned> index(blockIdx.x);
  const int64_t first_column = index.take(work.column_tiles) * kColumns;
  const Range embeddings = tile_of(index.take(work.embedding_tiles), kRows, work.embeddings);
  const int64_t head = index.take(f.heads), part = index.rest();
  const Range own = part_of(work.chunks * f.batch, part, gradient.sums.count);
  FloatProduct product;  // (embeddings,dim)
  for (int64_t chunk = own.begin; chunk < own.end; ++chunk) {
    const int64_t batch = chunk / work.chunks;
    const Range tokens = tile_of(chunk % work.chunks, kDepth, f.num_queries());
    const auto grad = [&](int row, int depth) {
      const int64_t token = tokens.begin + depth, embedding = embeddings.begin + row;
      const bool exists = token < tokens.end && embedding < embeddings.end;
      const int64_t first = relative.first[gradient.axis] + embedding;
      return exists ? p.relative_grad[row_of(relative, batch, head, token) + first] : 0.0f;
    };
    const auto query = [&](int depth, int column) {
      const bool exists = tokens.begin + depth < tokens.end && first_column + column < f.head_dim;
      return exists ? float(query_of<Element>(f, batch, head, tokens.begin + depth)[first_column + column]) : 0.0f;
    };
    product.add<false, false>(shared, grad, query);
  }
  float* target = gradient.sums.part(part) + head * work.embeddings * f.head_dim;
  product.for_each([&](int row, int column, float sum) {
    const int64_t embedding = embeddings.begin + row;
    if (embedding < embeddings.end && first_column + column < f.head_dim) {
      target[embedding * f.head_dim + first_column + column] = sum;
    }
  });
}

}  // namespace

cudaError_t launch_spatial_relative_logits(const SpatialCudaParams& p, float* logits, cudaStream_t stream) {
  const int64_t tasks = RowTile::count(p) * ceil_div(p.score.by_offset.relative.width, kColumns);
  return dispatch_element(p.dtype, [&]<class Element>(Element) {
    return launch_tasks(spatial_relative_logits<Element>, tasks, FloatProduct::kThreads, 0, stream, p, logits);
  });
}

cudaError_t launch_spatial_relative_grad_query(const SpatialBackwardCudaParams& p, cudaStream_t stream) {
  const int64_t tasks = RowTile::count(p.forward) * ceil_div<int64_t>(p.forward.head_dim, kColumns);
  return launch_tasks(spatial_relative_grad_query, tasks, FloatProduct::kThreads, 0, stream, p);
}

int64_t parts_of_spatial_embedding(const SpatialBackwardCudaParams& p, int axis) {
  const SpatialCudaParams& f = p.forward;
  const EmbeddingWork work(f, axis);
  return parts_for(work.num_owners(f), work.chunks * f.batch, work.embeddings * f.head_dim * f.heads);
}

cudaError_t launch_spatial_relative_grad_embedding(const SpatialBackwardCudaParams& p,
                                                   const EmbeddingGradient& gradient, cudaStream_t stream) {
  const int64_t tasks = EmbeddingWork(p.forward, gradient.axis).num_owners(p.forward) * gradient.sums.count;
  return dispatch_element(p.forward.dtype, [&]<class Element>(Element) {
    return launch_tasks(spatial_relative_grad_embedding<Element>, tasks, FloatProduct::kThreads, 0, stream, p,
                        gradient);
  });
}

}  // namespace vitkernels
