// Tasks of the weights' gradients. They depend on shapes alone: results are the same for any number of threads.
#pragma once

#include "monarch/monarch.h"

namespace vitkernels {

// First those of the first weight, some rows of one block each; then those of the second, the same rows of all blocks,
// of which an output gradient has neighbors.
class MonarchWeightTasks {
 public:
  explicit MonarchWeightTasks(const MonarchProblem& p)
      : blocks_(p.first.blocks), first_(p.first.outputs), second_(p.second.outputs), turns_(p.second.blocks) {}

  int64_t first_chunk() const { return at_most(kRows, first_); }
  int64_t second_chunk() const { return at_most(turns_ < 8 ? 4 * kRows / turns_ : kFewest, second_); }
  int64_t first_chunks() const { return divide(first_, first_chunk()); }
  int64_t of_first() const { return blocks_ * first_chunks(); }
  int64_t count() const { return of_first() + divide(second_, second_chunk()); }

  Range first_rows(int64_t chunk) const { return share_of({0, first_}, chunk, first_chunks()); }
  Range second_rows(int64_t chunk) const { return share_of({0, second_}, chunk, divide(second_, second_chunk())); }

 private:
  static constexpr int64_t kRows = 64, kFewest = 32;

  // By value: code of an instruction set may not define a name that another's shares, as a reference would.
  static int64_t at_most(int64_t largest, int64_t n) { return n < largest ? n : largest; }
  static int64_t divide(int64_t n, int64_t by) { return (n + by - 1) / by; }

  int64_t blocks_, first_, second_, turns_;
};

}  // namespace vitkernels
