// The attention kernels on a GPU, as host functions that launch them.
#pragma once

#include <cuda_runtime_api.h>

#include "attention/cuda/params.h"

namespace vitkernels {

// Entries of a table by offset.
VK_HOST_DEVICE int num_table_entries(const DeviceOffsetGrid& grid) {
  return grid.num_offsets(0) * grid.num_offsets(1) * grid.num_offsets(2);
}

// Each part takes four pointers of the kernel's arguments, which are limited to 4 KB.
inline constexpr int64_t kMaxMergeParts = 64;

// Kernels with so many instantiations that each dtype is compiled on its own (cuda/library.cmake).
template <DType kDType>
struct AttentionLaunches {
  static int64_t forward_blocks(const AttentionCudaParams& params);  // of one split
  static cudaError_t forward(const AttentionCudaParams& params, cudaStream_t stream);
  static int64_t backward_splits(const AttentionBackwardCudaParams& params, const OwnedGrads& grads, Side owner);
  static int64_t backward_dot_parts(const AttentionBackwardCudaParams& params, const OwnedGrads& grads);
  static cudaError_t backward(const AttentionBackwardCudaParams& params, const OwnedGrads& grads, Side owner,
                              cudaStream_t stream);
};

// The fast path of 16-bit dtypes (forward_path.h).
template <DType kDType>
struct PlainForwardLaunches {
  static int64_t forward_blocks(const AttentionCudaParams& params);  // of one split
  static cudaError_t forward(const AttentionCudaParams& params, cudaStream_t stream);
};

template <DType kDType>
struct ResidentForwardLaunches {
  static int64_t forward_blocks(const AttentionCudaParams&) { return 0; }  // none that would be split
  static cudaError_t forward(const AttentionCudaParams& params, cudaStream_t stream);
};

// The backward's fast paths of 16-bit dtypes (backward_path.h), by what blocks own.
template <DType kDType, Side kOwner>
struct PlainBackwardLaunches {
  static int64_t backward_splits(const AttentionBackwardCudaParams& params, const OwnedGrads& grads, Side owner);
  static cudaError_t backward(const AttentionBackwardCudaParams& params, const OwnedGrads& grads, Side owner,
                              cudaStream_t stream);
};

// Writes the sum of all additive terms of a score.
cudaError_t launch_expand_bias(const Problem& problem, const DenseBias& to, cudaStream_t stream);

// Split-KV of the forward, for calls with few blocks.
int64_t attention_key_splits(const AttentionCudaParams& params);
cudaError_t launch_attention(const AttentionCudaParams& params, cudaStream_t stream);

// Writes delta, and the statistics where there is memory for them. The others read both.
cudaError_t launch_attention_backward_delta(const AttentionBackwardCudaParams& params, cudaStream_t stream);
// How many splits of the side that the blocks do not own, and how many parts the dots then have.
int64_t attention_backward_splits(const AttentionBackwardCudaParams& params, const OwnedGrads& grads, Side owner);
int64_t attention_backward_dot_parts(const AttentionBackwardCudaParams& params, const OwnedGrads& grads);
cudaError_t launch_attention_backward(const AttentionBackwardCudaParams& params, const OwnedGrads& grads, Side owner,
                                      cudaStream_t stream);
cudaError_t launch_row_reduction(const RowReduction& reduction, cudaStream_t stream);
// From the dots of queries' values with their accumulated P dO: the gradients of each row's weight, and of lse.
cudaError_t launch_transposed_rows(const AttentionBackwardCudaParams& params, const PartialSums& dots,
                                   float* grad_weight, float* grad_lse, cudaStream_t stream);

cudaError_t launch_attention_backward_term(const AttentionBackwardCudaParams& params, const TermGradient& term,
                                           cudaStream_t stream);
cudaError_t launch_attention_backward_table(const AttentionBackwardCudaParams& params, const TableGradient& table,
                                            cudaStream_t stream);
// The same from the sum of the logits' gradient over the batch: [heads, queries, keys] to [heads, offsets].
cudaError_t launch_attention_backward_table(const Problem& problem, const float* grads, float* table,
                                            cudaStream_t stream);
// Into how many parts the work is best cut.
int64_t parts_of_term(const AttentionBackwardCudaParams& params, const ScoreStrides& strides, int64_t elements);
int64_t parts_of_table(const AttentionBackwardCudaParams& params);
int64_t parts_of_embedding(const AttentionBackwardCudaParams& params, int axis);
// out, contiguous `elements` of a dtype, = the sum of all parts in a fixed order.
cudaError_t launch_sum_parts(const PartialSums& parts, int64_t elements, void* out, DType dtype, cudaStream_t stream);

// Writes what params.problem.score.by_offset.relative describes to `logits`.
cudaError_t launch_relative_logits(const AttentionCudaParams& params, float* logits, cudaStream_t stream);
// Adds the gradient of the relative logits to `grads`, which has their shape and is zero at first.
cudaError_t launch_relative_logits_backward(const AttentionBackwardCudaParams& params, float* grads,
                                            cudaStream_t stream);
// From that gradient to params.relative_grad_query.
cudaError_t launch_relative_grad_query(const AttentionBackwardCudaParams& params, const float* grads, float* grad_query,
                                       cudaStream_t stream);
cudaError_t launch_relative_grad_embedding(const AttentionBackwardCudaParams& params,
                                           const EmbeddingGradient& embedding, cudaStream_t stream);

cudaError_t launch_merge_attentions(const MergeParams& params, cudaStream_t stream);
cudaError_t launch_merge_attentions(const MergeBackwardParams& params, cudaStream_t stream);

}  // namespace vitkernels
