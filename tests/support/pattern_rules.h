// What tests ask csrc/attention/pattern.h on one axis, of the host (pattern_library.cpp) and of a device
// (emulator/kernels/pattern.cu). Everything but u and v counts the tokens of their residue class.
#pragma once

#include "attention/pattern.h"

namespace vitkernels {

// From what Axis.encoded() returns in Python.
inline AxisRule rule_of(const int64_t* integers, int64_t num_queries, int64_t num_keys, bool has_outside) {
  return {.rule = Rule(integers[0]),
          .num_queries = num_queries,
          .num_keys = num_keys,
          .step = integers[1],
          .size = integers[2],
          .key_size = integers[3],
          .shift = integers[4],
          .halo = integers[5],
          .stride = integers[6],
          .is_causal = integers[7] != 0,
          .has_outside = has_outside};
}

// For query u of the map: first key, end of the keys, place.
VK_HOST_DEVICE void keys_of_query(const AxisRule& rule, int64_t u, int64_t* out) {
  const AxisRule own = rule.of_class(u % rule.step);
  const Range keys = own.keys(u / rule.step);
  out[0] = keys.begin, out[1] = keys.end, out[2] = own.num_keys ? own.coord(u / rule.step) : 0;
}

// For key v of the map: first query, end of the queries that see it.
VK_HOST_DEVICE void queries_of_key(const AxisRule& rule, int64_t v, int64_t* out) {
  const Range queries = rule.of_class(v % rule.step).queries(v / rule.step);
  out[0] = queries.begin, out[1] = queries.end;
}

}  // namespace vitkernels
