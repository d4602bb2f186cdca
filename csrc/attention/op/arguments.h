// From the tensors of an attention operator to the Params of its kernels, with all checks.
#pragma once

#include "attention/dense.h"
#include "attention/op/offset_arguments.h"
#include "common/token_argument.h"

namespace vitkernels {

// Which kv head a query head reads, and the inverse (dense.h). Empty if the values stay on a device.
struct HeadMap {
  HeadMap() = default;
  HeadMap(const Checker& checker, const OptionalTensor& head_map, const Tensor& query, int64_t heads, int64_t kv_heads,
          ReadIntegers read = read_host_integers);

  HostHeadGroups view() const { return {kv_head_of.data(), first_head.data(), head_list.data()}; }

  std::vector<int64_t> kv_head_of, first_head, head_list;
};

// Checks what query, key and value of every attention have in common: their sizes before and behind the axes of tokens,
// of which the last is before `heads_axis`. Takes these sizes and the dtype.
template <class Arguments>
void check_tensors(const Checker& checker, Arguments& args, int64_t heads_axis) {
  const Tensor &query = args.query, &key = args.key, &value = args.value;
  args.dtype = checker.element_type("query", query);
  for (const auto& [name, t] : {std::pair{"query", &query}, {"key", &key}, {"value", &value}}) {
    checker.tensor(name, *t, query, query.scalar_type());
  }
  args.heads = query.size(heads_axis), args.head_dim = query.size(heads_axis + 1);
  args.kv_heads = key.size(heads_axis), args.value_dim = value.size(heads_axis + 1);
  checker.size("value", value, heads_axis, args.kv_heads, "key's number of heads");
  checker.size("key", key, heads_axis + 1, args.head_dim, "query's head dimension");
  checker.check(args.heads > 0 && args.heads <= kMaxHeads, "query has ", args.heads, " heads, takes 1 to ", kMaxHeads);
  checker.check(args.kv_heads <= kMaxHeads, "key has ", args.kv_heads, " heads, takes at most ", kMaxHeads);
  checker.check(args.head_dim > 0, "query has head dimension 0, takes at least 1");
  checker.check(args.value_dim > 0, "value has head dimension 0, takes at least 1");
}

// Checks the scale, and the scale of each head, which is made contiguous.
void check_scale(const Checker& checker, ScoreArguments& score, const Tensor& query, int64_t heads, ScalarType type);

// What differs between devices in the checks and in what kernels read.
struct DevicePolicy {
  ReadIntegers read = read_host_integers;
  TablesAs tables = TablesAs::kReversed;
  int64_t max_head_dim = std::numeric_limits<int64_t>::max();
  bool takes_float64 = true;
};

// Owns what Params points to. Tensors are (B, N, heads, dim), or (tokens, heads, dim) with a packing.
class AttentionArguments {
 public:
  AttentionArguments(const Checker& checker, DenseCall call, const DevicePolicy& policy = {});

  void fill(Problem& problem) const;
  void fill(AttentionParams& params) const;  // on the host
  std::vector<int64_t> out_sizes() const;
  std::vector<int64_t> lse_sizes() const;

  Tensor query, key, value;
  OptionalTensor cu_seqlens_q, cu_seqlens_k;  // contiguous
  ScoreArguments score;
  OffsetScore by_offset;
  DType dtype;
  bool is_causal, allow_tf32;
  int64_t batch, num_queries, num_keys, heads, kv_heads, head_dim, value_dim;  // of the longest sequence
  int64_t num_tasks;                                                           // of the forward on the CPU

 private:
  void check_tokens(const Checker& checker, bool is_packed, const DevicePolicy& policy);
  void check_packing(const Checker& checker, const Packing& packing, ReadIntegers read);
  void check_score(const Checker& checker, const DevicePolicy& policy);
  void count_tasks();

  HeadMap heads_of;
  std::vector<int64_t> query_offsets, key_offsets, first_task;
};

// Strides of a tensor that is broadcast to the last `rank` of (batch, head, query, key); a rank of 3 has no query axis.
// `contiguous`: as if the tensor were contiguous.
ScoreStrides score_strides(const Tensor& t, int64_t rank, bool contiguous);

// Checks that a term broadcasts to `target`, which `takes` names.
void check_score_term(const Checker& checker, const char* name, const OptionalTensor& term, const Tensor& query,
                      ScalarType type, const std::vector<int64_t>& target, const char* takes);

// The gradient of a score term: zero, in the term's own shape. Sums over batch, heads or tokens are float64.
Tensor attach_gradient(ScoreTerm& term, const Tensor& tensor, int64_t rank, const Problem& problem);

}  // namespace vitkernels
