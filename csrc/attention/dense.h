// Params of the dense attention kernels. Plain data, no torch.
#pragma once

#include <limits>

#include "attention/pattern.h"
#include "attention/score.h"
#include "common/dtype.h"

namespace vitkernels {

// A tensor [batch, tokens, heads, dim] with a unit last stride. Strides are in elements.
struct TokenTensor {
  void* data = nullptr;
  int64_t batch_stride = 0, token_stride = 0, head_stride = 0;
  bool is_aligned = false;  // rows begin at multiples of 16 bytes and are whole numbers of them

  VK_HOST_DEVICE int64_t offset(int64_t batch, int64_t token, int64_t head) const {
    return batch * batch_stride + token * token_stride + head * head_stride;
  }
  template <class S>
  VK_HOST_DEVICE S* at(int64_t batch, int64_t token, int64_t head) const {
    return static_cast<S*>(data) + offset(batch, token, head);
  }
};

// One sequence of the batch: its sizes and mask, and where its tokens start.
struct Sequence {
  Axis axis;
  int64_t first_query = 0, first_key = 0;
  int64_t first_row = 0;  // of its queries among those of all sequences

  // From tokens of the sequence to those of a tensor.
  VK_HOST_DEVICE Range query_tokens(Range queries) const { return relative_to(queries, -first_query); }
  VK_HOST_DEVICE Range key_tokens(Range keys) const { return relative_to(keys, -first_key); }
};

// What is attended to, on either device: sizes, tensors and score. The batch may be packed, and the axis is then that of
// its longest sequence.
struct Problem {
  DType dtype = DType::kFloat32;
  int64_t batch = 0, heads = 0, kv_heads = 0, head_dim = 0, value_dim = 0;
  Axis axis;
  Score score;
  TokenTensor query, key, value;  // heads / kv_heads / kv_heads

  VK_HOST_DEVICE int64_t num_queries() const { return axis.num_queries; }
  VK_HOST_DEVICE int64_t num_keys() const { return axis.num_keys; }
};

// Which heads share keys, in memory of the host.
struct HostHeadGroups {
  const int64_t* kv_head_of = nullptr;  // [heads]: the kv head that a query head reads
  const int64_t* first_head = nullptr;  // [kv_heads + 1], [heads]: the inverse of kv_head_of, the query heads of
  const int64_t* head_list = nullptr;   // kv head g are head_list[first_head[g]] to head_list[first_head[g + 1] - 1]
};

// A packed batch: the tokens of all sequences follow one another along the token axis, and batch strides are zero.
struct HostPacking {
  const int64_t* query_offsets = nullptr;  // [batch + 1], or null: the batch is not packed
  const int64_t* key_offsets = nullptr;
  const int64_t* first_task = nullptr;  // [batch + 1]: the forward's tasks before each sequence

  explicit operator bool() const { return query_offsets; }

  int64_t num_rows(const Problem& p) const {
    return query_offsets ? query_offsets[p.batch] : p.batch * p.num_queries();
  }

  Sequence sequence(const Problem& p, int64_t batch) const {
    Sequence s{.axis = p.axis, .first_row = batch * p.num_queries()};
    if (query_offsets) {
      s.first_row = s.first_query = query_offsets[batch];
      s.first_key = key_offsets[batch];
      s.axis.num_queries = query_offsets[batch + 1] - s.first_query;
      s.axis.num_keys = key_offsets[batch + 1] - s.first_key;
    }
    return s;
  }
};

// In a packed batch the tokens of all entries follow one another along the token axis (and batch strides are zero);
// the pattern then holds the largest entry's sizes.
struct AttentionParams {
  DType dtype = DType::kFloat32;
  int64_t batch = 0, heads = 0, kv_heads = 0, head_dim = 0, value_dim = 0;
  const int64_t* kv_head_of = nullptr;     // [heads]: the kv head that a query head reads
  const int64_t* first_head = nullptr;     // [kv_heads + 1], [heads]: the inverse of kv_head_of, the query heads of
  const int64_t* head_list = nullptr;      // kv head g are head_list[first_head[g]] to head_list[first_head[g + 1] - 1]
  const int64_t* query_offsets = nullptr;  // [batch + 1] of a packed batch, else null
  const int64_t* key_offsets = nullptr;
  const int64_t* first_task = nullptr;  // [batch + 1] of a packed batch: the forward's tasks before each entry
  Pattern pattern;
  Score score;
  TokenTensor query, key, value, out;  // heads / kv_heads / kv_heads / heads
  void* lse = nullptr;                 // [rows, heads], contiguous, in the type of the arithmetic

