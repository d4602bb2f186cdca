"""Calls of flash-attention and PyTorch: alignment of causal masks, layouts, and what they refuse."""

from __future__ import annotations

import re

import pytest
import torch
from vitkernels.compat import flash_attn_func, flash_attn_varlen_func, scaled_dot_product_attention


def plain(q, k, v, scale=None, causal=False):
    """The formula, with the causal mask aligned at the last query and key."""
    groups = q.size(2) // k.size(2)
    q, k, v = q.transpose(1, 2), *(t.repeat_interleave(groups, 2).transpose(1, 2) for t in (k, v))
    logits = q @ k.transpose(-1, -2) * (q.size(-1) ** -0.5 if scale is None else scale)
    if causal:
        seen = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril(k.size(2) - q.size(2))
        logits = logits.masked_fill(~seen, -torch.inf)
    p = torch.nan_to_num(torch.softmax(logits, -1), nan=0.0)
    return (p @ v).transpose(1, 2), torch.logsumexp(logits, -1)


def tensors(nq, nk, heads=4, kv_heads=2, dim=16, batch=2):
    shapes = [(batch, nq, heads, dim), (batch, nk, kv_heads, dim), (batch, nk, kv_heads, dim)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("nq", "nk"), [(33, 33), (7, 40), (40, 7), (1, 9)])
