"""Attention on a GPU: what only its kernels do. Hostile offsets, splits of the keys, and what they cost in memory."""

import json
import os
import subprocess
import sys

import pytest
import torch
import vitkernels as vk
from support.calls import differentiate
from support.emulation import conflicts, nbytes, needs_emulator
from support.gates.errors import VALUE_ERRORS
from support.hostile import GOOD, HOSTILE, check_packed, packed_call
from support.paths import TESTS

pytestmark = needs_emulator

HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize(("of_queries", "of_keys"), [(True, False), (False, True), (True, True)], ids=["q", "k", "qk"])
@pytest.mark.parametrize("offsets", HOSTILE, ids=str)
def test_hostile_offsets(offsets, of_queries, of_keys, cuda_kernels):
    check_packed(packed_call(offsets if of_queries else GOOD[0], offsets if of_keys else GOOD[1]))


def test_hostile_offsets_of_split_keys(cuda_kernels):
    """Forward and backward; in float32 parts that are joined."""
    check_packed(packed_call([7, 525], [0, 530], queries=530, keys=530, longest=(515, 512), heads=1))
    assert {"merge", "sum_parts"} <= set(kernels_of(cuda_kernels))


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
    command = [sys.executable, "-m", "support.value_worker", str(compute_capability)]
    ran = subprocess.run(command, cwd=TESTS, env={**os.environ, **environment}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_values_are_checked_if_the_environment_asks_for_it():
    found = emulated_errors(80, VITKERNELS_CHECK="1")
    assert len(found) == len(VALUE_ERRORS)
    for error, (_, _, text) in zip(found, VALUE_ERRORS, strict=True):
        assert error is not None and text in error
    assert not any(emulated_errors(80, VITKERNELS_CHECK="0"))
    wrong = emulated_errors(80, VITKERNELS_CHECK="yes")
    assert {"VITKERNELS_CHECK is 'yes', takes 0 or 1" in (error or "") for error in wrong} == {True}


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
    assert kernels_of(cuda_kernels) == (["attention_plain"] if splits == 1 else ["attention_plain", "merge"])
    grid = cuda_kernels.launches()[0].grid[0]
    cuda_kernels.reset()
    cuda_kernels.configure(multiprocessors=132, seed=1)
    found = forward(torch.float16, **sizes)
    assert cuda_kernels.launches()[0].grid[0] == grid and grid % splits == 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# Queries of a tile, by head dimension. All sizes of a test make whole sectors.
QUERY_TILE = {32: 128, 64: 128, 128: 128, 256: 64}


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
def test_backward_traffic(dtype, cuda_kernels):
    """Nothing but operands is read, gradients are written once, and no access meets a bank conflict."""
    query, key, value = (tokens(2, n, 1, 256, dtype, seed).requires_grad_() for seed, n in enumerate((152, 200, 200)))
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
