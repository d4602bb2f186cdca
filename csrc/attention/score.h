// What is done to a logit: scale, multiplier, bias. Host and device, no torch.
#pragma once

#include "attention/pattern.h"

namespace vitkernels {

// Strides over (batch, head, query, key): 0 where one value serves all.
struct ScoreStrides {
  int64_t batch = 0, head = 0, query = 0, key = 0;

  VK_HOST_DEVICE int64_t offset(int64_t b, int64_t h, int64_t q, int64_t k) const {
    return b * batch + h * head + q * query + k * key;
  }
};

// A tensor that is broadcast to (batch, heads, queries, keys). Its key stride is 0 or 1. The gradient is contiguous in
// the tensor's own shape, so its strides differ where the tensor is itself an expanded view.
struct ScoreTerm {
  const void* data = nullptr;  // null: the term is absent
  ScoreStrides strides;
  void* grad = nullptr;         // null: not wanted
  bool grad_is_double = false;  // it sums many rows; else each element is written once
  ScoreStrides grad_strides;
};

struct Score {
  double scale = 1.0;
  const void* head_scale = nullptr;  // [heads], or none
  ScoreTerm multiplier, bias, key_bias;

  VK_HOST_DEVICE bool has_terms() const { return multiplier.data || bias.data || key_bias.data; }

  template <class T>
  VK_HOST_DEVICE T scale_of(int64_t head) const {
    return T(scale) * (head_scale ? static_cast<const T*>(head_scale)[head] : T(1));
  }
};

// logit = (scale * q.k) * multiplier + bias + key_bias. V is a number on the GPU and a vector on the CPU.
template <class V>
VK_HOST_DEVICE V logit(V scaled_product, V multiplier, V bias, V key_bias) {
  return scaled_product * multiplier + bias + key_bias;
}

}  // namespace vitkernels
