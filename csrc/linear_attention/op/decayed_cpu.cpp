// The operators vitkernels::decayed_linear_attention and vitkernels::decayed_linear_attention_backward on the CPU.
#include "common/parallel.h"
#include "cpu/kernel.h"
#include "linear_attention/op/decayed_arguments.h"
#include "linear_attention/tiles.h"

namespace vitkernels {
namespace {

class DecayedOnCpu {
 public:
  DecayedOnCpu(const Checker& checker, const DecayedArguments& args) : args_(args) { check_decay(checker); }

  Tensor run(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const void* initial,
             int64_t exponent, bool reversed) const {
    const Tensor state = args_.state_of(q, v);
    DecayedParams params = args_.params(q, k, v, out, initial, exponent, reversed, state);
    touch(out);
    if (params.num_pairs() > 0) run_stages(params);
    return state;
  }

  void decay_once(const Tensor& state) const {
    dispatch_statistics(state, [&]<class T>(T) {
      const int64_t heads = state.size(1), size = state.size(2) * state.size(3);
      T* x = static_cast<T*>(state.mutable_data_ptr());
      for (int64_t pair = 0; pair < state.size(0) * heads; ++pair) {
        const T factor = static_cast<const T*>(args_.decay.const_data_ptr())[pair % heads];
        for (int64_t i = 0; i < size; ++i) *x++ *= factor;
      }
    });
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
    const Tensor& query = args_.query;
    const Kernel<DecayedParams>& kernel = vitkernels::kernel<DecayedParams>();
    const int64_t pairs = params.num_pairs(), chunks = decayed_chunks(params.tokens);
    const int64_t threads = torch::stable::get_num_threads();
    if (!splits_decayed(pairs, chunks, threads)) {
      params.group = std::clamp<int64_t>(pairs / threads, 1, kMaxGroup);
      return run_kernel(kernel, params, params.num_groups(), 1, query);
    }
    const int64_t element = args_.dtype == DType::kFloat64 ? 8 : 4;
    const Tensor states = empty_as(query, {kernel.parts(params) / element}, statistics_type(args_.dtype));
    params.chunk_states = states.mutable_data_ptr();
    params.stage = DecayedStage::kSum;
    run_kernel(kernel, params, pairs * chunks, chunks, query);
    torch::stable::parallel_for(0, pairs, 1, [&](int64_t begin, int64_t end) { kernel.finish(params, begin, end); });
    params.stage = DecayedStage::kRead;
    run_kernel(kernel, params, pairs * chunks, chunks, query);
  }

  void check_decay(const Checker& checker) const {
    const Tensor& decay = args_.decay;
    dispatch_statistics(decay, [&]<class T>(T) {
      for (int64_t h = 0; h < decay.numel(); ++h) {
        const T x = static_cast<const T*>(decay.const_data_ptr())[h];
        checker.check(x >= T(0) && x <= T(1), "decay[", h, "] is ", x, ", takes 0 to 1");
      }
    });
  }

  const DecayedArguments& args_;
};

}  // namespace
}  // namespace vitkernels

STABLE_TORCH_LIBRARY_IMPL(vitkernels, CPU, m) {
  using namespace vitkernels;
  m.impl("decayed_linear_attention", &boxed<"decayed_linear_attention", decayed_forward<DecayedOnCpu>>);
  m.impl("decayed_linear_attention_backward",
         &boxed<"decayed_linear_attention_backward", decayed_backward<DecayedOnCpu>>);
}
