"""timm: ``timm.layers.attention.Attention`` of ViT, DeiT, DINOv2 and their relatives."""

from __future__ import annotations

from timm.layers.attention import Attention
from torch import Tensor, nn

from vitkernels.functional import attention
from vitkernels.integrations.devices import KERNEL_DTYPES, conditions
from vitkernels.integrations.report import Entry, kind_of
from vitkernels.nn.masks import mask_terms

__all__ = ["FusedAttention", "replace", "restore"]

_ATTRIBUTES = (
    "num_heads",
    "head_dim",
    "attn_dim",
    "scale",
    "qkv",
    "q_norm",
    "k_norm",
    "attn_drop",
    "norm",
    "gate",
)


class FusedAttention(Attention):  # type: ignore[misc]  # timm is untyped
    """timm's attention with another forward: the class that an accelerated module has.

    The state is the stock class's, so a change of ``__class__`` in either direction is all there is to do.
    """

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if (
            x.dtype not in KERNEL_DTYPES.get(x.device.type, ())
            or (self.training and self.attn_drop.p > 0.0)
            or (is_causal and attn_mask is not None)
        ):
            return super().forward(x, attn_mask, is_causal)  # type: ignore[no-any-return]
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).unbind(2)  # [B, N, H, D]
        bias, key_bias = mask_terms(attn_mask)
        out = attention(
            self.q_norm(q),
            self.k_norm(k),
            v,
            scale=self.scale,
            bias=bias,
            key_bias=key_bias,
            is_causal=is_causal,
        )
        out = self.norm(out.reshape(B, N, self.attn_dim))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))  # type: ignore[no-any-return]


def replace(model: nn.Module) -> list[Entry]:
    """Swap the class of every stock attention module of ``model``."""
    entries = []
    for name, module in model.named_modules():
        if not isinstance(module, Attention):
            continue
        obstacle = _obstacle(module)
        if obstacle:
            entries.append(Entry(name, kind_of(module), "stock", obstacle))
            continue
        module.__class__ = FusedAttention
        reason = "; ".join(conditions(module, module.attn_drop.p))
        entries.append(Entry(name, "timm Attention", "replaced", reason))
    return entries


def restore(model: nn.Module) -> None:
    """Give every accelerated module its stock class again."""
    for module in model.modules():
        if type(module) is FusedAttention:
            module.__class__ = Attention


def _obstacle(module: Attention) -> str:
    if type(module) not in (Attention, FusedAttention):
        return "a subclass of timm's Attention may compute something else"
    if "forward" in module.__dict__:
        return "its forward is overridden on the instance"
    missing = [name for name in _ATTRIBUTES if not hasattr(module, name)]
    if missing:
        return f"this version of timm's Attention has no {', '.join(missing)}"
    if module.scale != module.head_dim**-0.5:
        return f"its scale was changed to {module.scale}"
    return ""