def test_flash_attn_func(nq, nk, causal):
    inputs = tensors(nq, nk)
    out, lse, probabilities = flash_attn_func(*inputs, softmax_scale=0.3, causal=causal, return_attn_probs=True)
    expected, expected_lse = plain(*inputs, scale=0.3, causal=causal)
    assert probabilities is None
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    visible = expected[:, max(nq - nk, 0) :] if causal else expected
    mine = out[:, max(nq - nk, 0) :] if causal else out
    weight = torch.randn_like(visible)
    for a, b in zip(
        torch.autograd.grad(mine, inputs, weight), torch.autograd.grad(visible, inputs, weight), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attn_varlen_func(causal):
    lengths = [5, 0, 17, 1]
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    q, k, v = (t[0] for t in tensors(23, 23, batch=1))
    out, lse, _ = flash_attn_varlen_func(q, k, v, offsets, offsets, 17, 17, causal=causal, return_attn_probs=True)
    assert lse.shape == (4, 23)
    for begin, length in zip(offsets.tolist(), lengths, strict=False):
        part = slice(begin, begin + length)
        if length:
            expected, expected_lse = plain(*(t[None, part] for t in (q, k, v)), causal=causal)
            torch.testing.assert_close(out[part], expected[0])
            torch.testing.assert_close(lse[:, part], expected_lse[0])


@pytest.mark.parametrize(
    ("argument", "value"),
    [("dropout_p", 0.1), ("window_size", (3, 3)), ("softcap", 30.0), ("alibi_slopes", torch.ones(4))],
)
def test_what_is_not_computed_is_refused(argument, value):
    q, k, v = tensors(5, 5)
    with pytest.raises(NotImplementedError, match=rf"vitkernels.compat.flash_attn_func: {argument} is"):
        flash_attn_func(q, k, v, **{argument: value})


def test_varlen_causal_needs_equal_lengths():
    q, k, v = (t[0] for t in tensors(6, 6, batch=1))
    a, b = torch.tensor([0, 2, 6]), torch.tensor([0, 3, 6])
    with pytest.raises(NotImplementedError, match="causal is True, takes False where"):
        flash_attn_varlen_func(q, k, v, a, b, 4, 3, causal=True)


SDPA_CALLS = {
    "plain": ({}, [(2, 3, 9, 8)] * 3),
    "cross": ({}, [(2, 3, 9, 8), (2, 3, 5, 8), (2, 3, 5, 6)]),
    "causal": ({"is_causal": True}, [(2, 3, 9, 8), (2, 3, 5, 8), (2, 3, 5, 8)]),
    "scale": ({"scale": 0.3}, [(2, 3, 9, 8)] * 3),
    "grouped": ({"enable_gqa": True}, [(2, 6, 9, 8), (2, 2, 5, 8), (2, 2, 5, 8)]),
    "two-axes": ({}, [(9, 8)] * 3),
    "three-axes": ({}, [(3, 9, 8)] * 3),
    "five-axes": ({}, [(2, 2, 3, 9, 8)] * 3),
}
MASKS = {"dense": (9, 9), "heads": (3, 9, 9), "keys": (2, 1, 1, 9), "batch": (2, 1, 9, 9)}


def same_as_torch(shapes, options, dtype=torch.float64):
    inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    results = []
    for function in (scaled_dot_product_attention, torch.nn.functional.scaled_dot_product_attention):
        out = function(*inputs, **options)
        learnt = [*inputs, *(o for o in options.values() if isinstance(o, torch.Tensor) and o.requires_grad)]
        results.append((out, *torch.autograd.grad(out.square().sum(), learnt)))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", SDPA_CALLS)
def test_scaled_dot_product_attention(name):
    options, shapes = SDPA_CALLS[name]
    same_as_torch(shapes, options)


@pytest.mark.parametrize("rank", [4, 5])
@pytest.mark.parametrize("kind", ["boolean", "floating", "learnt"])
@pytest.mark.parametrize("name", MASKS)
def test_scaled_dot_product_attention_with_a_mask(name, kind, rank):
    mask = torch.rand(MASKS[name], dtype=torch.float64)
    mask = mask > 0.3 if kind == "boolean" else mask.requires_grad_(kind == "learnt")
    if kind == "boolean":
        mask[..., 0] = True
    same_as_torch([(2,) * (rank - 3) + (3, 9, 8)] * 3, {"attn_mask": mask})


HEADS, HALF = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8)
EMPTIED = HEADS.clone()
EMPTIED.untyped_storage().resize_(0)
SDPA_ERRORS = [
    ({"dropout_p": 0.1}, "dropout_p is 0.1, takes 0"),
    ({"attn_mask": HEADS[0, 0], "is_causal": True}, "is_causal is True, takes False with an attn_mask"),
    ({"is_causal": 1}, "is_causal is 1, takes True or False"),
    ({"query": HEADS.numpy()}, "query is a ndarray, takes a tensor"),
    ({"query": HEADS[0, 0, 0]}, "query has shape (8,), takes (B, heads, tokens, d), or two dimensions and more"),
    ({"key": HEADS[0]}, "key has shape (4, 9, 8), takes 4 dimensions, as query"),
    ({"key": HEADS[..., :7]}, "key has shape (2, 4, 9, 7), takes query's d (8) as its last dimension"),
    ({"key": HALF, "value": HALF}, "key has shape (2, 2, 9, 8), takes query's 4 heads without enable_gqa"),
    (
        {"key": HEADS[:, :3], "value": HEADS[:, :3], "enable_gqa": True},
        "key has shape (2, 3, 9, 8), takes a number of heads that divides query's 4",
    ),
    ({"value": HEADS[:, :, :8]}, "value has shape (2, 4, 8, 8), takes key's number of tokens (9) before its last"),
    ({"key": HEADS.half()}, "key is float16, takes float32"),
    ({"key": HEADS[[0, 0, 0]]}, "key has shape (3, 4, 9, 8), takes query's batch (2,)"),
    ({"query": HEADS[:1], "value": HEADS[[0, 0, 0]]}, "value has shape (3, 4, 9, 8), takes key's batch (2,)"),
    ({"value": HALF}, "value has shape (2, 2, 9, 8), takes query's 4 heads without enable_gqa"),
    ({"query": EMPTIED}, "query of shape (2, 4, 9, 8) has a storage of 0 bytes, takes 2304: it was resized"),
    ({"key": EMPTIED}, "key of shape (2, 4, 9, 8) has a storage of 0 bytes, takes 2304: it was resized"),
    ({"value": EMPTIED}, "value of shape (2, 4, 9, 8) has a storage of 0 bytes, takes 2304: it was resized"),
    ({"attn_mask": torch.zeros(9)}, "attn_mask has shape (9,), takes two dimensions or more that broadcast to (2, 4,"),
    ({"attn_mask": torch.zeros(3, 9, 9)}, "attn_mask has shape (3, 9, 9), takes two dimensions or more"),
    ({"attn_mask": torch.zeros(9, 9).half()}, "attn_mask is torch.float16, takes bool, float32 or query's dtype"),
    ({"scale": "1"}, "scale is '1', takes a number"),
]


@pytest.mark.parametrize(("wrong", "text"), SDPA_ERRORS, ids=[text for _, text in SDPA_ERRORS])
def test_scaled_dot_product_attention_refuses(wrong, text):
    """In the caller's words and layout; and what PyTorch refuses."""
    call = {"query": HEADS, "key": HEADS, "value": HEADS} | wrong
    with pytest.raises(RuntimeError, match=re.escape(f"vitkernels.compat.scaled_dot_product_attention: {text}")):
        scaled_dot_product_attention(**call)
    if "dropout_p" in wrong or wrong.get("is_causal") == 1 or re.match(r"(key|value) has shape \((4|2, 4, 8), ", text):
        return  # laxer there
    with pytest.raises((RuntimeError, TypeError, IndexError, ValueError)):
        torch.nn.functional.scaled_dot_product_attention(**call)


