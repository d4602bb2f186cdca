// What the attention kernels on a GPU are told. Plain data.
#pragma once

#include "attention/dense.h"
#include "common/integers.h"

namespace vitkernels {

inline constexpr int64_t kMaxCudaHeadDim = 256;

struct DeviceHeadMap {
  Integers kv_head_of;  // [heads], or absent: equal groups

  // The kv head that a query head reads, -1 if the map names none that exists.
  VK_HOST_DEVICE int64_t kv_head(const Problem& p, int64_t head) const {
    return vitkernels::kv_head_of(kv_head_of, head, p.heads, p.kv_heads);
  }
};

// A packed batch: the tokens of all sequences follow one another along the token axis. Whatever the offsets hold, kernels
// write every token of their outputs.
struct DevicePacking {
  Integers cu_seqlens_q, cu_seqlens_k;    // [batch + 1], or absent: the batch is not packed
  int64_t num_queries = 0, num_keys = 0;  // of the packed tensors

  VK_HOST_DEVICE explicit operator bool() const { return bool(cu_seqlens_q); }
  VK_HOST_DEVICE int64_t num_rows(const Problem& p) const { return *this ? num_queries : p.batch * p.num_queries(); }

  // The extent of a launch grid. A packed batch has at least one sequence and a sequence at least one tile, even if
  // empty: some block must clear the tokens that no sequence covers.
  VK_HOST_DEVICE int64_t num_sequences(const Problem& p) const { return *this ? at_least_one(p.batch) : p.batch; }
  VK_HOST_DEVICE int64_t query_tiles(const Problem& p, int64_t size) const {
    return tiles(p.num_queries(), num_queries, size);
  }
  VK_HOST_DEVICE int64_t key_tiles(const Problem& p, int64_t size) const { return tiles(p.num_keys(), num_keys, size); }

  VK_HOST_DEVICE Sequence sequence(const Problem& p, int64_t batch) const {
    Sequence s{.axis = p.axis, .first_row = batch * p.num_queries()};
    if (*this) {
      const Range queries = tokens_of(p, cu_seqlens_q, batch, p.num_queries(), num_queries);
      const Range keys = tokens_of(p, cu_seqlens_k, batch, p.num_keys(), num_keys);
      s.first_row = s.first_query = queries.begin, s.first_key = keys.begin;
      s.axis.num_queries = queries.end - queries.begin, s.axis.num_keys = keys.end - keys.begin;
    }
    return s;
  }

  // The slot of a sequence: from its offset to the next one's. A sequence clears the tokens of its slot that it does
  // not cover. Slots cover every token, whatever the offsets are: they lead from 0 to the end, and one step passes the
  // token.
  VK_HOST_DEVICE Range query_slot(const Problem& p, int64_t batch) const {
    return slot(p, cu_seqlens_q, batch, num_queries);
  }
  VK_HOST_DEVICE Range key_slot(const Problem& p, int64_t batch) const {
    return slot(p, cu_seqlens_k, batch, num_keys);
  }

 private:
  static VK_HOST_DEVICE int64_t at_least_one(int64_t count) { return count > 0 ? count : 1; }

  VK_HOST_DEVICE int64_t tiles(int64_t longest, int64_t packed, int64_t size) const {
    if (*this) longest = at_least_one(longest < packed ? longest : packed);
    return (longest + size - 1) / size;
  }

  // Existing tokens, and at most as many as the longest sequence has.
  static VK_HOST_DEVICE Range tokens_of(const Problem& p, const Integers& offsets, int64_t batch, int64_t longest,
                                        int64_t count) {
    return batch < p.batch ? packed_tokens(offsets, batch, longest, count) : Range{0, 0};
  }

  static VK_HOST_DEVICE Range slot(const Problem& p, const Integers& offsets, int64_t batch, int64_t count) {
    const auto begin_of = [&](int64_t b) {
      const int64_t begin = offsets[b];
      return begin < 0 ? 0 : begin < count ? begin : count;
    };
    return {batch == 0 ? 0 : begin_of(batch), batch + 1 >= p.batch ? count : begin_of(batch + 1)};
  }
};

struct AttentionCudaParams {
  Problem problem;
  DevicePacking packing;
  DeviceHeadMap head_map;
  TokenTensor out;
  float* lse = nullptr;     // [rows, heads]
  bool allow_tf32 = false;  // operands of float32 products are rounded to TF32
  // Split-KV. Where there are several splits, each has partial results, which are merged afterwards: softmax statistics
  // in place of an LSE, since a large LSE cannot hold the logarithm of the sum.
  int64_t splits = 1;
  float* split_out = nullptr;  // [splits, rows, heads, value_dim]
  float* split_max = nullptr;  // [splits, rows, heads]: of the logits
  float* split_sum = nullptr;  // [splits, rows, heads]: of exp(logit - max)

  VK_HOST_DEVICE int64_t num_rows() const { return packing.num_rows(problem); }
  VK_HOST_DEVICE int64_t kv_head(int64_t head) const { return head_map.kv_head(problem, head); }
  VK_HOST_DEVICE Sequence sequence(int64_t batch) const { return packing.sequence(problem, batch); }
};

// A bias [batch, heads, queries, pitch] in memory; batch and heads are 1 where all share it.
struct DenseBias {
  int64_t batch = 1, heads = 1, pitch = 0;
  float* data = nullptr;

