// The score terms by offset: from tensors to what kernels read, and from partial sums to gradients.
#pragma once

#include "attention/dense.h"
#include "attention/op/calls.h"

namespace vitkernels {

// How kernels read tables and embeddings: reversed and padded (CPU), or contiguous as they were given (GPU).
enum class TablesAs { kReversed, kGiven };

// Owns what OffsetTerms point to.
class OffsetScore {
 public:
  OffsetScore() = default;
  OffsetScore(const Checker& checker, const ScoreArguments& score, const Tensor& query, const Tensor& key,
              ScalarType statistics, TablesAs tables = TablesAs::kReversed);
  // On a map with `axes` axes, where no query sees a key further away than `largest_offset`.
  OffsetScore(const Checker& checker, const ScoreArguments& score, const Tensor& query, int axes,
              const std::array<int64_t, kMaxAxes>& largest_offset, ScalarType statistics,
              TablesAs tables = TablesAs::kReversed);

  void fill(OffsetTerms& terms) const;

  ScoreFields<OptionalTensor> from;

 private:
  void check_terms(const Checker& checker, const Tensor& query, ScalarType statistics, int64_t num_prefix);
  void find_grid(const Checker& checker, int64_t num_prefix);
  void check_grid(const Checker& checker, int64_t num_tokens) const;
  void reverse();
  void keep(const Checker& checker, int64_t tokens);
  void check_table(const Checker& checker, const char* name, const OptionalTensor& table, const Tensor& query,
                   ScalarType statistics) const;
  bool has_table() const { return from.bias_table || from.multiplier_table; }
  void check_rel_pos(const Checker& checker, int axis, const Tensor& query, ScalarType statistics) const;

  OffsetGrid grid;
  DeviceOffsetGrid small;
  const char* source = nullptr;                       // the argument that it was found in
  OptionalTensor bias_entries, multiplier_entries;    // [heads or 1, entries and padding], or as given
  std::array<OptionalTensor, kMaxAxes> rel_pos_rows;  // [heads or 1, offsets, padded d], or as given
};

// The gradients of these terms, and the memory of their partial sums.
class OffsetGradients {
 public:
  // The batch is divided into at most this many groups, each with partial sums of its own.
  static constexpr int64_t kParts = 8;

  OffsetGradients(const OffsetScore& score, const ScoreFields<bool>& needed);

  bool any() const { return needed.bias_table || needed.multiplier_table || any_rel_pos(); }

  // Partial sums for each of `parts` tasks.
  void allocate(OffsetTerms& terms, int64_t heads, int64_t parts, const Tensor& query);
  void finish(int64_t heads, ScoreFields<OptionalTensor>& grads) const;

 private:
  bool any_rel_pos() const { return needed.rel_pos[0] || needed.rel_pos[1] || needed.rel_pos[2]; }

  const OffsetScore& score;
  ScoreFields<bool> needed;
  ScoreFields<OptionalTensor> sums;  // [parts, heads, ...]: of the tables in float64
};

}  // namespace vitkernels
