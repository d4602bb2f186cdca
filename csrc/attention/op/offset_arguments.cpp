#include "attention/op/offset_arguments.h"

namespace vitkernels {
namespace {

// Elements of the widest vector: a kernel may read, or add zeros to, this many behind the last entry of a table; and
// the length of an embedding is a multiple of it.
constexpr int64_t kPadding = 16;

int64_t num_entries(const Tensor& table) { return table.numel() / table.size(0); }

OptionalTensor contiguous(const OptionalTensor& t) { return t ? OptionalTensor(as_contiguous(*t)) : t; }

OptionalTensor reversed_entries(const OptionalTensor& table) {
  if (!table) return {};
  const Tensor source = as_contiguous(*table);
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
  return {.data = entries->const_data_ptr(), .head_stride = entries->size(0) == 1 ? 0 : entries->stride(0)};
}

int64_t heads_of(const Tensor& rel_pos) { return rel_pos.dim() == 2 ? 1 : rel_pos.size(0); }
int64_t offsets_of(const Tensor& rel_pos) { return rel_pos.size(rel_pos.dim() - 2); }

int64_t padded_dim(const Tensor& rel_pos) {
  return (rel_pos.size(rel_pos.dim() - 1) + kPadding - 1) / kPadding * kPadding;
}

OptionalTensor reversed_rows(const OptionalTensor& rel_pos) {
  if (!rel_pos) return {};
  const Tensor source = as_contiguous(*rel_pos);
  const int64_t heads = heads_of(source), offsets = offsets_of(source), dim = source.size(source.dim() - 1);
  Tensor target = zeros_as(source, {heads, offsets, padded_dim(source)}, source.scalar_type());
  dispatch_statistics(source, [&]<class T>(T) {
    const T* from = static_cast<const T*>(source.const_data_ptr());
    T* to = static_cast<T*>(target.mutable_data_ptr());
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t i = offsets - 1; i >= 0; --i, to += target.size(2)) {
        std::copy_n(from + (h * offsets + i) * dim, dim, to);
      }
    }
  });
  return target;
}

RelPosTerm rel_pos_term(const OptionalTensor& rows) {
  if (!rows) return {};
  return {.data = rows->const_data_ptr(),
          .head_stride = heads_of(*rows) == 1 ? 0 : rows->stride(0),
          .row_stride = rows->size(rows->dim() - 1)};
}

// Adds the parts, and the heads that share a term, in order. Consecutive sums of the reversed entries are `row`
// elements apart, of which the first `dim` are the entry's gradient; heads are `stride` elements apart.
struct Reduction {
  int64_t heads, entries, dim, row, stride;

  template <class Sum, class T>
  void run(const Sum* sums, int64_t parts, int64_t num_heads, T* grad) const {
    const int64_t shared_by = heads == 1 ? num_heads : 1;
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t entry = entries - 1; entry >= 0; --entry) {
        for (int64_t c = 0; c < dim; ++c) {
          double sum = 0;
          for (int64_t part = 0; part < parts; ++part) {
            for (int64_t h = head; h < head + shared_by; ++h) {
              sum += double(sums[(part * num_heads + h) * stride + entry * row + c]);
            }
          }
          *grad++ = T(sum);
        }
      }
    }
  }
};

}  // namespace

OffsetScore::OffsetScore(const Checker& checker, const ScoreArguments& score, const Tensor& query, const Tensor& key,
                         ScalarType statistics, TablesAs tables)
    : from(score.terms) {
  const bool has_table = from.bias_table || from.multiplier_table;
  const bool has_axis = std::any_of(from.rel_pos.begin(), from.rel_pos.end(), [](const auto& t) { return !!t; });
  const int64_t prefix = score.num_prefix_tokens;
  if (!has_table && !has_axis) {
    checker.check(prefix == 0, "num_prefix_tokens is ", prefix, ", takes 0 without a table by offset");
    return;
  }
  const int64_t tokens = query.size(1);
  checker.check(prefix >= 0 && prefix < std::max<int64_t>(tokens, 1), "num_prefix_tokens is ", prefix,
                ", takes 0 to less than query's number of tokens (", tokens, ")");
  checker.check(key.size(1) == tokens, "key has ", key.size(1), " tokens, takes query's ", tokens,
                " with a table by offset");
  check_terms(checker, query, statistics, prefix);
  check_grid(checker, tokens - prefix);
  tables == TablesAs::kGiven ? keep(checker, tokens) : reverse();
}