def test_flash_attention_is_told_in_its_words():
    q, k, v = (t.float() for t in tensors(5, 5))
    offsets = torch.tensor([0, 5])
    with pytest.raises(
        RuntimeError, match=r"vitkernels\.compat\.flash_attn_func: k has size 7 in dimension 3, takes 16"
    ):
        flash_attn_func(q, k[..., :7], v)
    with pytest.raises(
        RuntimeError, match=r"vitkernels\.compat\.flash_attn_func: softmax_scale is nan, takes a finite"
    ):
        flash_attn_func(q, k, v, softmax_scale=float("nan"))
    with pytest.raises(RuntimeError, match=r"vitkernels\.compat\.flash_attn_func: q is a ndarray, takes a tensor"):
        flash_attn_func(q.detach().numpy(), k, v)
    with pytest.raises(RuntimeError, match=r"vitkernels\.compat\.flash_attn_varlen_func: v is a list, takes a tensor"):
        flash_attn_varlen_func(q[0], k[0], [v], offsets, offsets, 5, 5)
    with pytest.raises(
        RuntimeError, match=r"vitkernels\.compat\.flash_attn_varlen_func: max_seqlen_q is -1, takes 0 to"
    ):
        flash_attn_varlen_func(q[0], k[0], v[0], offsets, offsets, -1, 5)


def test_what_pytorch_takes_is_taken():
    q, single, five = torch.randn(2, 4, 9, 8), torch.randn(1, 4, 9, 8), torch.randn(2, 3, 4, 9, 8)
    theirs = torch.nn.functional.scaled_dot_product_attention
    for call in (
        (single, q, q, torch.randn(2, 1, 9, 9)), (torch.randn(1, 1, 4, 9, 8), five, five),
        (torch.randn(1, 1, 4, 9, 8), five, five, torch.randn(2, 3, 1, 1, 9)),
    ):  # fmt: skip
        torch.testing.assert_close(scaled_dot_product_attention(*call), theirs(*call))
    few, fewer = torch.randn(1, 2, 7, 8), torch.randn(2, 1, 7, 8)
    for own, k, v in (
        (q, few, fewer),
        (q, fewer, few),
        (five, few[None], fewer[:, None]),
        (q[0], few[0], fewer[0]),
    ):
        found, expected = (f(own, k, v, enable_gqa=True) for f in (scaled_dot_product_attention, theirs))
        torch.testing.assert_close(found, expected)
    with torch.autocast("cpu", torch.bfloat16):
        mask = torch.randn(9, 9).bfloat16()
        found, expected = (f(q, q, q, mask) for f in (scaled_dot_product_attention, theirs))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03)


def test_sizes_that_depend_on_data_export():
    class Masked(torch.nn.Module):
        def forward(self, q, keep):
            q = q[:, :, keep.nonzero()[:, 0]]
            n = q.shape[2]
            return scaled_dot_product_attention(q, q, q, q.new_zeros(n, n))

    q, keep = torch.randn(2, 4, 9, 8), torch.arange(9) % 2 == 0
    program = torch.export.export(Masked(), (q, keep), strict=False)
    torch.testing.assert_close(program.module()(q, keep), Masked()(q, keep))


def test_compiled_errors_say_what_is_wrong():
    q, mask = torch.randn(2, 4, 9, 8), torch.zeros(3, 9)
    with pytest.raises(Exception, match=r"attn_mask has shape|takes two dimensions or more that broadcast"):
        torch.compile(scaled_dot_product_attention, fullgraph=True, backend="eager")(q, q, q, mask)


def test_flags_and_freed_storages_of_compat():
    q, k, v = (t.float() for t in tensors(5, 9))
    offsets, freed = torch.tensor([0, 5]), torch.tensor([0, 5])
    freed.untyped_storage().resize_(0)
    mask = torch.ones(5, 9, dtype=torch.bool)
    mask.untyped_storage().resize_(0)
    heads = [t.transpose(1, 2) for t in (q, k, v)]
    packed = (q[0], k[0, :5], v[0, :5])
    for text, call in {
        "flash_attn_func: causal is 'no', takes": lambda: flash_attn_func(q, k, v, causal="no"),
        "flash_attn_func: return_attn_probs is 1, takes": lambda: flash_attn_func(q, k, v, return_attn_probs=1),
        "flash_attn_func: v has shape (2, 8, 2, 16), takes k's": lambda: flash_attn_func(q, k, v[:, 1:], causal=True),
        "enable_gqa is 'no', takes": lambda: scaled_dot_product_attention(*heads, enable_gqa="no"),
        "attn_mask of shape (5, 9) has a storage": lambda: scaled_dot_product_attention(*heads, mask, enable_gqa=True),
        "cu_seqlens_q of shape (2,) has a storage": lambda: flash_attn_varlen_func(
            *packed, freed, offsets, 5, 5, causal=True
        ),
    }.items():
        with pytest.raises(RuntimeError, match=re.escape(text)):
            call()
