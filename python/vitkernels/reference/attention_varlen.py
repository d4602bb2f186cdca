"""The definition of attention over packed sequences, in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitkernels.reference.attention import attention

__all__ = ["attention_varlen"]


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    multiplier: Tensor | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Same arguments, shapes and results as :func:`vitkernels.attention_varlen`: one attention per sequence."""
    count, heads = len(cu_seqlens_q) - 1, query.size(1)
    matrix = (count, heads, max_seqlen_q, max_seqlen_k)
    shapes = {"bias": matrix, "multiplier": matrix, "key_bias": (count, heads, max_seqlen_k)}
    tables = {"bias": bias, "multiplier": multiplier, "key_bias": key_bias}
    parts = []
    for i in range(max(count, 1)):  # no sequences: the attention of none
        rows, columns = (slice(int(c[i]), int(c[min(i + 1, count)])) for c in (cu_seqlens_q, cu_seqlens_k))
        own: dict[str, Any] = {}
        for name, table in tables.items():
            if table is not None:
                own[name] = table.expand(shapes[name])[i : i + 1, ..., : columns.stop - columns.start]
                if name != "key_bias":
                    own[name] = own[name][..., : rows.stop - rows.start, :]
        parts.append(
            attention(query[None, rows], key[None, columns], value[None, columns], return_lse=True, **own, **options)
        )
    out = torch.cat([part[0][0] for part in parts])
    lse = torch.cat([part[1][0] for part in parts])
    return (out, lse) if return_lse else out
