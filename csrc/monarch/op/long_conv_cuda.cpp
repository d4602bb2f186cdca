// The operators vitkernels::long_conv and its backward on a GPU.
#include "cuda/device.h"
#include "monarch/cuda/long_conv_launches.h"
#include "monarch/op/long_conv_arguments.h"

namespace vitkernels {
namespace {

// One call's kernels.
class LongConvOnDevice {
 public:
  LongConvOnDevice(const Checker& checker, const LongConvArguments& args)
      : checker_(checker), args_(args), device_(args.x) {
    const LongConvProblem& p = args.problem;
    checker.check(p.dtype != DType::kFloat64, "x is float64, takes float32, bfloat16 or float16 on a GPU");
    constexpr int64_t kMaxLength = int64_t(1) << LongConvCudaPlan::kMaxLogLength;
    checker.check(p.length <= kMaxLength, "x has ", p.length, " positions, takes at most ", kMaxLength, " on a GPU");
    params_.set(p, {p.length, p.channels, args.channels_last, p.dtype == DType::kFloat32 ? 4 : 2});
  }

  void convolve(const Tensor& out) {
    params_.out = args_.signals(out);
    const Tensor points = outer_points(params_.batch);
    params_.points = data(points);
    with_launches([&](auto launches) {
      params_.shares = launches.shares(params_, 0);
      prepare(launches, [&] { return launches.convolve(params_, device_.stream()); });
    });
  }

  void differentiate(const LongConvBackwardArguments& backward) {
    params_.grad_out = args_.signals(backward.grad_out), params_.grad_x = args_.signals(backward.grad_x);
    params_.grad_filter = backward.of_grad_filter();
    const Tensor points = outer_points(backward.needs_filter ? params_.batch : 0);
    const Tensor grad_points = outer_points(params_.batch);
    params_.points = data(points), params_.grad_points = data(grad_points);
    with_launches([&](auto launches) {
      params_.shares = launches.shares(params_, backward.needs_filter ? num_floats() : 0);
      const Tensor partial = floats(backward.needs_filter ? params_.shares * num_floats() : 0);
      params_.partial = data(partial);
      prepare(launches, [&] { return launches.differentiate(params_, device_.stream()); });
    });
  }

 private:
  // Of all channels' spectra.
  int64_t num_floats() const { return 2 * params_.groups * params_.plan.num_points(); }

  Tensor floats(int64_t count) const { return empty_as(args_.x, {count}, ScalarType::Float); }
  static float* data(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

  // Nothing where a thread block has a whole transform.
  Tensor outer_points(int64_t batch) const { return floats(params_.plan.outer > 0 ? batch * num_floats() : 0); }

  // Calls launch() while there are roots and a spectrum.
  template <class Launches, class Launch>
  void prepare(Launches launches, Launch&& launch) {
    const Tensor roots = floats(2 * params_.plan.num_roots), spectrum = floats(num_floats());
    const Tensor filter_points = outer_points(1);
    params_.roots = data(roots), params_.spectrum = data(spectrum), params_.filter_points = data(filter_points);
    check_cuda(checker_, launches.prepare(params_, device_.stream()));
    check_cuda(checker_, launch());
  }

  template <class Function>
  void with_launches(Function&& f) const {
    switch (args_.problem.dtype) {
      case DType::kFloat32: return f(LongConvLaunches<DType::kFloat32>{});
      case DType::kBFloat16: return f(LongConvLaunches<DType::kBFloat16>{});
      default: return f(LongConvLaunches<DType::kFloat16>{});
    }
  }

  const Checker& checker_;
  const LongConvArguments& args_;
  const OnDevice device_;
  LongConvCudaParams params_;
};

void long_conv(Call& call) {
  const LongConvArguments args(call);
  LongConvOnDevice device(call.checker, args);
  const Tensor out = empty_as(args.x);
  if (!args.is_empty()) device.convolve(out);
  call.give(out, "");
}

void long_conv_backward(Call& call) {
  const LongConvBackwardArguments backward(call);
  LongConvOnDevice device(call.checker, backward.args);
  if (!backward.args.is_empty()) device.differentiate(backward);
  backward.give(call);
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CUDA, m) {
  using namespace vitkernels;
  m.impl("long_conv", &boxed<"long_conv", long_conv>);
  m.impl("long_conv_backward", &boxed<"long_conv_backward", long_conv_backward>);
}
