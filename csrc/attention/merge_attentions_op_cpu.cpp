// The operators vitkernels::merge_attentions and vitkernels::merge_attentions_backward on the CPU.
#include "attention/attention.h"
#include "common/check.h"
#include "cpu/isa.h"

namespace vitkernels {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kRowsPerTask = 256;

// Checked, contiguous parts; owns what Params points to.
struct MergeArguments {
  std::vector<Tensor> outs, lses;
  std::vector<const void*> out_data, lse_data;
  MergeParams params;

  MergeArguments(const Checker& checker, const std::vector<Tensor>& outs_in, const std::vector<Tensor>& lses_in) {
    checker.check(!outs_in.empty(), "outs is empty, takes at least one tensor");
    checker.check(outs_in.size() == lses_in.size(), "lses has ", lses_in.size(), " tensors, takes as many as outs (",
                  outs_in.size(), ")");
    const Tensor& first = outs_in[0];
    checker.defined("outs[0]", first);
    checker.check(first.dim() >= 2, "outs[0] has shape ", shape_text(first), ", takes (B, *spatial, heads, dv)");
    params.dtype = checker.element_type("outs", first);
    const std::vector<int64_t> out_sizes = sizes_of(first);
    const std::vector<int64_t> lse_sizes(out_sizes.begin(), out_sizes.end() - 1);
    for (size_t i = 0; i < outs_in.size(); ++i) {
      checker.strided_like("outs", outs_in[i], first);
      checker.strided_like("lses", lses_in[i], first);
      checker.dtype("outs", outs_in[i], first.scalar_type());
      checker.dtype("lses", lses_in[i], statistics_type(params.dtype));
      checker.shape("outs", outs_in[i], out_sizes);
      checker.shape("lses", lses_in[i], lse_sizes);
    }
    for (size_t i = 0; i < outs_in.size(); ++i) {
      outs.push_back(torch::stable::contiguous(outs_in[i]));
      lses.push_back(torch::stable::contiguous(lses_in[i]));
      out_data.push_back(outs[i].const_data_ptr());
      lse_data.push_back(lses[i].const_data_ptr());
    }
    params.parts = int64_t(outs.size());
    params.rows = lses[0].numel();
    params.dim = out_sizes.back();
    params.outs = out_data.data();
    params.lses = lse_data.data();
  }
};

std::tuple<Tensor, Tensor> merge_attentions_cpu(std::vector<Tensor> outs, std::vector<Tensor> lses) {
  MergeArguments args(Checker("merge_attentions"), outs, lses);
  Tensor out = empty_as(outs[0], sizes_of(outs[0]), outs[0].scalar_type());
  Tensor lse = empty_as(lses[0], sizes_of(lses[0]), lses[0].scalar_type());
  args.params.out = out.mutable_data_ptr();
  args.params.lse = lse.mutable_data_ptr();
  const Kernels& kernels = vitkernels::kernels();
  parallel_for(0, args.params.rows, kRowsPerTask,
               [&](int64_t begin, int64_t end) { kernels.merge_attentions(args.params, begin, end); });
  return {out, lse};
}

std::vector<Tensor> merge_attentions_backward_cpu(const Tensor& grad_out, OptionalTensor grad_lse,
                                                  std::vector<Tensor> outs, std::vector<Tensor> lses,
                                                  const Tensor& lse) {
  const Checker checker("merge_attentions_backward");
  MergeArguments args(checker, outs, lses);
  for (const auto& [name, t, like] : {std::tuple{"grad_out", &grad_out, &outs[0]}, {"lse", &lse, &lses[0]}}) {
    checker.strided_like(name, *t, *like);
    checker.dtype(name, *t, like->scalar_type());
    checker.shape(name, *t, sizes_of(*like));
  }
  if (grad_lse) {
    checker.strided_like("grad_lse", *grad_lse, outs[0]);
    checker.dtype("grad_lse", *grad_lse, lses[0].scalar_type());
    checker.shape("grad_lse", *grad_lse, sizes_of(lses[0]));
  }
  std::vector<Tensor> grads;
  for (const Tensor& t : outs) grads.push_back(empty_as(t, sizes_of(t), t.scalar_type()));
  for (const Tensor& t : lses) grads.push_back(empty_as(t, sizes_of(t), t.scalar_type()));
  std::vector<void*> grad_data;
  for (const Tensor& t : grads) grad_data.push_back(t.mutable_data_ptr());

  const Tensor grad_out_rows = torch::stable::contiguous(grad_out);
  const Tensor lse_rows = torch::stable::contiguous(lse);
  const OptionalTensor grad_lse_rows = grad_lse ? OptionalTensor(torch::stable::contiguous(*grad_lse)) : grad_lse;
  args.params.lse = const_cast<void*>(lse_rows.const_data_ptr());
  args.params.grad_out = grad_out_rows.const_data_ptr();
  args.params.grad_lse = grad_lse_rows ? grad_lse_rows->const_data_ptr() : nullptr;
  args.params.grad_outs = grad_data.data();
  args.params.grad_lses = grad_data.data() + outs.size();
  const Kernels& kernels = vitkernels::kernels();
  parallel_for(0, args.params.rows, kRowsPerTask,
               [&](int64_t begin, int64_t end) { kernels.merge_attentions_backward(args.params, begin, end); });
  return grads;
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  m.impl("merge_attentions", TORCH_BOX(&vitkernels::merge_attentions_cpu));
  m.impl("merge_attentions_backward", TORCH_BOX(&vitkernels::merge_attentions_backward_cpu));
}
