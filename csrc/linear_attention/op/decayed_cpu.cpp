// The operators vitkernels::decayed_linear_attention and vitkernels::decayed_linear_attention_backward on the CPU.
#include "common/boxed.h"
#include "common/parallel.h"
#include "common/token_argument.h"
#include "cpu/kernel.h"
#include "linear_attention/decayed.h"
#include "linear_attention/tiles.h"

namespace vitkernels {
namespace {

struct DecayedArguments {
  Tensor query, key, value, decay;
  OptionalTensor initial_state;
  bool is_reversed, includes_self;
  DType dtype;

  explicit DecayedArguments(Call& call)
      : query(call.take<Tensor>("query")),
        key(call.take<Tensor>("key")),
        value(call.take<Tensor>("value")),
        decay(call.take<Tensor>("decay")),
        initial_state(call.take<OptionalTensor>("initial_state")),
        is_reversed(call.take<bool>("is_reversed")),
        includes_self(call.take<bool>("includes_self")) {
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
    check_decay(checker);
    query = with_unit_last_stride(query), key = with_unit_last_stride(key), value = with_unit_last_stride(value);
    if (initial_state) initial_state = as_contiguous(*initial_state);
  }

  std::vector<int64_t> state_sizes() const { return {query.size(0), query.size(2), query.size(3), value.size(3)}; }

  // out (like `value`) = the attention of these tensors; returns the last state.
  Tensor run(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const void* initial,
             int64_t exponent, bool reversed) const {
    const Tensor state = zeros_as(query, {q.size(0), q.size(2), q.size(3), v.size(3)}, statistics_type(dtype));
    DecayedParams params{.dtype = dtype,
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
    touch(out);
    if (params.num_pairs() > 0) run_stages(params);
    return state;
  }

 private:
  static constexpr int64_t kMaxGroup = 8;  // pairs whose states stay in the L2 cache

  // Threads at neighbouring heads would ask for the same page of new memory at the same time, and each would get one.
  static void touch(const Tensor& out) {
    constexpr int64_t kPage = 4096, kMinBytes = 1 << 20;
    const int64_t bytes = out.numel() * int64_t(out.element_size());
    if (bytes < kMinBytes) return;
    volatile char* const data = static_cast<char*>(out.mutable_data_ptr());
    torch::stable::parallel_for(0, bytes / kPage, 16, [&](int64_t begin, int64_t end) {
      for (int64_t page = begin; page < end; ++page) data[page * kPage] = 0;
    });
  }

  void run_stages(DecayedParams& params) const {
    const Kernel<DecayedParams>& kernel = vitkernels::kernel<DecayedParams>();
    const int64_t pairs = params.num_pairs(), chunks = decayed_chunks(params.tokens);
    const int64_t threads = torch::stable::get_num_threads();
    if (!splits_decayed(pairs, chunks, threads)) {
      params.group = std::clamp<int64_t>(pairs / threads, 1, kMaxGroup);
      return run_kernel(kernel, params, params.num_groups(), 1, query);
    }
    const int64_t element = dtype == DType::kFloat64 ? 8 : 4;
    const Tensor states = empty_as(query, {kernel.parts(params) / element}, statistics_type(dtype));
    params.chunk_states = states.mutable_data_ptr();
    params.stage = DecayedStage::kSum;
    run_kernel(kernel, params, pairs * chunks, chunks, query);
    torch::stable::parallel_for(0, pairs, 1, [&](int64_t begin, int64_t end) { kernel.finish(params, begin, end); });
    params.stage = DecayedStage::kRead;
    run_kernel(kernel, params, pairs * chunks, chunks, query);
  }

  void check_decay(const Checker& checker) const {
    dispatch_statistics(decay, [&]<class T>(T) {
      for (int64_t h = 0; h < decay.numel(); ++h) {
        const T x = static_cast<const T*>(decay.const_data_ptr())[h];
        checker.check(x >= T(0) && x <= T(1), "decay[", h, "] is ", x, ", takes 0 to 1");
      }
    });
  }
};

void decayed_linear_attention(Call& call) {
  const DecayedArguments args(call);
  const Tensor out = empty_as(args.value);
  const void* const initial = args.initial_state ? args.initial_state->const_data_ptr() : nullptr;
  const Tensor state = args.run(args.query, args.key, args.value, out, initial, 1, args.is_reversed);
  call.give(out, "out");
  call.give(state, "state");
}

// The first token reads the initial state once decayed.
void decay_once(const Tensor& state, const Tensor& decay) {
  dispatch_statistics(state, [&]<class T>(T) {
    const int64_t heads = state.size(1), size = state.size(2) * state.size(3);
    T* x = static_cast<T*>(state.mutable_data_ptr());
    for (int64_t pair = 0; pair < state.size(0) * heads; ++pair) {
      const T factor = static_cast<const T*>(decay.const_data_ptr())[pair % heads];
      for (int64_t i = 0; i < size; ++i) *x++ *= factor;
    }
  });
}

// Of a contiguous tensor (B, heads, d, dv), its last two axes exchanged.
Tensor transposed(const Tensor& t) { return as_contiguous(torch::stable::transpose(t, 2, 3)); }

// Every gradient is such an attention. Queries look back, as the forward does, at values whose values are the keys; keys
// and values look ahead, at what the queries and the gradients after them leave: the state that the gradient of the last
// state starts, and that ends as the one of the initial state.
void decayed_linear_attention_backward(Call& call) {
  OptionalTensor grad_out = call.take<OptionalTensor>("grad_out");
  const OptionalTensor grad_last = call.take<OptionalTensor>("grad_state");
  const DecayedArguments args(call);
  const bool needs_initial = call.take<bool>("need_initial_state") && args.initial_state;
  const ScalarType type = args.query.scalar_type(), statistics = statistics_type(args.dtype);
  if (grad_out) call.checker.tensor("grad_out", *grad_out, args.query, type, sizes_of(args.value));
  if (grad_last) call.checker.tensor("grad_state", *grad_last, args.query, statistics, args.state_sizes());
  const Tensor grad = grad_out ? with_unit_last_stride(*grad_out) : zeros_as(args.value);
  const Tensor grad_query = empty_as(args.query), grad_key = empty_as(args.key), grad_value = empty_as(args.value);

  OptionalTensor initial, last, last_transposed;
  if (args.initial_state) initial = transposed(*args.initial_state);
  if (grad_last) last = as_contiguous(*grad_last), last_transposed = transposed(*grad_last);
  const auto data = [](const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; };
  args.run(grad, args.value, args.key, grad_query, data(initial), 1, args.is_reversed);
  args.run(args.value, grad, args.query, grad_key, data(last_transposed), 0, !args.is_reversed);
  const Tensor first = args.run(args.key, args.query, grad, grad_value, data(last), 0, !args.is_reversed);
  if (needs_initial && args.query.size(1) > 0) decay_once(first, args.decay);
  call.give(grad_query, "grad_query");
  call.give(grad_key, "grad_key");
  call.give(grad_value, "grad_value");
  call.give(needs_initial ? first : none_like(args.query), "grad_initial_state");
}

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  using namespace vitkernels;
  m.impl("decayed_linear_attention", &boxed<"decayed_linear_attention", decayed_linear_attention>);
  m.impl("decayed_linear_attention_backward",
         &boxed<"decayed_linear_attention_backward", decayed_linear_attention_backward>);
}
