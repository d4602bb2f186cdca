// Tasks of a kernel on all threads.
#pragma once

#include <atomic>

#include "common/range.h"
#include "common/stable.h"

namespace vitkernels {

// Calls f(begin, end) for ranges of tasks, long ones first: a thread that another program slows down takes fewer. The
// assignment to threads changes no bit of any result. Ranges end at multiples of `unit` tasks, which share work, unless
// they are much shorter than that. A single thread goes through parallel_for, too, which gives it its number.
template <class Function>
void parallel_ranges(int64_t tasks, int64_t unit, const Function& f) {
  constexpr int64_t kRangesPerThread = 32;  // if all were as short as the last
  if (tasks <= 0) return;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  const int64_t shortest = std::max<int64_t>(tasks / (threads * kRangesPerThread), 1);
  const auto end_of = [=](int64_t begin) {
    const int64_t wanted = threads == 1 ? tasks : std::max((tasks - begin) / (2 * threads), shortest);
    if (2 * wanted < unit) return std::min(begin + wanted, tasks);
    const int64_t nearest = (begin + wanted + unit / 2) / unit, next = begin / unit + 1;
    return std::min(std::max(nearest, next) * unit, tasks);
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

// Some tasks of a kernel (cpu/kernel.h), in ranges as above.
template <class Kernel, class Params>
void run_kernel(const Kernel& kernel, const Params& params, Range tasks, int64_t unit, const Tensor& like) {
  const int64_t first = tasks.begin, count = tasks.end - tasks.begin;
  const ThreadScratch scratch(like, kernel.scratch(params), count);
  parallel_ranges(count, unit,
                  [&](int64_t begin, int64_t end) { kernel.run(params, first + begin, first + end, scratch.mine()); });
}

// All of them.
template <class Kernel, class Params>
void run_kernel(const Kernel& kernel, const Params& params, int64_t tasks, int64_t unit, const Tensor& like) {
  run_kernel(kernel, params, Range{0, tasks}, unit, like);
}

}  // namespace vitkernels
