// Relative logits on a GPU: products of queries with embeddings of their offsets from the keys, axis by axis, and the
// gradients of both.
//
// They are computed before the attention kernels, by the coordinates of the keys: a query on an offset grid of h x w
// has h + w of them, instead of the h w that are added to its logits. A query tile is multiplied with all embeddings
// that one of its queries needs, at most twice as many as each needs itself. Per head that costs N (h + w) d to 2 N (h
// + w) d float32 multiplications and 4 N (h + w) bytes; on a grid of one axis as many as there are logits. The backward
// needs as many bytes again for their gradient, and 4 N d for the gradient that reaches the queries.

#include "attention/cuda/tokens.h"
#include "cuda/float_product.h"
#include "cuda/parts.h"
#include "cuda/scheduler.h"

namespace vitkernels {
namespace {

using namespace cuda;

constexpr int kRows = FloatProduct::kRows, kColumns = FloatProduct::kColumns, kDepth = FloatProduct::kDepth;

// The embeddings of one axis that some tokens need.
struct AxisOfTokens {
  int axis, size;
  Range tokens;      // counted from the first on the offset grid
  Range embeddings;  // of the pairs of these tokens with all keys

  __device__ AxisOfTokens(const OffsetGrid& grid, int axis, Range tokens)
      : axis(axis), size(int(grid.size[axis])), tokens(tokens) {
    const Range range = grid.coordinates(axis, tokens);
    embeddings = {range.begin, range.end + grid.size[axis] - 1};
  }

