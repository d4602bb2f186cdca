// The state of linear attention on a GPU: the sum of phi(k)^T v over the keys, and that of phi(k).
//
// A block sums a share of the keys of a (batch, kv head) pair; the sums of the blocks are added in order.

#include "linear_attention/cuda/state_tile.h"

namespace vitkernels {
namespace {

using namespace cuda;

template <class T, int kDim>
struct LinearStateKernel : LinearTile<T, kDim, kRowTilesOfForward<T, kDim>> {
  using Tile = LinearTile<T, kDim, kRowTilesOfForward<T, kDim>>;
  using Element = T;
  using typename Tile::Features, typename Tile::Tokens, typename Tile::Vectors;
  static constexpr int kSharedBytes = 2 * Tokens::kElements * int(sizeof(Element));
  static constexpr int kMinBlocks = kDim * sizeof(Element) <= 64 ? 3 : 2;
  // Of float, and with 128 columns, the sums leave no registers for the tile to come.
  static constexpr bool kPrefetches = sizeof(Element) == 2 && kDim <= 64;

  static __device__ void run(const LinearStateParams& params, bool allow_tf32, Element* shared) {
    const LinearProblem& p = params.problem;
    const LinearTask task(int(params.splits), p.kv_heads, Tile::kTokens, [&](int batch) { return p.keys(batch); });
    const HeadRows keys = Tile::rows_of(p.key, task.batch, task.head, p.head_dim, task.first_token);
    const HeadRows values = Tile::rows_of(p.value, task.batch, task.head, p.value_dim, task.first_token);
    Element* const shared_keys = shared;
    Element* const shared_values = shared + Tokens::kElements;
    const Features features(p, Tile::column());
    StateSums<Tile> sums;
    using Ones = ColumnOperand<Element, Tile::kTokens, One>;
    const std::conditional_t<kPrefetches, HeldColumn<Element, Tile::kTokens>, Ones> ones(Ones{});
    Vectors k, v;
    int first = task.first_tile * Tile::kTokens, count = task.count - first;
    const int end = task.end_tile * Tile::kTokens;
    if (kPrefetches && first < end) k.load(keys, first, count), v.load(values, first, count);
    while (first < end) {
      __syncthreads();  // all reads of the tile before are done
      if constexpr (kPrefetches) {
        k.apply(features);
        k.clear_behind(count);
        k.store_shared(shared_keys);
        v.store_shared(shared_values);
      } else {
        Tile::copy(keys, first, count, shared_keys, [&](uint4 x) { return Vectors::mapped(x, features); });
        Tile::copy(values, first, count, shared_values, [](uint4 x) { return x; });
      }
      __syncthreads();
      first += Tile::kTokens, count -= Tile::kTokens;
      if (kPrefetches && first < end) k.load(keys, first, count), v.load(values, first, count);
      sums.add(shared_keys, shared_values, allow_tf32);
      sums.add_features(shared_keys, ones, allow_tf32);
    }
    sums.store(p, params.parts, task);
  }
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    linear_state(const __grid_constant__ LinearStateParams p, bool allow_tf32) {
  extern __shared__ __align__(128) unsigned char shared[];
  Kernel::run(p, allow_tf32, reinterpret_cast<typename Kernel::Element*>(shared));
}

}  // namespace

template <DType kDType>
cudaError_t LinearLaunches<kDType>::state(const LinearStateParams& p, bool allow_tf32, cudaStream_t stream) {
  return dispatch_linear_dim<kDType>(p.problem, [&]<int kDim>(cute::Int<kDim>) {
    using Kernel = LinearStateKernel<LinearElement<kDType>, kDim>;
    return launch_tasks(linear_state<Kernel>, p.problem.batch * p.problem.kv_heads * p.splits, Kernel::kThreads,
                        Kernel::kSharedBytes, stream, p, allow_tf32);
  });
}

template cudaError_t LinearLaunches<DType::VK_DTYPE>::state(const LinearStateParams&, bool, cudaStream_t);

}  // namespace vitkernels
