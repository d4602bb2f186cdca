// Sums over the rows and over parts, in a fixed order, and outputs' gradients shared out between the blocks.

#include "cuda/parts.h"
#include "cuda/scheduler.h"
#include "cuda/vector.h"
#include "monarch/cuda/operands.h"

namespace vitkernels {
namespace {

using namespace cuda;

constexpr int kThreads = 256, kSummedRows = 128;

// Columns of a block of the weight that a thread block takes, of all blocks: about one a thread.
int64_t columns_of_tile(int64_t blocks) { return std::max<int64_t>(kThreads / blocks, 1); }

template <class Element>
__global__ void __launch_bounds__(kThreads)
    monarch_columns(const __grid_constant__ MonarchColumnsCudaParams p, int columns_of_tile) {
  TaskIndex<unsigned> index(block_index());
  const Range columns = tile_of(index.take(ceil_div<int64_t>(p.columns, columns_of_tile)), columns_of_tile, p.columns);
  const int64_t split = index.rest();
  const Range tiles = part_of(ceil_div<int64_t>(p.rows, kSummedRows), split, p.splits);
  for (int64_t i = threadIdx.x; i < p.blocks * columns_of_tile; i += kThreads) {
    // Neighbouring threads read neighbours.
    const int64_t block = p.is_interleaved ? i % p.blocks : i / columns_of_tile;
    const int64_t column = columns.begin + (p.is_interleaved ? i / p.blocks : i % columns_of_tile);
    if (column >= columns.end) continue;
    const int64_t in_turn = column * p.blocks + block, behind = block * p.columns + column;
    const int64_t from = p.is_interleaved ? in_turn : behind;
    float total = 0.0f;
    for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
      const Range rows = tile_of(tile, kSummedRows, p.rows);
      float sum = 0.0f;  // of few numbers: a long sum loses bits
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        const Element x = p.in.row<const Element>(row)[from];
        if (p.out.data) p.out.row<Element>(row)[behind] = x;
        sum += float(x);
      }
      total += sum;
    }
    if (p.parts) p.parts[split * p.blocks * p.columns + in_turn] = total;
  }
}

template <class Element>
__global__ void __launch_bounds__(kThreads) monarch_sum(const __grid_constant__ MonarchSumCudaParams p) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.elements) return;
  double sum = 0.0;
  for (int64_t split = 0; split < p.splits; ++split) sum += double(p.parts[split * p.elements + i]);
  static_cast<Element*>(p.out)[i] = Element(float(sum));
}

}  // namespace

template <DType kDType>
int64_t MonarchLaunches<kDType>::column_splits(const MonarchColumnsCudaParams& p) {
  return parts_for(ceil_div(p.columns, columns_of_tile(p.blocks)), ceil_div<int64_t>(p.rows, kSummedRows),
                   p.blocks * p.columns);
}

template <DType kDType>
cudaError_t MonarchLaunches<kDType>::columns(const MonarchColumnsCudaParams& p, cudaStream_t stream) {
  const int64_t of_tile = columns_of_tile(p.blocks);
  return launch_tasks(monarch_columns<MonarchElement<kDType>>, ceil_div(p.columns, of_tile) * p.splits, kThreads, 0,
                      stream, p, int(of_tile));
}

template <DType kDType>
cudaError_t MonarchLaunches<kDType>::sum(const MonarchSumCudaParams& p, cudaStream_t stream) {
  return launch_tasks(monarch_sum<MonarchElement<kDType>>, ceil_div<int64_t>(p.elements, kThreads), kThreads, 0, stream,
                      p);
}

template int64_t MonarchLaunches<DType::VK_DTYPE>::column_splits(const MonarchColumnsCudaParams&);
template cudaError_t MonarchLaunches<DType::VK_DTYPE>::columns(const MonarchColumnsCudaParams&, cudaStream_t);
template cudaError_t MonarchLaunches<DType::VK_DTYPE>::sum(const MonarchSumCudaParams&, cudaStream_t);

}  // namespace vitkernels
