// csrc/attention/pattern.h behind a C interface: tests/pattern.py compiles it and asks which keys a query sees.
#include "pattern_rules.h"

using namespace vitkernels;

// For every query: [num_queries][3].
extern "C" void keys_of_queries(const int64_t* integers, int64_t num_queries, int64_t num_keys, int has_outside,
                                int64_t* out) {
  const AxisRule rule = rule_of(integers, num_queries, num_keys, has_outside != 0);
  for (int64_t u = 0; u < num_queries; ++u) keys_of_query(rule, u, out + 3 * u);
}

// For every key: [num_keys][2].
extern "C" void queries_of_keys(const int64_t* integers, int64_t num_queries, int64_t num_keys, int has_outside,
                                int64_t* out) {
  const AxisRule rule = rule_of(integers, num_queries, num_keys, has_outside != 0);
  for (int64_t v = 0; v < num_keys; ++v) queries_of_key(rule, v, out + 2 * v);
}
