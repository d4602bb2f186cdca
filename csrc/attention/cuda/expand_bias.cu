// The additive terms of a score as one dense bias, for the fast paths (forward_path.h).

#include "attention/cuda/launches.h"
#include "attention/cuda/score.h"

namespace vitkernels {
namespace {

using namespace cuda;
using namespace cute;

// A block takes a tile of one head's logits, a thread some rows and columns of it. Neighbouring lanes write
// neighbouring columns.
struct ExpandKernel {
  static constexpr int kWarps = 4, kThreads = kWarps * kWarpSize, kRowsOfThread = 4, kColumnsOfThread = 4;
  static constexpr int kQueries = kWarps * kRowsOfThread, kKeys = kWarpSize * kColumnsOfThread;

  struct Coordinates {
    int first_row = int(threadIdx.x) / kWarpSize * kRowsOfThread, first_column = lane_index();

    __device__ auto operator()(int r, int c) const { return make_coord(first_row + r, first_column + c * kWarpSize); }
  };

  static VK_HOST_DEVICE int64_t tiles(int64_t tokens, int size) { return (tokens + size - 1) / size; }

  static __device__ void run(const Problem& problem, const DenseBias& to) {
    TaskIndex index(blockIdx.x);
    const int64_t key_tile = index.take(tiles(problem.num_keys(), kKeys));
    const int64_t query_tile = index.take(tiles(problem.num_queries(), kQueries));
    const int64_t head = index.take(to.heads), batch = index.rest();
    const LogitTile at{batch, head, tile_of(query_tile, kQueries, problem.num_queries()),
                       tile_of(key_tile, kKeys, problem.num_keys())};
    Tensor tile = make_tensor<float>(Shape<Int<kRowsOfThread>, Int<kColumnsOfThread>>{});  // (rows,columns)
    const Coordinates coordinates;
    clear(tile);
    add_terms(tile, coordinates, problem.score, at);

    const ScoreStrides strides = to.strides(problem);
    CUTE_UNROLL
    for (int r = 0; r < kRowsOfThread; ++r) {
      const int64_t query = at.queries.begin + get<0>(coordinates(r, 0));
      CUTE_UNROLL
      for (int c = 0; c < kColumnsOfThread; ++c) {
        const int64_t key = at.keys.begin + get<1>(coordinates(0, c));
        if (query < at.queries.end && key < at.keys.end) {
          to.data[batch * strides.batch + head * strides.head + query * strides.query + key] = tile(r, c);
        }
      }
    }
  }
};

__global__ void __launch_bounds__(ExpandKernel::kThreads)
    expand_bias(const __grid_constant__ Problem problem, const __grid_constant__ DenseBias to) {
  ExpandKernel::run(problem, to);
}

}  // namespace

cudaError_t launch_expand_bias(const Problem& problem, const DenseBias& to, cudaStream_t stream) {
  const int64_t tiles = ExpandKernel::tiles(problem.num_keys(), ExpandKernel::kKeys) *
                        ExpandKernel::tiles(problem.num_queries(), ExpandKernel::kQueries);
  return launch_tasks(expand_bias, tiles * to.heads * to.batch, ExpandKernel::kThreads, 0, stream, problem, to);
}

}  // namespace vitkernels
