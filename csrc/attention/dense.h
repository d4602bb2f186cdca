// Params of the dense attention kernels. Plain data, no torch.
#pragma once

#include <algorithm>
#include <limits>

#include "attention/pattern.h"
#include "attention/score.h"
#include "common/dtype.h"
#include "common/token_tensor.h"

namespace vitkernels {

// One sequence of the batch: its sizes and mask, and where its tokens start.
struct Sequence {
  Axis axis;
  int64_t first_query = 0, first_key = 0;
  int64_t first_row = 0;  // of its queries, among the queries of all sequences

  // From tokens of the sequence to tokens of a tensor.
  VK_HOST_DEVICE Range query_tokens(Range queries) const { return relative_to(queries, -first_query); }
  VK_HOST_DEVICE Range key_tokens(Range keys) const { return relative_to(keys, -first_key); }
};

// The attention problem, on either device: sizes, tensors and score. If the batch is packed, the axis is that of its
// longest sequence.
struct Problem {
  DType dtype = DType::kFloat32;
  int64_t batch = 0, heads = 0, kv_heads = 0, head_dim = 0, value_dim = 0;
  Axis axis;
  Score score;
  TokenTensor query, key, value;  // heads / kv_heads / kv_heads

  VK_HOST_DEVICE int64_t num_queries() const { return axis.num_queries; }
  VK_HOST_DEVICE int64_t num_keys() const { return axis.num_keys; }
};

// Which heads share keys, in host memory.
struct HostHeadGroups {
  const int64_t* kv_head_of = nullptr;  // [heads]: the kv head that a query head reads
  const int64_t* first_head = nullptr;  // [kv_heads + 1], [heads]: the inverse of kv_head_of, the query heads of
  const int64_t* head_list = nullptr;   // kv head g are head_list[first_head[g]] to head_list[first_head[g + 1] - 1]
};

// A packed batch: the sequences are concatenated along the token axis, and batch strides are zero.
struct HostPacking {
  const int64_t* query_offsets = nullptr;  // [batch + 1], or null: the batch is not packed
  const int64_t* key_offsets = nullptr;
  const int64_t* first_task = nullptr;  // [batch + 1]: number of forward tasks before each sequence

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

struct AttentionParams {
  Problem problem;
  HostHeadGroups groups;
  HostPacking packing;
  TokenTensor out;      // heads
  void* lse = nullptr;  // [rows, heads], contiguous, in the type of the arithmetic

  DType element_type() const { return problem.dtype; }
  int64_t num_rows() const { return packing.num_rows(problem); }
  Sequence sequence(int64_t batch) const { return packing.sequence(problem, batch); }
};

// The backward is partitioned by shapes alone: into `splits` ranges of keys, and into the groups of (batch, head) that
// write to the same key, value or bias gradient. A task owns what it writes, except for partial sums, one for each
// split, or for each split of each batch group, which are added in order.
struct AttentionBackwardParams {
  AttentionParams forward;
  TokenTensor grad_out, grad_query, grad_key, grad_value;
  const void* grad_lse = nullptr;  // as lse, or null
  bool batch_is_shared = false;    // a gradient is summed over the batch: one task loops over all of it
  bool heads_are_shared = false;   // likewise for the heads
  int64_t max_batch_groups = std::numeric_limits<int64_t>::max();  // fewer, longer groups if each costs memory
  int64_t splits = 1;
  // [splits, heads, rows, padded head_dim], zero at first; null: a task has all keys of its queries at once, and stores
  // their gradient itself.
  void* grad_query_parts = nullptr;
  void* grad_rel_query_parts = nullptr;  // likewise, from the relative logits, whose query is not scaled; or null
  void* query_dot = nullptr;             // [heads, rows]: q.dq before scaling (gradient of the scale), or null

  DType element_type() const { return forward.element_type(); }
  int64_t batch_groups() const { return batch_is_shared ? 1 : std::min(forward.problem.batch, max_batch_groups); }
  int64_t head_groups() const { return heads_are_shared ? 1 : forward.problem.kv_heads; }
  int64_t num_tasks() const { return batch_groups() * head_groups() * splits; }
};

// A weight for each query and head, broadcast, in the type of the arithmetic.
struct QueryWeight {
  const void* data = nullptr;  // null: all are 1
  ScoreStrides strides;        // its key stride is 0

  template <class T>
  T at(int64_t batch, int64_t head, int64_t query) const {
    return data ? static_cast<const T*>(data)[strides.offset(batch, head, query, 0)] : T(1);
  }
};

// O = P^T (w V') for the probabilities P of an attention. `value` is V' [batch, queries, heads, dv]; the output and its
// gradient are [batch, keys, heads, dv].
struct AttentionTransposedParams {
  AttentionParams attention;
  QueryWeight weight;

  DType element_type() const { return attention.element_type(); }
};

struct AttentionTransposedBackwardParams {
  AttentionBackwardParams attention;
  QueryWeight weight;
  void* grad_value_parts = nullptr;  // [splits, heads, rows, padded value_dim]: P dO, zero at first
  void* grad_row_weight = nullptr;   // [rows, heads]: of w, before it is reduced to w's own shape
  void* grad_row_lse = nullptr;      // [rows, heads]

  DType element_type() const { return attention.element_type(); }
};

struct MergeParams {
  DType dtype = DType::kFloat32;         // of the parts
  DType out_dtype = DType::kFloat32;     // of the result: as the parts, or on a GPU narrower than their float32
  int64_t parts = 0, rows = 0, dim = 0;  // rows: batch * tokens * heads, all tensors contiguous
  const void* const* outs = nullptr;     // [parts] -> [rows, dim]
  const void* const* lses = nullptr;     // [parts] -> [rows]
  const float* sums = nullptr;           // [parts, rows], or null: lses hold maxima, these sums of exp(logit - maximum)
  void* out = nullptr;
  void* lse = nullptr;

  DType element_type() const { return dtype; }
};

struct MergeBackwardParams {
  MergeParams forward;  // without its results
  const void* grad_out = nullptr;
  const void* grad_lse = nullptr;  // may be null
  void* const* grad_outs = nullptr;
  void* const* grad_lses = nullptr;

  DType element_type() const { return forward.dtype; }
};

}  // namespace vitkernels
