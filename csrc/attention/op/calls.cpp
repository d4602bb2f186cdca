#include "attention/op/calls.h"

#include <algorithm>

namespace vitkernels {

ScoreArguments::ScoreArguments(Call& call) : scale(call.take<double>("scale")) {
  const auto take = [&](const char* name, OptionalTensor& term) { term = call.take<OptionalTensor>(name); };
  for_each_score_term(take, terms);
  num_prefix_tokens = call.take<int64_t>("num_prefix_tokens");
  head_map = call.take<OptionalTensor>("head_map");
  radius = call.take<double>("radius");
  has_outside = call.take<bool>("has_outside");
  for_each_fill(take, terms);
}

void ScoreArguments::refuse(const Checker& checker, std::span<const std::string_view> names, const char* where) const {
  for_each_term(
      [&](const char* name, const OptionalTensor& term) {
        const bool is_refused = term && std::find(names.begin(), names.end(), name) != names.end();
        checker.check(!is_refused, name, " is given, takes None ", where);
      },
      terms);
}

void ScoreArguments::refuse_map(const Checker& checker) const {
  constexpr const char* kWhere = "without a map";
  constexpr std::string_view kFills[] = {"key_fill", "value_fill"};
  refuse(checker, kFills, kWhere);
  checker.check(radius == 0, "radius is ", radius, ", takes 0 ", kWhere);
  checker.check(!has_outside, "has_outside is True, takes False ", kWhere);
}

DenseCall take_dense(Call& call, bool is_packed) {
  const auto packing = [&]() -> std::optional<Packing> {
    if (!is_packed) return {};
    return Packing{call.take<Tensor>("cu_seqlens_q"), call.take<Tensor>("cu_seqlens_k"),
                   call.take<int64_t>("max_seqlen_q"), call.take<int64_t>("max_seqlen_k")};
  };
  return {.query = call.take<Tensor>("query"),
          .key = call.take<Tensor>("key"),
          .value = call.take<Tensor>("value"),
          .packing = packing(),
          .score = ScoreArguments(call),
          .is_causal = call.take<bool>("is_causal"),
          .allow_tf32 = call.take<bool>("allow_tf32"),
          .why_no_offsets = is_packed ? "with packed sequences" : nullptr};
}

SpatialCall take_spatial(Call& call) {
  return {.query = call.take<Tensor>("query"),
          .key = call.take<Tensor>("key"),
          .value = call.take<Tensor>("value"),
          .axes = call.take<std::vector<int64_t>>("axes"),
          .is_shared_query = call.take<bool>("is_shared_query"),
          .qk_norm = call.take<bool>("qk_norm"),
          .score = ScoreArguments(call),
          .allow_tf32 = call.take<bool>("allow_tf32")};
}

RoutedCall take_routed(Call& call) {
  return {.query = call.take<Tensor>("query"),
          .key = call.take<Tensor>("key"),
          .value = call.take<Tensor>("value"),
          .region_graph = call.take<Tensor>("region_graph"),
          .region_size = call.take<std::vector<int64_t>>("region_size"),
          .kv_region_size = call.take<std::vector<int64_t>>("kv_region_size"),
          .score = ScoreArguments(call),
          .allow_tf32 = call.take<bool>("allow_tf32")};
}

IndexedCall take_indexed(Call& call) {
  return {.query = call.take<Tensor>("query"),
          .key = call.take<Tensor>("key"),
          .value = call.take<Tensor>("value"),
          .key_index = call.take<Tensor>("key_index"),
          .key_count = call.take<OptionalTensor>("key_count"),
          .score = ScoreArguments(call),
          .allow_tf32 = call.take<bool>("allow_tf32")};
}

TransposedCall take_transposed(Call& call) {
  const Tensor query = call.take<Tensor>("query"), key = call.take<Tensor>("key");
  const Tensor value_q = call.take<Tensor>("value_q"), lse = call.take<Tensor>("lse");
  const OptionalTensor query_weight = call.take<OptionalTensor>("query_weight");
  return {.attention = {.query = query,
                        .key = key,
                        .value = key,
                        .packing = {},
                        .score = ScoreArguments(call),
                        .is_causal = call.take<bool>("is_causal"),
                        .allow_tf32 = call.take<bool>("allow_tf32"),
                        .why_no_offsets = "in a transposed attention"},
          .value_q = value_q,
          .lse = lse,
          .query_weight = query_weight};
}

ScoreFields<bool> take_needed(Call& call, const ScoreArguments& score) {
  ScoreFields<bool> needed;
  for_each_term([&](const char* name, bool& is_needed,
                    const OptionalTensor& term) { is_needed = call.take<bool>(name, "need_") && term; },
                needed, score.terms);
  return needed;
}

void give_gradients(Call& call, const ScoreFields<OptionalTensor>& grads, const Tensor& lse) {
  const auto give = [&](const char* name, const OptionalTensor& grad) {
    call.give(grad ? *grad : none_like(lse), name, "grad_");
  };
  for_each_term(give, grads);
}

BackwardCall::BackwardCall(Call& call, const ScoreArguments& score)
    : grad_out(call.take<Tensor>("grad_out")),
      grad_lse(call.take<OptionalTensor>("grad_lse")),
      out(call.take<Tensor>("out")),
      lse(call.take<Tensor>("lse")),
      needed(take_needed(call, score)) {}

void BackwardCall::check(const Checker& checker, const Tensor& query, const std::vector<int64_t>& out_sizes) {
  const std::vector<int64_t> lse_sizes(out_sizes.begin(), out_sizes.end() - 1);
  const ScalarType type = query.scalar_type(), statistics = statistics_type(type);
  for (const auto& [name, t] : {std::pair{"grad_out", &grad_out}, {"out", &out}}) {
    checker.tensor(name, *t, query, type, out_sizes);
    *t = with_unit_last_stride(*t);
  }
  for (const auto& [name, t] : {std::pair{"lse", &lse}, {"grad_lse", grad_lse ? &*grad_lse : nullptr}}) {
    if (!t) continue;
    checker.tensor(name, *t, query, statistics, lse_sizes);
    *t = as_contiguous(*t);
  }
}

}  // namespace vitkernels
