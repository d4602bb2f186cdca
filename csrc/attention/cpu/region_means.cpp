// Means of the tokens of regions. Compiled once per instruction set.
//
// A task is a region of one image. Its tokens are added in order, so no bit depends on the number of threads.
#include "attention/cpu/softmax.h"
#include "attention/route.h"
#include "cpu/convert.h"
#include "cpu/make_kernel.h"

namespace vitkernels::VK_ISA {
namespace {

template <class S>
class RegionMeans {
  using T = Compute<S>;

 public:
  RegionMeans(const RegionMeansParams& params, void* memory) : p(params), scratch(memory) {}

  int64_t scratch_size() const { return scratch.size(); }

  void run(int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t batch = task / p.regions, region = task % p.regions;
      std::fill_n(sums, p.channels(), T(0));
      int64_t count = 0;
      for (int64_t i = 0; i < p.tokens_per_region; ++i) {
        const int32_t token = p.tokens[region * p.tokens_per_region + i];
        if (token < 0) continue;
        for (int64_t head = 0; head < p.heads; ++head) add(p.rows.at<const S>(batch, token, head), head);
        ++count;
      }
      T* const means = static_cast<T*>(p.means) + p.element(batch, region);
      for (int64_t c = 0; c < p.channels(); ++c) means[c * p.panel] = sums[c] / T(count);
    }
  }

 private:
  VK_INLINE void add(const S* row, int64_t head) {
    T* const sum = sums + head * p.head_dim;
    for_each_vector<T>({0, p.head_dim}, [&](int64_t c, Range lanes) {
      const Vec<T> total = load_widened<T>(sum + c, lanes.end) + load_widened<T>(row + c, lanes.end);
      store_narrowed<T>(sum + c, total, lanes.end);
    });
  }

  const RegionMeansParams& p;
  Scratch scratch;
  T* const sums = scratch.take<T>(p.channels());
};

}  // namespace
}  // namespace vitkernels::VK_ISA

VK_KERNEL(RegionMeans, RegionMeansParams);
