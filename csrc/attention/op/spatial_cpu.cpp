// The operators vitkernels::spatial_attention and vitkernels::spatial_attention_backward on the CPU.
#include "attention/cpu/tile_sizes.h"
#include "attention/op/spatial_gradients.h"
#include "common/parallel.h"
#include "cpu/kernel.h"

namespace vitkernels {
namespace {

void run_unit_rows(const UnitRowsParams& params) {
  constexpr int64_t kRowsPerTask = 256;
  const Kernel<UnitRowsParams>& unit_rows = kernel<UnitRowsParams>();  // not in a task, where it must not throw
  torch::stable::parallel_for(0, params.num_rows(), kRowsPerTask,
                              [&](int64_t begin, int64_t end) { unit_rows.run(params, begin, end, nullptr); });
}

// A gradient of unit rows becomes that of the rows.
void differentiate_unit_rows(const Tensor& rows, const Tensor& grad, DType dtype) {
  UnitRowsParams params = unit_rows_params(rows, dtype);
  params.grad = grad.mutable_data_ptr();
  run_unit_rows(params);
}

void spatial_attention(Call& call) {
  SpatialArguments args(call.checker, take_spatial(call));
  args.normalize(run_unit_rows);
  Tensor out = empty_as(args.query, args.out_sizes(), args.query.scalar_type());
  Tensor lse = empty_as(args.query, args.lse_sizes(), statistics_type(args.dtype));
  if (!args.is_empty()) {
    SpatialParams params;
    args.fill(params);
    params.out = map_tensor(out, args.axes);
    params.lse = lse.mutable_data_ptr();
    const int64_t of_head = params.batch * params.num_tiles() * spatial_row_blocks(params);
    run_kernel(kernel<SpatialParams>(), params, params.heads * of_head, of_head, args.query);
  }
  call.give(out, "out");
  call.give(lse, "lse");
}

void spatial_attention_backward(Call& call) {
  SpatialCall forward = take_spatial(call);
  BackwardCall from(call, forward.score);
  SpatialArguments args(call.checker, std::move(forward));
  const Tensor query = args.query, key = args.key;
  args.normalize(run_unit_rows);
  from.check(call.checker, args.query, args.out_sizes());

  SpatialBackwardParams params;
  args.fill(params.forward);
  params.forward.out = map_tensor(from.out, args.axes);
  params.grad_out = map_tensor(from.grad_out, args.axes);
  params.forward.lse = const_cast<void*>(from.lse.const_data_ptr());
  params.grad_lse = from.grad_lse ? from.grad_lse->const_data_ptr() : nullptr;
  SpatialGradients grads(args, from.needed, params);
  if (!args.is_empty()) run_kernel(kernel<SpatialBackwardParams>(), params, params.num_tasks(), 1, args.query);
  grads.finish(args, params);
  if (args.qk_norm && !args.is_empty()) {
    differentiate_unit_rows(query, grads.query, args.dtype);
    differentiate_unit_rows(key, grads.key, args.dtype);
  }
  call.give(grads.query, "grad_query");
  call.give(grads.key, "grad_key");
  call.give(grads.value, "grad_value");
  give_gradients(call, grads.terms, from.lse);
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  using namespace vitkernels;
  m.impl("spatial_attention", &boxed<"spatial_attention", spatial_attention>);
  m.impl("spatial_attention_backward", &boxed<"spatial_attention_backward", spatial_attention_backward>);
}
