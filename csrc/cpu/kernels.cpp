// The table of one instruction set. Compiled once per instruction set.
#include "cpu/kernels.h"

#include "cpu/isa.h"
#include "cpu/simd.h"

#define VK_STRING_(x) #x
#define VK_STRING(x) VK_STRING_(x)

namespace vitkernels::VK_ISA {

extern const Kernels kernels;
const Kernels kernels = {
    .isa = VK_STRING(VK_ISA),
    .vector_bytes = kVectorBytes,
    .attention_scratch = attention_scratch,
    .attention = attention,
    .attention_backward_scratch = attention_backward_scratch,
    .attention_backward_parts = attention_backward_parts,
    .attention_backward = attention_backward,
    .finish_query_gradient = finish_query_gradient,
    .attention_transposed_scratch = attention_transposed_scratch,
    .attention_transposed = attention_transposed,
    .attention_transposed_backward_scratch = attention_transposed_backward_scratch,
    .attention_transposed_backward_parts = attention_transposed_backward_parts,
    .attention_transposed_backward = attention_transposed_backward,
    .finish_value_gradient = finish_value_gradient,
    .spatial_attention_scratch = spatial_attention_scratch,
    .spatial_attention = spatial_attention,
    .spatial_attention_backward_scratch = spatial_attention_backward_scratch,
    .spatial_attention_backward = spatial_attention_backward,
    .sum_spatial_parts = sum_spatial_parts,
    .merge_attentions = merge_attentions,
    .merge_attentions_backward = merge_attentions_backward,
};

}  // namespace vitkernels::VK_ISA
