// The score terms: scale, multiplier, bias. Host and device, no torch.
#pragma once

#include "attention/offset_grid.h"

namespace vitkernels {

// Strides over (batch, head, query, key): 0 on broadcast axes.
struct ScoreStrides {
  int64_t batch = 0, head = 0, query = 0, key = 0;

  VK_HOST_DEVICE int64_t offset(int64_t b, int64_t h, int64_t q, int64_t k) const {
    return b * batch + h * head + q * query + k * key;
  }
};

// A tensor that is broadcast to (batch, heads, queries, keys). Its key stride is 0 or 1. The gradient is contiguous in
// the tensor's own shape, so its strides differ if the tensor is an expanded view.
struct ScoreTerm {
  const void* data = nullptr;  // null: the term is absent
  ScoreStrides strides;
  void* grad = nullptr;         // null: not wanted
  bool grad_is_double = false;  // accumulates over many rows; else each element is written once
  ScoreStrides grad_strides;
};

// A table by offset for each head, or one for all. On the CPU its entries are reversed and padded by a vector; the
// embeddings below are reversed too, and their rows are padded with zeros.
struct TableTerm {
  const void* data = nullptr;
  int64_t head_stride = 0;
  double* grad = nullptr;  // [parts, heads, entries and padding], reversed as well; one partial sum per part
  int64_t grad_part_stride = 0, grad_head_stride = 0;
};

// Embeddings of the offsets on one axis, whose product with the query is added: [heads or 1, offsets, row_stride].
struct RelPosTerm {
  const void* data = nullptr;
  int64_t head_stride = 0, row_stride = 0;
  void* grad = nullptr;  // [parts, heads, offsets, row_stride], as the table's
  int64_t grad_part_stride = 0, grad_head_stride = 0;
};

// On a GPU: relative logits by the coordinates of the keys, axis after axis, computed before their readers.
struct DeviceRelativeLogits {
  const float* data = nullptr;  // [batch, heads, tokens on the grid, width]
  int64_t batch_stride = 0, head_stride = 0;
  int width = 0, first[kMaxAxes] = {};  // first: where an axis' coordinates begin in a row
};

// Terms by the offset of query and key on a grid.
struct OffsetTerms {
  OffsetGrid grid;
  TableTerm multiplier, bias;
  RelPosTerm rel_pos[kMaxAxes];
  DeviceOffsetGrid small;         // on a GPU
  DeviceRelativeLogits relative;  // on a GPU

  VK_HOST_DEVICE bool has_rel_pos() const { return rel_pos[0].data || rel_pos[1].data || rel_pos[2].data; }
  VK_HOST_DEVICE bool has_bias() const { return bias.data || has_rel_pos(); }
  VK_HOST_DEVICE bool any() const { return multiplier.data || has_bias(); }
};

// A factor in both types, since a GPU takes long to convert one.
class Factor {
 public:
  constexpr Factor(double value) : double_(value), float_(float(value)) {}

  template <class T>
  VK_HOST_DEVICE T as() const {
    if constexpr (sizeof(T) == sizeof(float)) return float_;
    return T(double_);
  }

 private:
  double double_;
  float float_;
};

struct Score {
  Factor scale = 1.0;
  const void* head_scale = nullptr;  // [heads], or null
  ScoreTerm multiplier, bias, key_bias;
  int64_t key_bias_axis_stride[kMaxAxes - 1] = {};  // of a map's first axes; the last axis' stride is the key stride
  OffsetTerms by_offset = {};

  VK_HOST_DEVICE bool has_terms() const { return multiplier.data || bias.data || key_bias.data || by_offset.any(); }

  template <class T>
  VK_HOST_DEVICE T scale_of(int64_t head) const {
    return scale.as<T>() * head_factor<T>(head);
  }
  template <class T>
  VK_HOST_DEVICE T head_factor(int64_t head) const {
    return head_scale ? static_cast<const T*>(head_scale)[head] : T(1);
  }
};

// logit = (scale * q.k) * multiplier + bias + key_bias; multiplier and bias include tables by offset. V is a vector.
template <class V>
VK_HOST_DEVICE V logit(V scaled_product, V multiplier, V bias, V key_bias) {
  return scaled_product * multiplier + bias + key_bias;
}

}  // namespace vitkernels
