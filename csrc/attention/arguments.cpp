#include "attention/arguments.h"

#include <cmath>

namespace vitkernels {
namespace {

constexpr int64_t kMaxHeads = 1 << 20;  // the head map is a table in memory

// Strides of a tensor broadcast to the last `rank` of (batch, head, query, key); a rank of 3 has no query axis.
ScoreStrides score_strides(const Tensor& t, int64_t rank, bool contiguous) {
  int64_t strides[4] = {};
  int64_t running = 1;
  for (int64_t i = t.dim() - 1; i >= 0; --i) {
    strides[4 - t.dim() + i] = t.size(i) == 1 ? 0 : contiguous ? running : t.stride(i);
    running *= t.size(i);
  }
  if (rank == 3) return {strides[1], strides[2], 0, strides[3]};
  return {strides[0], strides[1], strides[2], strides[3]};
}

void check_score_term(const Checker& checker, const char* name, const OptionalTensor& term, const Tensor& query,
                      ScalarType type, const std::vector<int64_t>& target, const char* takes) {
  if (!term) return;
  const Tensor& t = *term;
  checker.strided_like(name, t, query);
  checker.dtype(name, t, type);
  bool fits = t.dim() <= int64_t(target.size());
  for (int64_t i = 0; fits && i < t.dim(); ++i) {
    fits = t.size(i) == 1 || t.size(i) == target[target.size() - t.dim() + i];
  }
  std::ostringstream shape;
  for (size_t i = 0; i < target.size(); ++i) shape << (i ? ", " : "") << target[i];
  checker.check(fits, name, " has shape ", shape_text(t), ", takes one that broadcasts to (", shape.str(),
                ") = ", takes);
}

OptionalTensor with_kernel_strides(const OptionalTensor& term) {
  if (!term || term->dim() == 0) return term;
  const int64_t last = term->dim() - 1;
  const bool fine = term->size(last) == 1 || term->stride(last) == 1 || term->stride(last) == 0;
  return fine ? term : OptionalTensor(torch::stable::contiguous(*term));
}

ScoreTerm score_term(const OptionalTensor& term, int64_t rank) {
  if (!term) return {};
  ScoreTerm result;
  result.data = term->const_data_ptr();
  result.strides = score_strides(*term, rank, false);
  return result;
}

std::vector<int64_t> read_head_map(const Checker& checker, const OptionalTensor& head_map, const Tensor& query,
                                   int64_t heads, int64_t kv_heads) {
  std::vector<int64_t> map(heads);
  if (!head_map) {
    checker.check(kv_heads > 0 && heads % kv_heads == 0, "key has ", kv_heads, " heads, takes a divisor of query's ",
                  heads, " (or a head_map)");
    for (int64_t h = 0; h < heads; ++h) map[h] = h / (heads / kv_heads);
    return map;
  }
  checker.strided_like("head_map", *head_map, query);
  checker.shape("head_map", *head_map, {heads});
  const ScalarType type = head_map->scalar_type();
  checker.check(type == ScalarType::Long || type == ScalarType::Int, "head_map is ", dtype_text(type),
                ", takes int64 or int32");
  for (int64_t h = 0; h < heads; ++h) {
    const int64_t at = h * head_map->stride(0);
    map[h] = type == ScalarType::Long ? static_cast<const int64_t*>(head_map->const_data_ptr())[at]
                                      : static_cast<const int32_t*>(head_map->const_data_ptr())[at];
    checker.check(map[h] >= 0 && map[h] < kv_heads, "head_map[", h, "] is ", map[h], ", takes 0 to ", kv_heads - 1);
  }
  return map;
}

}  // namespace

AttentionArguments::AttentionArguments(const Checker& checker, const Tensor& query, const Tensor& key,
                                       const Tensor& value, ScoreArguments score, const OptionalTensor& head_map,
                                       bool is_causal)
    : query(query), key(key), value(value), score(std::move(score)), is_causal(is_causal) {
  checker.rank("query", query, 4, "(B, Nq, heads, d)");
  checker.rank("key", key, 4, "(B, Nk, kv_heads, d)");
  checker.rank("value", value, 4, "(B, Nk, kv_heads, dv)");
  dtype = checker.element_type("query", query);
  for (const auto& [name, t] : {std::pair{"query", &query}, {"key", &key}, {"value", &value}}) {
    checker.strided_like(name, *t, query);
    checker.dtype(name, *t, query.scalar_type());
  }
  batch = query.size(0), num_queries = query.size(1), heads = query.size(2), head_dim = query.size(3);
  num_keys = key.size(1), kv_heads = key.size(2), value_dim = value.size(3);
  checker.size("key", key, 0, batch, "query's batch size");
  checker.size("value", value, 0, batch, "query's batch size");
  checker.size("value", value, 1, num_keys, "key's number of tokens");
  checker.size("value", value, 2, kv_heads, "key's number of heads");
  checker.size("key", key, 3, head_dim, "query's head dimension");
  checker.check(heads > 0 && heads <= kMaxHeads, "query has ", heads, " heads, takes 1 to ", kMaxHeads);
  checker.check(head_dim > 0, "query has head dimension 0, takes at least 1");
  checker.check(value_dim > 0, "value has head dimension 0, takes at least 1");
  kv_head_of = read_head_map(checker, head_map, query, heads, kv_heads);

  ScoreArguments& s = this->score;
  checker.check(std::isfinite(s.scale), "scale is ", s.scale, ", takes a finite number");
  const ScalarType type = statistics_type(dtype);
  if (s.head_scale) {
    checker.strided_like("scale", *s.head_scale, query);
    checker.dtype("scale", *s.head_scale, type);
    checker.shape("scale", *s.head_scale, {heads});
    s.head_scale = torch::stable::contiguous(*s.head_scale);
  }
  const std::vector<int64_t> full{batch, heads, num_queries, num_keys};
  check_score_term(checker, "bias", s.bias, query, type, full, "(B, heads, Nq, Nk)");
  check_score_term(checker, "multiplier", s.multiplier, query, type, full, "(B, heads, Nq, Nk)");
  check_score_term(checker, "key_bias", s.key_bias, query, type, {batch, heads, num_keys}, "(B, heads, Nk)");

  this->query = with_unit_last_stride(query);
  this->key = with_unit_last_stride(key);
  this->value = with_unit_last_stride(value);
  s.bias = with_kernel_strides(s.bias);
  s.multiplier = with_kernel_strides(s.multiplier);
  s.key_bias = with_kernel_strides(s.key_bias);
}

void AttentionArguments::fill(AttentionParams& params) const {
  params.dtype = dtype;
  params.batch = batch, params.heads = heads, params.kv_heads = kv_heads;
  params.head_dim = head_dim, params.value_dim = value_dim;
  params.kv_head_of = kv_head_of.data();
  params.pattern.axis[0] = {.num_queries = num_queries, .num_keys = num_keys, .is_causal = is_causal};
  params.score = {.scale = score.scale,
                  .head_scale = score.head_scale ? score.head_scale->const_data_ptr() : nullptr,
                  .multiplier = score_term(score.multiplier, 4),
                  .bias = score_term(score.bias, 4),
                  .key_bias = score_term(score.key_bias, 3)};
  params.query = token_tensor(query);
  params.key = token_tensor(key);
  params.value = token_tensor(value);
}

TokenTensor token_tensor(const Tensor& t) {
  return {.data = const_cast<void*>(t.const_data_ptr()),
          .batch_stride = t.stride(0),
          .token_stride = t.stride(1),
          .head_stride = t.stride(2)};
}

Tensor attach_gradient(ScoreTerm& term, const Tensor& tensor, int64_t rank) {
  Tensor grad = zeros_as(tensor, sizes_of(tensor), tensor.scalar_type());
  term.grad = grad.mutable_data_ptr();
  term.grad_strides = score_strides(tensor, rank, true);
  return grad;
}

}  // namespace vitkernels