  // The coordinate of the key whose offset from the token has this embedding; -1 if there is none.
  __device__ int key_coordinate(const DeviceOffsetGrid& grid, int64_t token, int64_t embedding) const {
    if (token >= tokens.end || embedding >= 2 * size - 1) return -1;
    const int coordinate = grid.coordinate(axis, int(token)) + size - 1 - int(embedding);
    return coordinate < size ? coordinate : -1;
  }
};

__device__ const float* embeddings_of(const RelPosTerm& term, int64_t head) {
  return static_cast<const float*>(term.data) + head * term.head_stride;
}

struct QueryTile {
  int64_t batch, head;
  Range tokens;
};

__device__ QueryTile query_tile(const Problem& p, TaskIndex<unsigned> index) {
  const int64_t tokens = p.score.by_offset.grid.num_tokens(), tile = index.take(ceil_div<int64_t>(tokens, kRows));
  const int64_t head = index.take(p.heads);
  return {index.rest(), head, tile_of(tile, kRows, tokens)};
}

int64_t num_query_tiles(const Problem& p) {
  return ceil_div<int64_t>(p.score.by_offset.grid.num_tokens(), kRows) * p.heads * p.batch;
}

// The rows of the queries on the offset grid.
template <class Element>
__device__ StridedRows<Element> queries_of(const Problem& p, int64_t batch, int64_t head) {
  return rows_of<Element>(p.query, batch, p.score.by_offset.grid.num_prefix, head, 0);
}

template <class Element>
__global__ void __launch_bounds__(FloatProduct::kThreads, FloatProduct::kBlocks)
    relative_logits(const __grid_constant__ AttentionCudaParams p, float* logits) {
  __shared__ FloatProduct::Shared shared;
  const Problem& problem = p.problem;
  const OffsetTerms& terms = problem.score.by_offset;
  const QueryTile tile = query_tile(problem, TaskIndex(blockIdx.x));
  const StridedRows<Element> queries = queries_of<Element>(problem, tile.batch, tile.head);
  float* target = logits + tile.batch * terms.relative.batch_stride + tile.head * terms.relative.head_stride;
  for (int axis = 0; axis < kMaxAxes; ++axis) {
    const RelPosTerm& term = terms.rel_pos[axis];
    if (!term.data) continue;
    const AxisOfTokens of_axis(terms.grid, axis, tile.tokens);
    const float* embeddings = embeddings_of(term, tile.head);
    for (int64_t first = of_axis.embeddings.begin; first < of_axis.embeddings.end; first += kColumns) {
      FloatProduct product;  // (queries,embeddings)
      for (int64_t column = 0; column < problem.head_dim; column += kDepth) {
        const auto query = [&](int row, int depth) {
          const int64_t token = tile.tokens.begin + row;
          const bool exists = token < tile.tokens.end && column + depth < problem.head_dim;
          return exists ? float(queries[int(token)][column + depth]) : 0.0f;
        };
        const auto embedding = [&](int depth, int i) {
          const bool exists = first + i < of_axis.embeddings.end && column + depth < problem.head_dim;
          return exists ? embeddings[(first + i) * term.row_stride + column + depth] : 0.0f;
        };
        product.add<true, true>(shared, query, embedding);
      }
      product.for_each([&](int row, int i, float sum) {
        const int64_t token = tile.tokens.begin + row;
        const int coordinate = of_axis.key_coordinate(terms.small, token, first + i);
        if (coordinate >= 0) target[token * terms.relative.width + terms.relative.first[axis] + coordinate] = sum;
      });
    }
  }
}

// The gradient of the relative logits of a token and an embedding.
__device__ float relative_grad(const OffsetTerms& terms, const AxisOfTokens& axis, const float* grads, int64_t token,
                               int64_t embedding) {
  const int coordinate = axis.key_coordinate(terms.small, token, embedding);
  return coordinate < 0 ? 0.0f : grads[token * terms.relative.width + terms.relative.first[axis.axis] + coordinate];
}

__global__ void __launch_bounds__(FloatProduct::kThreads, FloatProduct::kBlocks)
    relative_grad_query(const __grid_constant__ AttentionBackwardCudaParams p, const float* all_grads,
                        float* grad_query) {
  __shared__ FloatProduct::Shared shared;
  const Problem& problem = p.forward.problem;
  const OffsetTerms& terms = problem.score.by_offset;
  TaskIndex index(blockIdx.x);
  const int64_t first_column = index.take(ceil_div<int64_t>(problem.head_dim, kColumns)) * kColumns;
  const QueryTile tile = query_tile(problem, index);
  const float* grads = all_grads + tile.batch * terms.relative.batch_stride + tile.head * terms.relative.head_stride;
  FloatProduct product;  // (queries,dim)
  for (int axis = 0; axis < kMaxAxes; ++axis) {
    const RelPosTerm& term = terms.rel_pos[axis];
    if (!term.data) continue;
    const AxisOfTokens of_axis(terms.grid, axis, tile.tokens);
    const float* embeddings = embeddings_of(term, tile.head);
    for (int64_t first = of_axis.embeddings.begin; first < of_axis.embeddings.end; first += kDepth) {
      const auto grad = [&](int row, int depth) {
        return relative_grad(terms, of_axis, grads, tile.tokens.begin + row, first + depth);
      };
      const auto embedding = [&](int depth, int column) {
        const bool exists = first + depth < of_axis.embeddings.end && first_column + column < problem.head_dim;
        return exists ? embeddings[(first + depth) * term.row_stride + first_column + column] : 0.0f;
      };
      product.add<true, false>(shared, grad, embedding);
    }
  }
  float* target = grad_query + (tile.batch * problem.heads + tile.head) * terms.grid.num_tokens() * problem.head_dim;
  product.for_each([&](int row, int column, float sum) {
    const int64_t token = tile.tokens.begin + row;
    if (token < tile.tokens.end && first_column + column < problem.head_dim) {
      target[token * problem.head_dim + first_column + column] = sum;
    }
  });
}

// The launch grid for the gradient of the embeddings on one axis: blocks own columns of some embeddings, for a share of
// the queries.
struct EmbeddingWork {
  int64_t embeddings, embedding_tiles, column_tiles, chunks;  // a chunk: kDepth queries of a sequence

  VK_HOST_DEVICE EmbeddingWork(const Problem& p, int axis)
      : embeddings(p.score.by_offset.grid.num_offsets(axis)),
        embedding_tiles(ceil_div<int64_t>(embeddings, kRows)),
        column_tiles(ceil_div<int64_t>(p.head_dim, kColumns)),
        chunks(ceil_div<int64_t>(p.score.by_offset.grid.num_tokens(), kDepth)) {}

