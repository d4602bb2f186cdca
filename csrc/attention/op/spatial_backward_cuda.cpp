#include "attention/op/spatial_backward_cuda.h"

#include "attention/cuda/tile_sizes.h"
#include "attention/op/partial_sums_cuda.h"
#include "cuda/device.h"

namespace vitkernels {
namespace {

constexpr int64_t kTableBytes = 64 << 20;  // of all parts, unless a part for each head is more

float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// One call: owns what its params point to.
class SpatialBackward {
 public:
  SpatialBackward(const Checker& checker, const SpatialArguments& args, const BackwardCall& from, bool allow_tf32,
                  const SpatialGradientTensors& grads)
      : checker_(checker),
        args_(args),
        grads_(grads),
        device_(args.query),
        tile_(spatial_backward_tile(args.dtype == DType::kFloat32 ? 4 : 2)),
        grad_out_(as_contiguous(from.grad_out)) {
    params_.forward = spatial_cuda_params(checker, args, tile_);
    params_.forward.is_aligned = params_.forward.is_aligned && has_aligned_rows(grad_out_);
    params_.forward.allow_tf32 = allow_tf32;
    checker.check(std::max(args.head_dim, args.value_dim) <= kMaxSpatialBackwardDim,
                  "got CUDA tensors, takes tensors on the CPU for gradients over maps of a head dimension above ",
                  kMaxSpatialBackwardDim);
    params_.grad_out = grad_out_.const_data_ptr();
    params_.lse = static_cast<const float*>(from.lse.const_data_ptr());
    cut_keys();
    relative_ = launch_spatial_relative_logits(checker, args, params_.forward, device_.stream());
    find_delta(from);
  }

  void run() {
    std::vector<PartialSumsOwner> owners;
    own_queries(owners);
    own_keys(owners);
    for (const PartialSumsOwner& sums : owners) check(sums.add(DType::kFloat32, device_.stream()));
  }

 private:
  void check(cudaError_t error) const { check_cuda(checker_, error); }

  Tensor statistics_tensor(const std::vector<int64_t>& sizes) const {
    return empty_as(args_.query, sizes, ScalarType::Float);
  }

  void cut_keys() {
    SpatialPattern pattern = args_.pattern;
    if (!grads_.terms.key_fill && !grads_.terms.value_fill) {
      for (AxisRule& rule : pattern.axis) rule.has_outside = false;
    }
    params_.keys = SpatialCut(pattern, tile_, true);
    const double tasks = double(args_.batch) * double(args_.kv_heads) * double(params_.keys.num_tiles());
    checker_.check(params_.keys.fits && tasks < double(std::numeric_limits<int32_t>::max()),
                   "got CUDA tensors, takes tensors on the CPU for gradients of queries with so many keys");
  }

  void find_delta(const BackwardCall& from) {
    delta_ = statistics_tensor(args_.lse_sizes());
    AttentionBackwardCudaParams p;
    Problem& problem = p.forward.problem;
    problem.dtype = args_.dtype;
    problem.batch = args_.batch, problem.heads = args_.heads, problem.value_dim = args_.value_dim;
    problem.axis.num_queries = params_.forward.num_queries();
    const auto rows = [&](const Tensor& t) {
      return token_tensor(torch::stable::view(t, {args_.batch, problem.num_queries(), args_.heads, args_.value_dim}));
    };
    const Tensor out = as_contiguous(from.out);
    p.forward.out = rows(out);
    p.query_value = rows(grad_out_);
    if (from.grad_lse) p.grad_lse = static_cast<const float*>(from.grad_lse->const_data_ptr());
    p.delta = floats(*delta_);
    check(launch_attention_backward_delta(p, device_.stream()));
    params_.delta = p.delta;
  }

  int64_t num_offsets() const { return num_table_entries(params_.forward.score.by_offset.small); }

  int64_t num_warps() const { return tile_.owned / 16; }

  // Blocks take several tiles each where they sum tables, whose parts are memory.
  int64_t blocks_of_head() const {
    const int64_t tiles = args_.batch * params_.forward.cut.num_tiles();
    if (!grads_.terms.bias_table && !grads_.terms.multiplier_table) return tiles;
    const int64_t of_block = num_warps() * args_.heads * num_offsets() * int64_t(sizeof(float));
    const int64_t wanted = std::max<int64_t>(4 * kBlocksOfLargeGpu / args_.heads, 1);
    return std::max<int64_t>(std::min({tiles, wanted, kTableBytes / of_block}), 1);
  }

  void own_queries(std::vector<PartialSumsOwner>& owners) {
    params_.blocks_of_head = blocks_of_head();
    const auto table = [&](const OptionalTensor& grad) {
      if (!grad) return PartialSums{};
      return owners
          .emplace_back(*grad, params_.blocks_of_head * num_warps(), args_.heads * num_offsets(),
                        PartialSumsOwner::Start::kZero)
          .sums();
    };
    params_.bias_table = table(grads_.terms.bias_table);
    params_.multiplier_table = table(grads_.terms.multiplier_table);
    if (grads_.terms.head_scale) params_.dots = floats(*(dots_ = statistics_tensor(args_.lse_sizes())));
    params_.grad_query = grads_.query.mutable_data_ptr();
    if (args_.is_shared_query || relative_) {
      std::vector<int64_t> sizes = args_.lse_sizes();
      sizes.push_back(args_.head_dim);
      params_.float_grad_query = floats(*(float_grad_query_ = statistics_tensor(sizes)));
    }
    if (relative_) {
      relative_grad_ = zeros_as(*relative_);
      params_.relative_grad = floats(*relative_grad_);
    }
    check(launch_spatial_attention_backward(params_, Side::kQueries, device_.stream()));
    if (relative_) differentiate_relative(owners);
    if (float_grad_query_) sum_windows();
    if (dots_) sum_dots();
  }

