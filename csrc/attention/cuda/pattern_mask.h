// Which keys a query sees, as a product of matrices: what it adds to a logit is zero, or a large negative number.
//
// A pattern is a product over axes, and a tile has few coordinates on each. A token that the block owns has a one in the
// columns of its coordinates; a token that passes by has kMask in the columns of those that it has nothing to do with.
// The first column is one for all owned tokens, and kMask for tokens that do not exist. So a step of sixteen columns
// costs a matrix instruction for 128 logits, where comparisons would cost several for each of a thread.
#pragma once

#include "attention/cuda/spatial_tile.h"
#include "cuda/fragments.h"
#include "cuda/masked_softmax.h"
#include "cuda/mma.h"

namespace vitkernels::cuda {

template <int kOwned, int kStreamed, int kWarps>
struct PatternMask {
  using Element = cutlass::bfloat16_t;  // whatever the elements of queries and keys are
  static constexpr int kColumns = MaskColumns::kMost, kVectors = kColumns / 8, kBuffers = 2;
  static constexpr unsigned short kOne = 0x3f80, kMaskBits = 0xfe00;  // 1, kMask
  using Owned = SharedTile<Element, kOwned, kColumns>;
  using Streamed = SharedTile<Element, kStreamed, kColumns>;

  struct Shared {
    Element owned[Owned::kElements];
    Element streamed[kBuffers][Streamed::kElements];
    uint4 table[MaskColumns::kMostRows][kVectors];  // a row for each coordinate of passing tokens
    int2 seen[kColumns];                            // the coordinates that those of a column have to do with
  };

  Shared& shared;
  const MaskColumns& columns;

  // The row of an owned token.
  __device__ void set_owned(int row, const int (&at)[kMaxAxes], bool exists) const {
    cute::Tensor sO = cute::make_tensor(cute::make_smem_ptr(reinterpret_cast<unsigned short*>(shared.owned)),
                                        typename Owned::Layout{});  // (owned,columns)
    CUTE_UNROLL
    for (int c = 0; c < kColumns; c += 8) *reinterpret_cast<uint4*>(&sO(row, c)) = uint4{};
    sO(row, 0) = kOne;
    CUTE_UNROLL
    for (int a = 0; a < kMaxAxes; ++a) {
      if (exists && columns.count[a] > 0) sO(row, columns.first[a] + at[a]) = kOne;
    }
  }

  // Fills the table, from a barrier to a barrier. `seen(axis, coordinate)` gives a range of the box.
  template <class Seen>
  __device__ void set_table(Seen&& seen) const {
    const auto axis_of_column = [&](int column) {
      int axis = -1;
      CUTE_UNROLL
      for (int a = 0; a < kMaxAxes; ++a) {
        if (column >= columns.first[a] && column < columns.first[a] + columns.count[a]) axis = a;
      }
      return axis;
    };
    const int column = int(threadIdx.x) % kColumns, axis = axis_of_column(column);
    if (threadIdx.x < kColumns) {
      int2 range{};
      CUTE_UNROLL
      for (int a = 0; a < kMaxAxes; ++a) {
        if (a == axis) range = seen(a, column - columns.first[a]);
      }
      shared.seen[column] = range;
    }
    __syncthreads();
    const int2 range = shared.seen[column];
    auto* const table = reinterpret_cast<unsigned short*>(shared.table);
    int first_row = 0, rows = 0;
    CUTE_UNROLL
    for (int a = 0; a < kMaxAxes; ++a) {
      if (a == axis) first_row = columns.first_row[a], rows = columns.rows[a];
    }
    for (int row = int(threadIdx.x) / kColumns; row < columns.num_rows; row += int(blockDim.x) / kColumns) {
      const int coordinate = row - first_row;
      const bool is_of_axis = coordinate >= 0 && coordinate < rows;
      const bool is_seen = coordinate >= range.x && coordinate < range.y;
      table[row * kColumns + column] = is_of_axis && !is_seen ? kMaskBits : 0;
    }
    __syncthreads();
  }

  // Half of the row of a passing token.
  __device__ void set_streamed(int buffer, int row, int half, const int (&at)[kMaxAxes], bool exists) const {
    cute::Tensor sS = cute::make_tensor(cute::make_smem_ptr(shared.streamed[buffer]),
                                        typename Streamed::Layout{});  // (streamed,columns)
    CUTE_UNROLL
    for (int v = 0; v < kVectors / 2; ++v) {
      uint4 sum{};
      CUTE_UNROLL
      for (int a = 0; a < kMaxAxes; ++a) {
        const int entry = columns.count[a] > 0 ? columns.first_row[a] + min(at[a], columns.rows[a] - 1) : 0;
        const uint4 of_axis = shared.table[entry][half * (kVectors / 2) + v];
        sum.x |= of_axis.x, sum.y |= of_axis.y, sum.z |= of_axis.z, sum.w |= of_axis.w;
      }
      if (v == 0) sum.x |= half == 0 && !exists ? kMaskBits : 0;
      *reinterpret_cast<uint4*>(&sS(row, (half * (kVectors / 2) + v) * 8)) = sum;
    }
  }

  // Adds to logits (owned,streamed).
  template <class Logits>
  __device__ __forceinline__ void add(Logits& logits, int buffer) const {
    const TileMma<Element, kWarps> mma(false);
    multiply_first_columns(mma, logits, shared_tile<Owned>(shared.owned),
                           shared_tile<Streamed>(shared.streamed[buffer]), columns.num_columns);
  }
};

}  // namespace vitkernels::cuda
