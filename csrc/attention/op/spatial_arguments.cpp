#include "attention/op/spatial_arguments.h"

#include <cmath>

namespace vitkernels {
namespace {

constexpr int64_t kIntegersPerAxis = 8;
constexpr int64_t kMaxKeys = 1 << 22;  // of a tile, unless all of them are on the map
constexpr int64_t kMaxExtent = 4096;   // of a block or a window, unless the axis is longer
constexpr int64_t kMaxTokens = int64_t(1) << 31;

std::vector<int64_t> map_sizes(const Tensor& t) {
  const std::vector<int64_t> sizes = sizes_of(t);
  return {sizes.begin() + 1, sizes.end() - 2};
}

}  // namespace

MapTensor map_tensor(const Tensor& t, int axes) {
  MapTensor result{const_cast<void*>(t.const_data_ptr()), t.stride(0), {}, t.stride(1 + axes)};
  // The stride of one token says nothing, and kernels count tokens outside the map, too.
  for (int axis = 0; axis < axes; ++axis) {
    result.axis_stride[kMaxAxes - axes + axis] = t.size(1 + axis) == 1 ? 0 : t.stride(1 + axis);
  }
  return result;
}

MapTensor key_bias_tensor(const Tensor& term, int axes) {
  int64_t strides[2 + kMaxAxes] = {};  // (B, heads, *map), of which the term has the last axes
  const int64_t rank = 2 + axes;
  for (int64_t i = 0; i < term.dim(); ++i) {
    strides[rank - term.dim() + i] = term.size(i) == 1 ? 0 : term.stride(i);
  }
  MapTensor result{const_cast<void*>(term.const_data_ptr()), strides[0], {}, strides[1]};
  for (int axis = 0; axis < axes; ++axis) result.axis_stride[kMaxAxes - axes + axis] = strides[2 + axis];
  return result;
}

UnitRowsParams unit_rows_params(const Tensor& rows, DType dtype) {
  const int axes = int(rows.dim()) - 3;
  UnitRowsParams params{.dtype = dtype, .batch = rows.size(0), .rows = map_tensor(rows, axes)};
  params.heads = rows.size(1 + axes), params.dim = rows.size(2 + axes);
  for (int axis = 0; axis < axes; ++axis) params.size[kMaxAxes - axes + axis] = rows.size(1 + axis);
  return params;
}

SpatialArguments::SpatialArguments(const Checker& checker, SpatialCall call, const DevicePolicy& policy)
    : query(call.query),
      key(call.key),
      value(call.value),
      score(std::move(call.score)),
      is_shared_query(call.is_shared_query),
      qk_norm(call.qk_norm) {
  constexpr std::string_view kDenseTerms[] = {"bias", "multiplier"};
  score.refuse(checker, kDenseTerms, "over a map");
  checker.check(score.num_prefix_tokens == 0, "num_prefix_tokens is ", score.num_prefix_tokens, ", takes 0 over a map");
  check_tokens(checker);
  const ScalarType statistics = statistics_type(dtype);
  pattern.radius = score.radius;
  checker.check(pattern.radius >= 0 && std::isfinite(pattern.radius), "radius is ", pattern.radius,
                ", takes a positive number of tokens, or 0 for none");
  check_axes(checker, call.axes);
  if (is_shared_query) check_shared_query(checker);
  check_fill(checker, "key_fill", score.terms.key_fill, head_dim);
  check_fill(checker, "value_fill", score.terms.value_fill, value_dim);
  heads_of = HeadMap(checker, score.head_map, query, heads, kv_heads, policy.read);
  if (score.head_map) score.head_map = as_contiguous(*score.head_map);
  check_scale(checker, score, query, heads, statistics);
  std::vector<int64_t> of_keys{batch, heads};
  of_keys.insert(of_keys.end(), key_map.begin(), key_map.end());
  check_score_term(checker, "key_bias", score.terms.key_bias, query, statistics, of_keys, "(B, heads, *key_map)");
  tile(checker);
  std::array<int64_t, kMaxAxes> largest_offset{};
  for (size_t axis = 0; axis < tiled_axes.size(); ++axis) largest_offset[axis] = tiled_axes[axis].largest_offset;
  tables = OffsetScore(checker, score, query, axes, largest_offset, statistics, policy.tables);
  query = with_unit_last_stride(query);
  key = with_unit_last_stride(key);
  value = with_unit_last_stride(value);
}

void SpatialArguments::check_tokens(const Checker& checker) {
  constexpr const char* kTakes = ", takes 4 to 6 dimensions (B, one to three axes, heads, d)";
  checker.defined("query", query);
  checker.check(query.dim() >= 4 && query.dim() <= 3 + kMaxAxes, "query has shape ", Shape(query), kTakes);
  axes = int(query.dim()) - 3;
  checker.rank("key", key, query.dim(), "(B, *map, kv_heads, d), as query");
  checker.rank("value", value, query.dim(), "(B, *map, kv_heads, dv), as query");
  check_tensors(checker, *this, axes + 1);
  batch = query.size(0);
  checker.size("key", key, 0, batch, "query's batch size");
  checker.size("value", value, 0, batch, "query's batch size");
  for (int axis = 0; axis < axes; ++axis) checker.size("value", value, 1 + axis, key.size(1 + axis), "key's map");
  key_map = map_sizes(key);
  query_map = is_shared_query ? key_map : map_sizes(query);
  for (int axis = 0; axis < axes; ++axis) {
    const int64_t longest = std::max(query_map[axis], key_map[axis]);
    checker.check(longest < kMaxTokens, "query or key has ", longest, " tokens on an axis, takes less than ",
                  kMaxTokens);
  }
}

void SpatialArguments::check_axes(const Checker& checker, const std::vector<int64_t>& integers) {
  checker.check(int64_t(integers.size()) == axes * kIntegersPerAxis, "axes has ", integers.size(), " integers, takes ",
                axes * kIntegersPerAxis, " = 8 for each axis of query's map");
  for (int axis = 0; axis < axes; ++axis) {
    const int64_t* of_axis = integers.data() + axis * kIntegersPerAxis;
    checker.check(of_axis[0] >= 0 && of_axis[0] <= int64_t(Rule::kSliding), "axes gives axis ", axis, " the rule ",
                  of_axis[0], ", takes 0 (full), 1 (block), 2 (neighborhood) or 3 (sliding)");
    checker.check(of_axis[7] == 0 || of_axis[7] == 1, "axes gives axis ", axis, " the is_causal ", of_axis[7],
                  ", takes 0 or 1");
    const AxisRule rule{.rule = Rule(of_axis[0]),
                        .num_queries = query_map[axis],
                        .num_keys = key_map[axis],
                        .step = of_axis[1],
                        .size = of_axis[2],
                        .key_size = of_axis[3],
                        .shift = of_axis[4],
                        .halo = of_axis[5],
                        .stride = of_axis[6],
                        .is_causal = of_axis[7] == 1,
                        .has_outside = score.has_outside};
    check_rule(checker, axis, rule);
    pattern.axis[kMaxAxes - axes + axis] = rule;
  }
}

void SpatialArguments::check_rule(const Checker& checker, int axis, const AxisRule& rule) const {
  const auto check = [&](const char* what, int64_t value, int64_t min, int64_t max) {
    checker.check(value >= min && value <= max, "axes gives axis ", axis, " the ", what, " ", value, ", takes ", min,
                  " to ", max);
  };
  const int64_t longest = std::max<int64_t>({rule.num_queries, rule.num_keys, 1});
  const int64_t largest = std::max(kMaxExtent, 2 * longest);
  check("step", rule.step, 1, longest);
  if (rule.rule == Rule::kNeighborhood) {
    const int64_t classes = std::min(rule.step, std::max<int64_t>(rule.num_queries, 1));
    const int64_t fewest = rule.of_class(classes - 1).num_keys;
    checker.check(rule.size <= fewest, "axes gives axis ", axis, " the size ", rule.size, ", which exceeds its ",
                  fewest, " keys", rule.step > 1 ? " of a residue class" : "");
  }
  check("size", rule.size, 1, largest);
  check("key_size", rule.key_size, 1, largest);
  check("shift", rule.shift, 0, rule.size - 1);
  check("halo", rule.halo, 0, largest);
  check("stride", rule.stride, 1, rule.size);
}

void SpatialArguments::check_shared_query(const Checker& checker) const {
  for (int axis = 0; axis < axes; ++axis) {
    const AxisRule& rule = pattern.axis[kMaxAxes - axes + axis];
    checker.check(rule.rule == Rule::kBlock && rule.shift == 0 && rule.step == 1 && rule.key_size == rule.size &&
                      rule.num_keys % rule.size == 0,
                  "axes gives axis ", axis, " another rule than blocks that divide key's ", rule.num_keys,
                  " tokens, takes these with a shared query");
    checker.size("query", query, 1 + axis, rule.size, "the size of a block, with a shared query");
  }
}

void SpatialArguments::check_fill(const Checker& checker, const char* name, OptionalTensor& fill, int64_t dim) const {
  if (!fill) return;
  checker.check(score.has_outside, name, " is given, takes None unless there are keys outside the map");
  checker.tensor(name, *fill, query, query.scalar_type(), {kv_heads, dim});
  fill = as_contiguous(*fill);
}

void SpatialArguments::tile(const Checker& checker) {
  if (is_empty()) return;
  const std::array<int64_t, kMaxAxes> extents = tile_extents(pattern);
  double keys = 1, on_map = 1;
  for (int axis = 0; axis < kMaxAxes; ++axis) {
    tiled_axes.emplace_back(pattern.axis[axis], extents[axis]);
    keys *= double(tiled_axes.back().view().max_keys);
    on_map *= double(pattern.axis[axis].num_keys);
  }
  checker.check(keys <= std::max(on_map, double(kMaxKeys)), "axes gives a query ", keys, " keys, takes at most ",
                kMaxKeys, " or those of the map");
}

bool SpatialArguments::is_empty() const {
  return batch == 0 || std::find(query_map.begin(), query_map.end(), 0) != query_map.end();
}

std::vector<int64_t> SpatialArguments::lse_sizes() const {
  std::vector<int64_t> sizes{batch};
  sizes.insert(sizes.end(), query_map.begin(), query_map.end());
  sizes.push_back(heads);
  return sizes;
}

std::vector<int64_t> SpatialArguments::out_sizes() const {
  std::vector<int64_t> sizes = lse_sizes();
  sizes.push_back(value_dim);
  return sizes;
}

void SpatialArguments::fill(SpatialParams& params) const {
  params.dtype = dtype;
  params.batch = batch, params.heads = heads, params.kv_heads = kv_heads;
  params.head_dim = head_dim, params.value_dim = value_dim;
  params.groups = heads_of.view();
  for (int axis = 0; axis < kMaxAxes; ++axis) {
    params.query_size[axis] = pattern.axis[axis].num_queries;
    params.key_size[axis] = pattern.axis[axis].num_keys;
    if (!tiled_axes.empty()) params.axis[axis] = tiled_axes[axis].view();
  }
  params.radius = pattern.radius;
  params.is_shared_query = is_shared_query;
  const ScoreFields<OptionalTensor>& terms = score.terms;
  params.score = {.scale = score.scale,
                  .head_scale = terms.head_scale ? terms.head_scale->const_data_ptr() : nullptr,
                  .multiplier = {},
                  .bias = {},
                  .key_bias = {}};
  tables.fill(params.score.by_offset);
  params.query = map_tensor(query, axes);
  params.key = map_tensor(key, axes);
  params.value = map_tensor(value, axes);
  if (terms.key_bias) {
    const MapTensor map = key_bias_tensor(*terms.key_bias, axes);
    params.score.key_bias.data = map.data;
    params.score.key_bias.strides = {map.batch_stride, map.head_stride, 0, map.axis_stride[kMaxAxes - 1]};
    std::copy_n(map.axis_stride, kMaxAxes - 1, params.score.key_bias_axis_stride);
  }
  params.key_fill = terms.key_fill ? terms.key_fill->const_data_ptr() : nullptr;
  params.value_fill = terms.value_fill ? terms.value_fill->const_data_ptr() : nullptr;
}

}  // namespace vitkernels
