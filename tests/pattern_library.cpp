// csrc/attention/pattern.h behind a C interface: tests/pattern.py compiles it and asks which keys a query sees.
#include "attention/pattern.h"

namespace {

vitkernels::AxisRule rule_of(const int64_t* integers, int64_t num_queries, int64_t num_keys, int has_outside) {
  return {.rule = vitkernels::Rule(integers[0]),
          .num_queries = num_queries,
          .num_keys = num_keys,
          .step = integers[1],
          .size = integers[2],
          .key_size = integers[3],
          .shift = integers[4],
          .halo = integers[5],
          .stride = integers[6],
          .is_causal = integers[7] != 0,
          .has_outside = has_outside != 0};
}

}  // namespace

// For every query u of the map its keys, in tokens of its residue class, and its place: [num_queries][3].
extern "C" void keys_of_queries(const int64_t* integers, int64_t num_queries, int64_t num_keys, int has_outside,
                                int64_t* out) {
  const vitkernels::AxisRule rule = rule_of(integers, num_queries, num_keys, has_outside);
  for (int64_t u = 0; u < num_queries; ++u, out += 3) {
    const vitkernels::AxisRule own = rule.of_class(u % rule.step);
    const vitkernels::Range keys = own.keys(u / rule.step);
    out[0] = keys.begin, out[1] = keys.end, out[2] = own.num_keys ? own.place(u / rule.step) : 0;
  }
}

// For every key v of the map the queries that see it, in tokens of its residue class: [num_keys][2].
extern "C" void queries_of_keys(const int64_t* integers, int64_t num_queries, int64_t num_keys, int has_outside,
                                int64_t* out) {
  const vitkernels::AxisRule rule = rule_of(integers, num_queries, num_keys, has_outside);
  for (int64_t v = 0; v < num_keys; ++v, out += 2) {
    const vitkernels::Range queries = rule.of_class(v % rule.step).queries(v / rule.step);
    out[0] = queries.begin, out[1] = queries.end;
  }
}
