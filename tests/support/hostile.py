"""Values inside tensors that the host does not check before a GPU reads them: cu_seqlens and head maps."""

from __future__ import annotations

from itertools import pairwise

import torch
import vitkernels as vk
from support.calls import differentiate, replace
from support.devices import DEVICE

MIN, MAX = -(2**63), 2**63 - 1
QUERIES, KEYS, LONGEST_QUERY, LONGEST_KEY = 11, 13, 4, 6
GOOD = ([0, 4, 7, 11], [0, 6, 8, 13])
# Offsets of three sequences, none of which the operator accepts.
HOSTILE = [
    [2, 5, 7, 9], [0, 9, 11, 11], [-3, 2, 5, 11], [0, 8, 3, 11], [7, 3, 8, 2], [0, 3, 30, 60], [30, 20, 40, 13],
    [MIN, MAX, MIN, MAX], [MAX, MIN, 3, MIN], [6, 6, 6, 6], [-1, -1, -1, -1], [0, MAX, 0, 5], [MIN, MIN, 5, 9],
]  # fmt: skip


def spans(offsets, longest, count):
    """The tokens of each sequence, as the kernels must read the offsets."""

    def span(begin, end):
        return range(begin, min(begin + longest, end, count)) if 0 <= begin <= min(end, count) else range(0)

    return [span(a, b) for a, b in pairwise(offsets)]


def are_disjoint(found):
    return sum(map(len, found)) == len({token for tokens in found for token in tokens})


def uncovered(found, count):
    return sorted(set(range(count)) - {token for tokens in found for token in tokens})


def packed_reference(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
    """Each sequence by itself; rows of no sequence are zero, with the lse of no keys."""
    bias = options.pop("bias")
    out = torch.zeros(*query.shape[:2], value.shape[-1], dtype=query.dtype)
    lse = torch.full(query.shape[:2], -torch.inf)
    of_queries = spans(cu_seqlens_q.tolist(), max_seqlen_q, len(query))
    of_keys = spans(cu_seqlens_k.tolist(), max_seqlen_k, len(key))
    for i, (q, k) in enumerate(zip(of_queries, of_keys, strict=True)):
        if q and k:
            data = (t[None, s.start : s.stop] for t, s in ((query, q), (key, k), (value, k)))
            found = vk.reference.attention(*data, bias=bias[i : i + 1, :, : len(q), : len(k)], **options)
            at = torch.tensor(q)
            out, lse = out.index_put((at,), found[0][0]), lse.index_put((at,), found[1][0].float())
    return out, lse


def packed_call(offsets_q, offsets_k, queries=QUERIES, keys=KEYS, longest=(LONGEST_QUERY, LONGEST_KEY), heads=2):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    data = {"query": normal(queries, heads, 8), "key": normal(keys, heads, 8), "value": normal(keys, heads, 5)}
    call = {name: t.half().requires_grad_() for name, t in data.items()}
    call["bias"] = normal(len(offsets_q) - 1, heads, *longest).requires_grad_()
    call["scale"] = normal(heads).requires_grad_()
    call |= {"cu_seqlens_q": torch.tensor(offsets_q), "cu_seqlens_k": torch.tensor(offsets_k)}
    return call | {"max_seqlen_q": longest[0], "max_seqlen_k": longest[1], "return_lse": True}


def check_packed(call, device="cpu"):
    """Tokens that no sequence covers have results and gradients of zero, the others those of their sequence."""
    found, found_grads = differentiate(vk.attention_varlen, replace(call, lambda t: t.to(device)))
    found, found_grads = [t.cpu() for t in found], [t.cpu() for t in found_grads]
    of_queries = spans(call["cu_seqlens_q"].tolist(), call["max_seqlen_q"], len(call["query"]))
    of_keys = spans(call["cu_seqlens_k"].tolist(), call["max_seqlen_k"], len(call["key"]))
    queries, keys = uncovered(of_queries, len(call["query"])), uncovered(of_keys, len(call["key"]))
    assert not found[0][queries].any() and (found[1][queries] == -torch.inf).all()
    assert not found_grads[0][queries].any() and not any(g[keys].any() for g in found_grads[1:3])
    if are_disjoint(of_queries) and are_disjoint(of_keys):
        expected, expected_grads = differentiate(packed_reference, call)
        for a, b in zip([*found, *found_grads], [*expected, *expected_grads], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=2e-2)


def check_head_map_out_of_range():
    """A query head whose kv head does not exist sees no keys."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, n, heads, 8, generator=generator).bfloat16().to(DEVICE) for n, heads in ((5, 3), (7, 2), (7, 2))
    )
    for wrong in (-1, 2, 2**62, -(2**63)):
        data = {name: t.requires_grad_() for name, t in (("query", query), ("key", key), ("value", value))}
        call = {**data, "head_map": torch.tensor([0, wrong, 1], device=DEVICE), "return_lse": True}
        (out, lse), (grad_query, *others) = differentiate(vk.attention, call)
        assert not out[:, :, 1].any() and (lse[:, :, 1] == -torch.inf).all() and not grad_query[:, :, 1].any()
        assert out[:, :, 0].any() and out[:, :, 2].any() and all(g.isfinite().all() for g in others)
