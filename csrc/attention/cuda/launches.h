// The attention engine's kernels on a GPU, as host functions that launch them.
#pragma once

#include <cuda_runtime_api.h>

#include "attention/dense.h"

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

struct AttentionCudaParams : Problem {
  TokenTensor out;
  void* lse = nullptr;                          // [rows, heads], contiguous
  DeviceIntegers head_map;                      // [heads], or absent: equal groups
  DeviceIntegers cu_seqlens_q, cu_seqlens_k;    // [batch + 1] of a packed batch, else absent
  int64_t packed_queries = 0, packed_keys = 0;  // tokens of a packed batch
  bool allow_tf32 = false;                      // operands of float32 products are rounded to TF32
  // The forward's splits of the keys. Where there are several, each has results of its own, which are then joined. In
  // place of an LSE they have what makes one, since a large one cannot hold the logarithm of the sum.
  int64_t splits = 1;
  float* split_out = nullptr;  // [splits, rows, heads, value_dim]
  float* split_max = nullptr;  // [splits, rows, heads]: of the logits
  float* split_sum = nullptr;  // [splits, rows, heads]: of exp(logit - max)

  // The kv head that a query head reads, -1 if the map names none that exists.
  VK_HOST_DEVICE int64_t kv_head(int64_t head) const {
    if (!head_map) return head / (heads / kv_heads);
    const int64_t mapped = head_map[head];
    return mapped >= 0 && mapped < kv_heads ? mapped : -1;
  }

  VK_HOST_DEVICE bool is_packed() const { return bool(cu_seqlens_q); }
  VK_HOST_DEVICE int64_t num_rows() const { return is_packed() ? packed_queries : batch * num_queries(); }

  // What a grid has blocks for. A packed batch has an entry, and an entry a tile, even if they are empty: somebody must
  // clear the tokens that no entry covers.
  VK_HOST_DEVICE int64_t num_entries() const { return is_packed() ? at_least_one(batch) : batch; }
  VK_HOST_DEVICE int64_t query_tiles(int64_t size) const { return tiles(num_queries(), packed_queries, size); }
  VK_HOST_DEVICE int64_t key_tiles(int64_t size) const { return tiles(num_keys(), packed_keys, size); }

  VK_HOST_DEVICE Sequence sequence(int64_t entry) const {
    Sequence s{.axis = axis, .first_row = entry * num_queries()};
    if (is_packed()) {
      const Range queries = tokens_of(cu_seqlens_q, entry, num_queries(), packed_queries);
      const Range keys = tokens_of(cu_seqlens_k, entry, num_keys(), packed_keys);
      s.first_row = s.first_query = queries.begin, s.first_key = keys.begin;
      s.axis.num_queries = queries.end - queries.begin, s.axis.num_keys = keys.end - keys.begin;
    }
    return s;
  }

  // From where an entry begins to where the next one does: those of its tokens that are none of the sequence are its own
  // to clear. Whatever the offsets say, each token lies in a slot: they lead from 0 to the end in steps, and somewhere a
  // step upwards goes past it.
  VK_HOST_DEVICE Range query_slot(int64_t entry) const { return slot(cu_seqlens_q, entry, packed_queries); }
  VK_HOST_DEVICE Range key_slot(int64_t entry) const { return slot(cu_seqlens_k, entry, packed_keys); }

 private:
  static VK_HOST_DEVICE int64_t at_least_one(int64_t count) { return count > 0 ? count : 1; }

  VK_HOST_DEVICE int64_t tiles(int64_t longest, int64_t packed, int64_t size) const {
    if (is_packed()) longest = at_least_one(longest < packed ? longest : packed);
    return (longest + size - 1) / size;
  }

  // Whatever the offsets say, tokens that exist, and no more than the longest entry has.
  VK_HOST_DEVICE Range tokens_of(const DeviceIntegers& offsets, int64_t entry, int64_t longest, int64_t count) const {
    if (entry >= batch) return {0, 0};
    const int64_t begin = offsets[entry], end = offsets[entry + 1];
    if (begin < 0 || begin > count || end < begin) return {0, 0};
    return intersect({begin, begin + longest}, {begin, end < count ? end : count});
  }

  VK_HOST_DEVICE Range slot(const DeviceIntegers& offsets, int64_t entry, int64_t count) const {
    const auto begin_of = [&](int64_t e) {
      const int64_t begin = offsets[e];
      return begin < 0 ? 0 : begin < count ? begin : count;
    };
    return {entry == 0 ? 0 : begin_of(entry), entry + 1 >= batch ? count : begin_of(entry + 1)};
  }
};

enum class Side { kQueries, kKeys };

