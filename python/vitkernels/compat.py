"""Calls of flash-attention and of PyTorch, for code that has them: ``from vitkernels.compat import flash_attn_func``.

Arguments, layouts and results are theirs; what the kernels do not compute is an error, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from vitkernels._torch_private import sizes_are_tensors
from vitkernels.functional import attention, attention_varlen, merge_attentions
from vitkernels.functional.arguments import check_flag, check_stored, check_tensors
from vitkernels.functional.words import Words

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "scaled_dot_product_attention"]

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def _says(operator: str, **arguments: str) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
    """Have errors of ``operator`` name the function, and its arguments by the operator's."""

    def decorate(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        words = Words(function.__name__, arguments)

        @wraps(function)
        def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
            if torch.compiler.is_compiling():  # which cannot trace the words, and would hide the error behind them
                return function(*args, **kwargs)
            try:
                return function(*args, **kwargs)
            except RuntimeError as error:
                if f"vitkernels::{operator}: " not in str(error):
                    raise
                text = str(words.of(error, operator))
                raise RuntimeError(text.replace("vitkernels::", "vitkernels.compat.")) from None

        return call

    return decorate


@_says("attention", bias="attn_mask")
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """:func:`torch.nn.functional.scaled_dot_product_attention`, heads before tokens.

    Args:
        query: ``(B, heads, Nq, d)``; fewer or more axes before the last two as well.
        key: ``(B, heads, Nk, d)``; with ``enable_gqa`` the number of heads may be a divisor of the query's.
        value: ``(B, heads, Nk, dv)``, its number of heads as that of ``key``, or with ``enable_gqa`` another divisor.
            The batches of all three broadcast.
        attn_mask: broadcasts to ``(B, heads, Nq, Nk)``: boolean, true where a key is seen, or floating, added to the
            logits, float32 or the query's dtype.
        dropout_p: only 0.
        is_causal: query i sees keys up to i; not together with ``attn_mask``.
        scale: default ``d ** -0.5``.
        enable_gqa: successive query heads share a key head.

    Returns:
        ``(B, heads, Nq, dv)``, as a view of ``(B, Nq, heads, dv)``. A query that sees no key gets zeros.

    A NaN or infinity in a key or value may reach queries that do not see it: they share a tile.

    Raises:
        NotImplementedError: if ``dropout_p`` is not 0.
        RuntimeError: for arguments that do not go together, and as :func:`vitkernels.attention`.
    """
    name = "scaled_dot_product_attention"
    if dropout_p != 0.0:
        _refuse(name, "dropout_p", str(dropout_p), "0")
    check_flag("attention", "is_causal", is_causal)
    check_flag("attention", "enable_gqa", enable_gqa)
    check_tensors("attention", query=query, key=key, value=value)
    if not sizes_are_tensors():
        _check_shapes(query, key, value, enable_gqa)
    check_stored("attention", query=query, key=key, value=value)
    rank, bias = query.dim(), attn_mask
    batch = _batch_of(query, key, value)
    if key.shape[:-3] != batch or value.shape[:-3] != batch:
        key, value = (t.expand(*batch, *t.shape[-3:]) for t in (key, value))
    if query.shape[:-3] != batch and query.shape[:-3].numel() != 1:  # the kernels share one query themselves
        query = query.expand(*batch, *query.shape[-3:])
    if enable_gqa and rank > 2 and key.size(-3) != value.size(-3):
        key, value = (t.repeat_interleave(query.size(-3) // t.size(-3), -3) for t in (key, value))
    if attn_mask is not None:
        _check_mask((*batch, *query.shape[-3:-1], key.size(-2)), query, attn_mask, is_causal)
    if bias is not None:
        if bias.dtype == torch.bool:
            bias = torch.where(bias, 0.0, -torch.inf)
        if rank > 4 and bias.dim() > 3:
            bias = _with_four_axes(bias.expand(*batch, *bias.shape[-3:]))
    q, k, v = (_with_four_axes(t).transpose(1, 2) for t in (query, key, value))
    out = attention(q, k, v, bias=bias, is_causal=is_causal, scale=scale).transpose(1, 2)
    return out if rank == 4 else out.reshape(*batch, *query.shape[-3:-2], *out.shape[2:])


def _batch_of(*data: Tensor) -> torch.Size:
    """What the batches broadcast to."""
    batch, *others = (t.shape[:-3] for t in data)
    return batch if all(other == batch for other in others) else torch.broadcast_shapes(batch, *others)  # type: ignore[no-untyped-call]


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    """In PyTorch's layout, which :func:`vitkernels.attention` does not have."""
    rank = query.dim()
    if rank < 2:
        _fail("query", query, "(B, heads, tokens, d), or two dimensions and more")
    for name, t in (("key", key), ("value", value)):
        if t.dim() != rank:
            _fail(name, t, f"{rank} dimensions, as query")
        others = ("query",) if name == "key" else ("query", "key")
        for other, own in zip(others, (query, key), strict=False):
            if any(n != m and 1 not in (n, m) for n, m in zip(t.shape[:-3], own.shape[:-3], strict=True)):
                _fail(name, t, f"{other}'s batch {tuple(own.shape[:-3])}")
    if key.size(-1) != query.size(-1):
        _fail("key", key, f"query's d ({query.size(-1)}) as its last dimension")
    if value.size(-2) != key.size(-2):
        _fail("value", value, f"key's number of tokens ({key.size(-2)}) before its last dimension")
    for name, t in (("key", key), ("value", value)) if rank > 2 else ():
        heads, own_heads = query.size(-3), t.size(-3)
        if own_heads != heads and not enable_gqa:
            _fail(name, t, f"query's {heads} heads without enable_gqa")
        if own_heads != heads and (own_heads == 0 or heads % own_heads != 0):
            _fail(name, t, f"a number of heads that divides query's {heads}")


def _check_mask(sizes: Sequence[int], query: Tensor, mask: Tensor, is_causal: bool) -> None:
    check_tensors("attention", attn_mask=mask)
    check_stored("attention", attn_mask=mask)
    if is_causal:
        raise RuntimeError("vitkernels::attention: is_causal is True, takes False with an attn_mask")
    is_cast = query.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(query.device.type)
    if mask.dtype not in (torch.bool, torch.float32, query.dtype) and not (is_cast and mask.is_floating_point()):
        raise RuntimeError(f"vitkernels::attention: attn_mask is {mask.dtype}, takes bool, float32 or query's dtype")
    fits = 2 <= mask.dim() <= len(sizes) and all(
        n in (own, 1) for n, own in zip(mask.shape[::-1], sizes[::-1], strict=False)
    )
    if not fits:
        _fail("attn_mask", mask, f"two dimensions or more that broadcast to {tuple(sizes)}")


def _fail(name: str, t: Tensor, takes: str) -> None:
    raise RuntimeError(f"vitkernels::attention: {name} has shape {tuple(t.shape)}, takes {takes}")


def _with_four_axes(t: Tensor) -> Tensor:
    """One axis in place of all before the last three; axes of size one in front of fewer."""
    if t.dim() > 4:
        return t.flatten(0, -4)
    return t[(None,) * (4 - t.dim())]


@_says("attention", query="q", key="k", value="v", scale="softmax_scale", is_causal="causal")
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """flash-attention's ``flash_attn_func``.

    Args:
        q: ``(B, Nq, heads, d)``.
        k: ``(B, Nk, kv_heads, d)``.
        v: ``(B, Nk, kv_heads, d)``.
        dropout_p: only 0.
        softmax_scale: default ``d ** -0.5``.
        causal: aligned at the *last* query and key, as flash-attention does since its version 2.1; queries that see
            no key give 0. (:func:`vitkernels.attention` aligns at the first.)
        window_size: only ``(-1, -1)``, no window.
        softcap: only 0.
        alibi_slopes: only ``None``.
        deterministic: accepted; the result always is.
        return_attn_probs: return ``(out, lse, None)``. The probabilities are flash-attention's testing aid.

    Returns:
        ``out (B, Nq, heads, d)``; ``lse`` is float32 ``(B, heads, Nq)``.

    A NaN or infinity in a key or value may reach queries that do not see it: they share a tile.

    Raises:
        NotImplementedError: for an argument that is not computed, naming it.
        RuntimeError: as :func:`vitkernels.attention`.
    """
    _check_options("flash_attn_func", dropout_p, window_size, softcap, alibi_slopes)
    check_tensors("attention", query=q, key=k, value=v)
    _check_flags("attention", causal, return_attn_probs)
    if causal and k.dim() == v.dim() == 4 and v.size(1) != k.size(1):
        _fail("value", v, f"key's number of tokens ({k.size(1)})")
    offset = k.size(1) - q.size(1) if q.dim() == 4 and k.dim() == 4 else 0
    options: dict[str, Any] = {"scale": softmax_scale, "return_lse": True}
    if not causal or offset == 0:
        out, lse = attention(q, k, v, is_causal=causal, **options)
    elif offset > 0:
        # The first keys are seen by all queries, the others form a square.
        before = attention(q, k[:, :offset], v[:, :offset], **options)
        square = attention(q, k[:, offset:], v[:, offset:], is_causal=True, **options)
        out, lse = merge_attentions([before[0], square[0]], [before[1], square[1]])
    else:
        # The first queries see nothing.
        out, lse = attention(q[:, -offset:], k, v, is_causal=True, **options)
        out = torch.nn.functional.pad(out, (0, 0, 0, 0, -offset, 0))
        lse = torch.nn.functional.pad(lse, (0, 0, -offset, 0), value=-torch.inf)
    return (out, lse.transpose(1, 2), None) if return_attn_probs else out


@_says("attention_varlen", query="q", key="k", value="v", scale="softmax_scale", is_causal="causal")
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """flash-attention's ``flash_attn_varlen_func``.

    Args:
        q: ``(tokens_q, heads, d)``, sequences one after another.
        k: ``(tokens_k, kv_heads, d)``.
        v: ``(tokens_k, kv_heads, d)``.
        cu_seqlens_q: ``(sequences + 1,)`` int32, where each sequence begins, then the number of tokens.
        cu_seqlens_k: likewise for ``k`` and ``v``.
        max_seqlen_q: length of the longest sequence of queries.
        max_seqlen_k: length of the longest sequence of keys.
        dropout_p: only 0.
        softmax_scale: default ``d ** -0.5``.
        causal: only where ``cu_seqlens_q`` equals ``cu_seqlens_k``.
        window_size: only ``(-1, -1)``.
        softcap: only 0.
        alibi_slopes: only ``None``.
        deterministic: accepted; the result always is.
        return_attn_probs: return ``(out, lse, None)``.
        block_table: only ``None``.

    Returns:
        ``out (tokens_q, heads, d)``; ``lse`` is float32 ``(heads, tokens_q)``.

    A NaN or infinity in a key or value may reach queries that do not see it: they share a tile.

    Raises:
        NotImplementedError: for an argument that is not computed, naming it.
        RuntimeError: as :func:`vitkernels.attention_varlen`.
    """
    name = "flash_attn_varlen_func"
    _check_options(name, dropout_p, window_size, softcap, alibi_slopes)
    if block_table is not None:
        _refuse(name, "block_table", "a tensor", "None")
    check_tensors("attention_varlen", query=q, key=k, value=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    _check_flags("attention_varlen", causal, return_attn_probs)
    check_stored("attention_varlen", cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    if causal and cu_seqlens_q is not cu_seqlens_k and not torch.equal(cu_seqlens_q, cu_seqlens_k):
        _refuse(name, "causal", "True", "False where cu_seqlens_q and cu_seqlens_k differ")
    out, lse = attention_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        scale=softmax_scale, is_causal=causal, return_lse=True,
    )  # fmt: skip
    return (out, lse.transpose(0, 1), None) if return_attn_probs else out


def _check_options(
    name: str, dropout_p: float, window_size: tuple[int, int], softcap: float, alibi_slopes: Tensor | None
) -> None:
    if dropout_p != 0.0:
        _refuse(name, "dropout_p", str(dropout_p), "0")
    if tuple(window_size) != (-1, -1):
        _refuse(name, "window_size", str(window_size), "(-1, -1)")
    if softcap != 0.0:
        _refuse(name, "softcap", str(softcap), "0")
    if alibi_slopes is not None:
        _refuse(name, "alibi_slopes", "a tensor", "None")


def _check_flags(operator: str, causal: object, return_attn_probs: object) -> None:
    check_flag(operator, "is_causal", causal)
    check_flag(operator, "return_attn_probs", return_attn_probs)


def _refuse(function: str, argument: str, value: str, takes: str) -> None:
    raise NotImplementedError(f"vitkernels.compat.{function}: {argument} is {value}, takes {takes}")