OffsetScore::OffsetScore(const Checker& checker, const ScoreArguments& score, const Tensor& query, int axes,
                         const std::array<int64_t, kMaxAxes>& largest_offset, ScalarType statistics, TablesAs tables)
    : from(score.terms) {
  check_terms(checker, query, statistics, 0);
  for (const auto& [name, table] :
       {std::pair{"bias_table", &from.bias_table}, {"multiplier_table", &from.multiplier_table}}) {
    if (*table) checker.rank(name, **table, 1 + axes, "(heads or 1, then the offsets of each axis of the map)");
  }
  for (int axis = 0; axis < kMaxAxes; ++axis) {
    const bool is_missing = axis < kMaxAxes - axes;
    checker.check(!is_missing || !from.rel_pos[axis], kRelPosNames[axis], " is given, takes None with a map of ", axes,
                  " axes");
    const bool has_term = has_table() || from.rel_pos[axis];
    checker.check(is_missing || !has_term || grid.size[axis] > largest_offset[axis],
                  has_table() ? source : kRelPosNames[axis], " has ", grid.num_offsets(axis), " offsets on axis ",
                  axis - (kMaxAxes - axes), ", takes at least ", 2 * largest_offset[axis] + 1);
  }
  tables == TablesAs::kGiven ? keep(checker, grid.num_tokens()) : reverse();
}

void OffsetScore::check_terms(const Checker& checker, const Tensor& query, ScalarType statistics, int64_t num_prefix) {
  check_table(checker, "bias_table", from.bias_table, query, statistics);
  check_table(checker, "multiplier_table", from.multiplier_table, query, statistics);
  for (int axis = 0; axis < kMaxAxes; ++axis) check_rel_pos(checker, axis, query, statistics);
  find_grid(checker, num_prefix);
}

void OffsetScore::keep(const Checker& checker, int64_t tokens) {
  double entries = 1.0;
  for (int axis = 0; axis < kMaxAxes; ++axis) entries *= double(grid.num_offsets(axis));
  checker.check(entries + double(grid.num_prefix) <= DeviceOffsetGrid::kMaxEntries, "query has ", tokens,
                " tokens on a grid with offsets beyond 32 bits, takes fewer on a GPU");
  small = DeviceOffsetGrid(grid);
  bias_entries = contiguous(from.bias_table);
  multiplier_entries = contiguous(from.multiplier_table);
  for (int axis = 0; axis < kMaxAxes; ++axis) rel_pos_rows[axis] = contiguous(from.rel_pos[axis]);
}

void OffsetScore::reverse() {
  bias_entries = reversed_entries(from.bias_table);
  multiplier_entries = reversed_entries(from.multiplier_table);
  for (int axis = 0; axis < kMaxAxes; ++axis) rel_pos_rows[axis] = reversed_rows(from.rel_pos[axis]);
}

void OffsetScore::check_table(const Checker& checker, const char* name, const OptionalTensor& table,
                              const Tensor& query, ScalarType statistics) const {
  if (!table) return;
  const Tensor& t = *table;
  checker.tensor(name, t, query, statistics);
  const int64_t heads = query.size(query.dim() - 2);
  bool fits = t.dim() >= 2 && t.dim() <= 1 + kMaxAxes && (t.size(0) == 1 || t.size(0) == heads);
  for (int64_t i = 1; fits && i < t.dim(); ++i) fits = t.size(i) % 2 == 1;
  checker.check(fits, name, " has shape ", Shape(t), ", takes 1 or ", heads,
                " (heads), then an odd number 2 n - 1 for each of one to three axes");
}

void OffsetScore::check_rel_pos(const Checker& checker, int axis, const Tensor& query, ScalarType statistics) const {
  if (!from.rel_pos[axis]) return;
  const Tensor& t = *from.rel_pos[axis];
  const char* name = kRelPosNames[axis];
  checker.tensor(name, t, query, statistics);
  const int64_t heads = query.size(query.dim() - 2), dim = query.size(query.dim() - 1), rank = t.dim();
  const bool fits = (rank == 2 || (rank == 3 && (t.size(0) == 1 || t.size(0) == heads))) && t.size(rank - 1) == dim &&
                    t.size(rank - 2) % 2 == 1;
  checker.check(fits, name, " has shape ", Shape(t), ", takes (2 n - 1, ", dim, ") or (", heads, ", 2 n - 1, ", dim,
                ") = (heads, offsets, d)");
}

// Infers the grid from the numbers of offsets. It must be the same in all terms.
void OffsetScore::find_grid(const Checker& checker, int64_t num_prefix) {
  grid.num_prefix = num_prefix;
  const auto take = [&](const char* name, const Tensor& t, int axis, int64_t offsets) {
    const int64_t size = (offsets + 1) / 2;
    checker.check(!source || size == grid.size[axis], name, " has shape ", Shape(t), ", of ", size,
                  " tokens on an axis that has ", grid.size[axis], " in ", source);
    grid.size[axis] = size;
  };
  for (const auto& [name, table] :
       {std::pair{"bias_table", &from.bias_table}, {"multiplier_table", &from.multiplier_table}}) {
    if (!*table) continue;
    const Tensor& t = **table;
    const int axes = int(t.dim()) - 1;
    for (int axis = 0; axis < kMaxAxes; ++axis) {
      const int of_table = axis - (kMaxAxes - axes);
      take(name, t, axis, of_table < 0 ? 1 : t.size(1 + of_table));
    }
    source = name;
  }
  for (int axis = 0; axis < kMaxAxes; ++axis) {
    if (from.rel_pos[axis]) take(kRelPosNames[axis], *from.rel_pos[axis], axis, offsets_of(*from.rel_pos[axis]));
  }
}