  VK_HOST_DEVICE int64_t num_owners(const Problem& p) const { return embedding_tiles * column_tiles * p.heads; }
};

template <class Element>
__global__ void __launch_bounds__(FloatProduct::kThreads, FloatProduct::kBlocks)
    relative_grad_embedding(const __grid_constant__ AttentionBackwardCudaParams p,
                            const __grid_constant__ EmbeddingGradient gradient) {
  __shared__ FloatProduct::Shared shared;
  const Problem& problem = p.forward.problem;
  const OffsetTerms& terms = problem.score.by_offset;
  const EmbeddingWork work(problem, gradient.axis);
  TaskIndex index(blockIdx.x);
  const int64_t first_column = index.take(work.column_tiles) * kColumns;
  const Range embeddings = tile_of(index.take(work.embedding_tiles), kRows, work.embeddings);
  const int64_t head = index.take(problem.heads), part = index.rest();
  const Range own = part_of(work.chunks * problem.batch, part, gradient.sums.count);
  FloatProduct product;  // (embeddings,dim)
  for (int64_t chunk = own.begin; chunk < own.end; ++chunk) {
    const int64_t batch = chunk / work.chunks;
    const Range tokens = tile_of(chunk % work.chunks, kDepth, terms.grid.num_tokens());
    const AxisOfTokens of_axis(terms.grid, gradient.axis, tokens);
    if (intersect(of_axis.embeddings, embeddings).empty()) continue;
    const StridedRows<Element> queries = queries_of<Element>(problem, batch, head);
    const float* grads =
        gradient.relative_grad + batch * terms.relative.batch_stride + head * terms.relative.head_stride;
    const auto grad = [&](int row, int depth) {
      return relative_grad(terms, of_axis, grads, tokens.begin + depth, embeddings.begin + row);
    };
    const auto query = [&](int depth, int column) {
      const bool exists = tokens.begin + depth < tokens.end && first_column + column < problem.head_dim;
      return exists ? float(queries[int(tokens.begin) + depth][first_column + column]) : 0.0f;
    };
    product.add<false, false>(shared, grad, query);
  }
  float* target = gradient.sums.part(part) + head * work.embeddings * problem.head_dim;
  product.for_each([&](int row, int column, float sum) {
    const int64_t embedding = embeddings.begin + row;
    if (embedding < embeddings.end && first_column + column < problem.head_dim) {
      target[embedding * problem.head_dim + first_column + column] = sum;
    }
  });
}

}  // namespace

cudaError_t launch_relative_logits(const AttentionCudaParams& p, float* logits, cudaStream_t stream) {
  return dispatch_element(p.problem.dtype, [&]<class Element>(Element) {
    return launch_tasks(relative_logits<Element>, num_query_tiles(p.problem), FloatProduct::kThreads, 0, stream, p,
                        logits);
  });
}

cudaError_t launch_relative_grad_query(const AttentionBackwardCudaParams& p, const float* grads, float* grad_query,
                                       cudaStream_t stream) {
  const Problem& problem = p.forward.problem;
  const int64_t tasks = num_query_tiles(problem) * ceil_div<int64_t>(problem.head_dim, kColumns);
  return launch_tasks(relative_grad_query, tasks, FloatProduct::kThreads, 0, stream, p, grads, grad_query);
}

int64_t parts_of_embedding(const AttentionBackwardCudaParams& p, int axis) {
  const Problem& problem = p.forward.problem;
  const EmbeddingWork work(problem, axis);
  return parts_for(work.num_owners(problem), work.chunks * problem.batch,
                   work.embeddings * problem.head_dim * problem.heads);
}

cudaError_t launch_relative_grad_embedding(const AttentionBackwardCudaParams& p, const EmbeddingGradient& gradient,
                                           cudaStream_t stream) {
  const Problem& problem = p.forward.problem;
  const int64_t tasks = EmbeddingWork(problem, gradient.axis).num_owners(problem) * gradient.sums.count;
  return dispatch_element(problem.dtype, [&]<class Element>(Element) {
    return launch_tasks(relative_grad_embedding<Element>, tasks, FloatProduct::kThreads, 0, stream, p, gradient);
  });
}

}  // namespace vitkernels
