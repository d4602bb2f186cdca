// The operators vitkernels::decayed_linear_attention and vitkernels::decayed_linear_attention_backward on a GPU.
#include "linear_attention/cuda/decayed_launches.h"
#include "linear_attention/op/decayed_arguments.h"
#include "linear_attention/op/on_device.h"

namespace vitkernels {
namespace {

class DecayedOnDevice {
 public:
  // float16 holds no sums over many tokens; TF32 has its bits, and float's range.
  DecayedOnDevice(const Checker& checker, DecayedArguments& args)
      : checker_(checker), args_(args), device_(args.query) {
    check_on_device(checker, args.dtype, "query or value", std::max(args.query.size(3), args.value.size(3)));
    if (args.dtype != DType::kFloat16) return;
    for (Tensor* t : {&args.query, &args.key, &args.value}) *t = torch::stable::to(*t, ScalarType::Float);
    args.dtype = DType::kFloat32, args.allow_tf32 = true;
  }

  Tensor run(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const void* initial,
             int64_t exponent, bool reversed) const {
    const Tensor query = with_near_tokens(q), key = with_near_tokens(k), value = with_near_tokens(v);
    const Tensor state = args_.state_of(q, v);
    DecayedParams params = args_.params(query, key, value, out, initial, exponent, reversed, state);
    const int64_t splits = decayed_splits(params);
    if (splits == 1) {
      launch(params, splits);
      return state;
    }
    const Tensor states = empty_as(q, {splits * state.numel()}, ScalarType::Float);
    params.chunk_states = floats(states);
    params.stage = DecayedStage::kSum;
    launch(params, splits);
    check_cuda(checker_, launch_decayed_prefix(params, splits, device_.stream()));
    params.stage = DecayedStage::kRead;
    launch(params, splits);
    return state;
  }

  void decay_once(const Tensor& state) const {
    DecayedParams params;
    params.batch = state.size(0), params.heads = state.size(1);
    params.head_dim = state.size(2), params.value_dim = state.size(3);
    params.decay = args_.decay.const_data_ptr();
    check_cuda(checker_, launch_decay_once(params, floats(state), device_.stream()));
  }

 private:
  void launch(const DecayedParams& params, int64_t splits) const {
    const auto run = [&](auto launches) { return launches.run(params, splits, args_.allow_tf32, device_.stream()); };
    check_cuda(checker_, args_.dtype == DType::kFloat32 ? run(DecayedLaunches<DType::kFloat32>{})
                                                        : run(DecayedLaunches<DType::kBFloat16>{}));
  }

  const Checker& checker_;
  const DecayedArguments& args_;
  OnDevice device_;
};

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CUDA, m) {
  using namespace vitkernels;
  m.impl("decayed_linear_attention", &boxed<"decayed_linear_attention", decayed_forward<DecayedOnDevice>>);
  m.impl("decayed_linear_attention_backward",
         &boxed<"decayed_linear_attention_backward", decayed_backward<DecayedOnDevice>>);
}
