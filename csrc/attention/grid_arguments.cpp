#include "attention/grid_arguments.h"

namespace vitkernels {
namespace {

// What a kernel may read, or add zeros to, behind the last entry: a vector of the largest kind.
constexpr int64_t kPadding = 16;
// The batch is cut into at most so many groups, each with sums of its own for a table's gradient.
constexpr int64_t kTableParts = 8;

constexpr const char* kAxisNames[kMaxAxes] = {"depth_bias", "height_bias", "width_bias"};

int64_t num_entries(const Tensor& table) { return table.numel() / table.size(0); }

// The function with the element type of a statistics tensor.
template <class Function>
void dispatch_statistics(const Tensor& t, Function&& function) {
  if (t.scalar_type() == ScalarType::Double) {
    function(double{});
  } else {
    function(float{});
  }
}

OptionalTensor reversed_entries(const OptionalTensor& table) {
  if (!table) return {};
  const Tensor source = torch::stable::contiguous(*table);
  const int64_t heads = source.size(0), entries = num_entries(source), stride = entries + kPadding;
  Tensor target = zeros_as(source, {heads, stride}, source.scalar_type());
  dispatch_statistics(source, [&]<class T>(T) {
    const T* from = static_cast<const T*>(source.const_data_ptr());
    T* to = static_cast<T*>(target.mutable_data_ptr());
    for (int64_t h = 0; h < heads; ++h) {
      std::reverse_copy(from + h * entries, from + (h + 1) * entries, to + h * stride);
    }
  });
  return target;
}

TableTerm table_term(const OptionalTensor& entries) {
  if (!entries) return {};
  return {.data = entries->const_data_ptr(), .head_stride = entries->size(0) == 1 ? 0 : entries->size(1)};
}

// [batch, tokens, heads, offsets]
ScoreStrides axis_strides(const Tensor& t) {
  return {.batch = t.stride(0), .head = t.stride(2), .query = t.stride(1), .key = 1};
}

}  // namespace

GridScore::GridScore(const Checker& checker, const GridArguments& arguments, const Tensor& query, const Tensor& key,
                     ScalarType statistics)
    : from(arguments) {
  const bool has_table = from.bias_table || from.multiplier_table;
  const bool has_axis = std::any_of(from.axis_bias.begin(), from.axis_bias.end(), [](const auto& t) { return !!t; });
  const int64_t prefix = from.num_prefix_tokens;
  if (!has_table && !has_axis) {
    checker.check(prefix == 0, "num_prefix_tokens is ", prefix, ", takes 0 without a table by offset");
    return;
  }
  const int64_t tokens = query.size(1);
  checker.check(prefix >= 0 && prefix < std::max<int64_t>(tokens, 1), "num_prefix_tokens is ", prefix,
                ", takes 0 to less than query's number of tokens (", tokens, ")");
  checker.check(key.size(1) == tokens, "key has ", key.size(1), " tokens, takes query's ", tokens,
                " with a table by offset");
  check_table(checker, "bias_table", from.bias_table, query, statistics);
  check_table(checker, "multiplier_table", from.multiplier_table, query, statistics);
  for (int axis = 0; axis < kMaxAxes; ++axis) {
    const OptionalTensor& t = from.axis_bias[axis];
    if (!t) continue;
    checker.strided_like(kAxisNames[axis], *t, query);
    checker.dtype(kAxisNames[axis], *t, statistics);
    checker.rank(kAxisNames[axis], *t, 4, "(B, tokens on the grid, heads, 2 n - 1)");
    checker.check(t->size(3) % 2 == 1, kAxisNames[axis], " has ", t->size(3), " offsets, takes an odd number 2 n - 1");
  }
  find_grid(checker, tokens - prefix);
  for (int axis = 0; axis < kMaxAxes; ++axis) {
    OptionalTensor& t = from.axis_bias[axis];
    if (!t) continue;
    checker.shape(kAxisNames[axis], *t, {query.size(0), tokens - prefix, query.size(2), grid.num_offsets(axis)});
    t = with_unit_last_stride(*t);
  }
  bias_entries = reversed_entries(from.bias_table);
  multiplier_entries = reversed_entries(from.multiplier_table);
}

void GridScore::check_table(const Checker& checker, const char* name, const OptionalTensor& table, const Tensor& query,
                            ScalarType statistics) const {
  if (!table) return;
  const Tensor& t = *table;
  checker.strided_like(name, t, query);
  checker.dtype(name, t, statistics);
  bool fits = t.dim() >= 2 && t.dim() <= 1 + kMaxAxes && (t.size(0) == 1 || t.size(0) == query.size(2));
  for (int64_t i = 1; fits && i < t.dim(); ++i) fits = t.size(i) % 2 == 1;
  checker.check(fits, name, " has shape ", shape_text(t), ", takes 1 or ", query.size(2),
                " (heads), then an odd number 2 n - 1 for each of one to three axes");
}

// The grid follows from the number of offsets. It must be the same in all terms, and hold the tokens.
void GridScore::find_grid(const Checker& checker, int64_t num_tokens) {
  grid.num_prefix = from.num_prefix_tokens;
  const char* source = nullptr;
  for (const auto& [name, table] :
       {std::pair{"bias_table", &from.bias_table}, {"multiplier_table", &from.multiplier_table}}) {
    if (!*table) continue;
    const Tensor& t = **table;
    Grid found{.num_prefix = grid.num_prefix};
    for (int64_t i = 1; i < t.dim(); ++i) found.size[kMaxAxes - t.dim() + i] = (t.size(i) + 1) / 2;
    const bool same = !source || std::equal(std::begin(grid.size), std::end(grid.size), std::begin(found.size));
    checker.check(same, name, " has shape ", shape_text(t), ", takes as many offsets as bias_table");
    grid = found, source = name;
  }
  for (int axis = 0; !source && axis < kMaxAxes; ++axis) {
    if (from.axis_bias[axis]) grid.size[axis] = (from.axis_bias[axis]->size(3) + 1) / 2;
  }
  int64_t rest = num_tokens;  // what the product so far must be multiplied with; no product can overflow
  for (const int64_t size : grid.size) rest = rest % size == 0 ? rest / size : 0;
  checker.check(rest == 1, source ? source : "rel_pos", " is of a grid of ", grid.size[0], " x ", grid.size[1], " x ",
                grid.size[2], " tokens, takes one of ", num_tokens, " = query's ", num_tokens + grid.num_prefix,
                " less num_prefix_tokens");
}

void GridScore::fill(GridTerms& terms) const {
  terms.grid = grid;
  terms.bias = table_term(bias_entries);
  terms.multiplier = table_term(multiplier_entries);
  for (int axis = 0; axis < kMaxAxes; ++axis) {
    const OptionalTensor& t = from.axis_bias[axis];
    if (t) terms.axis_bias[axis] = {.data = t->const_data_ptr(), .strides = axis_strides(*t)};
  }
}

GridGradients::GridGradients(const GridScore& score, const WantedOnGrid& asked, AttentionBackwardParams& params)
    : score(score), wanted(asked) {
  wanted[0] &= !!score.from.bias_table;
  wanted[1] &= !!score.from.multiplier_table;
  if (wanted[0] || wanted[1]) params.most_batch_groups = kTableParts;
  for (int axis = 0; axis < kMaxAxes; ++axis) {
    wanted[2 + axis] &= !!score.from.axis_bias[axis];
    // Several ranges of keys add to the same offset of a query.
    if (wanted[2 + axis]) params.splits = 1;
  }
}

void GridGradients::allocate(AttentionBackwardParams& params, const Tensor& like) {
  GridTerms& terms = params.score.on_grid;
  const int64_t parts = params.batch_groups() * params.splits, stride = terms.grid.num_entries() + kPadding;
  const auto attach = [&](bool want, TableTerm& term, OptionalTensor& sums) {
    if (!want) return;
    sums = zeros_as(like, {parts, params.heads, stride}, ScalarType::Double);
    term.grad = static_cast<double*>(sums->mutable_data_ptr());
    term.grad_part_stride = params.heads * stride, term.grad_stride = stride;
  };
  attach(wanted[0], terms.bias, bias_sums);
  attach(wanted[1], terms.multiplier, multiplier_sums);
  for (int axis = 0; axis < kMaxAxes; ++axis) {
    if (!wanted[2 + axis]) continue;
    Tensor grad = zeros_as(like, sizes_of(*score.from.axis_bias[axis]), like.scalar_type());
    terms.axis_bias[axis].grad = grad.mutable_data_ptr();
    terms.axis_bias[axis].grad_strides = axis_strides(grad);
    axis_gradients[axis] = grad;
  }
}

std::vector<Tensor> GridGradients::finish(const AttentionBackwardParams& params, const Tensor& like) const {
  const auto none = [&] { return empty_as(like, {0}, like.scalar_type()); };  // a new one each: outputs must not alias
  std::vector<Tensor> grads;
  grads.push_back(wanted[0] ? finish_table(*score.from.bias_table, *bias_sums, params) : none());
  grads.push_back(wanted[1] ? finish_table(*score.from.multiplier_table, *multiplier_sums, params) : none());
  for (const OptionalTensor& grad : axis_gradients) grads.push_back(grad ? *grad : none());
  return grads;
}

// The parts of all heads that share the table, added in order.
Tensor GridGradients::finish_table(const Tensor& table, const Tensor& sums,
                                   const AttentionBackwardParams& params) const {
  Tensor grad = empty_as(table, sizes_of(table), table.scalar_type());
  const int64_t heads = table.size(0), entries = num_entries(table), stride = sums.size(2);
  const int64_t shared_by = heads == 1 ? params.heads : 1;
  const double* from = static_cast<const double*>(sums.const_data_ptr());
  dispatch_statistics(table, [&]<class T>(T) {
    T* to = static_cast<T*>(grad.mutable_data_ptr());
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t entry = entries - 1; entry >= 0; --entry) {
        double sum = 0;
        for (int64_t part = 0; part < sums.size(0); ++part) {
          for (int64_t h = head; h < head + shared_by; ++h) sum += from[(part * params.heads + h) * stride + entry];
        }
        *to++ = T(sum);
      }
    }
  });
  return grad;
}

}  // namespace vitkernels
