// What the attention kernels are told. Plain data: no torch here or in anything that includes it.
#pragma once

#include "attention/pattern.h"
#include "attention/score.h"
#include "common/dtype.h"

namespace vitkernels {

// A tensor [batch, tokens, heads, dim] with a unit last stride. Strides are in elements.
struct TokenTensor {
  void* data = nullptr;
  int64_t batch_stride = 0, token_stride = 0, head_stride = 0;

  template <class S>
  VK_HOST_DEVICE S* at(int64_t batch, int64_t token, int64_t head) const {
    return static_cast<S*>(data) + batch * batch_stride + token * token_stride + head * head_stride;
  }
};

struct AttentionParams {
  DType dtype = DType::kFloat32;
  int64_t batch = 0, heads = 0, kv_heads = 0, head_dim = 0, value_dim = 0;
  const int64_t* kv_head_of = nullptr;  // [heads]: the kv head that a query head reads
  Pattern pattern;
  Score score;
  TokenTensor query, key, value, out;  // heads / kv_heads / kv_heads / heads
  void* lse = nullptr;                 // [batch, queries, heads], contiguous, in the type of the arithmetic

  VK_HOST_DEVICE int64_t num_queries() const { return pattern.num_queries(); }
  VK_HOST_DEVICE int64_t num_keys() const { return pattern.num_keys(); }
};

// The backward's work is cut by shapes alone: into `splits` ranges of keys, and into the groups of (batch, head)
// that write to the same key, value or bias gradient. A task owns all that it writes, except the query gradient,
// of which every split has one of its own; finish_query_gradient adds them in order.
struct AttentionBackwardParams : AttentionParams {
  TokenTensor grad_out, grad_query, grad_key, grad_value;
  const void* grad_lse = nullptr;  // as lse, or null
  bool batch_is_shared = false;    // a gradient is summed over the batch: one task goes through all of it
  bool heads_are_shared = false;   // likewise for the heads
  int64_t splits = 1;
  void* grad_query_parts = nullptr;  // [splits, batch, heads, queries, padded head_dim], zero at first
  void* query_dot = nullptr;         // [batch, heads, queries]: q.dq before scaling (gradient of the scale), or null

  VK_HOST_DEVICE int64_t batch_groups() const { return batch_is_shared ? 1 : batch; }
  VK_HOST_DEVICE int64_t head_groups() const { return heads_are_shared ? 1 : kv_heads; }
  VK_HOST_DEVICE int64_t num_tasks() const { return batch_groups() * head_groups() * splits; }
};

struct MergeParams {
  DType dtype = DType::kFloat32;
  int64_t parts = 0, rows = 0, dim = 0;  // rows: batch * tokens * heads, all tensors contiguous
  const void* const* outs = nullptr;     // [parts] -> [rows, dim]
  const void* const* lses = nullptr;     // [parts] -> [rows]
  void* out = nullptr;
  void* lse = nullptr;
  // Backward only.
  const void* grad_out = nullptr;
  const void* grad_lse = nullptr;  // may be null
  void* const* grad_outs = nullptr;
  void* const* grad_lses = nullptr;
};

}  // namespace vitkernels
