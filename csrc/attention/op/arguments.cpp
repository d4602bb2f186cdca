#include "attention/op/arguments.h"

#include <cmath>

#include "attention/cpu/tile_sizes.h"

namespace vitkernels {

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
  checker.tensor(name, t, query, type);
  bool fits = t.dim() <= int64_t(target.size());
  for (int64_t i = 0; fits && i < t.dim(); ++i) {
    fits = t.size(i) == 1 || t.size(i) == target[target.size() - t.dim() + i];
  }
  checker.check(fits, name, " has shape ", Shape(t), ", takes one that broadcasts to ", Shape(target), " = ", takes);
}

namespace {

Tensor with_kernel_strides(const Tensor& term) {
  const int64_t last = term.dim() - 1;
  const bool is_fine = last < 0 || term.size(last) == 1 || term.stride(last) == 1 || term.stride(last) == 0;
  return is_fine ? term : as_contiguous(term);
}

}  // namespace

AttentionArguments::AttentionArguments(const Checker& checker, DenseCall call, const DevicePolicy& policy)
    : query(call.query),
      key(call.key),
      value(call.value),
      score(std::move(call.score)),
      is_causal(call.is_causal),
      allow_tf32(call.allow_tf32) {
  score.refuse_map(checker);
  if (call.why_no_offsets) score.refuse(checker, kOffsetTerms, call.why_no_offsets);
  check_tokens(checker, call.packing.has_value(), policy);
  if (call.packing) check_packing(checker, *call.packing, policy.read);
  heads_of = HeadMap(checker, score.head_map, query, heads, kv_heads, policy.read);
  if (score.head_map) score.head_map = as_contiguous(*score.head_map);
  check_score(checker, policy);
  query = with_unit_last_stride(query);
  key = with_unit_last_stride(key);
  value = with_unit_last_stride(value);
  for_each_broadcast_term(
      [&](const char*, Broadcast, OptionalTensor& term) {
        if (term) term = with_kernel_strides(*term);
      },
      score.terms);
  if (policy.read) count_tasks();
}

void AttentionArguments::count_tasks() {
  if (query_offsets.empty()) {
    num_tasks = batch * heads * forward_query_blocks({.num_queries = num_queries, .num_keys = num_keys});
    return;
  }
  first_task.push_back(0);
  for (int64_t i = 0; i < batch; ++i) {
    const Axis axis{.num_queries = query_offsets[i + 1] - query_offsets[i],
                    .num_keys = key_offsets[i + 1] - key_offsets[i]};
    first_task.push_back(first_task.back() + heads * forward_query_blocks(axis));
  }
  num_tasks = first_task.back();
}

HeadMap::HeadMap(const Checker& checker, const OptionalTensor& head_map, const Tensor& query, int64_t heads,
                 int64_t kv_heads, ReadIntegers read)
    : kv_head_of(read_head_map(checker, head_map, query, heads, kv_heads, read)) {
  if (!read) return;
  // The query heads of each kv head, in order: a counting sort of kv_head_of.
  first_head.assign(kv_heads + 1, 0);
  for (const int64_t kv_head : kv_head_of) ++first_head[kv_head + 1];
  for (int64_t g = 0; g < kv_heads; ++g) first_head[g + 1] += first_head[g];
  head_list.resize(heads);
  std::vector<int64_t> next(first_head);
  for (int64_t h = 0; h < heads; ++h) head_list[next[kv_head_of[h]]++] = h;
}

void AttentionArguments::check_tokens(const Checker& checker, bool is_packed, const DevicePolicy& policy) {
  const int64_t rank = is_packed ? 3 : 4, tokens = rank - 3;  // the axis of tokens; heads and dim follow
  checker.rank("query", query, rank, is_packed ? "(tokens, heads, d)" : "(B, Nq, heads, d)");
  checker.rank("key", key, rank, is_packed ? "(tokens, kv_heads, d)" : "(B, Nk, kv_heads, d)");
  checker.rank("value", value, rank, is_packed ? "(tokens, kv_heads, dv)" : "(B, Nk, kv_heads, dv)");
  check_tensors(checker, *this, tokens + 1);
  checker.check(policy.takes_float64 || dtype != DType::kFloat64,
                "query is float64, takes float32, bfloat16 or float16 on a GPU");
  checker.check(head_dim <= policy.max_head_dim, "query has head dimension ", head_dim, ", takes at most ",
                policy.max_head_dim, " on a GPU");
  num_queries = query.size(tokens), num_keys = key.size(tokens);
  checker.size("value", value, tokens, num_keys, "key's number of tokens");
  if (is_packed) return;
  batch = query.size(0);
  checker.size("key", key, 0, batch, "query's batch size");
  checker.size("value", value, 0, batch, "query's batch size");
}

