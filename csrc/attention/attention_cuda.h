// The attention engine's kernels on a GPU, as host functions that launch them.
#pragma once

#include <cuda_runtime_api.h>

#include "attention/attention.h"

namespace vitkernels {

// Each part costs four pointers of a kernel's arguments, which are limited to 4 KB.
inline constexpr int64_t kMaxMergeParts = 64;

// Integers that lie in a tensor on the device: read there, and checked there.
struct DeviceIntegers {
  const void* data = nullptr;  // null: absent
  bool is_int64 = false;

  VK_HOST_DEVICE explicit operator bool() const { return data; }
  VK_HOST_DEVICE int64_t operator[](int64_t i) const {
    return is_int64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

struct AttentionCudaParams : AttentionParams {
  DeviceIntegers head_map;                      // [heads], or absent: equal groups
  DeviceIntegers cu_seqlens_q, cu_seqlens_k;    // [batch + 1] of a packed batch, else absent
  int64_t packed_queries = 0, packed_keys = 0;  // tokens of a packed batch
  bool allow_tf32 = false;                      // operands of float32 products are rounded to TF32

  // The kv head that a query head reads, -1 if the map names none that exists.
  VK_HOST_DEVICE int64_t kv_head(int64_t head) const {
    if (!head_map) return head / (heads / kv_heads);
    const int64_t mapped = head_map[head];
    return mapped >= 0 && mapped < kv_heads ? mapped : -1;
  }

  VK_HOST_DEVICE bool is_packed() const { return bool(cu_seqlens_q); }
  VK_HOST_DEVICE int64_t num_rows() const { return is_packed() ? packed_queries : batch * num_queries(); }

  VK_HOST_DEVICE Sequence sequence(int64_t entry) const {
    Sequence s{.axis = pattern.axis[0], .first_row = entry * num_queries()};
    if (is_packed()) {
      const Range queries = tokens_of(cu_seqlens_q, entry, num_queries(), packed_queries);
      const Range keys = tokens_of(cu_seqlens_k, entry, num_keys(), packed_keys);
      s.first_row = s.first_query = queries.begin, s.first_key = keys.begin;
      s.axis.num_queries = queries.end - queries.begin, s.axis.num_keys = keys.end - keys.begin;
    }
    return s;
  }

 private:
  // Whatever the offsets say, tokens that exist, and no more than the longest entry has.
  static VK_HOST_DEVICE Range tokens_of(const DeviceIntegers& offsets, int64_t entry, int64_t longest, int64_t count) {
    const int64_t begin = offsets[entry], end = offsets[entry + 1];
    if (begin < 0 || begin > count || end < begin) return {0, 0};
    return intersect({begin, begin + longest}, {begin, end < count ? end : count});
  }
};

struct AttentionBackwardCudaParams : AttentionCudaParams {
  TokenTensor grad_out, grad_query, grad_key, grad_value;
  const float* grad_lse = nullptr;  // as lse, or null
  float* delta = nullptr;           // [rows, heads]: dO.O - dlse, so that dS = P * (dP - delta)
  // [batch, heads, tokens on the grid, head_dim], or null: what reaches the queries through the relative logits.
  const float* relative_grad_query = nullptr;
};

// What the gradient of a score term sums: that of the logits (biases), times the scaled product and the other multiplier
// (multipliers), times the product and everything else on it (scale of a head).
enum class TermFactor { kBias, kMultiplier, kMultiplierTable, kHeadScale };

// Sums of a gradient in `count` parts, `stride` apart. Each part has a share of the work, cut by shapes.
struct PartialSums {
  float* data = nullptr;
  int64_t count = 1, stride = 0;
};

// A term that is broadcast to the logits with these strides, those of its contiguous gradient.
struct TermGradient {
  TermFactor factor = TermFactor::kBias;
  ScoreStrides strides;
  PartialSums sums;  // each in the shape of the term
};

// A table by offset: each part is [heads, entries] and zero at first.
struct TableGradient {
  TermFactor factor = TermFactor::kBias;
  PartialSums sums;
};

// The embeddings on one axis: each part is [heads, offsets, head_dim].
struct EmbeddingGradient {
  int axis = 0;
  const float* relative_grad = nullptr;  // of the relative logits
  PartialSums sums;
};

inline constexpr int64_t kMaxCudaHeadDim = 256;

cudaError_t launch_attention(const AttentionCudaParams& params, cudaStream_t stream);
// Writes delta, which the others read.
cudaError_t launch_attention_backward_delta(const AttentionBackwardCudaParams& params, cudaStream_t stream);
cudaError_t launch_attention_backward_keys(const AttentionBackwardCudaParams& params, cudaStream_t stream);
cudaError_t launch_attention_backward_queries(const AttentionBackwardCudaParams& params, cudaStream_t stream);
cudaError_t launch_attention_backward_term(const AttentionBackwardCudaParams& params, const TermGradient& term,
                                           cudaStream_t stream);
cudaError_t launch_attention_backward_table(const AttentionBackwardCudaParams& params, const TableGradient& table,
                                            cudaStream_t stream);
// Into how many parts the work is best cut.
int64_t parts_of_term(const AttentionBackwardCudaParams& params, const ScoreStrides& strides, int64_t elements);
int64_t parts_of_table(const AttentionBackwardCudaParams& params);
int64_t parts_of_embedding(const AttentionBackwardCudaParams& params, int axis);
// out = the sum of `parts` in order, `elements` of each.
cudaError_t launch_sum_parts(const PartialSums& parts, int64_t elements, float* out, cudaStream_t stream);

// Writes what params.score.on_grid.relative describes to `logits`.
cudaError_t launch_relative_logits(const AttentionCudaParams& params, float* logits, cudaStream_t stream);
// Adds the gradient of the relative logits to `grads`, which has their shape and is zero at first.
cudaError_t launch_relative_logits_backward(const AttentionBackwardCudaParams& params, float* grads,
                                            cudaStream_t stream);
// From it to `grad_query`, as params.relative_grad_query.
cudaError_t launch_relative_grad_query(const AttentionBackwardCudaParams& params, const float* grads, float* grad_query,
                                       cudaStream_t stream);
cudaError_t launch_relative_grad_embedding(const AttentionBackwardCudaParams& params,
                                           const EmbeddingGradient& embedding, cudaStream_t stream);

cudaError_t launch_merge_attentions(const MergeParams& params, cudaStream_t stream);
cudaError_t launch_merge_attentions_backward(const MergeParams& params, cudaStream_t stream);

}  // namespace vitkernels
