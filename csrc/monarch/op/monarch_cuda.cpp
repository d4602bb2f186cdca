// The operators vitkernels::blockdiag_butterfly_multiply and its backward on a GPU.
#include "cuda/device.h"
#include "monarch/cuda/launches.h"
#include "monarch/op/arguments.h"

namespace vitkernels {
namespace {

// One call's kernels.
class MonarchOnDevice {
 public:
  MonarchOnDevice(const Checker& checker, const MonarchArguments& args)
      : checker_(checker), args_(args), device_(args.x) {
    const MonarchProblem& p = args.problem;
    checker.check(p.dtype != DType::kFloat64, "x is float64, takes float32, bfloat16 or float16 on a GPU");
    for (const auto& [name, weight] : {std::pair{"w1", &p.first}, {"w2", &p.second}}) {
      checker.check(weight->blocks * weight->outputs * weight->inputs <= kMaxElements, name, " has ",
                    weight->blocks * weight->outputs * weight->inputs, " elements, takes at most ", kMaxElements,
                    " on a GPU");
    }
  }

  void multiply(MonarchCudaParams params) const {
    with_launches([&](auto launches) {
      check_cuda(checker_, launches.plan(params));
      Tensor inner = none_like(args_.x);
      if (!params.is_inner_shared && !params.inner.data) {
        inner = empty_as(args_.x, {params.problem.rows, params.problem.inner()}, args_.x.scalar_type());
        params.inner = MonarchArguments::matrix(inner);
        check_cuda(checker_, launches.plan(params));
      }
      check_cuda(checker_, launches.multiply(params, args_.allow_tf32, device_.stream()));
    });
  }

  // The gradient of a weight: of each block the products of the columns of its outputs' gradients and of its inputs.
  void grad_weight(const Tensor& grad, const Matrix& left, const Matrix& right) const {
    MonarchGradWeightCudaParams params{.rows = args_.problem.rows,
                                       .blocks = grad.size(0),
                                       .left_columns = grad.size(1),
                                       .right_columns = grad.size(2),
                                       .left = left,
                                       .right = right};
    with_launches([&](auto launches) {
      params.splits = launches.grad_weight_splits(params);
      const Tensor parts = floats({params.splits * params.num_elements()});
      params.parts = static_cast<float*>(parts.mutable_data_ptr());
      check_cuda(checker_, launches.grad_weight(params, args_.allow_tf32, device_.stream()));
      sum(launches, params.splits, grad, parts);
    });
  }

  // The sums of the columns, if they are asked for, become `grad_bias`.
  void columns(MonarchColumnsCudaParams params, bool needs_sums, Tensor& grad_bias) const {
    with_launches([&](auto launches) {
      params.splits = launches.column_splits(params);
      const Tensor parts = floats({needs_sums ? params.splits * args_.problem.outputs() : 0});
      if (needs_sums) params.parts = static_cast<float*>(parts.mutable_data_ptr());
      check_cuda(checker_, launches.columns(params, device_.stream()));
      if (!needs_sums) return;
      const Tensor sums = floats({args_.problem.outputs()});
      sum(MonarchLaunches<DType::kFloat32>{}, params.splits, sums, parts);
      grad_bias = torch::stable::to(sums, grad_bias.scalar_type());
    });
  }

 private:
  static constexpr int64_t kMaxElements = (int64_t(1) << 31) - 1;

  Tensor floats(const std::vector<int64_t>& sizes) const { return empty_as(args_.x, sizes, ScalarType::Float); }

  template <class Launches>
  void sum(Launches launches, int64_t splits, const Tensor& out, const Tensor& parts) const {
    const MonarchSumCudaParams params{.splits = splits,
                                      .elements = out.numel(),
                                      .parts = static_cast<const float*>(parts.const_data_ptr()),
                                      .out = out.mutable_data_ptr()};
    check_cuda(checker_, launches.sum(params, device_.stream()));
  }

  template <class Function>
  void with_launches(Function&& f) const {
    switch (args_.problem.dtype) {
      case DType::kFloat32: return f(MonarchLaunches<DType::kFloat32>{});
      case DType::kBFloat16: return f(MonarchLaunches<DType::kBFloat16>{});
      default: return f(MonarchLaunches<DType::kFloat16>{});
    }
  }

