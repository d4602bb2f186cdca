// The regions of keys whose means have the largest products with that of a region of queries. Compiled once per
// instruction set.
//
// A task is a few regions of queries of one image, whose products with all regions of keys are never in memory together.
// A lane is a region of keys and adds the channels in order, so equal means have equal products at any number of threads.
#include "attention/route.h"

#include <algorithm>
#include <numeric>

#include "cpu/make_kernel.h"

namespace vitkernels::VK_ISA {
namespace {

template <class S>
class Route {
  using T = Compute<S>;

 public:
  Route(const RouteParams& params, void* memory) : p(params), scratch(memory) {}

  int64_t scratch_size() const { return scratch.size(); }

  void run(int64_t begin, int64_t end) {
    const int64_t regions = p.queries.regions, blocks = (regions + kRows - 1) / kRows;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t batch = task / blocks, first = task % blocks * kRows;
      const int64_t count = std::min<int64_t>(regions - first, kRows);
      for (int64_t panel = 0; panel < padded; panel += kRoutePanel) multiply(batch, first, count, panel);
      for (int64_t r = 0; r < count; ++r) {
        choose(products + r * padded, p.graph + (batch * regions + first + r) * p.topk);
      }
    }
  }

 private:
  static constexpr int kRows = kRouteRows, kVectors = kRoutePanel / kWidth<T>;

  // Of `count` regions of queries with those of keys in a panel.
  void multiply(int64_t batch, int64_t first, int64_t count, int64_t panel) {
    const T* means[kRows];  // of queries [channels]; rows beyond the last repeat it
    for (int r = 0; r < kRows; ++r) {
      const int64_t region = first + std::min<int64_t>(r, count - 1);
      means[r] = static_cast<const T*>(p.queries.means) + p.queries.element(batch, region);
    }
    const T* const keys = static_cast<const T*>(p.keys.means) + p.keys.element(batch, panel);  // [channels, panel]
    for (int first_vector = 0; first_vector < kVectors; first_vector += kAtOnce) {
      Vec<T> acc[kRows][kAtOnce] = {};
      for (int64_t c = 0; c < p.queries.channels(); ++c) {
#pragma GCC unroll 2
        for (int v = 0; v < kAtOnce; ++v) {
          const Vec<T> key = load(keys + c * kRoutePanel + (first_vector + v) * kWidth<T>);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) acc[r][v] += key * means[r][c];
        }
      }
      for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kAtOnce; ++v) {
          store(products + r * padded + panel + (first_vector + v) * kWidth<T>, acc[r][v]);
        }
      }
    }
  }

  // The topk of a region's products [padded].
  void choose(const T* values, int64_t* chosen) {
    std::iota(order, order + p.keys.regions, 0);
    std::partial_sort(order, order + p.topk, order + p.keys.regions,
                      [values](int32_t a, int32_t b) { return is_before(values[a], a, values[b], b); });
    std::copy_n(order, p.topk, chosen);
  }

  static constexpr int kAtOnce = 2;  // vectors of accumulators a row
  static_assert(kVectors % kAtOnce == 0);

  const RouteParams& p;
  Scratch scratch;
  const int64_t padded = p.keys.padded_regions();
  T* const products = scratch.take<T>(kRows * padded);
  int32_t* const order = scratch.take<int32_t>(p.keys.regions);
};

}  // namespace
}  // namespace vitkernels::VK_ISA

VK_KERNEL(Route, RouteParams);
