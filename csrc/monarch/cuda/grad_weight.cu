// The gradients of a Monarch matrix's weights on a GPU: products of columns, summed over the rows.
//
// A thread block has a tile of a block's gradient and a share of the rows; the shares' sums are added in order.

#include "cuda/fast_softmax.h"
#include "cuda/parts.h"
#include "cuda/scheduler.h"
#include "monarch/cuda/operands.h"

namespace vitkernels {
namespace {

using namespace cuda;

constexpr int kSide = 64;  // of a tile

template <class Element>
inline constexpr int kRowsOfStep = 128 / int(sizeof(Element));

// Columns of a tile as operand A or B, sixteen at a time, whose depth runs from row to row.
template <class Element, bool kIsA>
struct ColumnOperand {
  using Tile = SharedTile<Element, kRowsOfStep<Element>, kSide>;
  FragmentAddress<Tile, kIsA ? MatrixOrder::kByColumns : MatrixOrder::kByRows> address;

  __device__ void read(uint32_t (&to)[4], const Element* tile, int sixteen, int step) const {
    load_transposed_matrices(to, address(cute::cast_smem_ptr_to_uint(tile), step, sixteen));
  }
};

template <bool kIsA>
struct ColumnOperand<float, kIsA> {
  using Tile = SharedTile<float, kRowsOfStep<float>, kSide>;

  __device__ void read(uint32_t (&to)[4], const float* tile, int sixteen, int step) const {
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int column = sixteen * 16 + lane_index() / 4 + (kIsA ? i % 2 : i / 2) * 8;
      const int row = step * 8 + lane_index() % 4 + (kIsA ? i / 2 : i % 2) * 4;
      to[i] = __float_as_uint(tile[typename Tile::Layout{}(row, column)]);
    }
  }
};

template <class T>
struct MonarchGradWeightKernel {
  using Element = T;
  using Tile = SharedTile<Element, kRowsOfStep<Element>, kSide>;
  static constexpr int kRows = kRowsOfStep<Element>, kThreads = 128, kStages = 3;
  static constexpr int kVector = kVectorOf<Element>, kVectorsOfRow = kSide / kVector;
  static constexpr int kPasses = kRows * kVectorsOfRow / kThreads, kRowsOfPass = kThreads / kVectorsOfRow;
  static constexpr int kStage = 2 * Tile::kElements, kSharedBytes = kStages * kStage * int(sizeof(Element));

  // The thread's share of the copies of one side's columns.
  struct Stream {
    const Element* next;
    int64_t stride;
    int count;  // of columns, from the thread's first
    bool is_aligned;

    __device__ Stream(const Matrix& matrix, int64_t row, int64_t column, int64_t columns)
        : next(matrix.row<const Element>(row + first_row()) + column + first_column()),
          stride(matrix.row_stride),
          count(int(min(columns, int64_t(kSide))) - first_column()),
          is_aligned(reinterpret_cast<uintptr_t>(matrix.row<const Element>(0) + column) % 16 == 0 &&
                     stride % kVector == 0 && columns % kVector == 0) {}

    static __device__ int first_row() { return int(threadIdx.x) / kVectorsOfRow; }
    static __device__ int first_column() { return int(threadIdx.x) % kVectorsOfRow * kVector; }

    // Of the next step, of which `rows` exist.
    template <bool kIsAligned>
    __device__ __forceinline__ void start(Element* tile, int rows) {
      Element* const to = tile + typename Tile::Layout{}(first_row(), first_column());
      static_assert(kRowsOfPass % 8 == 0);  // the swizzle's period
      constexpr int kPassElements = typename Tile::Layout{}(kRowsOfPass, 0);
      CUTE_UNROLL
      for (int pass = 0; pass < kPasses; ++pass) {
        const bool exists = first_row() + pass * kRowsOfPass < rows;
        const auto from = kIsAligned ? next : computed_here(next);  // one pointer for both
        if constexpr (kIsAligned) {
          copy_16_bytes(to + pass * kPassElements, from, exists && count > 0 ? 16 : 0);
        } else {
          copy_vector(to + pass * kPassElements, from, exists ? count : 0, false);
        }
        next += kRowsOfPass * stride;
      }
    }
  };

