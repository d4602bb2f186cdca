// From the tensors of decayed linear attention to the Params of its kernels, with all checks, and the backward.
#pragma once

#include "common/boxed.h"
#include "common/token_argument.h"
#include "linear_attention/decayed.h"

namespace vitkernels {

struct DecayedArguments {
  Tensor query, key, value, decay;
  OptionalTensor initial_state;
  bool is_reversed, includes_self;
  DType dtype;
  bool allow_tf32;

  explicit DecayedArguments(Call& call)
      : query(call.take<Tensor>("query")),
        key(call.take<Tensor>("key")),
        value(call.take<Tensor>("value")),
        decay(call.take<Tensor>("decay")),
        initial_state(call.take<OptionalTensor>("initial_state")),
        is_reversed(call.take<bool>("is_reversed")),
        includes_self(call.take<bool>("includes_self")),
        allow_tf32(call.take<bool>("allow_tf32")) {
    const Checker& checker = call.checker;
    checker.rank("query", query, 4, "(B, N, heads, d)");
    checker.rank("key", key, 4, "(B, N, heads, d)");
    checker.rank("value", value, 4, "(B, N, heads, dv)");
    dtype = checker.element_type("query", query);
    for (const auto& [name, t] : {std::pair{"query", &query}, {"key", &key}, {"value", &value}}) {
      checker.tensor(name, *t, query, query.scalar_type());
    }
    checker.shape("key", key, sizes_of(query));
    std::vector<int64_t> value_sizes = sizes_of(query);
    value_sizes[3] = value.size(3);
    checker.shape("value", value, value_sizes);
    checker.check(query.size(3) > 0, "query has head dimension 0, takes at least 1");
    checker.check(value.size(3) > 0, "value has head dimension 0, takes at least 1");
    checker.tensor("decay", decay, query, statistics_type(dtype), {query.size(2)});
    if (initial_state) checker.tensor("initial_state", *initial_state, query, statistics_type(dtype), state_sizes());
    decay = as_contiguous(decay);
    query = with_unit_last_stride(query), key = with_unit_last_stride(key), value = with_unit_last_stride(value);
    if (initial_state) initial_state = as_contiguous(*initial_state);
  }

  std::vector<int64_t> state_sizes() const { return {query.size(0), query.size(2), query.size(3), value.size(3)}; }

  // Of a pass over these tensors; `state` is the last one.
  DecayedParams params(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const void* initial,
                       int64_t exponent, bool reversed, const Tensor& state) const {
    return {.dtype = dtype,
            .batch = q.size(0),
            .heads = q.size(2),
            .tokens = q.size(1),
            .head_dim = q.size(3),
            .value_dim = v.size(3),
            .is_reversed = reversed,
            .includes_self = includes_self,
            .initial_exponent = exponent,
            .query = token_tensor(q),
            .key = token_tensor(k),
            .value = token_tensor(v),
            .out = token_tensor(out),
            .decay = decay.const_data_ptr(),
            .initial_state = initial,
            .state = state.mutable_data_ptr()};
  }
  // A state of a pass over these tensors.
  Tensor state_of(const Tensor& q, const Tensor& v) const {
    return zeros_as(query, {q.size(0), q.size(2), q.size(3), v.size(3)}, statistics_type(dtype));
  }
};

// Of a contiguous tensor (B, heads, d, dv), its last two axes exchanged.
inline Tensor transposed(const Tensor& t) { return as_contiguous(torch::stable::transpose(t, 2, 3)); }

// `Device` has run(q, k, v, out, initial state, exponent, reversed), which fills `out` and returns the last state.
template <class Device>
void decayed_forward(Call& call) {
  DecayedArguments args(call);
  const ScalarType type = args.query.scalar_type();
  const Device device(call.checker, args);
  const Tensor out = empty_as(args.value);
  const void* const initial = args.initial_state ? args.initial_state->const_data_ptr() : nullptr;
  const Tensor state = device.run(args.query, args.key, args.value, out, initial, 1, args.is_reversed);
  call.give(torch::stable::to(out, type), "out");
  call.give(state, "state");
}

// Every gradient is such an attention. Queries look back, as the forward does, at values whose values are the keys; keys
// and values look ahead, at what the queries and the gradients after them leave: the state that the gradient of the last
// state starts, and that ends as the one of the initial state.
template <class Device>
void decayed_backward(Call& call) {
  const OptionalTensor grad_out = call.take<OptionalTensor>("grad_out");
  const OptionalTensor grad_last = call.take<OptionalTensor>("grad_state");
  DecayedArguments args(call);
  const bool needs_initial = call.take<bool>("need_initial_state") && args.initial_state;
  const ScalarType type = args.query.scalar_type(), statistics = statistics_type(args.dtype);
  if (grad_out) call.checker.tensor("grad_out", *grad_out, args.query, type, sizes_of(args.value));
  if (grad_last) call.checker.tensor("grad_state", *grad_last, args.query, statistics, args.state_sizes());
  const Device device(call.checker, args);
  const Tensor grad =
      grad_out ? torch::stable::to(with_unit_last_stride(*grad_out), args.query.scalar_type()) : zeros_as(args.value);
  const Tensor grad_query = empty_as(args.query), grad_key = empty_as(args.key), grad_value = empty_as(args.value);

  OptionalTensor initial, last, last_transposed;
  if (args.initial_state) initial = transposed(*args.initial_state);
  if (grad_last) last = as_contiguous(*grad_last), last_transposed = transposed(*grad_last);
  const auto data = [](const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; };
  device.run(grad, args.value, args.key, grad_query, data(initial), 1, args.is_reversed);
  device.run(args.value, grad, args.query, grad_key, data(last_transposed), 0, !args.is_reversed);
  const Tensor first = device.run(args.key, args.query, grad, grad_value, data(last), 0, !args.is_reversed);
  // The first token reads the initial state once decayed.
  if (needs_initial && args.query.size(1) > 0) device.decay_once(first);
  call.give(torch::stable::to(grad_query, type), "grad_query");
  call.give(torch::stable::to(grad_key, type), "grad_key");
  call.give(torch::stable::to(grad_value, type), "grad_value");
  call.give(needs_initial ? first : none_like(args.query), "grad_initial_state");
}

}  // namespace vitkernels
