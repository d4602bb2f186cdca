#include "attention/arguments_cuda.h"

#include <utility>

namespace vitkernels {
namespace {

DeviceIntegers integers(const Tensor& t) { return {t.const_data_ptr(), t.scalar_type() == ScalarType::Long}; }

}  // namespace

AttentionArguments arguments_on_device(const Checker& checker, const Tensor& query, const Tensor& key,
                                       const Tensor& value, ScoreArguments score, const OptionalTensor& head_map,
                                       bool is_causal) {
  const GridArguments on_grid = std::exchange(score.on_grid, {});
  AttentionArguments args(checker, query, key, value, std::move(score), head_map, is_causal, std::nullopt,
                                IntegersOn::kDevice);
  args.on_grid = GridScore(checker, on_grid, query, key, statistics_type(args.dtype), TablesAs::kGiven);
  checker.check(args.dtype == DType::kBFloat16 || args.dtype == DType::kFloat16, "query is ",
                dtype_text(args.query.scalar_type()), ", takes bfloat16 or float16 on a GPU");
  checker.check(args.head_dim <= kMaxCudaHeadDim, "query has head dimension ", args.head_dim, ", takes at most ",
                kMaxCudaHeadDim, " on a GPU");
  return args;
}

void fill_on_device(const AttentionArguments& args, const Tensor& out, const Tensor& lse, AttentionCudaParams& params) {
  args.fill(params);
  params.kv_head_of = params.first_head = params.head_list = nullptr;  // those are on the host
  params.out = token_tensor(out);
  params.lse = const_cast<void*>(lse.const_data_ptr());
  if (args.head_map) params.head_map = integers(*args.head_map);
}

}  // namespace vitkernels
