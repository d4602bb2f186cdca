// Tasks of a kernel on all threads.
#pragma once

#include <atomic>

#include "common/stable.h"

namespace vitkernels {

// Calls f(begin, end) for ranges of tasks, long ones first: a thread that another program slows down takes fewer. Which
// thread has which changes no bit of any result. Long ranges end at multiples of `unit`, tasks that have much in common.
template <class Function>
void parallel_ranges(int64_t tasks, int64_t unit, const Function& f) {
  constexpr int64_t kRangesPerThread = 32;  // if all were as short as the last ones
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  if (threads <= 1) {
    if (tasks > 0) f(0, tasks);
    return;
  }
  const int64_t shortest = std::max<int64_t>(tasks / (threads * kRangesPerThread), 1);
  const auto end_of = [=](int64_t begin) {
    const int64_t count = std::max((tasks - begin) / (2 * threads), shortest);
    const int64_t end = std::min(begin + count, tasks);
    return count > unit ? end / unit * unit : end;
  };
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t begin = next; begin < tasks;) {
      const int64_t end = end_of(begin);
      if (!next.compare_exchange_weak(begin, end)) continue;
      f(begin, end);
      begin = next;
    }
  });
}

}  // namespace vitkernels
