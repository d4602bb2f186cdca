// The end of a forward kernel: from accumulators and softmax statistics to the results in memory.
#pragma once

#include "attention/cuda/params.h"
#include "cuda/epilogue.h"
#include "cuda/online_softmax.h"

namespace vitkernels::cuda {

// Where the results of a query tile go.
struct ForwardResult {
  int64_t batch, head, split;
  int64_t first_row, first_token;  // among the rows of the statistics, and in `out`
  int64_t first_column;
  int rows, columns;
};

template <class Softmax>
__device__ void store_statistics(const AttentionCudaParams& p, int64_t split, int64_t row, int64_t head, float max,
                                 float sum) {
  const int64_t i = (split * p.num_rows() + row) * p.problem.heads + head;
  if (p.splits == 1) {
    p.lse[i] = Softmax::lse_of(max, sum);
  } else {
    p.split_max[i] = max, p.split_sum[i] = sum;
  }
}

// Accumulators become out = out / sum. `coordinates` gives the (row,column) of each in the tile. Calls
// store(row, max, sum) for all rows, each lane of a quad for one of its rows.
template <class Rows, class Coordinates, class Softmax, class Store>
__device__ __forceinline__ void finish_rows(Rows& out_rows, const Coordinates& coordinates, const Softmax& softmax,
                                            Store&& store) {
  constexpr int kRows = decltype(cute::size<0>(out_rows))::value;
  static_assert(kRows <= 4);
  CUTE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const float factor = Softmax::factor_of(softmax.sum[r]);
    CUTE_UNROLL
    for (int c = 0; c < cute::size<1>(out_rows); ++c) out_rows(r, c) *= factor;
  }
  const int lane = cute::get<1>(coordinates(0, 0)) / 2;
  int row = cute::get<0>(coordinates(0, 0));
  float max = softmax.max[0], sum = softmax.sum[0];
  CUTE_UNROLL
  for (int r = 1; r < kRows; ++r) {
    if (lane == r) row = cute::get<0>(coordinates(r, 0)), max = softmax.max[r], sum = softmax.sum[r];
  }
  if (lane < kRows) store(row, max, sum);
}

// The results of a block. They leave through the shared memory of the queries, `sO`.
template <int kThreads, class Mma, class Out, class Softmax, class Shared>
__device__ void store_forward(const AttentionCudaParams& p, const ForwardResult& to, const Mma& mma, Out& out,
                              const Softmax& softmax, Shared& sO) {
  const auto thread = mma.get_slice(threadIdx.x);
  cute::Tensor out_rows = by_rows(out);  // (rows,columns)
  cute::Tensor cO = by_rows(
      thread.partition_C(cute::make_identity_tensor(cute::product_each(shape(sO)))));  // (rows,columns) -> (row,column)
  finish_rows(out_rows, cO, softmax, [&](int row, float max, float sum) {
    if (row >= to.rows || to.first_column != 0) return;
    store_statistics<Softmax>(p, to.split, to.first_row + row, to.head, max, sum);
  });
  if (p.splits > 1) {
    const int64_t first = (to.split * p.num_rows() + to.first_row) * p.problem.heads + to.head;
    const int64_t dim = p.problem.value_dim;
    store_acc(out_rows, cO, p.split_out + first * dim + to.first_column, p.problem.heads * dim, to.rows, to.columns);
    return;
  }
  using Element = typename Shared::value_type;
  store_tile<kThreads>(mma, out, sO, p.out.at<Element>(to.batch, to.first_token, to.head) + to.first_column,
                       p.out.token_stride, to.rows, to.columns, p.out.is_aligned);
}

// Consecutive tiles of kRows x kColumns results of a warp on their way from shared memory, from the last tile to the
// first: a running pointer. Rows are aligned.
template <class Element, int kRows, int kColumns>
class ResultStream {
  static constexpr int kVector = 16 / sizeof(Element), kThreadsOfRow = kColumns / kVector;
  static constexpr int kRowsOfStep = kWarpSize / kThreadsOfRow, kSteps = kRows / kRowsOfStep;
  static_assert(kRows % kRowsOfStep == 0);

 public:
  // `rows` is the first of the last tile. `columns` exist.
  __device__ ResultStream(Element* rows, int64_t stride, int columns)
      : next_(rows + row() * stride + column()), first_row_(column() < columns ? row() : kRows) {}

  // Stores the next tile, of which `rows` exist.
  template <class Shared>
  __device__ void store(const Shared& sO, int64_t stride, int rows) {
    const int left = rows - first_row_;
    CUTE_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      const uint4 vector = *reinterpret_cast<const uint4*>(&sO(row() + step * kRowsOfStep, column()));
      if (step * kRowsOfStep < left)
        *reinterpret_cast<uint4*>(next_ + uint64_t(step * kRowsOfStep) * unsigned(stride)) = vector;
    }
    next_ -= uint64_t(kRows) * unsigned(stride);
  }

 private:
  static __device__ int row() { return lane_index() / kThreadsOfRow; }
  static __device__ int column() { return lane_index() % kThreadsOfRow * kVector; }

  Element* next_;  // this thread's first vector of the next tile
  int first_row_;  // this thread's, kRows if its column does not exist
};

}  // namespace vitkernels::cuda
