// The score terms by place on a grid: from tensors to what kernels read, and from their sums to gradients.
#pragma once

#include <array>

#include "attention/dense.h"
#include "common/check.h"

namespace vitkernels {

struct GridArguments {
  OptionalTensor bias_table = {}, multiplier_table = {};  // (heads or 1, 2 n - 1 for each axis)
  std::array<OptionalTensor, kMaxAxes> rel_pos = {};      // depth, height, width: (2 n - 1, d) or (heads, 2 n - 1, d)
  int64_t num_prefix_tokens = 0;
};

// In the order of the arguments.
using WantedOnGrid = std::array<bool, 2 + kMaxAxes>;

// How kernels read tables and embeddings: reversed and padded, on the CPU, or contiguous as they were given, on a GPU.
enum class TablesAs { kReversed, kGiven };

// Owns what GridTerms point to.
class GridScore {
 public:
  GridScore() = default;
  GridScore(const Checker& checker, const GridArguments& arguments, const Tensor& query, const Tensor& key,
            ScalarType statistics, TablesAs tables = TablesAs::kReversed);
  // Of a map with `axes` axes, where no query sees a key further away than `largest_offset`.
  GridScore(const Checker& checker, const GridArguments& arguments, const Tensor& query, int axes,
            const std::array<int64_t, kMaxAxes>& largest_offset, ScalarType statistics);

  void fill(GridTerms& terms) const;

  GridArguments from;

 private:
  void check_terms(const Checker& checker, const Tensor& query, ScalarType statistics);
  void find_grid(const Checker& checker);
  void check_grid(const Checker& checker, int64_t num_tokens) const;
  void reverse();
  void keep(const Checker& checker, int64_t tokens);
  void check_table(const Checker& checker, const char* name, const OptionalTensor& table, const Tensor& query,
                   ScalarType statistics) const;
  bool has_table() const { return from.bias_table || from.multiplier_table; }
  void check_rel_pos(const Checker& checker, int axis, const Tensor& query, ScalarType statistics) const;

  Grid grid;
  SmallGrid small;
  const char* source = nullptr;                       // the argument that it was found in
  OptionalTensor bias_entries, multiplier_entries;    // [heads or 1, entries and padding], or as given
  std::array<OptionalTensor, kMaxAxes> rel_pos_rows;  // [heads or 1, offsets, padded d], or as given
};

// The gradients of these terms, and the memory of their sums.
class GridGradients {
 public:
  // The batch is cut into at most so many groups, each with sums of its own.
  static constexpr int64_t kParts = 8;

  GridGradients(const GridScore& score, const WantedOnGrid& wanted);

  bool any() const { return std::find(wanted.begin(), wanted.end(), true) != wanted.end(); }

  // Sums for each of `parts` tasks.
  void allocate(GridTerms& terms, int64_t heads, int64_t parts, const Tensor& like);

  // Empty where not wanted, in the order of the arguments.
  std::vector<Tensor> finish(int64_t heads, const Tensor& like) const;

 private:
  const GridScore& score;
  WantedOnGrid wanted;
  std::array<OptionalTensor, 2 + kMaxAxes> sums;  // [parts, heads, ...]: of the tables in float64
};

}  // namespace vitkernels
