// The arguments of the softmax attention operators, the same on every device.
#pragma once

#include <span>

#include "attention/op/score_fields.h"
#include "common/boxed.h"
#include "common/integer_argument.h"

namespace vitkernels {

// The arguments of the score and the keys. Every operator takes all of them, whether or not its kernels can do all.
struct ScoreArguments {
  explicit ScoreArguments(Call& call);

  // Raises if one of these terms is given.
  void refuse(const Checker& checker, std::span<const std::string_view> names, const char* where) const;
  // Raises if an argument about keys outside a map is given.
  void refuse_map(const Checker& checker) const;

  double scale;
  ScoreFields<OptionalTensor> terms;
  int64_t num_prefix_tokens;
  OptionalTensor head_map;
  double radius;
  bool has_outside;
};

struct DenseCall {
  Tensor query, key, value;
  std::optional<Packing> packing;
  ScoreArguments score;
  bool is_causal, allow_tf32;
  const char* why_no_offsets = nullptr;  // set if the kernels take no terms by offset
};
DenseCall take_dense(Call& call, bool is_packed);

struct SpatialCall {
  Tensor query, key, value;
  std::vector<int64_t> axes;
  bool is_shared_query, qk_norm;
  ScoreArguments score;
  bool allow_tf32;
};
SpatialCall take_spatial(Call& call);

struct RoutedCall {
  Tensor query, key, value, region_graph;
  std::vector<int64_t> region_size, kv_region_size;
  ScoreArguments score;
  bool allow_tf32;
};
RoutedCall take_routed(Call& call);

struct IndexedCall {
  Tensor query, key, value, key_index;
  OptionalTensor key_count;
  ScoreArguments score;
  bool allow_tf32;
};
IndexedCall take_indexed(Call& call);

// There is a value for each query instead of each key; `attention` has the key in place of the missing value.
struct TransposedCall {
  DenseCall attention;
  Tensor value_q, lse;
  OptionalTensor query_weight;
};
TransposedCall take_transposed(Call& call);

// Which gradients are requested, of the terms that are given.
ScoreFields<bool> take_needed(Call& call, const ScoreArguments& score);
// An empty tensor for each absent gradient.
void give_gradients(Call& call, const ScoreFields<OptionalTensor>& grads, const Tensor& lse);

// The arguments of an attention's backward besides those of the forward.
struct BackwardCall {
  BackwardCall(Call& call, const ScoreArguments& score);

  // Also converts them to what kernels read.
  void check(const Checker& checker, const Tensor& query, const std::vector<int64_t>& out_sizes);

  Tensor grad_out;
  OptionalTensor grad_lse;
  Tensor out, lse;
  ScoreFields<bool> needed;
};

}  // namespace vitkernels
