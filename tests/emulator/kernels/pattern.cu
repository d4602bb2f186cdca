// The rules of csrc/attention/pattern.h on a device: every query's keys and every key's queries, on many axes.

#include "../../support/pattern_rules.h"

namespace vitkernels {
namespace {

__global__ void pattern_kernel(AxisRule rule, int64_t* keys, int64_t* queries) {
  for (int64_t u = threadIdx.x; u < rule.num_queries; u += blockDim.x) keys_of_query(rule, u, keys + 3 * u);
  for (int64_t v = threadIdx.x; v < rule.num_keys; v += blockDim.x) queries_of_key(rule, v, queries + 2 * v);
}

constexpr int kIntegers = 11;  // Axis.encoded(), queries, keys, whether there are keys outside the map

}  // namespace
}  // namespace vitkernels

// axes [count][kIntegers]; out: for one axis after another keys [num_queries][3], queries [num_keys][2].
extern "C" int pattern(const int64_t* axes, int64_t* out, int count) {
  using namespace vitkernels;
  for (int i = 0; i < count; ++i, axes += kIntegers) {
    const AxisRule rule = rule_of(axes, axes[8], axes[9], axes[10] != 0);
    pattern_kernel<<<1, 32>>>(rule, out, out + 3 * rule.num_queries);
    out += 3 * rule.num_queries + 2 * rule.num_keys;
  }
  return cudaGetLastError();
}