// The number of tokens must match the grid.
void OffsetScore::check_grid(const Checker& checker, int64_t num_tokens) const {
  int64_t rest = num_tokens;  // divided by the sizes so far, instead of a product that could overflow
  for (const int64_t size : grid.size) rest = rest % size == 0 ? rest / size : 0;
  checker.check(rest == 1, source ? source : "rel_pos", " is of a grid of ", grid.size[0], " x ", grid.size[1], " x ",
                grid.size[2], " tokens, takes one of ", num_tokens, " = query's ", num_tokens + grid.num_prefix,
                " less num_prefix_tokens");
}

void OffsetScore::fill(OffsetTerms& terms) const {
  terms.grid = grid;
  terms.small = small;
  terms.bias = table_term(bias_entries);
  terms.multiplier = table_term(multiplier_entries);
  for (int axis = 0; axis < kMaxAxes; ++axis) terms.rel_pos[axis] = rel_pos_term(rel_pos_rows[axis]);
}

OffsetGradients::OffsetGradients(const OffsetScore& score, const ScoreFields<bool>& needed)
    : score(score), needed(needed) {}

void OffsetGradients::allocate(OffsetTerms& terms, int64_t heads, int64_t parts, const Tensor& query) {
  const ScalarType statistics = statistics_type(query.scalar_type());
  const auto table = [&](bool is_needed, TableTerm& term, OptionalTensor& sum) {
    if (!is_needed) return;
    term.grad_head_stride = terms.grid.num_entries() + kPadding;
    term.grad_part_stride = heads * term.grad_head_stride;
    sum = zeros_as(query, {parts, term.grad_part_stride}, ScalarType::Double);
    term.grad = static_cast<double*>(sum->mutable_data_ptr());
  };
  table(needed.bias_table, terms.bias, sums.bias_table);
  table(needed.multiplier_table, terms.multiplier, sums.multiplier_table);
  for (int axis = 0; axis < kMaxAxes; ++axis) {
    if (!needed.rel_pos[axis]) continue;
    RelPosTerm& term = terms.rel_pos[axis];
    term.grad_head_stride = terms.grid.num_offsets(axis) * term.row_stride;
    term.grad_part_stride = heads * term.grad_head_stride;
    sums.rel_pos[axis] = zeros_as(query, {parts, term.grad_part_stride}, statistics);
    term.grad = sums.rel_pos[axis]->mutable_data_ptr();
  }
}

void OffsetGradients::finish(int64_t num_heads, ScoreFields<OptionalTensor>& grads) const {
  // Reduces `sum`, of element type Sum, to a gradient in the shape of `given`.
  const auto reduce = [&]<class Sum, class T>(Sum, T, const Tensor& sum, const Tensor& given, Reduction reduction) {
    const Tensor grad = empty_as(given);
    reduction.stride = sum.size(1) / num_heads;
    reduction.run(static_cast<const Sum*>(sum.const_data_ptr()), sum.size(0), num_heads,
                  static_cast<T*>(grad.mutable_data_ptr()));
    return grad;
  };
  const auto table = [&](const OptionalTensor& sum, const OptionalTensor& given, OptionalTensor& grad) {
    if (!sum) return;
    const Reduction reduction{.heads = given->size(0), .entries = num_entries(*given), .dim = 1, .row = 1, .stride = 0};
    grad = dispatch_statistics(*given, [&]<class T>(T) { return reduce(double{}, T{}, *sum, *given, reduction); });
  };
  table(sums.bias_table, score.from.bias_table, grads.bias_table);
  table(sums.multiplier_table, score.from.multiplier_table, grads.multiplier_table);
  for (int axis = 0; axis < kMaxAxes; ++axis) {
    if (!sums.rel_pos[axis]) continue;
    const Tensor& t = *score.from.rel_pos[axis];
    const Reduction reduction{
        .heads = heads_of(t), .entries = offsets_of(t), .dim = t.size(t.dim() - 1), .row = padded_dim(t), .stride = 0};
    grads.rel_pos[axis] =
        dispatch_statistics(t, [&]<class T>(T) { return reduce(T{}, T{}, *sums.rel_pos[axis], t, reduction); });
  }
}

}  // namespace vitkernels
