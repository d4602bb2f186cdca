// One table of kernels per instruction set; the best one that the CPU supports is chosen at run time.
#pragma once

#include <cstdint>

namespace vitkernels {

struct AttentionParams;
struct AttentionBackwardParams;
struct AttentionTransposedParams;
struct MergeParams;
struct SpatialParams;
struct SpatialBackwardParams;
struct SpatialSum;

// Kernels work through the tasks [begin, end) on one thread; `scratch` is theirs alone, 64-byte aligned.
struct Kernels {
  const char* isa;
  int64_t vector_bytes;                                  // rows of sums that a kernel leaves are padded to vectors
  int64_t (*attention_scratch)(const AttentionParams&);  // bytes per thread
  void (*attention)(const AttentionParams&, int64_t begin, int64_t end, void* scratch);
  int64_t (*attention_backward_scratch)(const AttentionBackwardParams&);
  int64_t (*attention_backward_parts)(const AttentionBackwardParams&);  // bytes of grad_query_parts
  void (*attention_backward)(const AttentionBackwardParams&, int64_t begin, int64_t end, void* scratch);
  // Tasks are (batch, head) pairs.
  void (*finish_query_gradient)(const AttentionBackwardParams&, int64_t begin, int64_t end);
  int64_t (*attention_transposed_scratch)(const AttentionTransposedParams&);
  void (*attention_transposed)(const AttentionTransposedParams&, int64_t begin, int64_t end, void* scratch);
  int64_t (*attention_transposed_backward_scratch)(const AttentionTransposedParams&);
  int64_t (*attention_transposed_backward_parts)(const AttentionTransposedParams&);  // bytes of grad_value_parts
  void (*attention_transposed_backward)(const AttentionTransposedParams&, int64_t begin, int64_t end, void* scratch);
  // Tasks are (batch, head) pairs.
  void (*finish_value_gradient)(const AttentionTransposedParams&, int64_t begin, int64_t end);
  int64_t (*spatial_attention_scratch)(const SpatialParams&);
  void (*spatial_attention)(const SpatialParams&, int64_t begin, int64_t end, void* scratch);
  int64_t (*spatial_attention_backward_scratch)(const SpatialBackwardParams&);
  void (*spatial_attention_backward)(const SpatialBackwardParams&, int64_t begin, int64_t end, void* scratch);
  // Tasks are (batch, head) pairs.
  void (*sum_spatial_parts)(const SpatialSum&, int64_t begin, int64_t end);
  // Tasks are rows.
  void (*merge_attentions)(const MergeParams&, int64_t begin, int64_t end);
  void (*merge_attentions_backward)(const MergeParams&, int64_t begin, int64_t end);
};

// The table in use: the environment variable VITKERNELS_ISA names one, else the best that is supported.
const Kernels& kernels();

}  // namespace vitkernels
