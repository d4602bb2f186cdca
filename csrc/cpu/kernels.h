// The kernels of one instruction set; each table (isa.h) is filled from these.
#pragma once

#include <cstdint>

#include "attention/dense.h"
#include "attention/spatial.h"

namespace vitkernels::VK_ISA {

int64_t attention_scratch(const AttentionParams&);
void attention(const AttentionParams&, int64_t begin, int64_t end, void* scratch);
int64_t attention_backward_scratch(const AttentionBackwardParams&);
int64_t attention_backward_parts(const AttentionBackwardParams&);
void attention_backward(const AttentionBackwardParams&, int64_t begin, int64_t end, void* scratch);
void finish_query_gradient(const AttentionBackwardParams&, int64_t begin, int64_t end);
int64_t attention_transposed_scratch(const AttentionTransposedParams&);
void attention_transposed(const AttentionTransposedParams&, int64_t begin, int64_t end, void* scratch);
int64_t attention_transposed_backward_scratch(const AttentionTransposedParams&);
int64_t attention_transposed_backward_parts(const AttentionTransposedParams&);
void attention_transposed_backward(const AttentionTransposedParams&, int64_t begin, int64_t end, void* scratch);
void finish_value_gradient(const AttentionTransposedParams&, int64_t begin, int64_t end);
int64_t spatial_attention_scratch(const SpatialParams&);
void spatial_attention(const SpatialParams&, int64_t begin, int64_t end, void* scratch);
int64_t spatial_attention_backward_scratch(const SpatialBackwardParams&);
void spatial_attention_backward(const SpatialBackwardParams&, int64_t begin, int64_t end, void* scratch);
void sum_spatial_parts(const SpatialSum&, int64_t begin, int64_t end);
void merge_attentions(const MergeParams&, int64_t begin, int64_t end);
void merge_attentions_backward(const MergeParams&, int64_t begin, int64_t end);

}  // namespace vitkernels::VK_ISA
