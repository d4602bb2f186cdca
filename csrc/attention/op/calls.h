// What the operators of softmax attention are called with, on every device.
#pragma once

#include <span>

#include "attention/op/score_fields.h"
#include "common/boxed.h"

namespace vitkernels {

// The score and the keys: the same for every operator, whether its kernels can do all of it or not.
struct ScoreArguments {
  explicit ScoreArguments(Call& call);

  // Raises where one of these terms is given.
  void refuse(const Checker& checker, std::span<const std::string_view> names, const char* where) const;
  // Raises on what concerns keys outside a map.
  void refuse_map(const Checker& checker) const;

  double scale;
  ScoreFields<OptionalTensor> terms;
  int64_t num_prefix_tokens;
  OptionalTensor head_map;
  double radius;
  bool has_outside;
};

// Sequences packed one after another: where each begins, and the longest ones' lengths.
struct Packing {
  Tensor cu_seqlens_q, cu_seqlens_k;  // [sequences + 1], int32 or int64
  int64_t max_seqlen_q, max_seqlen_k;
};

struct DenseCall {
  Tensor query, key, value;
  std::optional<Packing> packing;
  ScoreArguments score;
  bool is_causal, allow_tf32;
  const char* why_no_offsets = nullptr;  // where kernels take no terms by offset
};
DenseCall take_dense(Call& call, bool is_packed);

struct SpatialCall {
  Tensor query, key, value;
  std::vector<int64_t> axes;
  bool is_shared_query;
  ScoreArguments score;
  bool allow_tf32;
};
SpatialCall take_spatial(Call& call);

// There is a value for each query, and the key passes for the value that is missing.
struct TransposedCall {
  DenseCall attention;
  Tensor value_q, lse;
  OptionalTensor query_weight;
};
TransposedCall take_transposed(Call& call);

// Which gradients are asked for, of the terms that are given.
ScoreFields<bool> take_needed(Call& call, const ScoreArguments& score);
// An empty tensor for each that is not there.
void give_gradients(Call& call, const ScoreFields<OptionalTensor>& grads, const Tensor& query);

// What the backward of an attention gets besides.
struct BackwardCall {
  BackwardCall(Call& call, const ScoreArguments& score);

  // And makes them what kernels read.
  void check(const Checker& checker, const Tensor& query, const std::vector<int64_t>& out_sizes);

  Tensor grad_out;
  OptionalTensor grad_lse;
  Tensor out, lse;
  ScoreFields<bool> needed;
};

}  // namespace vitkernels
