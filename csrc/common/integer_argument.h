// Arguments of integers, which name heads and where packed sequences begin, with all checks.
#pragma once

#include <vector>

#include "common/check.h"
#include "common/integers.h"

namespace vitkernels {

// Reads the values of an int64 or int32 vector (head_map, cu_seqlens), to be checked up front. Null: they are not read,
// and kernels check them.
using ReadIntegers = std::vector<int64_t> (*)(const Checker& checker, const Tensor& t);

inline std::vector<int64_t> read_host_integers(const Checker&, const Tensor& t) {
  std::vector<int64_t> values(t.size(0));
  for (size_t i = 0; i < values.size(); ++i) {
    const int64_t at = int64_t(i) * t.stride(0);
    values[i] = t.scalar_type() == ScalarType::Long ? static_cast<const int64_t*>(t.const_data_ptr())[at]
                                                    : static_cast<const int32_t*>(t.const_data_ptr())[at];
  }
  return values;
}

inline void check_integers(const Checker& checker, const char* name, const Tensor& t, const Tensor& like) {
  checker.strided_like(name, t, like);
  checker.rank(name, t, 1, "(integers)");
  const ScalarType type = t.scalar_type();
  checker.check(type == ScalarType::Long || type == ScalarType::Int, name, " is ", dtype_text(type),
                ", takes int64 or int32");
}

inline constexpr int64_t kMaxHeads = 1 << 20;  // the head map is a table in memory

// Of a contiguous vector.
inline Integers integers(const Tensor& t) { return {t.const_data_ptr(), t.scalar_type() == ScalarType::Long}; }

// Checks a head map, or that there are equal groups. Returns the kv head of each head, or nothing where it is not read.
inline std::vector<int64_t> read_head_map(const Checker& checker, const OptionalTensor& head_map, const Tensor& query,
                                          int64_t heads, int64_t kv_heads, ReadIntegers read) {
  std::vector<int64_t> map(heads);
  if (!head_map) {
    checker.check(kv_heads > 0 && heads % kv_heads == 0, "key has ", kv_heads, " heads, takes a divisor of query's ",
                  heads, " (or a head_map)");
    for (int64_t h = 0; h < heads; ++h) map[h] = h / (heads / kv_heads);
    return map;
  }
  checker.defined("head_map", *head_map);
  checker.shape("head_map", *head_map, {heads});
  check_integers(checker, "head_map", *head_map, query);
  if (!read) return {};
  map = read(checker, *head_map);
  for (int64_t h = 0; h < heads; ++h) {
    checker.check(map[h] >= 0 && map[h] < kv_heads, "head_map[", h, "] is ", map[h], ", takes 0 to ", kv_heads - 1);
  }
  return map;
}

inline constexpr int64_t kMaxLength = int64_t(1) << 31;  // of a packed sequence: no tensor's size bounds max_seqlen

// Packed sequences: where each begins, and the lengths of the longest.
struct Packing {
  Tensor cu_seqlens_q, cu_seqlens_k;  // [sequences + 1], int32 or int64
  int64_t max_seqlen_q, max_seqlen_k;
};

// Checks all but the offsets' values.
inline void check_packing_of(const Checker& checker, const Packing& packing, const Tensor& like) {
  for (const auto& [name, longest] :
       {std::pair{"max_seqlen_q", packing.max_seqlen_q}, {"max_seqlen_k", packing.max_seqlen_k}}) {
    checker.check(longest >= 0 && longest <= kMaxLength, name, " is ", longest, ", takes 0 to ", kMaxLength);
  }
  for (const auto& [name, offsets] :
       {std::pair{"cu_seqlens_q", &packing.cu_seqlens_q}, {"cu_seqlens_k", &packing.cu_seqlens_k}}) {
    check_integers(checker, name, *offsets, like);
    checker.check(offsets->size(0) > 0, name, " is empty, takes 0 and the end of each sequence");
  }
  checker.check(packing.cu_seqlens_q.size(0) == packing.cu_seqlens_k.size(0), "cu_seqlens_k has ",
                packing.cu_seqlens_k.size(0), " elements, takes as many as cu_seqlens_q (",
                packing.cu_seqlens_q.size(0), ")");
}

inline std::vector<int64_t> read_offsets(const Checker& checker, const char* name, const Tensor& t, int64_t tokens,
                                         int64_t longest, ReadIntegers read) {
  const std::vector<int64_t> offsets = read(checker, t);
  checker.check(offsets[0] == 0, name, "[0] is ", offsets[0], ", takes 0");
  for (size_t i = 1; i < offsets.size(); ++i) {
    checker.check(offsets[i] >= offsets[i - 1] && offsets[i] <= tokens, name, "[", i, "] is ", offsets[i],
                  ", takes at least its predecessor and at most the number of tokens ", tokens);
    checker.check(offsets[i] - offsets[i - 1] <= longest, name, " gives sequence ", i - 1, " the length ",
                  offsets[i] - offsets[i - 1], ", takes at most the largest length ", longest);
  }
  checker.check(offsets.back() == tokens, name, " ends with ", offsets.back(), ", takes the number of tokens ", tokens);
  return offsets;
}

}  // namespace vitkernels