  void differentiate_relative(std::vector<PartialSumsOwner>& owners) {
    check(launch_spatial_relative_grad_query(params_, device_.stream()));
    for (int axis = 0; axis < kMaxAxes; ++axis) {
      const OptionalTensor& grad = grads_.terms.rel_pos[axis];
      if (!grad) continue;
      const int64_t offsets = params_.forward.score.by_offset.small.num_offsets(axis);
      owners.emplace_back(*grad, parts_of_spatial_embedding(params_, axis), args_.heads * offsets * args_.head_dim);
      check(launch_spatial_relative_grad_embedding(params_, {axis, params_.relative_grad, owners.back().sums()},
                                                   device_.stream()));
    }
  }

  // Rounds the gradient of the queries. A query that the windows of a map share gets the sum of theirs.
  void sum_windows() const {
    AxesSum sum{.data = floats(*float_grad_query_), .out = grads_.query.mutable_data_ptr(), .dtype = args_.dtype};
    sum.size[0] = args_.batch, sum.size[AxesSum::kAxes - 1] = args_.heads * args_.head_dim;
    for (int axis = 0; axis < kMaxAxes; ++axis) {
      const AxisRule& rule = args_.pattern.axis[axis];
      const bool exists = axis >= kMaxAxes - args_.axes && args_.is_shared_query;
      sum.size[1 + 2 * axis] = exists ? rule.num_queries / rule.size : 1;
      sum.size[2 + 2 * axis] = exists ? rule.size : args_.is_shared_query ? 1 : rule.num_queries;
      sum.is_summed[1 + 2 * axis] = true;
    }
    check(launch_axes_sum(sum, device_.stream()));
  }

  void sum_dots() const {
    check(launch_row_reduction({.rows = {params_.dots, 1, dots_->numel()},
                                .batch = args_.batch,
                                .queries = params_.forward.num_queries(),
                                .heads = args_.heads,
                                .factor = params_.forward.score.scale.as<double>(),
                                .strides = {.head = 1},
                                .out = floats(*grads_.terms.head_scale)},
                               device_.stream()));
  }

  void own_keys(std::vector<PartialSumsOwner>& owners) {
    params_.grad_key = grads_.key.mutable_data_ptr();
    params_.grad_value = grads_.value.mutable_data_ptr();
    std::vector<Fill> fills;
    params_.key_fill = fill_sums(grads_.terms.key_fill, fills);
    params_.value_fill = fill_sums(grads_.terms.value_fill, fills);
    if (grads_.terms.key_bias) {
      // Heads that read no kv head have no block.
      key_bias_ = zeros_as(args_.query, {args_.batch, args_.heads, params_.forward.num_keys()}, ScalarType::Float);
      params_.key_bias_grad = floats(*key_bias_);
    }
    check(launch_spatial_attention_backward(params_, Side::kKeys, device_.stream()));
    for (const Fill& fill : fills) {
      check(
          launch_sum_parts(fill.sums, fill.grad.numel(), fill.grad.mutable_data_ptr(), args_.dtype, device_.stream()));
    }
    if (key_bias_) sum_key_bias();
  }

  struct Fill {
    Tensor grad, parts;
    PartialSums sums;
  };
  PartialSums fill_sums(const OptionalTensor& grad, std::vector<Fill>& fills) const {
    if (!grad) return {};
    const int64_t parts = params_.num_fill_parts();
    const Tensor data = statistics_tensor({parts, grad->numel()});
    fills.push_back({*grad, data, {floats(data), parts, grad->numel()}});
    return fills.back().sums;
  }

  void sum_key_bias() const {
    const Tensor& grad = *grads_.terms.key_bias;
    AxesSum sum{.data = floats(*key_bias_), .out = grad.mutable_data_ptr()};
    const int64_t rank = 2 + args_.axes;  // (B, heads, *map), of which the term has the last axes
    for (int64_t i = 0; i < rank; ++i) {
      const int axis = int(i) - 2 + kMaxAxes - args_.axes;
      sum.size[i] = i == 0 ? args_.batch : i == 1 ? args_.heads : args_.pattern.axis[axis].num_keys;
      const int64_t own = i - (rank - grad.dim());
      sum.is_summed[i] = own < 0 || grad.size(own) == 1;
    }
    check(launch_axes_sum(sum, device_.stream()));
  }

  const Checker& checker_;
  const SpatialArguments& args_;
  const SpatialGradientTensors& grads_;
  OnDevice device_;
  SpatialTile tile_;
  Tensor grad_out_;
  OptionalTensor delta_, dots_, relative_, relative_grad_, float_grad_query_, key_bias_;
  SpatialBackwardCudaParams params_;
};

}  // namespace

void launch_spatial_backward(const Checker& checker, const SpatialArguments& args, const BackwardCall& from,
                             bool allow_tf32, const SpatialGradientTensors& grads) {
  SpatialBackward(checker, args, from, allow_tf32, grads).run();
}

}  // namespace vitkernels
