#include "attention/op/arguments_cuda.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cuda/device.h"

namespace vitkernels {
namespace {

bool values_are_checked() {
  static const bool checked = [] {
    const char* option = std::getenv("VITKERNELS_CHECK");
    const std::string wanted = option ? option : "";
    if (wanted.empty() || wanted == "0" || wanted == "1") return wanted == "1";
    throw std::runtime_error("vitkernels: VITKERNELS_CHECK is '" + wanted + "', takes 0 or 1");
  }();
  return checked;
}

std::vector<int64_t> read_device_integers(const Checker& checker, const Tensor& t) {
  const Tensor values = as_contiguous(t);
  const OnDevice device(t);
  const auto read = [&]<class T>(T) {
    std::vector<T> copy(t.numel());
    check_cuda(checker, cudaMemcpyAsync(copy.data(), values.const_data_ptr(), copy.size() * sizeof(T),
                                        cudaMemcpyDeviceToHost, device.stream()));
    check_cuda(checker, cudaStreamSynchronize(device.stream()));
    return std::vector<int64_t>(copy.begin(), copy.end());
  };
  return t.scalar_type() == ScalarType::Long ? read(int64_t{}) : read(int32_t{});
}

DeviceIntegers integers(const Tensor& t) { return {t.const_data_ptr(), t.scalar_type() == ScalarType::Long}; }

}  // namespace

DevicePolicy device_policy() {
  return {.read = values_are_checked() ? read_device_integers : nullptr,
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
