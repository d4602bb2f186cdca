// What the backward kernels need of each query: delta = dO.O - dlse, and for the fast paths its statistics (params.h).

#include "attention/cuda/launches.h"
#include "attention/cuda/tokens.h"
#include "common/divisor.h"
#include "cuda/fast_softmax.h"

namespace vitkernels {
namespace {

using namespace cuda;

// Eight lanes take a row, with loads of 16 bytes. A block takes some rows of a batch, in the order of the tensors.
template <class Element>
struct DeltaKernel {
  static constexpr int kThreads = 128, kLanes = 8, kRowsOfStep = kThreads / kLanes, kSteps = 4;
  static constexpr int kRowsOfBlock = kRowsOfStep * kSteps, kVector = 16 / sizeof(Element);
  using Vector = cutlass::AlignedArray<Element, kVector>;

  // Those of some queries, or where statistics are written of whole tiles. Rows are counted in 32 bits.
  struct Rows {
    int64_t first_query;
    int heads, count, blocks;
    Divisor by_heads{heads}, by_blocks{blocks};
  };

  static __device__ void run(const AttentionBackwardCudaParams& p, const Rows& rows) {
    const int batch = rows.by_blocks.divide(int(blockIdx.x));
    const int first = (int(blockIdx.x) - batch * rows.blocks) * kRowsOfBlock + int(threadIdx.x) / kLanes;
    CUTE_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      const int row = first + step * kRowsOfStep, number = rows.by_heads.divide(min(row, rows.count - 1));
      const int head = min(row, rows.count - 1) - number * rows.heads;
      const int64_t query = rows.first_query + number;
      const bool exists = row < rows.count && query < queries(p.forward);
      const float delta = exists ? dot(p, batch, query, head) : 0.0f;
      const float sum = sum_of_lanes(delta);
      if (row < rows.count && int(threadIdx.x) % kLanes == 0) store(p, batch, query, head, exists, sum);
    }
  }

  static VK_HOST_DEVICE int64_t queries(const AttentionCudaParams& f) {
    return f.packing ? f.packing.num_queries : f.problem.num_queries();
  }

  // This lane's share of dO.O.
  static __device__ float dot(const AttentionBackwardCudaParams& p, int batch, int64_t query, int head) {
    const TokenTensor &out = p.forward.out, &grad = p.query_value;
    const Element* const o = out.at<const Element>(batch, query, head);
    const Element* const d = grad.at<const Element>(batch, query, head);
    const int columns = int(p.forward.problem.value_dim), lane = int(threadIdx.x) % kLanes;
    float sum = 0.0f;
    if (out.is_aligned && grad.is_aligned) {
      for (int c = lane * kVector; c < columns; c += kLanes * kVector) {
        const Vector x = *reinterpret_cast<const Vector*>(o + c), y = *reinterpret_cast<const Vector*>(d + c);
        CUTE_UNROLL
        for (int i = 0; i < kVector; ++i) sum = fmaf(float(x[i]), float(y[i]), sum);
      }
    } else {
      for (int c = lane; c < columns; c += kLanes) sum = fmaf(float(o[c]), float(d[c]), sum);
    }
    return sum;
  }

  static __device__ float sum_of_lanes(float x) {
    CUTE_UNROLL
    for (int distance = kLanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
    return x;
  }

  static __device__ void store(const AttentionBackwardCudaParams& p, int batch, int64_t query, int head, bool exists,
                               float delta) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    const Problem& problem = p.forward.problem;
    const int64_t row = (batch * queries(p.forward) + query) * problem.heads + head;
    if (exists) {
      if (p.grad_lse) delta -= p.grad_lse[row];
      p.delta[row] = delta;
    }
    if (p.statistics.data) {
      float lse = exists ? p.forward.lse[row] : -kInfinity;
      StatisticsOfPair& pair = p.statistics.pair(QueryStatistics::index(problem, batch, head, int(query)));
      const int i = int(query) % 2;
      if (lse == -kInfinity) lse = kInfinity;
      const float minus_lse_log2 = -lse * kLog2e;
      const bool is_large = fabsf(minus_lse_log2) > kMaxExpOffset && fabsf(lse) < kInfinity;
      pair.minus_delta[i] = pair.minus_delta[2 + i] = -delta;
      pair.minus_lse_log2[i] = is_large ? std::numeric_limits<float>::quiet_NaN() : minus_lse_log2;
      pair.lse[i] = lse;
    }
  }
};

template <class Element>
__global__ void __launch_bounds__(DeltaKernel<Element>::kThreads)
    attention_backward_delta(const __grid_constant__ AttentionBackwardCudaParams p,
                             const __grid_constant__ typename DeltaKernel<Element>::Rows rows) {
  DeltaKernel<Element>::run(p, rows);
}

}  // namespace

cudaError_t launch_attention_backward_delta(const AttentionBackwardCudaParams& p, cudaStream_t stream) {
  const Problem& problem = p.forward.problem;
  return dispatch_element(problem.dtype, [&]<class Element>(Element) {
    using Kernel = DeltaKernel<Element>;
    const int64_t queries = p.statistics.data ? QueryStatistics::pitch(problem) : Kernel::queries(p.forward);
    const int64_t queries_of_launch = (kMaxBlocks - Kernel::kRowsOfBlock) / std::max<int64_t>(problem.heads, 1);
    cudaError_t error = cudaSuccess;
    for (int64_t first = 0; first < queries && error == cudaSuccess; first += queries_of_launch) {
      const int64_t count = std::min(queries - first, queries_of_launch) * problem.heads;
      const int64_t blocks = ceil_div<int64_t>(count, Kernel::kRowsOfBlock);
      error = launch_tasks(attention_backward_delta<Element>, blocks * (p.forward.packing ? 1 : problem.batch),
                           Kernel::kThreads, 0, stream, p, {first, int(problem.heads), int(count), int(blocks)});
    }
    return error;
  });
}

}  // namespace vitkernels
