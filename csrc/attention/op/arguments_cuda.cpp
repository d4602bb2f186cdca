#include "attention/op/arguments_cuda.h"

#include "cuda/read_integers.h"

namespace vitkernels {
DevicePolicy device_policy() {
  return {.read = device_integers_reader(),
          .tables = TablesAs::kGiven,
          .max_head_dim = kMaxCudaHeadDim,
          .takes_float64 = false};
}

void fill_on_device(const AttentionArguments& args, const Tensor& out, const Tensor& lse, AttentionCudaParams& params) {
  args.fill(params.problem);
  params.out = token_tensor(out);
  params.lse = static_cast<float*>(const_cast<void*>(lse.const_data_ptr()));
  params.allow_tf32 = args.allow_tf32;
  if (args.score.head_map) params.head_map.kv_head_of = integers(*args.score.head_map);
  if (!args.cu_seqlens_q) return;
  params.packing = {integers(*args.cu_seqlens_q), integers(*args.cu_seqlens_k), args.query.size(0), args.key.size(0)};
}

}  // namespace vitkernels
