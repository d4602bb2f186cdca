// c = a b^T with the tiles of the CUDA library: a (m, k), b (n, k), c (m, n); and the same kernel with one mistake.

#include "cuda/copy.h"
#include "cuda/mma.h"

namespace vitkernels::cuda {
namespace {

using namespace cute;

using Element = cutlass::bfloat16_t;

enum Mistake {
  kNone,
  kNoBarrier,         // before the tile is read
  kNoSecondBarrier,   // before the tile is overwritten
  kNoWait,            // for the copy
  kRowTooMany,        // in the check of the rows of b
  kCopiedByHalf,      // of the threads
  kDivergentBarrier,  // taken by every second thread
  kStoreUnchecked,
  kMisaligned,  // a begins an element late
  kNumMistakes
};

constexpr int kWarps = 4, kThreads = kWarps * kWarpSize, kTile = 64, kStages = 2;

template <Mistake kMistake>
__global__ void __launch_bounds__(kThreads) matmul(const Element* a, const Element* b, float* c, int m, int n, int k) {
  using Shared = SharedTile<Element, kTile, kTile>;
  __shared__ alignas(128) Element smem_a[kStages * Shared::kElements];
  __shared__ alignas(128) Element smem_b[kStages * Shared::kElements];

  const auto tile = Shape<Int<kTile>, Int<kTile>>{};
  Tensor mC = make_tensor(make_gmem_ptr(c), make_shape(m, n), make_stride(n, _1{}));  // (M,N)
  Tensor gC = local_tile(mC, tile, make_coord(blockIdx.x, blockIdx.y));               // (TILE,TILE)
  const int rows = m - blockIdx.x * kTile, columns = n - blockIdx.y * kTile;

  const typename TileCopy<Element, kThreads, kTile>::Copy copy;
  const TileMma<Element, kWarps> mma(false);
  const auto shared_tile = [&](Element* smem, int stage) {
    return make_tensor(make_smem_ptr(smem + stage * Shared::kElements), typename Shared::Layout{});  // (TILE,TILE)
  };
  const auto rows_of = [&](const Element* matrix, int block, int step) {
    return StridedRows<Element>{matrix + int64_t(block) * kTile * k + step * kTile, k, true};
  };
  const auto start_copy = [&](int step) {
    const int depth = k - step * kTile;
    if (kMistake != kCopiedByHalf || threadIdx.x < kThreads / 2) {
      copy_tile_async(copy, rows_of(a + (kMistake == kMisaligned), blockIdx.x, step),
                      shared_tile(smem_a, step % kStages), rows, depth);
    }
    copy_tile_async(copy, rows_of(b, blockIdx.y, step), shared_tile(smem_b, step % kStages),
                    columns + (kMistake == kRowTooMany), depth);
    commit_copies();
  };

  Tensor sums = partition_fragment_C(mma, tile);  // (MMA,MMA_M,MMA_N)
  clear(sums);
  const int steps = ceil_div(k, kTile);
  start_copy(0);
  for (int step = 0; step < steps; ++step) {
    step + 1 < steps ? start_copy(step + 1) : commit_copies();
    if constexpr (kMistake != kNoWait) wait_for_copies<1>();
    if constexpr (kMistake == kDivergentBarrier) {
      if (threadIdx.x % 2 == 0) __syncthreads();
    } else if constexpr (kMistake != kNoBarrier) {
      __syncthreads();
    }
    multiply_tile(mma, sums, shared_tile(smem_a, step % kStages), shared_tile(smem_b, step % kStages), kTile);
    if constexpr (kMistake != kNoSecondBarrier) __syncthreads();
  }

  const auto thread = mma.get_slice(threadIdx.x);
  Tensor tCgC = thread.partition_C(gC);                               // (MMA,MMA_M,MMA_N)
  Tensor tCcC = thread.partition_C(make_identity_tensor(shape(gC)));  // (MMA,MMA_M,MMA_N) -> (row,column)
  CUTE_UNROLL
  for (int i = 0; i < size(sums); ++i) {
    const bool exists = get<0>(tCcC(i)) < rows && get<1>(tCcC(i)) < columns;
    if (kMistake == kStoreUnchecked || exists) tCgC(i) = sums(i);
  }
}

using Kernel = void (*)(const Element*, const Element*, float*, int, int, int);

template <int... kMistakes>
Kernel kernel_with(int mistake, std::integer_sequence<int, kMistakes...>) {
  const Kernel kernels[] = {matmul<Mistake(kMistakes)>...};
  return kernels[mistake];
}

}  // namespace
}  // namespace vitkernels::cuda

using namespace vitkernels::cuda;

extern "C" int matmul(const void* a, const void* b, float* c, int m, int n, int k, int mistake) {
  const auto kernel = kernel_with(mistake, std::make_integer_sequence<int, kNumMistakes>{});
  const dim3 grid(ceil_div(m, kTile), ceil_div(n, kTile));
  kernel<<<grid, kThreads>>>(static_cast<const Element*>(a), static_cast<const Element*>(b), c, m, n, k);
  return cudaGetLastError();
}