  VK_HOST_DEVICE int64_t num_elements(const Problem& p) const { return batch * heads * p.num_queries() * pitch; }
  VK_HOST_DEVICE ScoreStrides strides(const Problem& p) const {
    const int64_t of_head = p.num_queries() * pitch;
    return {.batch = batch == 1 ? 0 : heads * of_head, .head = heads == 1 ? 0 : of_head, .query = pitch, .key = 1};
  }
};

// What the backward's fast paths need of two neighbouring queries, as threads read it that hold columns of both.
struct alignas(16) StatisticsOfPair {
  float minus_delta[4];  // AttentionBackwardCudaParams::delta, twice: two rows of a matrix product begin with it
  // To the base 2: -inf where a query does not exist or sees no key, and P is zero; NaN where it is too large for a
  // difference from it to be exact (fast_softmax.h).
  float minus_lse_log2[2];
  float lse[2];
};

// A row for each batch and head, padded to whole tiles.
struct QueryStatistics {
  static constexpr int64_t kTile = 32;

  StatisticsOfPair* data = nullptr;  // [batch, heads, pitch / 2], or null

  static VK_HOST_DEVICE int64_t pitch(const Problem& p) { return (p.num_queries() + kTile - 1) / kTile * kTile; }
  static VK_HOST_DEVICE int64_t num_pairs(const Problem& p) { return p.batch * p.heads * pitch(p) / 2; }
  // Of a query, among all. There are fewer than 2^31.
  static VK_HOST_DEVICE int index(const Problem& p, int batch, int head, int query) {
    return (batch * int(p.heads) + head) * int(pitch(p)) + query;
  }
  VK_HOST_DEVICE StatisticsOfPair& pair(int index) const { return data[index / 2]; }
};

// The gradients of the logits, in 16 bits, as a backward's fast path leaves them for those of the score terms. The
// queries of a tile lie as the threads of a warp hold them: a quad takes a key's row, each of its lanes 16 bytes.
struct LogitGrads {
  static constexpr int kQueries = 32, kLaneQueries = 8;

  static_assert(kQueries == QueryStatistics::kTile);

  void* data = nullptr;  // [batch, heads, tiles of queries, keys, kQueries], or null

  static VK_HOST_DEVICE int64_t num_elements(const Problem& p) {
    return p.batch * p.heads * QueryStatistics::pitch(p) * p.num_keys();
  }
  // Of a tile whose first query has this QueryStatistics::index. There are fewer than 2^31 elements.
  template <class Element>
  VK_HOST_DEVICE Element* row(const Problem& p, int index, int key) const {
    return static_cast<Element*>(data) + (index * int(p.num_keys()) + key * kQueries);
  }
};

enum class Side { kQueries, kKeys };

// Each side has two tensors: query and key make the logits, their values the gradient of P. In the backward of
// attention these are dO and V; attention_transposed has values of the queries, and dO is the keys'.
struct AttentionBackwardCudaParams {
  AttentionCudaParams forward;
  TokenTensor query_value, key_value;
  bool key_value_has_query_heads = false;  // else kv heads
  const float* query_weight = nullptr;     // of P, or null
  ScoreStrides weight_strides;             // its key stride is 0
  const float* grad_lse = nullptr;         // as lse, or null
  float* delta = nullptr;                  // [rows, heads]: dO.O - dlse, so that dS = P * (dP - delta); null: zero
  QueryStatistics statistics;
  LogitGrads logit_grads;
  // [batch, heads, tokens on the offset grid, head_dim], or null: the query's gradient through the relative logits.
  const float* relative_grad_query = nullptr;

  VK_HOST_DEVICE float weight(int64_t batch, int64_t query, int64_t head) const {
    return query_weight ? query_weight[weight_strides.offset(batch, head, query, 0)] : 1.0f;
  }
};

// Partial sums in `count` parts, `stride` elements apart. Each part has a share of the work, cut by shapes alone.
struct PartialSums {
  float* data = nullptr;  // null: absent
  int64_t count = 1, stride = 0;

  VK_HOST_DEVICE float* part(int64_t i) const { return data + i * stride; }
};

// What a backward kernel sums for each token of the side that its blocks own, over the tokens of the other side. A
// launch that owns queries sums one of the two tensors: registers hold no more. Tensors are contiguous; where the other
// side is split, each split has partial sums in the same layout.
struct OwnedGrads {
  TokenTensor logit_grads;  // dS, with scale and multiplier, times the other side's query or key; no data: not wanted
  TokenTensor probs;        // P times the other side's values; no data: not wanted
  TokenTensor query_grads;  // of a launch whose blocks own all keys of a head: the queries', too; no data: not wanted
  PartialSums logit_grad_parts, prob_parts;
  PartialSums dots;  // [rows, heads] for each split and block of columns: the dot product of each query (or its values)
                     // with its accumulator, before any scale and weight of the query
  int64_t splits = 1;
};

// Sums of [rows, heads] over their parts and over what a tensor that broadcasts to (batch, queries, heads) shares.
struct RowReduction {
  PartialSums rows;
  int64_t batch = 0, queries = 0, heads = 0;
  const float* weight = nullptr;  // of each row, or null
  ScoreStrides weight_strides;
  double factor = 1.0;
  ScoreStrides strides;
  float* out = nullptr;
};

// What the gradient of a score term sums: the logits' gradient (biases), or that times the scaled product and the other
// multiplier (multipliers).
enum class TermFactor { kBias, kMultiplier, kMultiplierTable };

// A term that broadcasts to the logits with these strides, those of its contiguous gradient.
struct TermGradient {
  TermFactor factor = TermFactor::kBias;
  ScoreStrides strides;
  PartialSums sums;  // each part in the shape of the term
};

// A table by offset: each part is [heads, offsets], and zero at first.
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

}  // namespace vitkernels