  const Checker& checker_;
  const MonarchArguments& args_;
  OnDevice device_;
};

void blockdiag_butterfly_multiply(Call& call) {
  const MonarchArguments args(call);
  call.checker.check(!call.take<OptionalTensor>("packed"), "packed is a tensor, takes None on a GPU");
  const MonarchOnDevice device(call.checker, args);
  const Tensor out = empty_as(args.x, args.out_sizes(), args.x.scalar_type());
  const Tensor inner = empty_as(args.x, args.inner_sizes(), args.x.scalar_type());
  if (args.problem.rows > 0) {
    device.multiply({.problem = args.problem,
                     .inner = args.keeps_inner ? MonarchArguments::matrix(inner) : Matrix{},
                     .needs_inner = args.keeps_inner,
                     .bias = static_cast<const float*>(args.bias_data()),
                     .epilogue = args.activation == Activation::kGelu ? MonarchEpilogue::kGelu : MonarchEpilogue::kNone,
                     .out = MonarchArguments::matrix(out)});
  }
  call.give(out, "out");
  call.give(inner, "inner");
}

class MonarchBackward : public MonarchBackwardArguments {
 public:
  explicit MonarchBackward(Call& call) : MonarchBackwardArguments(call), device_(call.checker, args) {}

  void run() {
    if (problem.rows == 0) return;
    const Tensor grad_before = rows_of(problem.outputs());  // by the second weight's blocks
    if (computes_inner) inner = rows_of(problem.inner());
    const Matrix of_grad = MonarchArguments::matrix(grad_before);
    differentiate_epilogue(of_grad);
    const Tensor grad_inner = needs_w1 ? rows_of(problem.inner()) : none_like(args.x);
    const Matrix of_grad_inner = needs_w1 ? MonarchArguments::matrix(grad_inner) : Matrix{};
    grad_input(of_grad, of_grad_inner);
    if (needs_w1) device_.grad_weight(grad_w1, of_grad_inner, problem.x);
    if (needs_w2) device_.grad_weight(grad_w2, of_grad, MonarchArguments::matrix(inner));
  }

 private:
  Tensor rows_of(int64_t columns) const { return empty_as(args.x, {problem.rows, columns}, args.x.scalar_type()); }

  // The gradient before the activation, and that of the bias; and the intermediate, if the forward did not keep it.
  void differentiate_epilogue(const Matrix& grad_before) {
    MonarchCudaParams again{.problem = problem,
                            .inner = computes_inner ? MonarchArguments::matrix(inner) : Matrix{},
                            .needs_inner = computes_inner};
    MonarchColumnsCudaParams columns{
        .rows = problem.rows, .blocks = problem.second.blocks, .columns = problem.second.outputs};
    if (has_activation()) {
      again.bias = static_cast<const float*>(args.bias_data());
      again.epilogue = MonarchEpilogue::kGradGelu;
      again.grad_out = MonarchArguments::matrix(grad_out);
      again.out = grad_before, again.is_interleaved = false;
      columns.in = grad_before, columns.is_interleaved = false;
    } else {
      columns.in = MonarchArguments::matrix(grad_out), columns.out = grad_before;
    }
    if (computes_inner || has_activation()) device_.multiply(again);
    if (needs_bias || !has_activation()) device_.columns(columns, needs_bias, grad_bias);
  }

  // As the forward, with transposed weights: small copies.
  void grad_input(const Matrix& grad_before, const Matrix& grad_inner) const {
    const Tensor w2 = as_contiguous(torch::stable::transpose(args.w2, 1, 2));  // (l, r, s)
    const Tensor w1 = as_contiguous(torch::stable::transpose(args.w1, 1, 2));  // (k, p, q)
    MonarchProblem transposed = problem;
    transposed.first = {w2.const_data_ptr(), w2.size(0), w2.size(1), w2.size(2)};
    transposed.second = {w1.const_data_ptr(), w1.size(0), w1.size(1), w1.size(2)};
    transposed.x = grad_before;
    device_.multiply({.problem = transposed,
                      .order = MonarchOrder::kBackward,
                      .inner = grad_inner,
                      .needs_inner = needs_w1,
                      .out = MonarchArguments::matrix(grad_x),
                      .is_interleaved = false});
  }

  const MonarchOnDevice device_;
  const bool computes_inner = needs_w2 && !args.keeps_inner;
};

void blockdiag_butterfly_multiply_backward(Call& call) {
  MonarchBackward backward(call);
  backward.run();
  backward.give(call);
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CUDA, m) {
  using namespace vitkernels;
  m.impl("blockdiag_butterfly_multiply", &boxed<"blockdiag_butterfly_multiply", blockdiag_butterfly_multiply>);
  m.impl("blockdiag_butterfly_multiply_backward",
         &boxed<"blockdiag_butterfly_multiply_backward", blockdiag_butterfly_multiply_backward>);
}
