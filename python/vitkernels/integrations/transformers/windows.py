"""Swin and Swin V2: the layers whose attention is within shifted windows."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from vitkernels.integrations.shapes import split_last
from vitkernels.integrations.swap import DROPOUT, Fused
from vitkernels.integrations.windows import Projections, attend_in_windows, cosine_terms

__all__ = ["CosineWindowLayer", "WindowLayer"]

_SWIN = "transformers.models.swin.modeling_swin"
_SWIN_V2 = "transformers.models.swinv2.modeling_swinv2"


class WindowLayer(Fused):
    """Swin: a bias from a table, norms before."""

    operator = "spatial_attention"
    condition = "stock path with output_attentions"
    dropout_attribute = "attention.attention_dropout"
    absorbed: ClassVar = {
        "attention": (f"{_SWIN}.SwinAttention",),
        "attention.relative_position_bias": (f"{_SWIN}.SwinRelativePositionBias",),
    }
    attributes = (
        "layernorm_before", "layernorm_after", "mlp", "dropout", "drop_path", "window_size", "shift_size",
        "set_shift_and_window_size", "attention", "attention.config", "attention.q_proj", "attention.k_proj",
        "attention.v_proj", "attention.o_proj", "attention.head_dim", "attention.scaling",
        "attention.relative_position_bias.relative_position_bias_table",
    )  # fmt: skip

    @staticmethod
    def obstacle(module: nn.Module) -> str:
        implementation = module.attention.config._attn_implementation  # type: ignore[union-attr]
        if implementation in ("sdpa", "vitkernels"):
            return ""
        return f"its attention implementation is {implementation!r}, only 'sdpa' is replaced"

    def attend(
        self, hidden_states: Tensor, input_dimensions: tuple[int, int], always_partition: bool = False, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if kwargs.get("output_attentions"):
            return self.stock(hidden_states, input_dimensions, always_partition, **kwargs)  # type: ignore[no-any-return]
        if not always_partition:
            self.set_shift_and_window_size(input_dimensions)
        attention = self.attention

        def project(x: Tensor) -> Projections:
            projected = (attention.q_proj(x), attention.k_proj(x), attention.v_proj(x))
            q, k, v = (split_last(t, -1, attention.head_dim) for t in projected)
            return q, k, v

        table = attention.relative_position_bias.relative_position_bias_table
        x = self.layernorm_before(hidden_states).unflatten(1, input_dimensions)  # [B, height, width, C]
        out = _attend(self, x, project, scale=attention.scaling, bias_table=table)
        hidden_states = hidden_states + self.drop_path(self.dropout(attention.o_proj(out)).flatten(1, 2))
        return hidden_states + self.dropout(self.mlp(self.layernorm_after(hidden_states))), None


class CosineWindowLayer(Fused):
    """Swin V2: cosine attention, a bias from an MLP, norms after."""

    operator = "spatial_attention"
    condition = "stock path with output_attentions"
    dropout_attribute = "attention.self.dropout"
    absorbed: ClassVar = {
        "attention": (f"{_SWIN_V2}.Swinv2Attention",),
        "attention.self": (f"{_SWIN_V2}.Swinv2SelfAttention",),
        "attention.self.dropout": DROPOUT,
    }
    attributes = (
        "layernorm_before", "layernorm_after", "intermediate", "output", "drop_path", "window_size", "shift_size",
        "attention", "attention.self.query", "attention.self.key", "attention.self.value",
        "attention.self.attention_head_size", "attention.self.logit_scale",
        "attention.self.continuous_position_bias_mlp", "attention.self.relative_coords_table", "attention.output",
    )  # fmt: skip

    def attend(
        self, hidden_states: Tensor, input_dimensions: tuple[int, int], output_attentions: bool | None = False
    ) -> tuple[Tensor, ...]:
        if output_attentions:
            return self.stock(hidden_states, input_dimensions, output_attentions)  # type: ignore[no-any-return]
        attention = self.attention.self

        def project(x: Tensor) -> Projections:
            projected = (attention.query(x), attention.key(x), attention.value(x))
            q, k, v = (split_last(t, -1, attention.attention_head_size) for t in projected)
            return q, k, v

        terms = cosine_terms(
            attention.logit_scale, attention.continuous_position_bias_mlp(attention.relative_coords_table)
        )
        x = hidden_states.unflatten(1, input_dimensions)  # type: ignore[no-untyped-call]  # [B, height, width, C]
        out = _attend(self, x, project, **terms)
        out = self.attention.output(out, x).flatten(1, 2)
        hidden_states = hidden_states + self.drop_path(self.layernorm_before(out))
        out = self.output(self.intermediate(hidden_states))
        return (hidden_states + self.drop_path(self.layernorm_after(out)),)


def _attend(layer: Fused, x: Tensor, project: Any, **terms: Any) -> Tensor:
    window, shift = layer.window_size, layer.shift_size
    return attend_in_windows(x, (window, window), (shift, shift), project, **terms)
