// The operator vitkernels::attention on a GPU.
#include "attention/arguments.h"
#include "attention/attention_cuda.h"
#include "cuda/device.h"

namespace vitkernels {
namespace {

bool is_aligned(const Tensor& t, int64_t element_bytes) {
  constexpr int64_t kBytes = 16;
  bool aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kBytes == 0;
  for (int64_t i = 0; i < t.dim() - 1; ++i) aligned = aligned && t.stride(i) * element_bytes % kBytes == 0;
  return aligned && t.size(t.dim() - 1) * element_bytes % kBytes == 0;
}

std::tuple<Tensor, Tensor> attention_cuda(const Tensor& query, const Tensor& key, const Tensor& value, double scale,
                                          OptionalTensor head_scale, OptionalTensor bias, OptionalTensor key_bias,
                                          OptionalTensor multiplier, OptionalTensor head_map, bool is_causal) {
  const Checker checker("attention");
  const AttentionArguments args(checker, query, key, value, {scale, head_scale, bias, key_bias, multiplier}, head_map,
                                is_causal, std::nullopt, IntegersOn::kDevice);
  checker.check(args.dtype == DType::kBFloat16 || args.dtype == DType::kFloat16, "query is ",
                dtype_text(query.scalar_type()), ", takes bfloat16 or float16 on a GPU");
  checker.check(args.head_dim <= kMaxCudaHeadDim, "query has head dimension ", args.head_dim, ", takes at most ",
                kMaxCudaHeadDim, " on a GPU");
  Tensor out = empty_as(args.query, args.out_sizes(), args.query.scalar_type());
  Tensor lse = empty_as(args.query, args.lse_sizes(), ScalarType::Float);

  AttentionCudaParams params;
  args.fill(params);
  params.kv_head_of = params.first_head = params.head_list = nullptr;  // those are on the host
  params.out = token_tensor(out);
  params.lse = lse.mutable_data_ptr();
  if (args.head_map) {
    params.head_map = args.head_map->const_data_ptr();
    params.head_map_is_int64 = args.head_map->scalar_type() == ScalarType::Long;
  }
  constexpr int64_t kElementBytes = 2;
  params.query_is_aligned = is_aligned(args.query, kElementBytes);
  params.key_is_aligned = is_aligned(args.key, kElementBytes);
  params.value_is_aligned = is_aligned(args.value, kElementBytes);
  params.out_is_aligned = is_aligned(out, kElementBytes);
  if (lse.numel() > 0) {
    const OnDevice device(query);
    check_cuda(checker, launch_attention(params, device.stream()));
  }
  return {out, lse};
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CUDA, m) { m.impl("attention", TORCH_BOX(&vitkernels::attention_cuda)); }
