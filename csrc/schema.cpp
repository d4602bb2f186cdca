// Every operator's signature: the page to read first.
//
// Layouts: query (B, Nq, heads, d), key (B, Nk, kv_heads, d), value (B, Nk, kv_heads, dv), lse (B, Nq, heads);
// without B in varlen operators, whose sequences follow one another.
// Terms by the place of tokens on a grid: tables (heads or 1, 2 n - 1 for each axis), by the offset of the query from the
// key; and embeddings of the offsets on one axis, (2 n - 1, d) or (heads, 2 n - 1, d), to be multiplied with the query.
// allow_tf32: a GPU may round float32 operands of matrix products to TF32; nothing else takes notice of it.
// Over a map: query and key are (B, *map, heads, d) with one to three axes, lse (B, *map, heads), key_bias broadcasts to
// (B, heads, *key_map); tables have an odd number for each axis. `axes` holds eight integers for each of them: rule (0
// full, 1 block, 2 neighborhood, 3 sliding), step, size, key_size, shift, halo, stride, is_causal (pattern.h).
// A backward operator returns an empty tensor for each gradient of a score term that was not asked for.
#include "common/stable.h"

STABLE_TORCH_LIBRARY(vitkernels, m) {
  m.def(
      "attention(Tensor query, Tensor key, Tensor value, float scale, Tensor? head_scale, Tensor? bias, "
      "Tensor? key_bias, Tensor? multiplier, Tensor? bias_table, Tensor? multiplier_table, Tensor? rel_pos_depth, "
      "Tensor? rel_pos_height, Tensor? rel_pos_width, SymInt num_prefix_tokens, Tensor? head_map, bool is_causal, "
      "bool allow_tf32) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
      "Tensor lse, float scale, Tensor? head_scale, Tensor? bias, Tensor? key_bias, Tensor? multiplier, "
      "Tensor? bias_table, Tensor? multiplier_table, Tensor? rel_pos_depth, Tensor? rel_pos_height, "
      "Tensor? rel_pos_width, SymInt num_prefix_tokens, Tensor? head_map, bool is_causal, bool allow_tf32, "
      "bool need_head_scale, bool need_bias, bool need_key_bias, bool need_multiplier, bool need_bias_table, "
      "bool need_multiplier_table, bool need_rel_pos_depth, bool need_rel_pos_height, bool need_rel_pos_width) -> "
      "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_head_scale, Tensor grad_bias, "
      "Tensor grad_key_bias, Tensor grad_multiplier, Tensor grad_bias_table, Tensor grad_multiplier_table, "
      "Tensor grad_rel_pos_depth, Tensor grad_rel_pos_height, Tensor grad_rel_pos_width)");
  m.def(
      "attention_varlen(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, Tensor? head_scale, Tensor? bias, Tensor? key_bias, "
      "Tensor? multiplier, Tensor? head_map, bool is_causal, bool allow_tf32) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_varlen_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
      "Tensor out, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
      "float scale, Tensor? head_scale, Tensor? bias, Tensor? key_bias, Tensor? multiplier, Tensor? head_map, "
      "bool is_causal, bool allow_tf32, bool need_head_scale, bool need_bias, bool need_key_bias, "
      "bool need_multiplier) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_head_scale, "
      "Tensor grad_bias, Tensor grad_key_bias, Tensor grad_multiplier)");
  // value_q (B, Nq, heads, dv), out (B, Nk, heads, dv), query_weight broadcasts to (B, Nq, heads).
  m.def(
      "attention_transposed(Tensor query, Tensor key, Tensor value_q, Tensor lse, Tensor? query_weight, float scale, "
      "Tensor? head_scale, Tensor? bias, Tensor? key_bias, Tensor? multiplier, Tensor? head_map, bool is_causal, "
      "bool allow_tf32) -> Tensor");
  m.def(
      "attention_transposed_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value_q, Tensor lse, "
      "Tensor? query_weight, float scale, Tensor? head_scale, Tensor? bias, Tensor? key_bias, Tensor? multiplier, "
      "Tensor? head_map, bool is_causal, bool allow_tf32, bool need_query_weight, bool need_head_scale, "
      "bool need_bias, bool need_key_bias, bool need_multiplier) -> (Tensor grad_query, Tensor grad_key, "
      "Tensor grad_value_q, Tensor grad_lse, Tensor grad_query_weight, Tensor grad_head_scale, Tensor grad_bias, "
      "Tensor grad_key_bias, Tensor grad_multiplier)");
  // A shared query is (B, *window, heads, d).
  m.def(
      "spatial_attention(Tensor query, Tensor key, Tensor value, SymInt[] axes, float radius, bool has_outside, "
      "bool is_shared_query, Tensor? key_fill, Tensor? value_fill, float scale, Tensor? head_scale, Tensor? key_bias, "
      "Tensor? bias_table, Tensor? multiplier_table, Tensor? rel_pos_depth, Tensor? rel_pos_height, "
      "Tensor? rel_pos_width, Tensor? head_map, bool allow_tf32) -> (Tensor out, Tensor lse)");
  m.def(
      "spatial_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor "
      "out, "
      "Tensor lse, SymInt[] axes, float radius, bool has_outside, bool is_shared_query, Tensor? key_fill, "
      "Tensor? value_fill, float scale, Tensor? head_scale, Tensor? key_bias, Tensor? bias_table, "
      "Tensor? multiplier_table, Tensor? rel_pos_depth, Tensor? rel_pos_height, Tensor? rel_pos_width, "
      "Tensor? head_map, bool allow_tf32, bool need_key_fill, bool need_value_fill, bool need_head_scale, "
      "bool need_key_bias, bool need_bias_table, bool need_multiplier_table, bool need_rel_pos_depth, "
      "bool need_rel_pos_height, bool need_rel_pos_width) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, "
      "Tensor grad_key_fill, Tensor grad_value_fill, Tensor grad_head_scale, Tensor grad_key_bias, "
      "Tensor grad_bias_table, Tensor grad_multiplier_table, Tensor grad_rel_pos_depth, Tensor grad_rel_pos_height, "
      "Tensor grad_rel_pos_width)");
  m.def("merge_attentions(Tensor[] outs, Tensor[] lses) -> (Tensor out, Tensor lse)");
  m.def("merge_attentions_backward(Tensor grad_out, Tensor? grad_lse, Tensor[] outs, Tensor[] lses) -> Tensor[]");
}