// Each side has two tensors: query and key make the logits, their values the gradient of P. In the backward of attention
// these are dO and V; attention_transposed has values of the queries, and dO is the keys'.
struct AttentionBackwardCudaParams : AttentionCudaParams {
  TokenTensor query_value, key_value;
  bool key_value_has_query_heads = false;  // else kv heads
  const float* query_weight = nullptr;     // of P, or null
  ScoreStrides weight_strides;             // its key stride is 0
  const float* grad_lse = nullptr;         // as lse, or null
  float* delta = nullptr;                  // [rows, heads]: dO.O - dlse, so that dS = P * (dP - delta); null: zero
  // [batch, heads, tokens on the grid, head_dim], or null: what reaches the queries through the relative logits.
  const float* relative_grad_query = nullptr;

  VK_HOST_DEVICE float weight(int64_t entry, int64_t query, int64_t head) const {
    return query_weight ? query_weight[weight_strides.offset(entry, head, query, 0)] : 1.0f;
  }
};

// A contiguous tensor of sums. Where the work is split, each split has float sums in the same order: [splits, size].
struct SumTarget {
  TokenTensor tensor;  // no data: not wanted
  float* parts = nullptr;
  int64_t size = 0;

  VK_HOST_DEVICE bool is_wanted() const { return tensor.data; }
};

// What a backward kernel sums for each token of the side that its blocks own, over the tokens of the other side. Those of
// a query are one of the two, since the registers hold no more.
struct OwnedSums {
  SumTarget logit_grads;  // dS, with scale and multiplier, times the other side's query or key
  SumTarget probs;        // P times the other side's values
  float* dots = nullptr;  // [splits * blocks of columns, rows, heads]: of each query (or its values) with its sums,
                          // before any scale and weight of the query; or null
  int64_t splits = 1;
};

// Sums of [parts, rows, heads] over the parts and over what a tensor that is broadcast to (batch, queries, heads) shares.
struct RowSums {
  const float* rows = nullptr;
  int64_t parts = 1, batch = 0, queries = 0, heads = 0;
  const float* weight = nullptr;  // of each row, or null
  ScoreStrides weight_strides;
  double factor = 1.0;
  ScoreStrides strides;
  float* sums = nullptr;
};

// What the gradient of a score term sums: that of the logits (biases), or that times the scaled product and the other
// multiplier (multipliers).
enum class TermFactor { kBias, kMultiplier, kMultiplierTable };

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

// Of one dtype: what has so many instantiations that each dtype is compiled on its own (cuda/library.cmake).
template <DType kDType>
struct AttentionLaunches {
  // How many blocks one split has.
  static int64_t forward_blocks(const AttentionCudaParams& params);
  // Each split of the keys.
  static cudaError_t forward(const AttentionCudaParams& params, cudaStream_t stream);
  static int64_t backward_splits(const AttentionBackwardCudaParams& params, const OwnedSums& sums, Side owner);
  static int64_t backward_dot_parts(const AttentionBackwardCudaParams& params, const OwnedSums& sums);
  static cudaError_t backward(const AttentionBackwardCudaParams& params, const OwnedSums& sums, Side owner,
                              cudaStream_t stream);
};

// Ranges of keys for which the forward has blocks of their own, where there are few blocks otherwise.
int64_t attention_key_splits(const AttentionCudaParams& params);
cudaError_t launch_attention(const AttentionCudaParams& params, cudaStream_t stream);
// Writes delta, which the others read.
cudaError_t launch_attention_backward_delta(const AttentionBackwardCudaParams& params, cudaStream_t stream);
// How many splits, and how many parts the dots then have.
int64_t attention_backward_splits(const AttentionBackwardCudaParams& params, const OwnedSums& sums, Side owner);
int64_t attention_backward_dot_parts(const AttentionBackwardCudaParams& params, const OwnedSums& sums);
cudaError_t launch_attention_backward(const AttentionBackwardCudaParams& params, const OwnedSums& sums, Side owner,
                                      cudaStream_t stream);
// Adds the splits' parts, in order.
cudaError_t launch_sum_splits(const SumTarget& target, int64_t splits, DType dtype, cudaStream_t stream);
cudaError_t launch_sum_rows(const RowSums& sums, cudaStream_t stream);
// From the dots of queries' values with their sums of P: the gradients of each row's weight, and of lse.
cudaError_t launch_transposed_rows(const AttentionBackwardCudaParams& params, const float* dots, int64_t parts,
                                   float* grad_weight, float* grad_lse, cudaStream_t stream);
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
cudaError_t launch_merge_attentions_backward(const MergeBackwardParams& params, cudaStream_t stream);

}  // namespace vitkernels
