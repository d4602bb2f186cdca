"""Which keys a query sees: pattern.h, its twin in Python, and the words of those who invented the patterns."""

import random

import pytest
import torch
import vitkernels as vk
from support import pattern
from support.calls import differentiate
from support.emulation import needs_emulator
from vitkernels.reference.pattern import axis_pattern

needs_compiler = pytest.mark.skipif(pattern.compiler() is None, reason="no C++ compiler was found")


def any_axis(rng, nq, nk):
    """Any rule that fits the axis."""
    step = rng.choice([1, 1, 2, 3])
    step = min(step, nq, nk)
    causal = rng.random() < 0.3
    size, kernel = rng.randint(1, nq + 2), rng.randint(1, nk // step)
    keys = size * nk // nq if size * nk % nq == 0 and nk >= nq else size
    return rng.choice(
        [
            vk.Full(step, causal),
            vk.Block(size, rng.randrange(size), keys, step, causal),
            vk.Halo(size, rng.randint(0, 4), keys, rng.randrange(size), step, causal),
            vk.Neighborhood(kernel, rng.randint(1, kernel), step, causal),
            vk.Sliding(rng.randint(1, nk + 2), step, causal),
        ]
    )


def any_geometry(rng):
    nq, nk = rng.randint(1, 24), rng.randint(1, 24)
    if rng.random() < 0.6:
        nk = nq
    return any_axis(rng, nq, nk), nq, nk, rng.random() < 0.4


@needs_compiler
def test_twin_is_pattern_h():
    rng = random.Random(0)
    for _ in range(4000):
        axis, nq, nk, has_outside = any_geometry(rng)
        found = axis_pattern(axis, nq, nk, has_outside)
        for u, keys in enumerate(pattern.visible(axis, nq, nk, has_outside)):
            mine = (found.visible[u].nonzero().flatten() + found.first).tolist()
            assert mine == list(keys), (axis, nq, nk, has_outside, u)
        step = axis.encoded()[1]
        place = found.offset[:, 0] + torch.tensor(found.first).div(step, rounding_mode="floor")
        assert torch.equal(place, pattern.keys_of_queries(axis, nq, nk, has_outside)[:, 2]), (axis, nq, nk)


@needs_compiler
def test_queries_of_a_key_invert_the_keys_of_a_query():
    rng = random.Random(1)
    for _ in range(4000):
        axis, nq, nk, has_outside = any_geometry(rng)
        step = axis.encoded()[1]
        seen_by = [set() for _ in range(nk)]
        for u, keys in enumerate(pattern.visible(axis, nq, nk, has_outside)):
            for v in keys:
                if 0 <= v < nk:
                    seen_by[v].add(u)
        for v, (begin, end) in enumerate(pattern.queries_of_keys(axis, nq, nk, has_outside).tolist()):
            found = {u * step + v % step for u in range(begin, end)}
            assert found == seen_by[v], (axis, nq, nk, has_outside, v)


@needs_compiler
@needs_emulator
def test_device_is_the_host(emulator):
    rng = random.Random(0)
    axes = [any_geometry(rng) for _ in range(4000)]
    encoded = torch.tensor([[*axis.encoded(), *counts] for axis, *counts in axes])
    on_host = [ask(*axis).flatten() for axis in axes for ask in (pattern.keys_of_queries, pattern.queries_of_keys)]
    on_device = torch.zeros(sum(map(len, on_host)), dtype=torch.int64)
    emulator.compute("pattern", encoded, on_device, len(axes))
    of_axes = on_device.split([len(a) + len(b) for a, b in zip(on_host[::2], on_host[1::2], strict=True)])
    for axis, found, *expected in zip(axes, of_axes, on_host[::2], on_host[1::2], strict=True):
        assert torch.equal(found, torch.cat(expected)), axis


def natten_neighborhood(u, n, kernel, stride, dilation, is_causal):
    """The keys of query ``u``, in NATTEN's terms: a window around a centre, which its stride group shares."""
    residue, i = u % dilation, u // dilation
    length = (n - residue + dilation - 1) // dilation
    group = i // stride * stride
    keys = range(length)
    if is_causal:
        leader = min(group + stride - 1, length - 1)
        seen = [j for j in keys if 0 <= leader - j < kernel and j <= i]
    else:
        leader = min(group + stride // 2, length - 1)
        left, right = kernel // 2, (kernel - 1) // 2
        centre = min(max(leader, left), length - 1 - right)
        seen = [j for j in keys if centre - left <= j <= centre + right]
    return [j * dilation + residue for j in seen]


def natten_geometries(count, seed):
    rng = random.Random(seed)
    for _ in range(count):
        n = rng.randint(1, 30)
        dilation = rng.randint(1, max(n // 2, 1))
        kernel = rng.randint(1, n // dilation)
        yield n, kernel, rng.randint(1, kernel), dilation, rng.random() < 0.4


def test_neighborhoods_are_nattens():
    for n, *rule in natten_geometries(2000, 0):
        visible = axis_pattern(vk.Neighborhood(*rule), n, n, False).visible
        for u in range(n):
            assert visible[u].nonzero().flatten().tolist() == natten_neighborhood(u, n, *rule), (n, *rule, u)


def test_neighborhoods_are_nattens_own():
    natten = pytest.importorskip("natten")
    generator = torch.Generator().manual_seed(0)
    for n, kernel, stride, dilation, is_causal in natten_geometries(40, 1):
        if kernel in (1, n):  # not its neighborhood kernels
            continue
        q, k, v = (torch.randn(1, n, 2, 8, generator=generator) for _ in range(3))
        expected = natten.functional.na1d(q, k, v, kernel, stride, dilation, is_causal, backend="flex-fna")
        found = vk.reference.spatial_attention(q, k, v, [vk.Neighborhood(kernel, stride, dilation, is_causal)])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def swin_mask(n, window, shift):
    """Pairs that roll, window partition and region mask leave to one another, on an axis that the window divides."""
    rolled = torch.arange(n).roll(-shift)
    region = torch.zeros(n, dtype=torch.int64)
    region[n - window : n - shift], region[n - shift :] = 1, 2
    if shift == 0:
        region.zero_()
    place = torch.arange(n) // window
    same = (place[:, None] == place) & (region[:, None] == region)
    visible = torch.zeros(n, n, dtype=torch.bool)
    visible[rolled[:, None], rolled] = same
    return visible


@pytest.mark.parametrize(("window", "count"), [(1, 5), (2, 3), (3, 4), (7, 2), (7, 8), (8, 1)])
def test_shifted_blocks_are_swins(window, count):
    n = window * count
    for shift in range(window):
        found = axis_pattern(vk.Block(window, shift), n, n, False).visible
        assert torch.equal(found, swin_mask(n, window, shift)), (n, window, shift)


def test_thousands_of_geometries():
    """Maps of any shape under any rules, with tables: the operator against its definition."""
    rng = random.Random(2)
    generator = torch.Generator().manual_seed(2)
    for _ in range(1500):
        axes, query_map, key_map, has_outside = [], [], [], rng.random() < 0.3
        for _ in range(rng.choice([1, 2, 2, 3])):
            nq = rng.randint(1, 7)
            nk = rng.randint(1, 7) if rng.random() < 0.3 else nq
            axes.append(any_axis(rng, nq, nk))
            query_map.append(nq)
            key_map.append(nk)
        patterns = [axis_pattern(a, nq, nk, has_outside) for a, nq, nk in zip(axes, query_map, key_map, strict=True)]
        offsets = [2 * int(p.offset[p.visible].abs().max() if p.visible.any() else 0) + 1 for p in patterns]

        def randn(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        call = {
            "query": randn(1, *query_map, 2, 3), "key": randn(1, *key_map, 2, 3), "value": randn(1, *key_map, 2, 2),
            "axes": axes, "outside": (randn(2, 3), randn(2, 2)) if has_outside else None,
            "bias_table": randn(2, *offsets) if rng.random() < 0.5 else None,
            "radius": rng.uniform(0.5, 5.0) if rng.random() < 0.2 else None, "return_lse": True,
        }  # fmt: skip
        call |= {name: call[name].requires_grad_() for name in ("query", "key", "value")}
        found, expected = (differentiate(f, call) for f in (vk.spatial_attention, vk.reference.spatial_attention))
        for mine, wanted in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-9, msg=lambda m: f"{m}\n{call}")  # noqa: B023
