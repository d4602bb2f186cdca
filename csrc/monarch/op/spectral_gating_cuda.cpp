// The operators vitkernels::spectral_gating and its backward on a GPU.
#include "cuda/device.h"
#include "monarch/cuda/launches.h"
#include "monarch/cuda/spectral_gating.h"
#include "monarch/op/spectral_gating_arguments.h"

namespace vitkernels {
namespace {

// One call's kernels.
class SpectralGatingOnDevice {
 public:
  SpectralGatingOnDevice(const Checker& checker, const SpectralGatingArguments& args)
      : checker_(checker), args_(args), device_(args.x) {
    const SpectralGatingProblem& p = args.problem;
    checker.check(p.dtype != DType::kFloat64, "x is float64, takes float32, bfloat16 or float16 on a GPU");
    checker.check(p.rows <= kMaxSpectralPositions / p.columns, "x has shape ", Shape{sizes_of(args.x)},
                  ", takes at most ", kMaxSpectralPositions, " positions of a map on a GPU");
    for (const auto& [name, length] : {std::pair{"rows", p.rows}, {"columns", p.columns}}) {
      const int64_t prime = MixedRadix(length).max_prime;
      checker.check(prime <= kMaxSpectralPrime, "x has ", length, " ", name, ", a multiple of ", prime,
                    ", takes prime factors up to ", kMaxSpectralPrime, " on a GPU");
    }
  }

  void gate(const Tensor& out) const { run(planned(args_.x, out)); }

  // `grad_weight` may be none.
  void differentiate(const Tensor& grad_out, const Tensor& grad_x, const Tensor& grad_weight) const {
    SpectralGatingCudaParams params = planned(grad_out, grad_x, grad_weight.numel() > 0);
    params.is_conjugate = true;
    if (!params.saved_x.data) return run(params);
    const Tensor parts = empty_as(args_.x, {params.shares * params.weight_elements()}, ScalarType::Float);
    params.parts = static_cast<float*>(parts.mutable_data_ptr());
    run(params);
    const MonarchSumCudaParams sums{.splits = params.shares,
                                    .elements = params.weight_elements(),
                                    .parts = params.parts,
                                    .out = grad_weight.mutable_data_ptr()};
    if (args_.problem.is_weight_wide) {
      check_cuda(checker_, MonarchLaunches<DType::kFloat32>::sum(sums, device_.stream()));
    } else {
      with_dtype([&]<DType kDType>() { check_cuda(checker_, MonarchLaunches<kDType>::sum(sums, device_.stream())); });
    }
  }

 private:
  template <class Function>
  void with_dtype(Function&& f) const {
    switch (args_.problem.dtype) {
      case DType::kFloat32: return f.template operator()<DType::kFloat32>();
      case DType::kBFloat16: return f.template operator()<DType::kBFloat16>();
      default: return f.template operator()<DType::kFloat16>();
    }
  }

  SpectralGatingCudaParams planned(const Tensor& x, const Tensor& out, bool needs_weight = false) const {
    const SpectralGatingProblem& p = args_.problem;
    SpectralGatingCudaParams params{.batch = p.batch,
                                    .channels = p.channels,
                                    .rows = int(p.rows),
                                    .columns = int(p.columns),
                                    .x = SpectralGatingArguments::maps(x),
                                    .out = SpectralGatingArguments::maps(out),
                                    .saved_x = needs_weight ? p.x : Maps{},
                                    .weight = p.weight,
                                    .is_weight_wide = p.is_weight_wide};
    with_dtype([&]<DType kDType>() {
      params.shares = SpectralGatingLaunches<kDType>::shares(params);
      check_cuda(checker_, SpectralGatingLaunches<kDType>::plan(params));
    });
    checker_.check(params.shared_bytes <= params.shared_limit, "x has maps of ", p.rows, " x ", p.columns, ", whose ",
                   needs_weight ? "gradients need " : "spectra need ", params.shared_bytes,
                   " bytes of shared memory, takes at most ", params.shared_limit, " on this GPU");
    return params;
  }

  void run(const SpectralGatingCudaParams& params) const {
    with_dtype(
        [&]<DType kDType>() { check_cuda(checker_, SpectralGatingLaunches<kDType>::run(params, device_.stream())); });
  }

  const Checker& checker_;
  const SpectralGatingArguments& args_;
  OnDevice device_;
};

void spectral_gating(Call& call) {
  const SpectralGatingArguments args(call);
  const SpectralGatingOnDevice device(call.checker, args);
  const Tensor out = empty_as(args.x);
  if (!args.is_empty()) device.gate(out);
  call.give(out, "");
}

void spectral_gating_backward(Call& call) {
  const SpectralGatingBackwardArguments backward(call);
  const SpectralGatingOnDevice device(call.checker, backward.args);
  if (!backward.args.is_empty()) device.differentiate(backward.grad_out, backward.grad_x, backward.grad_weight);
  backward.give(call);
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CUDA, m) {
  using namespace vitkernels;
  m.impl("spectral_gating", &boxed<"spectral_gating", spectral_gating>);
  m.impl("spectral_gating_backward", &boxed<"spectral_gating_backward", spectral_gating_backward>);
}
