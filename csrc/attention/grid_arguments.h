// The score terms by place on a grid: from tensors to what kernels read, and from their sums to gradients.
#pragma once

#include <array>

#include "attention/attention.h"
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

  void fill(GridTerms& terms) const;

  GridArguments from;

 private:
  void find_grid(const Checker& checker, int64_t num_tokens);
  void check_table(const Checker& checker, const char* name, const OptionalTensor& table, const Tensor& query,
                   ScalarType statistics) const;
  void check_rel_pos(const Checker& checker, int axis, const Tensor& query, ScalarType statistics) const;

  Grid grid;
  SmallGrid small;
  OptionalTensor bias_entries, multiplier_entries;    // [heads or 1, entries and padding], or as given
  std::array<OptionalTensor, kMaxAxes> rel_pos_rows;  // [heads or 1, offsets, padded d], or as given
};

// The gradients of these terms, and the memory of their sums.
class GridGradients {
 public:
  // Says how the work is to be cut.
  GridGradients(const GridScore& score, const WantedOnGrid& wanted, AttentionBackwardParams& params);

  // Once the number of tasks is known.
  void allocate(AttentionBackwardParams& params, const Tensor& like);

  // Empty where not wanted, in the order of the arguments.
  std::vector<Tensor> finish(const AttentionBackwardParams& params, const Tensor& like) const;

 private:
  const GridScore& score;
  WantedOnGrid wanted;
  std::array<OptionalTensor, 2 + kMaxAxes> sums;  // [parts, heads, ...]: of the tables in float64
};

}  // namespace vitkernels
