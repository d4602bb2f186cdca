// Every operator's signature: read this file first.
//
// Layouts: query (B, Nq, heads, d), key (B, Nk, kv_heads, d), value (B, Nk, kv_heads, dv), lse (B, Nq, heads);
// without B in varlen operators, whose sequences are packed.
// Over a map: query and key are (B, *map, heads, d) with one to three axes, lse (B, *map, heads), key_bias broadcasts
// to (B, heads, *key_map); a shared query is (B, *window, heads, d). qk_norm: queries and keys of the map are divided by
// their Euclidean norms, fills are not. `axes` holds eight integers for each axis: rule
// (0 full, 1 block, 2 neighborhood, 3 sliding), step, size, key_size, shift, halo, stride, is_causal
// (attention/pattern.h).
// Every softmax operator takes all terms of the score and all options of the keys, and raises on what its kernels
// cannot do. Its backward operator returns an empty tensor for each gradient that was not requested.
// allow_tf32: a GPU may round float32 operands of matrix products to TF32; the CPU ignores it.
#include "common/signature.h"

#include <algorithm>
#include <stdexcept>

namespace vitkernels {
namespace {

// Tables are (heads or 1, 2 n - 1 for each axis), by the offset of the query from the key; rel_pos_*, embeddings of the
// offsets on one axis, (2 n - 1, d) or (heads, 2 n - 1, d), are multiplied with the query. Dense tokens lie on a grid
// of one to three axes, except for the first num_prefix_tokens.
constexpr const char* kScore =
    "float scale, Tensor? head_scale, Tensor? bias, Tensor? key_bias, Tensor? multiplier, Tensor? bias_table, "
    "Tensor? multiplier_table, Tensor? rel_pos_depth, Tensor? rel_pos_height, Tensor? rel_pos_width, "
    "SymInt num_prefix_tokens, ";
// Outside a map: no keys, or one key and one value for each kv head, zeros where no fill is given.
constexpr const char* kKeys =
    "Tensor? head_map, float radius, bool has_outside, Tensor? key_fill, Tensor? value_fill, ";

constexpr const char* kNeed =
    "bool need_head_scale, bool need_bias, bool need_key_bias, bool need_multiplier, bool need_bias_table, "
    "bool need_multiplier_table, bool need_rel_pos_depth, bool need_rel_pos_height, bool need_rel_pos_width, "
    "bool need_key_fill, bool need_value_fill";
constexpr const char* kGrads =
    "Tensor grad_head_scale, Tensor grad_bias, Tensor grad_key_bias, Tensor grad_multiplier, Tensor grad_bias_table, "
    "Tensor grad_multiplier_table, Tensor grad_rel_pos_depth, Tensor grad_rel_pos_height, Tensor grad_rel_pos_width, "
    "Tensor grad_key_fill, Tensor grad_value_fill";

constexpr const char* kPacking = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, ";

// An attention with some pattern, and its backward.
void add_attention(std::vector<std::string>& schemas, const std::string& op, const std::string& pattern,
                   const std::string& options) {
  const std::string data = "Tensor query, Tensor key, Tensor value, ", rest = pattern + kScore + kKeys + options;
  schemas.push_back(op + "(" + data + rest + ") -> (Tensor out, Tensor lse)");
  schemas.push_back(op + "_backward(Tensor grad_out, Tensor? grad_lse, " + data + "Tensor out, Tensor lse, " + rest +
                    ", " + kNeed + ") -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, " + kGrads + ")");
}

std::vector<std::string> make_schemas() {
  const std::string options = "bool is_causal, bool allow_tf32";
  std::vector<std::string> schemas;
  add_attention(schemas, "attention", "", options);
  add_attention(schemas, "attention_varlen", kPacking, options);
  add_attention(schemas, "spatial_attention", "SymInt[] axes, bool is_shared_query, bool qk_norm, ", "bool allow_tf32");
  // region_graph (B, heads or 1, query regions, topk): the key regions that each query region sees. Regions are numbered
  // in row-major order; the map's borders cut them short, or has_outside counts what lies beyond as keys of zeros.
  add_attention(schemas, "regional_routing_attention",
                "Tensor region_graph, SymInt[] region_size, SymInt[] kv_region_size, ", "bool allow_tf32");
  // That graph by the means of regions, for all heads: (B, 1, query regions, topk).
  schemas.push_back(
      "bilevel_route(Tensor query, Tensor key, SymInt[] region_size, SymInt[] kv_region_size, SymInt topk) -> Tensor");
  // key_index (B, heads or 1, groups, width): the keys that each group of Nq / groups neighboring queries sees, of which
  // the first key_count (B, heads or 1, groups) count.
  add_attention(schemas, "indexed_attention", "Tensor key_index, Tensor? key_count, ", "bool allow_tf32");
  // value_q (B, Nq, heads, dv), out (B, Nk, heads, dv), query_weight broadcasts to (B, Nq, heads).
  const std::string rows = "Tensor query, Tensor key, Tensor value_q, Tensor lse, Tensor? query_weight, ";
  const std::string transposed = rows + kScore + kKeys + options;
  schemas.push_back("attention_transposed(" + transposed + ") -> Tensor");
  schemas.push_back(
      "attention_transposed_backward(Tensor grad_out, " + transposed + ", bool need_query_weight, " + kNeed +
      ") -> (Tensor grad_query, Tensor grad_key, Tensor grad_value_q, Tensor grad_lse, Tensor grad_query_weight, " +
      kGrads + ")");
  schemas.push_back("merge_attentions(Tensor[] outs, Tensor[] lses) -> (Tensor out, Tensor lse)");
  schemas.push_back(
      "merge_attentions_backward(Tensor grad_out, Tensor? grad_lse, Tensor[] outs, Tensor[] lses) -> Tensor[]");
  // state (B or sequences, kv_heads, d, dv + 1): the sum of phi(k)^T v, and in its last column that of phi(k).
  // feature_map: 0 identity, 1 relu, 2 elu + 1, 3 exp, 4 focused (linear_attention/linear_attention.h).
  const std::string linear =
      "SymInt feature_map, SymInt power, bool normalize, float eps, float scale, float residual_v, Tensor? head_map, "
      "bool allow_tf32";
  // Of few queries or keys: without a state.
  const std::string few = "Tensor query, Tensor key, Tensor value, " + linear;
  schemas.push_back("linear_attention_quadratic(" + few + ") -> Tensor");
  schemas.push_back("linear_attention_quadratic_backward(Tensor grad_out, " + few +
                    ") -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
  for (const auto& [name, packing] : {std::pair{"linear_attention", ""}, {"linear_attention_varlen", kPacking}}) {
    const std::string arguments = std::string("Tensor query, Tensor key, Tensor value, ") + packing + linear;
    schemas.push_back(std::string(name) + "(" + arguments + ") -> (Tensor out, Tensor state)");
    schemas.push_back(std::string(name) + "_backward(Tensor? grad_out, Tensor? grad_state, " + arguments +
                      ", Tensor state) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
  }
  // decay (heads), initial_state and state (B, heads, d, dv): the sum of k^T v, each times the decay to the power of the
  // tokens behind it. Without includes_self a token does not see itself.
  const std::string decayed =
      "Tensor query, Tensor key, Tensor value, Tensor decay, Tensor? initial_state, bool is_reversed, "
      "bool includes_self, bool allow_tf32";
  schemas.push_back("decayed_linear_attention(" + decayed + ") -> (Tensor out, Tensor state)");
  schemas.push_back("decayed_linear_attention_backward(Tensor? grad_out, Tensor? grad_state, " + decayed +
                    ", bool need_initial_state) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, "
                    "Tensor grad_initial_state)");
  // query (B, N, heads, d), key (B, N, heads, dv), value and out (B, M, heads, dv) and (B, M, heads, d). state
  // (B, heads, d + 1, dv + 1): the products of channels, and their norms (linear_attention/channel.h).
  const std::string channel =
      "Tensor query, Tensor key, Tensor value, float scale, Tensor? head_scale, bool normalize_channels, bool "
      "allow_tf32";
  schemas.push_back("channel_attention(" + channel + ") -> (Tensor out, Tensor state)");
  schemas.push_back("channel_attention_backward(Tensor? grad_out, Tensor? grad_state, " + channel +
                    ", Tensor state, bool need_head_scale) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, "
                    "Tensor grad_head_scale)");
  // x (rows, k p), w1 (k, q, p), w2 (l, s, r) with l r = k q: two block-diagonal products (monarch/monarch.h).
  // bias (s l); activation: 0 none, 1 GELU. inner (rows, k q): what the first product gave, in the
  // device's own order, or without rows.
  const std::string monarch =
      "Tensor x, Tensor w1, Tensor w2, Tensor? bias, SymInt activation, bool allow_tf32, bool keeps_inner";
  // packed: both weights as the CPU's kernels read them, which are read instead of those given, of the same dtype.
  schemas.push_back("blockdiag_butterfly_multiply(" + monarch + ", Tensor? packed) -> (Tensor out, Tensor inner)");
  schemas.push_back("blockdiag_butterfly_pack(Tensor w1, Tensor w2) -> Tensor");
  schemas.push_back(
      "blockdiag_butterfly_multiply_backward(Tensor grad_out, " + monarch +
      ", Tensor inner, bool need_w1, bool need_w2, bool need_bias) -> (Tensor grad_x, Tensor grad_w1, Tensor grad_w2, "
      "Tensor grad_bias)");
  // x (B, channels, N), or (B, N, channels) with channels_last; filter (channels, taps) (monarch/long_conv.h).
  const std::string long_conv = "Tensor x, Tensor filter, bool channels_last, bool is_causal";
  schemas.push_back("long_conv(" + long_conv + ") -> Tensor");
  schemas.push_back("long_conv_backward(Tensor grad_out, " + long_conv +
                    ", bool need_filter) -> (Tensor grad_x, Tensor grad_filter)");
  // x (B, H, W, channels), weight (H, W // 2 + 1, channels, 2): real and imaginary parts (monarch/spectral_gating.h).
  schemas.push_back("spectral_gating(Tensor x, Tensor weight) -> Tensor");
  schemas.push_back(
      "spectral_gating_backward(Tensor grad_out, Tensor x, Tensor weight, bool need_weight) -> (Tensor grad_x, Tensor "
      "grad_weight)");
  return schemas;
}

// The names in "type name, type name, ...".
std::vector<std::string> names_in(const std::string& list) {
  std::vector<std::string> names;
  for (size_t begin = 0; begin < list.size();) {
    const size_t end = std::min(list.find(", ", begin), list.size()), space = list.rfind(' ', end - 1);
    names.push_back(space == std::string::npos || space < begin ? "" : list.substr(space + 1, end - space - 1));
    begin = end + 2;
  }
  return names;
}

}  // namespace

const std::vector<std::string>& schemas() {
  static const std::vector<std::string> all = make_schemas();
  return all;
}

Signature::Signature(const std::string& op) {
  for (const std::string& schema : schemas()) {
    if (!schema.starts_with(op + "(")) continue;
    const size_t begin = op.size() + 1, end = schema.find(") -> ");
    arguments = names_in(schema.substr(begin, end - begin));
    std::string list = schema.substr(end + 5);
    if (list.starts_with("(")) list = list.substr(1, list.size() - 2);
    results = names_in(list);
    return;
  }
  throw std::logic_error("no schema of " + op);
}

}  // namespace vitkernels
