// Forward and backward of softmax attention: the choice of a dtype's launchers, and the forward's split-KV.
#include "attention/cuda/forward_path.h"
#include "attention/cuda/launches.h"
#include "attention/cuda/tile_sizes.h"

namespace vitkernels {
namespace {

// Calls f with the launchers of a dtype.
template <class Function>
auto dispatch_launches(DType dtype, Function&& f) {
  if (dtype == DType::kFloat32) return f(AttentionLaunches<DType::kFloat32>{});
  if (dtype == DType::kBFloat16) return f(AttentionLaunches<DType::kBFloat16>{});
  return f(AttentionLaunches<DType::kFloat16>{});
}

// The same, of the kernel that runs a forward.
template <class Function>
auto dispatch_forward(const AttentionCudaParams& p, Function&& f) {
  const bool is_bfloat16 = p.problem.dtype == DType::kBFloat16;
  switch (forward_path(p)) {
    case ForwardPath::kPlain:
      return is_bfloat16 ? f(PlainForwardLaunches<DType::kBFloat16>{}) : f(PlainForwardLaunches<DType::kFloat16>{});
    case ForwardPath::kResident:
      return is_bfloat16 ? f(ResidentForwardLaunches<DType::kBFloat16>{})
                         : f(ResidentForwardLaunches<DType::kFloat16>{});
    default: return dispatch_launches(p.problem.dtype, f);
  }
}

template <Side kOwner, class Function>
auto dispatch_plain_backward(DType dtype, Function&& f) {
  if (dtype == DType::kBFloat16) return f(PlainBackwardLaunches<DType::kBFloat16, kOwner>{});
  return f(PlainBackwardLaunches<DType::kFloat16, kOwner>{});
}

// The same, of the kernel that sums for `owner`. The fast paths' have statistics.
template <class Function>
auto dispatch_backward(const AttentionBackwardCudaParams& p, Side owner, Function&& f) {
  const DType dtype = p.forward.problem.dtype;
  if (!p.statistics.data) return dispatch_launches(dtype, f);
  return owner == Side::kKeys ? dispatch_plain_backward<Side::kKeys>(dtype, f)
                              : dispatch_plain_backward<Side::kQueries>(dtype, f);
}

cudaError_t merge_splits(const AttentionCudaParams& p, cudaStream_t stream) {
  const int64_t rows = p.num_rows() * p.problem.heads, dim = p.problem.value_dim;
  const void *outs[kMaxMergeParts], *lses[kMaxMergeParts];
  for (int64_t split = 0; split < p.splits; ++split) {
    outs[split] = p.split_out + split * rows * dim;
    lses[split] = p.split_max + split * rows;
  }
  return launch_merge_attentions({.out_dtype = p.problem.dtype,
                                  .parts = p.splits,
                                  .rows = rows,
                                  .dim = dim,
                                  .outs = outs,
                                  .lses = lses,
                                  .sums = p.split_sum,
                                  .out = p.out.data,
                                  .lse = p.lse},
                                 stream);
}

}  // namespace

int64_t attention_key_splits(const AttentionCudaParams& p) {
  const int64_t blocks = dispatch_forward(p, [&]<class Launches>(Launches) { return Launches::forward_blocks(p); });
  return std::min(splits_of(blocks, p.packing.key_tiles(p.problem, 1)), kMaxMergeParts);
}

cudaError_t launch_attention(const AttentionCudaParams& p, cudaStream_t stream) {
  const cudaError_t error = dispatch_forward(p, [&]<class Launches>(Launches) { return Launches::forward(p, stream); });
  return error != cudaSuccess || p.splits == 1 ? error : merge_splits(p, stream);
}

int64_t attention_backward_splits(const AttentionBackwardCudaParams& p, const OwnedGrads& grads, Side owner) {
  return dispatch_backward(p, owner,
                           [&]<class Launches>(Launches) { return Launches::backward_splits(p, grads, owner); });
}

int64_t attention_backward_dot_parts(const AttentionBackwardCudaParams& p, const OwnedGrads& grads) {
  return dispatch_launches(p.forward.problem.dtype,
                           [&]<class Launches>(Launches) { return Launches::backward_dot_parts(p, grads); });
}

cudaError_t launch_attention_backward(const AttentionBackwardCudaParams& p, const OwnedGrads& grads, Side owner,
                                      cudaStream_t stream) {
  return dispatch_backward(p, owner,
                           [&]<class Launches>(Launches) { return Launches::backward(p, grads, owner, stream); });
}

}  // namespace vitkernels
