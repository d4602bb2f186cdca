// Copies of tiles from global to shared memory: asynchronous, 16 bytes a thread and step.
#pragma once

#include <cute/tensor.hpp>

#include "cuda/launch.h"
#include "cuda/rows.h"

namespace vitkernels::cuda {

// A swizzled tile in shared memory. Chunks of 16 bytes are permuted within groups of eight rows, so that these are free
// of bank conflicts: the copy into it, reads of eight rows of a column of chunks (ldmatrix), and of four rows of two
// (float).
template <class Element, int kRows, int kColumns>
struct SharedTile {
  static constexpr int kChunk = 16 / sizeof(Element), kLogChunk = kChunk == 8 ? 3 : 2;
  static constexpr int kLogChunks = kColumns % (8 * kChunk) == 0 ? 3 : 2, kSpan = kChunk << kLogChunks;
  static_assert(kColumns % kSpan == 0 && kRows % 8 == 0);
  using Rows8 = cute::Layout<cute::Shape<cute::_8, cute::Int<kSpan>>, cute::Stride<cute::Int<kSpan>, cute::_1>>;
  using Swizzled = decltype(cute::composition(cute::Swizzle<kLogChunks, kLogChunk, 3>{}, Rows8{}));
  using Layout = decltype(cute::tile_to_shape(Swizzled{},
                                              cute::Shape<cute::Int<kRows>, cute::Int<kColumns>>{}));  // (rows,columns)
  static constexpr int kElements = kRows * kColumns;
};

template <class Tile, class Element>
__device__ auto shared_tile(Element* data) {
  return cute::make_tensor(cute::make_smem_ptr(data), typename Tile::Layout{});  // (rows,columns)
}

// How kThreads threads copy rows of kColumns elements.
template <class Element, int kThreads, int kColumns>
struct TileCopy {
  static constexpr int kVector = 16 / sizeof(Element);
  static constexpr int kThreadsOfRow = kColumns / kVector;
  using Atom = cute::Copy_Atom<cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>, Element>;
  using Threads = cute::Layout<cute::Shape<cute::Int<kThreads / kThreadsOfRow>, cute::Int<kThreadsOfRow>>,
                               cute::Stride<cute::Int<kThreadsOfRow>, cute::_1>>;
  using Values = cute::Layout<cute::Shape<cute::_1, cute::Int<kVector>>>;
  using Copy = decltype(cute::make_tiled_copy(Atom{}, Threads{}, Values{}));
};

// Starts copying num_rows x num_columns elements to `sT`, whose others become zero. `num_columns` is a multiple of the
// vector, and rows begin at multiples of 16 bytes.
template <class Copy, class Rows, class Shared>
__device__ void copy_tile_async(const Copy& copy, const Rows& rows, const Shared& sT, int num_rows, int num_columns) {
  const auto thread = copy.get_slice(threadIdx.x);
  cute::Tensor cT = cute::make_identity_tensor(cute::product_each(cute::shape(sT)));  // (rows,columns) -> (row,column)
  cute::Tensor tsT = thread.partition_D(sT);                                          // (CPY,CPY_M,CPY_K)
  cute::Tensor tcT = thread.partition_S(cT);                                          // (CPY,CPY_M,CPY_K)
  const int first_row = cute::get<0>(tcT(0, 0, 0));
  const Rows thread_rows = rows.from(first_row);
  CUTE_UNROLL
  for (int m = 0; m < cute::size<1>(tsT); ++m) {
    const int row = cute::get<0>(tcT(0, m, 0));
    const auto* data = thread_rows[row - first_row];
    CUTE_UNROLL
    for (int k = 0; k < cute::size<2>(tsT); ++k) {
      const int column = cute::get<1>(tcT(0, m, k));
      const auto gV = cute::make_tensor(cute::make_gmem_ptr(data + column), cute::make_layout(cute::size<0>(tsT)));
      cute::copy(copy.with(row < num_rows && column < num_columns), gV, tsT(cute::_, m, k));  // (CPY)
    }
  }
}

// The same with loads of single elements, for rows of any alignment.
template <class Copy, class Rows, class Shared>
__device__ void copy_tile_by_elements(const Copy& copy, const Rows& rows, const Shared& sT, int num_rows,
                                      int num_columns) {
  using Element = typename Shared::value_type;
  const auto thread = copy.get_slice(threadIdx.x);
  cute::Tensor cT = cute::make_identity_tensor(cute::product_each(cute::shape(sT)));  // (rows,columns) -> (row,column)
  cute::Tensor tcT = thread.partition_S(cT);                                          // (CPY,CPY_M,CPY_K)
  for (int i = 0; i < cute::size(tcT); ++i) {
    const int row = cute::get<0>(tcT(i)), column = cute::get<1>(tcT(i));
    sT(row, column) = row < num_rows && column < num_columns ? rows[row][column] : Element(0);
  }
}

template <class Copy, class Rows, class Shared>
__device__ void copy_tile(const Copy& copy, const Rows& rows, const Shared& sT, int num_rows, int num_columns) {
  if (rows.is_aligned) {
    copy_tile_async(copy, rows, sT, num_rows, num_columns);
  } else {
    copy_tile_by_elements(copy, rows, sT, num_rows, num_columns);
  }
}

// Of 16 bytes, the first `bytes` are read, the others become zero.
template <class Element>
__device__ void copy_16_bytes(const Element* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(cute::cast_smem_ptr_to_uint(shared)), "l"(global),
               "r"(bytes)
               : "memory");
}

// Waits for all but the last `kLater` committed groups; a barrier then makes the data visible to the other threads.
template <int kLater>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLater) : "memory");  // CuTe commits a group of its own to wait for all
}
__device__ inline void commit_copies() { cute::cp_async_fence(); }

}  // namespace vitkernels::cuda
