// The operators with listed keys, vitkernels::regional_routing_attention and vitkernels::indexed_attention, and their
// backward operators on the CPU.
#include "attention/cpu/tile_sizes.h"
#include "attention/op/listed_arguments.h"
#include "common/parallel.h"
#include "cpu/kernel.h"

namespace vitkernels {
namespace {

bool has_lone_queries(const ListedParams& params) { return params.queries.max_tokens() == 1; }

// Arguments: of an operator, whose call `take` takes.
template <class Arguments, auto take>
void attend(Call& call) {
  const Arguments args(call.checker, take(call));
  const Tensor out = empty_as(args.query, args.out_sizes(), args.query.scalar_type());
  const Tensor lse = empty_as(args.query, args.lse_sizes(), statistics_type(args.dtype));
  if (out.numel() > 0) {
    ListedParams params;
    args.fill(params);
    params.out = map_tokens(out);
    params.lse = lse.mutable_data_ptr();
    const int64_t groups = args.batch * args.heads * params.groups;
    if (has_lone_queries(params)) {
      run_kernel(kernel<LoneQueryParams>(), LoneQueryParams{params}, groups, 1, args.query);
    } else {
      run_kernel(kernel<ListedParams>(), params, groups * listed_query_blocks(params), 1, args.query);
    }
  }
  call.give(out, "out");
  call.give(lse, "lse");
}

// d(scale) of each head, added in double and in order.
Tensor sum_head_scale(const Tensor& sums, double factor, const Tensor& like) {
  const Tensor total = zeros_as(like, sizes_of(like), ScalarType::Double);
  const double* from = static_cast<const double*>(sums.const_data_ptr());
  double* to = static_cast<double*>(total.mutable_data_ptr());
  for (int64_t i = 0; i < sums.numel(); ++i) to[i % like.numel()] += factor * from[i];
  return torch::stable::to(total, like.scalar_type());
}

// Runs the kernel of these Params in all (batch, kv head) `pairs`.
template <class Params>
void add_gradients(Params params, int64_t pairs, const BackwardCall& from, const Tensor& like) {
  const Kernel<Params>& kernel = vitkernels::kernel<Params>();
  const int64_t part_elements = pairs == 0 ? 0 : kernel.parts(params) / int64_t(from.lse.element_size());
  const Tensor parts = empty_as(from.lse, {part_elements}, from.lse.scalar_type());
  params.parts = parts.mutable_data_ptr();
  run_kernel(kernel, params, pairs * params.splits, 1, like);
  torch::stable::parallel_for(0, pairs, 1, [&](int64_t begin, int64_t end) { kernel.finish(params, begin, end); });
}

template <class Arguments, auto take>
void differentiate(Call& call) {
  auto forward = take(call);
  BackwardCall from(call, forward.score);
  const Arguments args(call.checker, std::move(forward));
  from.check(call.checker, args.query, args.out_sizes());
  const Tensor out = with_even_tokens(from.out), grad_out = with_even_tokens(from.grad_out);
  const Tensor grad_query = empty_as(args.query, sizes_of(args.query), args.query.scalar_type());
  const Tensor grad_key = empty_as(args.key, sizes_of(args.key), args.key.scalar_type());
  const Tensor grad_value = empty_as(args.value, sizes_of(args.value), args.value.scalar_type());

  ListedBackwardParams params;
  args.fill(params.forward);
  params.forward.out = map_tokens(out);
  params.forward.lse = const_cast<void*>(from.lse.const_data_ptr());
  params.grad_out = map_tokens(grad_out);
  params.grad_lse = from.grad_lse ? from.grad_lse->const_data_ptr() : nullptr;
  params.grad_query = map_tokens(grad_query);
  params.grad_key = map_tokens(grad_key), params.grad_value = map_tokens(grad_value);
  params.splits = listed_splits(params.forward);

  const bool is_empty = args.query.numel() == 0 && args.key.numel() == 0;
  const int64_t pairs = is_empty ? 0 : args.batch * args.kv_heads;  // an empty tensor may have any batch size
  const Tensor scale_sums =
      zeros_as(args.query, {from.needed.head_scale ? args.batch * params.splits : 0, args.heads}, ScalarType::Double);
  if (from.needed.head_scale) params.head_scale_sums = static_cast<double*>(scale_sums.mutable_data_ptr());
  if (has_lone_queries(params.forward)) {
    add_gradients(LoneQueryBackwardParams{params}, pairs, from, args.query);
  } else {
    add_gradients(params, pairs, from, args.query);
  }

  ScoreFields<OptionalTensor> terms;
  if (from.needed.head_scale) {
    terms.head_scale = sum_head_scale(scale_sums, args.score.scale, *args.score.terms.head_scale);
  }
  call.give(grad_query, "grad_query");
  call.give(grad_key, "grad_key");
  call.give(grad_value, "grad_value");
  give_gradients(call, terms, from.lse);
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  using namespace vitkernels;
  m.impl("regional_routing_attention", &boxed<"regional_routing_attention", attend<RoutedArguments, take_routed>>);
  m.impl("regional_routing_attention_backward",
         &boxed<"regional_routing_attention_backward", differentiate<RoutedArguments, take_routed>>);
  m.impl("indexed_attention", &boxed<"indexed_attention", attend<IndexedArguments, take_indexed>>);
  m.impl("indexed_attention_backward",
         &boxed<"indexed_attention_backward", differentiate<IndexedArguments, take_indexed>>);
}