  DType element_type() const { return dtype; }
  VK_HOST_DEVICE int64_t num_queries() const { return pattern.num_queries(); }
  VK_HOST_DEVICE int64_t num_keys() const { return pattern.num_keys(); }
  VK_HOST_DEVICE int64_t num_rows() const { return query_offsets ? query_offsets[batch] : batch * num_queries(); }

  VK_HOST_DEVICE Sequence sequence(int64_t entry) const {
    Sequence s{.axis = pattern.axis[0], .first_row = entry * num_queries()};
    if (query_offsets) {
      s.first_row = s.first_query = query_offsets[entry];
      s.first_key = key_offsets[entry];
      s.axis.num_queries = query_offsets[entry + 1] - s.first_query;
      s.axis.num_keys = key_offsets[entry + 1] - s.first_key;
    }
    return s;
  }
};

// The backward's work is cut by shapes alone: into `splits` ranges of keys, and into the groups of (batch, head)
// that write to the same key, value or bias gradient. A task owns all that it writes, except the query gradient,
// of which every split has one of its own; finish_query_gradient adds them in order. Likewise the gradient of a table by
// offset, of which every split of every batch group has one.
struct AttentionBackwardParams : AttentionParams {
  TokenTensor grad_out, grad_query, grad_key, grad_value;
  const void* grad_lse = nullptr;  // as lse, or null
  bool batch_is_shared = false;    // a gradient is summed over the batch: one task goes through all of it
  bool heads_are_shared = false;   // likewise for the heads
  int64_t max_batch_groups = std::numeric_limits<int64_t>::max();  // fewer, longer groups where each costs memory
  int64_t splits = 1;
  void* grad_query_parts = nullptr;      // [splits, heads, rows, padded head_dim], zero at first
  void* grad_rel_query_parts = nullptr;  // likewise, from the relative logits, whose query has no scale; or null
  void* query_dot = nullptr;             // [heads, rows]: q.dq before scaling (gradient of the scale), or null

  VK_HOST_DEVICE int64_t batch_groups() const {
    return batch_is_shared ? 1 : batch < max_batch_groups ? batch : max_batch_groups;
  }
  VK_HOST_DEVICE int64_t head_groups() const { return heads_are_shared ? 1 : kv_heads; }
  VK_HOST_DEVICE int64_t num_tasks() const { return batch_groups() * head_groups() * splits; }
};

// O = P^T (w V') for the P of an attention: `value` holds V' [batch, queries, heads, dv], `out` and its gradient
// [batch, keys, heads, dv]. The forward takes nothing of AttentionBackwardParams but its base.
struct AttentionTransposedParams : AttentionBackwardParams {
  const void* query_weight = nullptr;  // w, in the type of the arithmetic, or null
  ScoreStrides weight_strides;         // its key stride is 0
};

struct AttentionTransposedBackwardParams : AttentionTransposedParams {
  void* grad_value_parts = nullptr;  // [splits, heads, rows, padded value_dim]: P dO, zero at first
  void* grad_row_weight = nullptr;   // [rows, heads]: of w, before it is summed to w's own shape
  void* grad_row_lse = nullptr;      // [rows, heads]
};

struct MergeParams {
  DType dtype = DType::kFloat32;         // of the parts
  DType out_dtype = DType::kFloat32;     // of the result: that of the parts, or on a GPU narrower than their float32
  int64_t parts = 0, rows = 0, dim = 0;  // rows: batch * tokens * heads, all tensors contiguous
  const void* const* outs = nullptr;     // [parts] -> [rows, dim]
  const void* const* lses = nullptr;     // [parts] -> [rows]
  const float* sums = nullptr;           // [parts, rows], or null: lses hold maxima, these sums of exp(logit - maximum)
  void* out = nullptr;
  void* lse = nullptr;

  DType element_type() const { return dtype; }
};

struct MergeBackwardParams {
  MergeParams forward;  // without results
  const void* grad_out = nullptr;
  const void* grad_lse = nullptr;  // may be null
  void* const* grad_outs = nullptr;
  void* const* grad_lses = nullptr;

  DType element_type() const { return forward.dtype; }
};

}  // namespace vitkernels
