// Params of decayed linear attention. Plain data, no torch.
#pragma once

#include "common/dtype.h"
#include "common/token_tensor.h"

namespace vitkernels {

// A pass of its own for each: of few (batch, head) pairs with many tokens, all chunks are summed, the states before them
// are found, and all chunks read those. Or each pair is one task, whose chunks follow each other. No bit depends on that.
enum class DecayedStage : int32_t { kAll, kSum, kRead };

// o_t = q_t S_t with S_t = decay S_(t-1) + k_t^T v_t, from the first token to the last, or reversed.
struct DecayedParams {
  DType dtype = DType::kFloat32;
  int64_t batch = 0, heads = 0, tokens = 0, head_dim = 0, value_dim = 0;
  bool is_reversed = false;
  bool includes_self = true;     // else o_t reads decay S_(t-1)
  int64_t initial_exponent = 1;  // of the decay by which the first token reads the initial state
  TokenTensor query, key, value, out;
  const void* decay = nullptr;          // [heads]
  const void* initial_state = nullptr;  // [batch, heads, head_dim, value_dim], or null: zeros
  void* state = nullptr;                // likewise, that after the last token; or null
  DecayedStage stage = DecayedStage::kAll;
  int64_t group = 1;             // of kAll: pairs that a task takes together, block by block: their rows are neighbours
  void* chunk_states = nullptr;  // of kSum and kRead: [batch, heads, chunks][padded state]

  DType element_type() const { return dtype; }
  VK_HOST_DEVICE int64_t num_pairs() const { return batch * heads; }
  int64_t num_groups() const { return (num_pairs() + group - 1) / group; }
};

}  // namespace vitkernels