  static __device__ __forceinline__ void run(const MonarchGradWeightCudaParams& p, bool allow_tf32, Element* shared) {
    TaskIndex<unsigned> index(block_index());
    const int64_t left = index.take(ceil_div<int64_t>(p.left_columns, kSide)) * kSide;
    const int64_t right = index.take(ceil_div<int64_t>(p.right_columns, kSide)) * kSide;
    const int64_t block = index.take(p.blocks), split = index.rest();
    const Range rows = part_of(ceil_div<int64_t>(p.rows, kRows), split, p.splits);
    const int steps = int(rows.end - rows.begin);
    Stream lefts(p.left, rows.begin * kRows, block * p.left_columns + left, p.left_columns - left);
    Stream rights(p.right, rows.begin * kRows, block * p.right_columns + right, p.right_columns - right);
    int64_t num_rows = p.rows - rows.begin * kRows;  // from the next step on
    int started = 0;
    const auto start = [&] {
      if (started < steps) {
        Element* const stage = shared + started % kStages * kStage;
        const int exist = int(min(num_rows, int64_t(kRows)));
        if (lefts.is_aligned && rights.is_aligned) {
          lefts.template start<true>(stage, exist);
          rights.template start<true>(stage + Tile::kElements, exist);
        } else {
          rarely();
          lefts.template start<false>(stage, exist);
          rights.template start<false>(stage + Tile::kElements, exist);
        }
        num_rows -= kRows, ++started;
      }
      commit_copies();
    };
    CUTE_UNROLL
    for (int i = 0; i < kStages - 1; ++i) start();
    const ColumnOperand<Element, true> a;
    const ColumnOperand<Element, false> b;
    const int warp = int(threadIdx.x) / kWarpSize, first_m = warp % 2 * 2, first_n = warp / 2 * 2;
    MonarchAcc<2, 4> acc;  // (MMA,MMA_M,MMA_N)
    cute::clear(acc);
    with_arithmetic<Element>(allow_tf32, [&](auto arithmetic) __attribute__((always_inline)) {
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        wait_for_copies<kStages - 2>();
        __syncthreads();  // the stage is there, and all reads of the one before are done
        start();
        const Element* const stage = shared + step % kStages * kStage;
        constexpr int kSteps = kRows * int(sizeof(Element)) / 32;
        constexpr int kUnrolled = sizeof(Element) == 2 ? kSteps : 1;
#pragma unroll kUnrolled
        for (int k = 0; k < kSteps; ++k) {
          uint32_t of_left[2][4];
          CUTE_UNROLL
          for (int m = 0; m < 2; ++m) a.read(of_left[m], stage, first_m + m, k);
          const PreparedRows<Element, decltype(arithmetic)> prepared(of_left);
          CUTE_UNROLL
          for (int pair = 0; pair < 2; ++pair) {
            uint32_t of_right[4];
            b.read(of_right, stage + Tile::kElements, first_n + pair, k);
            multiply_pair<Element>(arithmetic, acc, prepared, of_right, pair);
          }
        }
      }
    });
    const int first_row = first_m * 16 + lane_index() / 4, first_column = first_n * 16 + lane_index() % 4 * 2;
    float* const to = p.parts + ((split * p.blocks + block) * p.left_columns + left) * p.right_columns + right;
    CUTE_UNROLL
    for (int r = 0; r < 4; ++r) {
      if (left + first_row + 8 * r >= p.left_columns) continue;
      CUTE_UNROLL
      for (int c = 0; c < 8; ++c) {
        const int column = first_column + c / 2 * 8 + c % 2;
        if (right + column >= p.right_columns) continue;
        to[(first_row + 8 * r) * p.right_columns + column] = acc(r % 2 * 2 + c % 2, r / 2, c / 2);
      }
    }
  }
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads)
    monarch_grad_weight(const __grid_constant__ MonarchGradWeightCudaParams p, bool allow_tf32) {
  extern __shared__ __align__(128) unsigned char shared[];
  Kernel::run(p, allow_tf32, reinterpret_cast<typename Kernel::Element*>(shared));
}

int64_t tiles_of(const MonarchGradWeightCudaParams& p) {
  return p.blocks * ceil_div<int64_t>(p.left_columns, kSide) * ceil_div<int64_t>(p.right_columns, kSide);
}

}  // namespace

template <DType kDType>
int64_t MonarchLaunches<kDType>::grad_weight_splits(const MonarchGradWeightCudaParams& p) {
  constexpr int64_t kMinRows = 256;  // fewer would not pay for the sums
  return parts_for(tiles_of(p), ceil_div(p.rows, kMinRows), p.num_elements());
}

template <DType kDType>
cudaError_t MonarchLaunches<kDType>::grad_weight(const MonarchGradWeightCudaParams& p, bool allow_tf32,
                                                 cudaStream_t stream) {
  using Kernel = MonarchGradWeightKernel<MonarchElement<kDType>>;
  return launch_tasks(monarch_grad_weight<Kernel>, tiles_of(p) * p.splits, Kernel::kThreads, Kernel::kSharedBytes,
                      stream, p, allow_tf32);
}

template int64_t MonarchLaunches<DType::VK_DTYPE>::grad_weight_splits(const MonarchGradWeightCudaParams&);
template cudaError_t MonarchLaunches<DType::VK_DTYPE>::grad_weight(const MonarchGradWeightCudaParams&, bool,
                                                                   cudaStream_t);

}  // namespace vitkernels
