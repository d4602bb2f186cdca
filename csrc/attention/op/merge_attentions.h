// The operators vitkernels::merge_attentions and vitkernels::merge_attentions_backward on every device: they check the
// arguments, allocate, and fill the kernels' Params.
#pragma once

#include "attention/dense.h"
#include "common/boxed.h"

namespace vitkernels {

// Checked, contiguous parts; owns what Params points to.
struct MergeArguments {
  std::vector<Tensor> outs, lses;
  std::vector<const void*> out_data, lse_data;
  MergeParams params;

  MergeArguments(const Checker& checker, const std::vector<Tensor>& outs_in, const std::vector<Tensor>& lses_in,
                 int64_t max_parts) {
    checker.check(!outs_in.empty(), "outs is empty, takes at least one tensor");
    checker.check(int64_t(outs_in.size()) <= max_parts, "outs has ", outs_in.size(), " tensors, takes at most ",
                  max_parts, " on this device");
    checker.check(outs_in.size() == lses_in.size(), "lses has ", lses_in.size(), " tensors, takes as many as outs (",
                  outs_in.size(), ")");
    const Tensor& first = outs_in[0];
    checker.defined("outs[0]", first);
    checker.check(first.dim() >= 2, "outs[0] has shape ", Shape(first), ", takes (B, *spatial, heads, dv)");
    params.dtype = params.out_dtype = checker.element_type("outs", first);
    const std::vector<int64_t> out_sizes = sizes_of(first);
    const std::vector<int64_t> lse_sizes(out_sizes.begin(), out_sizes.end() - 1);
    for (size_t i = 0; i < outs_in.size(); ++i) {
      checker.tensor("outs", outs_in[i], first, first.scalar_type(), out_sizes);
      checker.tensor("lses", lses_in[i], first, statistics_type(params.dtype), lse_sizes);
      outs.push_back(as_contiguous(outs_in[i]));
      lses.push_back(as_contiguous(lses_in[i]));
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

// Device::run(checker, params, rows, part) runs the kernel of these params on the device of `part`.
template <class Device>
void merge_attentions(Call& call) {
  const auto outs = call.take<std::vector<Tensor>>("outs"), lses = call.take<std::vector<Tensor>>("lses");
  MergeArguments args(call.checker, outs, lses, Device::kMaxParts);
  const Tensor out = empty_as(outs[0]), lse = empty_as(lses[0]);
  args.params.out = out.mutable_data_ptr();
  args.params.lse = lse.mutable_data_ptr();
  Device::run(call.checker, args.params, args.params.rows, outs[0]);
  call.give(out, "out");
  call.give(lse, "lse");
}

template <class Device>
void merge_attentions_backward(Call& call) {
  const Checker& checker = call.checker;
  const Tensor grad_out = call.take<Tensor>("grad_out");
  OptionalTensor grad_lse = call.take<OptionalTensor>("grad_lse");
  const auto outs = call.take<std::vector<Tensor>>("outs"), lses = call.take<std::vector<Tensor>>("lses");
  const MergeArguments args(checker, outs, lses, Device::kMaxParts);
  checker.tensor("grad_out", grad_out, outs[0], outs[0].scalar_type(), sizes_of(outs[0]));
  if (grad_lse) {
    checker.tensor("grad_lse", *grad_lse, outs[0], lses[0].scalar_type(), sizes_of(lses[0]));
    grad_lse = as_contiguous(*grad_lse);
  }
  std::vector<Tensor> grads;
  std::vector<void*> grad_data;
  for (const std::vector<Tensor>* list : {&outs, &lses}) {
    for (const Tensor& t : *list) grad_data.push_back(grads.emplace_back(empty_as(t)).mutable_data_ptr());
  }

  const Tensor grad_out_rows = as_contiguous(grad_out);
  const MergeBackwardParams params{.forward = args.params,
                                   .grad_out = grad_out_rows.const_data_ptr(),
                                   .grad_lse = grad_lse ? grad_lse->const_data_ptr() : nullptr,
                                   .grad_outs = grad_data.data(),
                                   .grad_lses = grad_data.data() + outs.size()};
  Device::run(checker, params, args.params.rows, outs[0]);
  call.give(grads, "");
}

}  // namespace vitkernels
