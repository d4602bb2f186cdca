// Integers in a tensor that kernels read, and what they say of heads and tokens. Plain data, no torch.
//
// On a GPU they are not trusted: whatever they hold, kernels touch existing tokens and heads only.
#pragma once

#include "common/range.h"

namespace vitkernels {

struct Integers {
  const void* data = nullptr;  // null: absent
  bool is_int64 = false;

  VK_HOST_DEVICE explicit operator bool() const { return data; }
  VK_HOST_DEVICE int64_t operator[](int64_t i) const {
    return is_int64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// The kv head that a query head reads by a map [heads], or in equal groups; -1 if the map names none that exists.
VK_HOST_DEVICE int64_t kv_head_of(const Integers& head_map, int64_t head, int64_t heads, int64_t kv_heads) {
  if (!head_map) return head / (heads / kv_heads);
  const int64_t mapped = head_map[head];
  return mapped >= 0 && mapped < kv_heads ? mapped : -1;
}

// The tokens of a packed sequence: of `count`, and at most as many as the longest sequence has.
VK_HOST_DEVICE Range packed_tokens(const Integers& offsets, int64_t sequence, int64_t longest, int64_t count) {
  const int64_t begin = offsets[sequence], end = offsets[sequence + 1];
  if (begin < 0 || begin > count || end < begin) return {0, 0};
  return intersect({begin, begin + longest}, {begin, end < count ? end : count});
}

}  // namespace vitkernels
