// The score's terms, one field each: for a call's tensors, for the gradients it wants, and for these gradients.
#pragma once

#include <array>
#include <string_view>

#include "attention/pattern.h"

namespace vitkernels {

// T: OptionalTensor for the arguments and for their gradients, bool for the gradients that are wanted.
template <class T>
struct ScoreFields {
  T head_scale = {}, bias = {}, key_bias = {}, multiplier = {}, bias_table = {}, multiplier_table = {};
  std::array<T, kMaxAxes> rel_pos = {};  // depth, height, width
  T key_fill = {}, value_fill = {};      // keys and values outside a map
};

inline constexpr const char* kRelPosNames[kMaxAxes] = {"rel_pos_depth", "rel_pos_height", "rel_pos_width"};

// The terms by the offset of the query from the key.
inline constexpr std::string_view kOffsetTerms[] = {"bias_table", "multiplier_table", "rel_pos_depth", "rel_pos_height",
                                                    "rel_pos_width"};

// Calls f(name, field of each record) for each term of the score, in the schema's order.
template <class Function, class... Records>
void for_each_score_term(Function&& f, Records&&... records) {
  f("head_scale", records.head_scale...);
  f("bias", records.bias...);
  f("key_bias", records.key_bias...);
  f("multiplier", records.multiplier...);
  f("bias_table", records.bias_table...);
  f("multiplier_table", records.multiplier_table...);
  for (int axis = 0; axis < kMaxAxes; ++axis) f(kRelPosNames[axis], records.rel_pos[axis]...);
}

// What a term is broadcast to: (B, heads, Nq, Nk), or for a rank of 3 (B, heads, Nk).
struct Broadcast {
  int64_t rank;
  bool is_multiplier = false;
};

// Calls f(name, Broadcast, field of each record) for each term that is broadcast to the logits. A record may be a Score.
template <class Function, class... Records>
void for_each_broadcast_term(Function&& f, Records&&... records) {
  f("bias", Broadcast{4}, records.bias...);
  f("key_bias", Broadcast{3}, records.key_bias...);
  f("multiplier", Broadcast{4, true}, records.multiplier...);
}

template <class Function, class... Records>
void for_each_fill(Function&& f, Records&&... records) {
  f("key_fill", records.key_fill...);
  f("value_fill", records.value_fill...);
}

template <class Function, class... Records>
void for_each_term(Function&& f, Records&&... records) {
  for_each_score_term(f, records...);
  for_each_fill(f, records...);
}

}  // namespace vitkernels
