// Around the backward kernels on a GPU: what becomes of rows that they write.

#include "attention/cuda/launches.h"
#include "attention/cuda/tokens.h"
#include "cuda/scheduler.h"

namespace vitkernels {
namespace {

using namespace cuda;

constexpr int kThreads = 128;

// Calls f(index) for a thread's share of `count`.
template <class Function>
__device__ void for_each_of_thread(int64_t count, Function&& f) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x)
    f(i);
}

template <class... Params>
cudaError_t launch_for_each(void (*kernel)(Params...), int64_t count, cudaStream_t stream,
                            const std::type_identity_t<Params>&... params) {
  return launch_tasks(kernel, count == 0 ? 0 : blocks_for(count, kThreads), kThreads, 0, stream, params...);
}

// The gradient of lse follows from that of w: a row's dS add up to w dw.
__global__ void attention_transposed_rows(const __grid_constant__ AttentionBackwardCudaParams p,
                                          const __grid_constant__ PartialSums dots, float* grad_weight,
                                          float* grad_lse) {
  const Problem& problem = p.forward.problem;
  for_each_of_thread(dots.stride, [&](int64_t i) {
    TaskIndex index(i);
    const int64_t head = index.take(problem.heads), query = index.take(problem.num_queries());
    float sum = 0.0f;
    for (int64_t part = 0; part < dots.count; ++part) sum += dots.part(part)[i];
    grad_weight[i] = sum;
    grad_lse[i] = -p.weight(index.rest(), query, head) * sum;
  });
}

// One axis of the rows: all of them are summed to one element, or each has an element of its own.
struct SharedAxis {
  int64_t count, stride;

  VK_HOST_DEVICE int64_t num_elements() const { return stride == 0 ? 1 : count; }
  VK_HOST_DEVICE int64_t num_shared() const { return stride == 0 ? count : 1; }
};

// A block takes an element.
__global__ void reduce_rows(const __grid_constant__ RowReduction s) {
  __shared__ double sum_of_warp[kThreads / kWarpSize];
  const SharedAxis batch{s.batch, s.strides.batch}, query{s.queries, s.strides.query}, head{s.heads, s.strides.head};
  TaskIndex element(blockIdx.x);
  const int64_t first_head = element.take(head.num_elements()), first_query = element.take(query.num_elements());
  const int64_t first_batch = element.rest();
  const int64_t count = batch.num_shared() * query.num_shared() * head.num_shared();
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    TaskIndex index(i);
    const int64_t h = first_head + index.take(head.num_shared()), q = first_query + index.take(query.num_shared());
    const int64_t b = first_batch + index.rest(), row = (b * s.queries + q) * s.heads + h;
    double sum_of_row = 0.0;
    for (int64_t part = 0; part < s.rows.count; ++part) sum_of_row += double(s.rows.part(part)[row]);
    sum += s.weight ? sum_of_row * double(s.weight[s.weight_strides.offset(b, h, q, 0)]) : sum_of_row;
  }
  sum = warp_sum(sum);
  if (lane_index() == 0) sum_of_warp[threadIdx.x / kWarpSize] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double total = 0.0;
  for (const double of_warp : sum_of_warp) total += of_warp;
  s.out[s.strides.offset(first_batch, first_head, first_query, 0)] = float(s.factor * total);
}

}  // namespace

cudaError_t launch_transposed_rows(const AttentionBackwardCudaParams& p, const PartialSums& dots, float* grad_weight,
                                   float* grad_lse, cudaStream_t stream) {
  return launch_for_each(attention_transposed_rows, dots.stride, stream, p, dots, grad_weight, grad_lse);
}

cudaError_t launch_row_reduction(const RowReduction& s, cudaStream_t stream) {
  const int64_t elements = SharedAxis{s.batch, s.strides.batch}.num_elements() *
                           SharedAxis{s.queries, s.strides.query}.num_elements() *
                           SharedAxis{s.heads, s.strides.head}.num_elements();
  return launch_tasks(reduce_rows, elements, kThreads, 0, stream, s);
}

}  // namespace vitkernels
