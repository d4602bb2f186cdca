// Around the backward kernels on a GPU: what rows of queries need before, and what is added up after, in order.

#include "attention/cuda/launches.h"
#include "attention/cuda/tokens.h"
#include "cuda/scheduler.h"

namespace vitkernels {
namespace {

using namespace cuda;

constexpr int kThreads = 128;

// Calls f(index) for all that a thread has of `count`.
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

// A warp takes a row.
template <class Element>
__global__ void attention_backward_delta(const __grid_constant__ AttentionBackwardCudaParams p) {
  for (int64_t row = warp_of_grid(); row < p.num_rows() * p.heads; row += warps_in_grid()) {
    TaskIndex index(row);
    const int64_t head = index.take(p.heads), token = index.take(p.is_packed() ? p.packed_queries : p.num_queries());
    const Element* out = p.out.at<const Element>(index.rest(), token, head);
    const Element* grad_out = p.query_value.at<const Element>(index.rest(), token, head);
    float sum = 0.0f;
    for (int64_t c = lane_index(); c < p.value_dim; c += kWarpSize) sum += float(out[c]) * float(grad_out[c]);
    sum = warp_sum(sum);
    if (lane_index() == 0) p.delta[row] = p.grad_lse ? sum - p.grad_lse[row] : sum;
  }
}

template <class Element>
__global__ void sum_splits(const __grid_constant__ SumTarget target, int64_t splits) {
  for_each_of_thread(target.size, [&](int64_t i) {
    float sum = 0.0f;
    for (int64_t split = 0; split < splits; ++split) sum += target.parts[split * target.size + i];
    static_cast<Element*>(target.tensor.data)[i] = Element(sum);
  });
}

// The gradient of dlse follows from that of w: a row's dS add up to w dw.
__global__ void attention_transposed_rows(const __grid_constant__ AttentionBackwardCudaParams p, const float* dots,
                                          int64_t parts, float* grad_weight, float* grad_lse) {
  const int64_t count = p.num_rows() * p.heads;
  for_each_of_thread(count, [&](int64_t i) {
    TaskIndex index(i);
    const int64_t head = index.take(p.heads), query = index.take(p.num_queries());
    float sum = 0.0f;
    for (int64_t part = 0; part < parts; ++part) sum += dots[part * count + i];
    grad_weight[i] = sum;
    grad_lse[i] = -p.weight(index.rest(), query, head) * sum;
  });
}

// Along one axis of rows: all of them belong to an element, or each has one of its own.
struct SharedAxis {
  int64_t count, stride;

  VK_HOST_DEVICE int64_t num_elements() const { return stride == 0 ? 1 : count; }
  VK_HOST_DEVICE int64_t num_shared() const { return stride == 0 ? count : 1; }
};

// A block takes an element.
__global__ void sum_rows(const __grid_constant__ RowSums s) {
  __shared__ double sum_of_warp[kThreads / kWarpSize];
  const SharedAxis batch{s.batch, s.strides.batch}, query{s.queries, s.strides.query}, head{s.heads, s.strides.head};
  TaskIndex element(blockIdx.x);
  const int64_t first_head = element.take(head.num_elements()), first_query = element.take(query.num_elements());
  const int64_t first_entry = element.rest();
  const int64_t count = batch.num_shared() * query.num_shared() * head.num_shared();
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    TaskIndex index(i);
    const int64_t h = first_head + index.take(head.num_shared()), q = first_query + index.take(query.num_shared());
    const int64_t b = first_entry + index.rest(), row = (b * s.queries + q) * s.heads + h;
    double sum_of_row = 0.0;
    for (int64_t part = 0; part < s.parts; ++part) {
      sum_of_row += double(s.rows[part * s.batch * s.queries * s.heads + row]);
    }
    sum += s.weight ? sum_of_row * double(s.weight[s.weight_strides.offset(b, h, q, 0)]) : sum_of_row;
  }
  sum = warp_sum(sum);
  if (lane_index() == 0) sum_of_warp[threadIdx.x / kWarpSize] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double total = 0.0;
  for (const double of_warp : sum_of_warp) total += of_warp;
  s.sums[s.strides.offset(first_entry, first_head, first_query, 0)] = float(s.factor * total);
}

}  // namespace

cudaError_t launch_attention_backward_delta(const AttentionBackwardCudaParams& p, cudaStream_t stream) {
  return dispatch_element(p.dtype, [&]<class Element>(Element) {
    return launch_for_each(attention_backward_delta<Element>, p.num_rows() * p.heads * kWarpSize, stream, p);
  });
}

cudaError_t launch_sum_splits(const SumTarget& target, int64_t splits, DType dtype, cudaStream_t stream) {
  return dispatch_element(dtype, [&]<class Element>(Element) {
    return launch_for_each(sum_splits<Element>, target.size, stream, target, splits);
  });
}

cudaError_t launch_transposed_rows(const AttentionBackwardCudaParams& p, const float* dots, int64_t parts,
                                   float* grad_weight, float* grad_lse, cudaStream_t stream) {
  return launch_for_each(attention_transposed_rows, p.num_rows() * p.heads, stream, p, dots, parts, grad_weight,
                         grad_lse);
}

cudaError_t launch_sum_rows(const RowSums& s, cudaStream_t stream) {
  const int64_t elements = SharedAxis{s.batch, s.strides.batch}.num_elements() *
                           SharedAxis{s.queries, s.strides.query}.num_elements() *
                           SharedAxis{s.heads, s.strides.head}.num_elements();
  return launch_tasks(sum_rows, elements, kThreads, 0, stream, s);
}

}  // namespace vitkernels
