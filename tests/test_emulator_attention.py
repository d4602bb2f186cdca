"""Attention on a GPU: what only its kernels do. Hostile offsets, splits of the keys, and what they cost in memory."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import test_errors
import torch
import vitkernels as vk
from calls import differentiate, replace
from emulation import needs_emulator

pytestmark = needs_emulator

HALF = [torch.bfloat16, torch.float16]
MIN, MAX = -(2**63), 2**63 - 1
QUERIES, KEYS, LONGEST_QUERY, LONGEST_KEY = 11, 13, 4, 6
GOOD = ([0, 4, 7, 11], [0, 6, 8, 13])
# Offsets of three sequences, none of them what the operator takes.
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
    """Each sequence by itself; what belongs to none is zero, its lse that of no keys."""
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
    """Tokens that no sequence covers have results and gradients of zero, the others what their sequence gives."""
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


@pytest.mark.parametrize(("of_queries", "of_keys"), [(True, False), (False, True), (True, True)], ids=["q", "k", "qk"])
@pytest.mark.parametrize("offsets", HOSTILE, ids=str)
def test_hostile_offsets(offsets, of_queries, of_keys, cuda_kernels):
    check_packed(packed_call(offsets if of_queries else GOOD[0], offsets if of_keys else GOOD[1]))


def test_hostile_offsets_of_split_keys(cuda_kernels):
    """Forward and backward; in float32 parts that are joined."""
    check_packed(packed_call([7, 525], [0, 530], queries=530, keys=530, longest=(515, 512), heads=1))
    assert {"merge", "sum_splits"} <= set(kernels_of(cuda_kernels))


@pytest.mark.parametrize("longest", [(0, 6), (4, 0), (0, 0), (2**31, 2**31)], ids=str)
@pytest.mark.parametrize("offsets", [[0], [3], [0, 11], [-5, 20]], ids=str)
def test_hostile_lengths(offsets, longest, cuda_kernels):
    """No sequences, or none that may have tokens: somebody must write the results nevertheless."""
    call = packed_call(offsets, offsets, longest=(1, 1)) | {"max_seqlen_q": longest[0], "max_seqlen_k": longest[1]}
    call["bias"] = torch.ones(1, 2, 1, 1, requires_grad=True)  # whose gradient sums over all that the lengths allow
    (out, lse), grads = differentiate(vk.attention_varlen, call)
    is_empty = 0 in longest or offsets != [0, 11]
    assert bool(out.any()) != is_empty and bool((lse == -torch.inf).all()) == is_empty
    assert all(g.isfinite().all() and bool(g.any()) != is_empty for g in grads)


def emulated_errors(compute_capability, **environment):
    """What calls with values out of range raise in a process of their own."""
    command = [sys.executable, str(Path(__file__).parent / "value_worker.py"), str(compute_capability)]
    ran = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_values_are_checked_if_the_environment_asks_for_it():
    found = emulated_errors(80, VITKERNELS_CHECK="1")
    assert len(found) == len(test_errors.VALUE_ERRORS)
    for error, (_, _, text) in zip(found, test_errors.VALUE_ERRORS, strict=True):
        assert error is not None and text in error
    assert not any(emulated_errors(80, VITKERNELS_CHECK="0"))


def test_library_without_code_for_the_gpu():
    for error in emulated_errors(75):
        assert "no kernel for a GPU of compute capability 7.5, the library has compute_80 (PTX)" in error


def tokens(b, n, h, d, dtype, seed):
    return torch.randn(b, n, h, d, generator=torch.Generator().manual_seed(seed)).to(dtype)


def forward(dtype, *, b=1, q, k, h=1, d, v=None):
    call = tokens(b, q, h, d, dtype, 0), tokens(b, k, h, d, dtype, 1), tokens(b, k, h, v or d, dtype, 2)
    return (*call, *vk.attention(*call, return_lse=True))


def kernels_of(emulator):
    return [launch.kernel.removeprefix("vitkernels::") for launch in emulator.launches()]


# b, q, k, h, d, and in how many splits the keys are cut: at least 256 keys each, where there are at most 128 blocks.
SPLITS = [
    ((1, 1, 511, 1, 16), 1), ((1, 1, 512, 1, 16), 2), ((1, 3, 1300, 2, 64), 5), ((2, 200, 801, 3, 32), 3),
    ((43, 1, 512, 3, 16), 1), ((8, 1, 512, 16, 16), 2),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "splits"), SPLITS, ids=str)
def test_keys_are_split_by_shape(shape, splits, cuda_kernels):
    """... whatever the GPU."""
    sizes = dict(zip("bqkhd", shape, strict=True))
    expected = forward(torch.float16, **sizes)
    assert kernels_of(cuda_kernels) == (["attention"] if splits == 1 else ["attention", "merge"])
    grid = cuda_kernels.launches()[0].grid[0]
    cuda_kernels.reset()
    cuda_kernels.configure(multiprocessors=132, seed=1)
    found = forward(torch.float16, **sizes)
    assert cuda_kernels.launches()[0].grid[0] == grid and grid % splits == 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def nbytes(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def conflicts(counters):
    """By line, the wavefronts beyond what the width of each access needs."""
    found = {f"{Path(c.file).name}:{c.line} {c.instruction}": c.conflicts for c in counters.conflicts.values()}
    assert found
    return {site: count for site, count in found.items() if count}


# Queries of a tile, by head dimension. All sizes of a test make whole sectors.
QUERY_TILE = {32: 128, 64: 128, 128: 64, 256: 64}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("d", QUERY_TILE)
def test_forward_traffic(d, dtype, cuda_kernels):
    """Queries are read once, keys and values once for each tile of queries, results are written once. That is all;
    and no access meets a bank conflict."""
    query, key, value, out, lse = forward(dtype, b=2, q=152, k=200, d=d)
    (counters,) = cuda_kernels.counters().values()
    tiles = -(-query.size(1) // QUERY_TILE[d])
    assert counters.read.distinct == nbytes(query, key, value)
    assert counters.read.total == nbytes(query) + tiles * nbytes(key, value)
    assert counters.written.distinct == counters.written.total == nbytes(out, lse)
    assert conflicts(counters) == {}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("d", QUERY_TILE)
def test_backward_traffic(d, dtype, cuda_kernels):
    """Nothing but operands is read, gradients are written once, and no access meets a bank conflict."""
    query, key, value = (tokens(2, n, 1, d, dtype, seed).requires_grad_() for seed, n in enumerate((152, 200, 200)))
    out, lse = vk.attention(query, key, value, return_lse=True)
    cuda_kernels.reset()
    torch.autograd.grad(out, (query, key, value), out.detach().clone())
    grad_out, delta = out, lse
    counters = {name.removeprefix("vitkernels::attention_backward"): c for name, c in cuda_kernels.counters().items()}
    assert counters["_delta"].read.total == nbytes(out, grad_out)
    of_owners = counters[""]  # of keys, then of queries
    assert of_owners.launches == 2
    assert of_owners.read.distinct == 2 * nbytes(query, key, value, grad_out, lse, delta)
    assert of_owners.written.distinct == of_owners.written.total == nbytes(query, key, value)
    assert conflicts(of_owners) == {}