void AttentionArguments::check_packing(const Checker& checker, const Packing& packing, ReadIntegers read) {
  check_packing_of(checker, packing, query);
  cu_seqlens_q = as_contiguous(packing.cu_seqlens_q);
  cu_seqlens_k = as_contiguous(packing.cu_seqlens_k);
  if (read) {
    query_offsets = read_offsets(checker, "cu_seqlens_q", *cu_seqlens_q, num_queries, packing.max_seqlen_q, read);
    key_offsets = read_offsets(checker, "cu_seqlens_k", *cu_seqlens_k, num_keys, packing.max_seqlen_k, read);
  }
  batch = cu_seqlens_q->size(0) - 1;
  num_queries = packing.max_seqlen_q, num_keys = packing.max_seqlen_k;
}

void check_scale(const Checker& checker, ScoreArguments& score, const Tensor& query, int64_t heads, ScalarType type) {
  const bool is_finite = type == ScalarType::Double ? std::isfinite(score.scale) : std::isfinite(float(score.scale));
  checker.check(is_finite, "scale is ", score.scale, ", takes a finite number in ", dtype_text(type));
  OptionalTensor& head_scale = score.terms.head_scale;
  if (!head_scale) return;
  checker.tensor("scale", *head_scale, query, type, {heads});
  head_scale = as_contiguous(*head_scale);
}

void AttentionArguments::check_score(const Checker& checker, const DevicePolicy& policy) {
  const ScalarType type = statistics_type(dtype);
  check_scale(checker, score, query, heads, type);
  for_each_broadcast_term(
      [&](const char* name, Broadcast to, const OptionalTensor& term) {
        if (!term) return;
        std::vector<int64_t> sizes{batch, heads, num_queries, num_keys};
        if (to.rank == 3) sizes.erase(sizes.begin() + 2);
        check_score_term(checker, name, term, query, type, sizes,
                         to.rank == 3 ? "(B, heads, Nk)" : "(B, heads, Nq, Nk)");
      },
      score.terms);
  by_offset = OffsetScore(checker, score, query, key, type, policy.tables);
}

std::vector<int64_t> AttentionArguments::out_sizes() const {
  std::vector<int64_t> sizes = lse_sizes();
  sizes.push_back(value_dim);
  return sizes;
}

std::vector<int64_t> AttentionArguments::lse_sizes() const {
  std::vector<int64_t> sizes = sizes_of(query);
  sizes.pop_back();
  return sizes;
}

void AttentionArguments::fill(Problem& problem) const {
  problem.dtype = dtype;
  problem.batch = batch, problem.heads = heads, problem.kv_heads = kv_heads;
  problem.head_dim = head_dim, problem.value_dim = value_dim;
  problem.axis = {.num_queries = num_queries, .num_keys = num_keys, .is_causal = is_causal};
  const ScoreFields<OptionalTensor>& terms = score.terms;
  problem.score.scale = score.scale;
  if (terms.head_scale) problem.score.head_scale = terms.head_scale->const_data_ptr();
  for_each_broadcast_term(
      [](const char*, Broadcast to, const OptionalTensor& given, ScoreTerm& term) {
        if (given) term.data = given->const_data_ptr(), term.strides = score_strides(*given, to.rank, false);
      },
      terms, problem.score);
  by_offset.fill(problem.score.by_offset);
  problem.query = token_tensor(query);
  problem.key = token_tensor(key);
  problem.value = token_tensor(value);
}

void AttentionArguments::fill(AttentionParams& params) const {
  fill(params.problem);
  params.groups = heads_of.view();
  if (query_offsets.empty()) return;
  params.packing = {query_offsets.data(), key_offsets.data(), first_task.empty() ? nullptr : first_task.data()};
}

Tensor attach_gradient(ScoreTerm& term, const Tensor& tensor, int64_t rank, const Problem& problem) {
  const ScoreStrides strides = score_strides(tensor, rank, true);
  term.grad_strides = strides;
  // Few numbers add up in float32 as exactly as they were computed.
  constexpr int64_t kMaxFloatSums = 8;
  const int64_t sums = (strides.batch == 0 ? problem.batch : 1) * (strides.head == 0 ? problem.heads : 1) *
                       (strides.query == 0 ? problem.num_queries() : 1) * (strides.key == 0 ? problem.num_keys() : 1);
  term.grad_is_double = sums > kMaxFloatSums;
  Tensor grad = zeros_as(tensor, sizes_of(tensor), term.grad_is_double ? ScalarType::Double : tensor.scalar_type());
  term.grad = grad.mutable_data_ptr();
  return grad;
}

}  // namespace vitkernels
