"""torch: ``nn.MultiheadAttention`` of torchvision's ViT, CLIP and others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from vitkernels.functional import attention
from vitkernels.integrations.classes import exchange, exchanged
from vitkernels.integrations.devices import KERNEL_DTYPES, conditions
from vitkernels.integrations.exporters import check_exporter, refuse_script
from vitkernels.integrations.report import Entry, kind_of
from vitkernels.integrations.shapes import split_last
from vitkernels.nn.masks import mask_terms

__all__ = ["FusedMultiheadAttention", "replace", "restore", "suspend"]

_CONDITION = "stock path with need_weights or is_causal"
_BYPASSED = "not called in inference, where its nn.TransformerEncoderLayer has a path of its own"


class FusedMultiheadAttention(nn.MultiheadAttention):
    """torch's module with another forward: the class that an accelerated module has.

    Like the stock forward, it reads the weights of ``out_proj`` and does not call it.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        arguments = (
            query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal,
        )  # fmt: skip
        if isinstance(query, fx.Proxy):  # a leaf, as every module of torch.nn
            path = query.tracer.path_of_module(self)
            return query.tracer.create_proxy("call_module", path, arguments, {})
        check_exporter(self)
        if (
            need_weights
            or is_causal
            or (self.training and self.dropout > 0.0)
            or query.dim() != 3
            or query.is_nested
            or query.dtype not in KERNEL_DTYPES["attention"].get(query.device.type, ())
            or not self._fit(query, key, value)
            or not self._masks_fit(query, key, attn_mask, key_padding_mask)
        ):
            return super().forward(*arguments)
        q, k, v = self._projections(query, key, value)
        if not self.batch_first:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        bias, key_bias = self._score_terms(attn_mask, key_padding_mask)
        out = attention(q, k, v, bias=bias, key_bias=key_bias).flatten(2)
        if not self.batch_first:
            out = out.transpose(0, 1)
        return F.linear(out, self.out_proj.weight, self.out_proj.bias), None

    __prepare_scriptable__ = refuse_script

    def _fit(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether the shapes are as torch takes them. The stock forward says what is wrong with others."""
        batch = 0 if self.batch_first else 1
        return query is key is value or (
            key.dim() == 3 and key.shape == value.shape and query.size(batch) == key.size(batch)
        )

    def _masks_fit(self, query: Tensor, key: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> bool:
        """Likewise, and the dtypes: torch's masks are not broadcast."""
        if attn_mask is None and key_padding_mask is None:
            return True
        batch, tokens = (0, 1) if self.batch_first else (1, 0)
        images, n_q, n_k = query.size(batch), query.size(tokens), key.size(tokens)
        accepted = (
            (attn_mask, ((n_q, n_k), (images * self.num_heads, n_q, n_k))),
            (key_padding_mask, ((images, n_k),)),
        )
        return all(
            mask is None or (mask.dtype in (torch.bool, query.dtype) and tuple(mask.shape) in shapes)
            for mask, shapes in accepted
        )

    def _projections(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The queries, keys and values ``(*, heads, d)`` of each token."""
        if query is key and key is value:
            projected = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            weights = self.in_proj_weight.chunk(3)
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            projected = tuple(map(F.linear, (query, key, value), weights, biases))
        q, k, v = (split_last(t, self.num_heads, self.head_dim) for t in projected)
        return q, k, v

    def _score_terms(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The ``(bias, key_bias)`` of torch's masks, in which True takes a key away."""
        if attn_mask is not None:
            if attn_mask.dim() == 3:
                attn_mask = torch.unflatten(attn_mask, 0, (-1, self.num_heads))
            if attn_mask.dtype == torch.bool:
                attn_mask = ~attn_mask
        bias, key_bias = mask_terms(attn_mask)
        if key_padding_mask is not None:
            if key_padding_mask.dtype == torch.bool:
                key_padding_mask = torch.where(key_padding_mask, -torch.inf, 0.0)
            padding = key_padding_mask.unsqueeze(1)  # [B, 1, Nk]
            key_bias = padding if key_bias is None else key_bias + padding
        return bias, key_bias


def replace(model: nn.Module) -> list[Entry]:
    """Swap the class of every ``nn.MultiheadAttention`` of ``model``."""
    bypassed = {id(m.self_attn) for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)}
    entries, made = [], dict[type, type]()
    for name, module in model.named_modules():
        if not isinstance(module, nn.MultiheadAttention):
            continue
        accelerated = isinstance(module, FusedMultiheadAttention)
        obstacle = _obstacle(module)
        if obstacle:
            if accelerated:  # by an earlier call, before something was changed
                module.__class__ = exchanged(type(module), FusedMultiheadAttention, nn.MultiheadAttention, made)
            entries.append(Entry(name, kind_of(module), "stock", obstacle))
            continue
        if not accelerated:
            module.__class__ = FusedMultiheadAttention
        reasons = [*conditions(module, module.dropout), _CONDITION]
        if id(module) in bypassed:
            reasons.append(_BYPASSED)
        entries.append(Entry(name, "torch MultiheadAttention", "replaced", "; ".join(reasons)))
    return entries


def restore(model: nn.Module) -> None:
    """Give every accelerated module its stock class again."""
    suspend(model)


def suspend(model: nn.Module) -> Callable[[], None]:
    """Restore ``model``. Returns what undoes that."""
    found = [module for module in model.modules() if isinstance(module, FusedMultiheadAttention)]
    return exchange([(module, FusedMultiheadAttention, nn.MultiheadAttention) for module in found])


def _obstacle(module: nn.MultiheadAttention) -> str:
    if type(module) is not nn.MultiheadAttention and not isinstance(module, FusedMultiheadAttention):
        return "a subclass of torch's MultiheadAttention may compute something else"
    if "forward" in module.__dict__:
        return "its forward is overridden on the instance"
    if module.in_proj_weight is None:
        return "its keys or values have other channels than its queries"
    if module.bias_k is not None or module.add_zero_attn:
        return "it adds keys of its own (add_bias_kv or add_zero_attn)"
    return ""
