"""The attention function ``"vitkernels"``, and models switched to it.

Importing this module registers the function and its mask.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from vitkernels.functional import attention
from vitkernels.integrations.devices import KERNEL_DTYPES, conditions
from vitkernels.integrations.exporters import check_exporter
from vitkernels.integrations.masks import mask_fits
from vitkernels.integrations.report import Entry, kind_of
from vitkernels.nn.masks import mask_terms

__all__ = ["Stock", "attention_forward", "attention_mask", "replace", "restore", "suspend"]

IMPLEMENTATION = "vitkernels"
_RECORD = "_vitkernels_stock"
# What SDPA's function of transformers acts on, besides the arguments of `attention_forward`.
_SDPA_ARGUMENTS = ("softcap", "position_bias", "cache")
_CONDITION = "stock path with output_attentions, softcap or position_bias"


@dataclass(frozen=True)
class Stock:
    """What an accelerated attention module was set to. Its unpickling registers the attention function."""

    implementation: str


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers, with the meaning of its ``"sdpa"``.

    Args:
        module: the calling module; its ``is_causal`` counts where the argument is ``None``.
        query: ``(B, heads, Nq, d)``.
        key: ``(B, kv_heads, Nk, d)``.
        value: ``(B, kv_heads, Nk, dv)``.
        attention_mask: broadcastable to ``(B, heads, Nq, Nk)``, boolean or added to the logits.
        dropout: of the attention weights; above 0, SDPA's function computes.
        scaling: factor on the logits, default ``d ** -0.5``.
        is_causal: query ``i`` sees the keys ``j <= i`` if there is neither a mask nor a single query.
        kwargs: as for ``"sdpa"``, whose function takes over where one of them needs it.

    Returns:
        ``(B, Nq, heads, dv)``, and ``None`` in place of the attention weights.
    """
    check_exporter(module)
    if (
        dropout > 0.0
        or query.dtype not in KERNEL_DTYPES["attention"].get(query.device.type, ())
        or kwargs.get("output_attentions")
        or not mask_fits(attention_mask, query)
        or any(kwargs.get(name) is not None for name in _SDPA_ARGUMENTS)
    ):
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    is_causal = bool(is_causal and attention_mask is None and query.size(2) > 1)
    bias, key_bias = mask_terms(attention_mask)
    out = attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
        scale=scaling, bias=bias, key_bias=key_bias, is_causal=is_causal,
    )  # fmt: skip
    return out, None


def attention_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask of ``"sdpa"``; where it only removes padding, one row that all queries share."""
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    if mask is not None and kwargs.get("mask_function") is bidirectional_mask_function:
        return mask[:, :, :1].expand(mask.shape)
    return mask


AttentionInterface.register(IMPLEMENTATION, attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, attention_mask)


def replace(model: nn.Module) -> list[Entry]:
    """Set the config of every attention module of ``model`` from ``"sdpa"`` to ``"vitkernels"``."""
    found = [(name, module) for name, module in model.named_modules() if _uses_registry(module)]
    # Modules that share a config can only be switched together.
    obstacles: dict[int, str] = {}
    for _, module in found:
        if reason := _obstacle(module):
            obstacles[id(_config(module))] = reason
    entries = []
    for name, module in found:
        if reason := obstacles.get(id(_config(module)), ""):
            entries.append(Entry(name, kind_of(module), "stock", reason))
            continue
        if _RECORD not in module.__dict__ or _config(module)._attn_implementation == "sdpa":
            setattr(module, _RECORD, Stock(_config(module)._attn_implementation))
        reason = "; ".join([*conditions(module, getattr(module, "attention_dropout", 0.0)), _CONDITION])
        entries.append(Entry(name, kind_of(module), "replaced", reason))
    for entry, (_, module) in zip(entries, found, strict=True):
        if entry.status == "replaced":
            # The public setter would also switch the sub-configs.
            _config(module)._attn_implementation_internal = IMPLEMENTATION
    return entries


def restore(model: nn.Module) -> None:
    """Put back the implementation of every attention module that :func:`replace` switched."""
    for module in model.modules():
        record = module.__dict__.pop(_RECORD, None)
        if record is not None and _config(module)._attn_implementation == IMPLEMENTATION:
            _config(module)._attn_implementation_internal = record.implementation


def suspend(model: nn.Module) -> Callable[[], None]:
    """Let ``model`` compute with ``"sdpa"`` whoever chose ``"vitkernels"``. Returns what undoes that."""
    records = [(module, module.__dict__.pop(_RECORD)) for module in model.modules() if _RECORD in module.__dict__]
    configs: list[Any] = [module.__dict__.get("config") for module in model.modules()]  # a property may raise
    configs = [config for config in configs if _implementation(config) == IMPLEMENTATION]

    def back() -> None:
        for config in configs:
            if _implementation(config) == "sdpa":
                config._attn_implementation_internal = IMPLEMENTATION
        for module, record in records:
            if _implementation(_config(module)) == IMPLEMENTATION:
                setattr(module, _RECORD, record)

    for config in configs:
        config._attn_implementation_internal = "sdpa"
    return back


def _implementation(config: Any) -> Any:
    return getattr(config, "_attn_implementation", None)


def _config(module: nn.Module) -> Any:
    return module.config


def _uses_registry(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names and hasattr(module, "config")


def _obstacle(module: nn.Module) -> str:
    forward = inspect.unwrap(type(module).forward)
    if forward.__globals__["ALL_ATTENTION_FUNCTIONS"].get("sdpa") is not sdpa_attention_forward:
        return "its library module overrides 'sdpa'"
    if _treats_sdpa_specially(type(module).__module__):
        return "its library module treats 'sdpa' specially"
    implementation = _config(module)._attn_implementation
    if implementation not in ("sdpa", IMPLEMENTATION):
        return f"its attention implementation is {implementation!r}, only 'sdpa' is replaced"
    return ""


@cache
def _treats_sdpa_specially(module_name: str) -> bool:
    try:
        source = inspect.getsource(sys.modules[module_name])
    except (KeyError, OSError, TypeError):
        return False
    return re.search(r"_attn_implementation\b[^\n]*[\"']sdpa[\"']", source) is not None
