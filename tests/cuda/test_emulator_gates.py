"""The gates of the sample table, passed by CUDA kernels: the emulator runs them on CPU tensors."""

import random
import warnings

import pytest
import torch
import vitkernels as vk
from support import fuzz_worker, samples
from support.calls import differentiate, in_float64
from support.devices import DTYPES, FUNCTIONS, WITHOUT_TF32, is_taken
from support.emulation import needs_emulator
from support.error_policy import check_sample, largest_error
from support.gates import autocast, compilers, errors, registration
from support.gates import layout as layout_gates
from support.gates.gradcheck import gradients_match_differences
from support.hostile import check_head_map_out_of_range
from vitkernels import reference

pytestmark = needs_emulator

EVERY_DTYPE = tuple(name for name, dtypes in FUNCTIONS.items() if dtypes == DTYPES)
SOME_DTYPES = tuple(name for name in FUNCTIONS if name not in EVERY_DTYPE)


def chosen(rows, tag=None, functions=tuple(FUNCTIONS)):
    found = [s for s in rows if is_taken(s) and s.operator in functions and (tag is None or tag in s.tags)]
    assert found
    return found


def each(rows, tag=None, functions=EVERY_DTYPE):
    return pytest.mark.parametrize("sample", chosen(rows, tag, functions), ids=str)


def dtypes_of(sample):
    return FUNCTIONS[sample.operator]


def last_dtype_of(sample):
    return dtypes_of(sample)[-1:]


def each_sized(calls, dtypes_of=dtypes_of, is_spared=lambda sample, dtype: False, short=None):
    """Samples with the sizes to take, ``None`` for their own, and a dtype.

    Every sample at its own sizes is too much for an interpreter: those that are missing, or spared in a dtype, wait for
    ``make emulate-all``; those that are not ``short``, if that is given, for ``make test-all``.
    """
    taken = [
        (s, dtype, sizes)
        for s, sizes in calls
        for dtype in dtypes_of(s)
        if sizes is not None or not is_spared(s, dtype)
    ]
    present = {(str(s), dtype) for s, dtype, sizes in taken if sizes is None}
    all_calls = [(s, dtype, None) for s in chosen(samples.SAMPLES) for dtype in dtypes_of(s)]
    rest = [call for call in all_calls if (str(call[0]), call[1]) not in present]
    long = [] if short is None else [call for call in taken if call[0] not in short]
    found = [
        pytest.param(
            *call, id=f"{call[0]}-{str(call[1]).removeprefix('torch.')}{'-small' if call[2] else ''}", marks=marks
        )
        for group, marks in (
            ([call for call in taken if call not in long], ()),
            (long, pytest.mark.full),
            (rest, pytest.mark.emulate_all),
        )
        for call in group
    ]
    return pytest.mark.parametrize(("sample", "dtype", "sizes"), found)


def some_tiles(sample):
    most = 1000 if "few" in sample.id else 150
    kept = "co"  # products of other sizes
    return {letter: n if letter in kept else min(n, 2 if letter == "b" else most) for letter, n in sample.sizes.items()}


CORE = chosen(samples.SAMPLES, tag="core")
COVERING = chosen(samples.COVERING)
FEW = [s for s in CORE if s.id.startswith("few")]  # the other side is split
DIMS = ("dims-1-1", "dims-16-130", "dims-33-300", "dims-64-64", "dims-80-7", "dims-111-111", "dims-256-256")
FEW_QUERIES = ("tokens-1-801", "lowest-rows-few-queries")
# Rows of many tiles, which most of the time would go to: as many as it takes, with a last one that is not full.
SOME_TILES = {
    "causal-long": {"b": 1, "q": 330, "k": 330}, "bias-table": {"b": 2}, "bias-grouped-long": {"k": 330},
    "key-bias-long": {"k": 330}, "query-weight-long": {"q": 250}, "column-sums": {"b": 1}, "all-terms": {"k": 203},
}  # fmt: skip


def sizes_of(sample):
    return {**sample.sizes, **SOME_TILES[sample.id]} if sample.id in SOME_TILES else None


# At their own sizes those that cover every argument, every tile size, and few queries for many keys; all at small ones.
REFERENCE = [
    *(
        (s, sizes_of(s))
        for s in chosen(samples.SAMPLES)
        if s.operator not in SOME_DTYPES or "core" in s.tags or s.id in (*DIMS, *FEW_QUERIES)
    ),
    *((s, s.small()) for s in chosen(samples.SMALL_SAMPLES, functions=SOME_DTYPES)),
]


def is_as_bfloat16(sample, dtype):
    """float16 has other instructions, not other paths: it is spared all sizes but those of the tiles."""
    return dtype == torch.float16 and sample.operator in SOME_DTYPES and sample.id not in DIMS


def gates(*functions):
    return pytest.mark.parametrize("gate", functions, ids=lambda f: f.__name__)


def test_functions_have_kernels(emulator):
    """Every operator with CUDA kernels is behind a function above, or has some for windows (test_emulator_windows)."""
    names = {f"vitkernels::{name}{suffix}" for name in FUNCTIONS for suffix in ("", "_backward")}
    of_windows = {"vitkernels::spatial_attention", "vitkernels::spatial_attention_backward"}
    assert set(emulator.operators) == names | of_windows


def launches_expected(sample):
    owners = {
        "attention_transposed": "bqhk", "spatial_attention": "bhzyx", "linear_attention": "bh",
        "linear_attention_varlen": "nh", "channel_attention": "bh", "decayed_linear_attention": "bh",
        "long_conv": "bc", "spectral_gating": "bc",
    }.get(sample.operator, "bqht")  # fmt: skip
    return all(n > 0 for letter, n in sample.sizes.items() if letter in owners)


@each_sized(REFERENCE, is_spared=is_as_bfloat16)
def test_reference_gate(sample, dtype, sizes, cuda_kernels):
    check_sample(sample, dtype, sizes=sizes)
    assert bool(cuda_kernels.launches()) == launches_expected(sample)


@each(samples.SMALL_SAMPLES, functions=SOME_DTYPES)
def test_float32_gate(sample, cuda_kernels):
    """The gates that need no float64."""
    autocast.casts_the_data_alone(sample)
    if "core" in sample.tags:
        registration.opcheck(sample)
        layout_gates.expanded_gradients(sample, sizes=sample.small())


PLAIN = [s for s in CORE if s.operator in SOME_DTYPES and s.id == "plain"]


@pytest.mark.parametrize("sample", PLAIN, ids=str)
def test_attention_takes_no_float64(sample, cuda_kernels):
    data = "x" if "x" in sample.call(torch.float64) else "query"
    takes = f"{sample.operator}: {data} is float64, takes float32, bfloat16 or float16 on a GPU"
    with pytest.raises(RuntimeError, match=takes):
        sample.function(**sample.call(torch.float64))
    assert not cuda_kernels.launches()


@pytest.mark.parametrize("sample", [s for s in PLAIN if s.operator not in WITHOUT_TF32], ids=str)
def test_tf32_where_it_is_allowed(sample, precision, cuda_kernels):
    call = sample.call(torch.float32)
    truth = differentiate(sample.reference, in_float64(call))
    exact = differentiate(sample.function, call)
    precision("high")
    rounded = differentiate(sample.function, call)
    for found, close, true in zip(*(a + b for a, b in (rounded, exact, truth)), strict=True):
        error = largest_error(found, true)
        assert 8 * largest_error(close, true) < error < 4 * TF32 * true.abs().max()


# Eleven significant bits; an operand is half a unit off, and its product with another one a unit.
TF32 = 2.0**-10


def test_operands_at_the_end_of_the_range(cuda_kernels):
    """What cannot be split: infinities, and numbers that would round to one."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.rand(1, n, 1, 8, generator=generator) + 0.5 for n in (5, 7, 7))
    key[:, 1] = -torch.inf  # absent
    value[:, 2, :, 3], value[:, 4, :, 4] = torch.inf, torch.finfo(torch.float32).max
    value[:, 5, :, 5] = torch.nan
    found, expected = (f(query, key, value) for f in (vk.attention, reference.attention))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0.0, equal_nan=True)
    assert found[..., 3].isinf().all() and found[..., 4].isfinite().all() and found[..., 5].isnan().all()


def test_attention_takes_grids_of_32_bits(cuda_kernels):
    q = torch.zeros(0, 2**30 + 1, 1, 8, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="attention: query has 1073741825 tokens on a grid with offsets beyond 32"):
        vk.attention(q, q, q, bias_table=torch.zeros(1, 1).expand(1, 2**31 + 1))
    assert not cuda_kernels.launches()


def test_head_map_out_of_range_is_an_absent_kv_head(cuda_kernels):
    check_head_map_out_of_range()


@gates(
    gradients_match_differences, registration.opcheck, autocast.casts_the_data_alone,
    autocast.float64_stays, layout_gates.expanded_gradients,
)  # fmt: skip
@each(samples.SMALL_SAMPLES)
def test_gate(gate, sample, cuda_kernels):
    gate(sample)
    assert bool(cuda_kernels.launches()) == launches_expected(sample)


@gates(registration.second_derivatives_raise, registration.unused_outputs_cost_nothing)
@each(samples.SMALL_SAMPLES, tag="core")
def test_core_gate(gate, sample, cuda_kernels):
    gate(sample)
    assert cuda_kernels.launches()


def of_compilers():
    """A gate and a sample; those with most to emulate, for which the compiler does nothing else, are for later."""
    for gate in (
        registration.opcheck_traced, compilers.recompiles_once_per_change, compilers.dynamic_never_recompiles,
        compilers.exports,
    ):  # fmt: skip
        for sample in chosen(samples.SMALL_SAMPLES, tag="deploy"):
            is_long = (sample.id == "additional" and gate is not registration.opcheck_traced) or (
                sample.id == "windows-shifted" and gate not in (registration.opcheck_traced, compilers.exports)
            )
            marks = pytest.mark.full if is_long else ()
            yield pytest.param(gate, sample, id=f"{gate.__name__}-{sample}", marks=marks)


@pytest.mark.parametrize(("gate", "sample"), of_compilers())
def test_compiler_gate(gate, sample, cuda_kernels):
    torch._dynamo.reset()
    gate(sample)
    torch._dynamo.reset()
    assert cuda_kernels.launches()


@each_sized([(s, s.small() if s.operator in SOME_DTYPES else None) for s in CORE], lambda sample: [torch.bfloat16])
def test_layout_gate(sample, dtype, sizes, cuda_kernels):
    layout_gates.strides_and_padding(sample, dtype, sizes=sizes)


@errors.each_error([row for row in errors.ERRORS if row[0].__name__ in FUNCTIONS])
def test_errors_gate(function, call, text, cuda_kernels):
    errors.check_text(function, call, text)
    assert not cuda_kernels.launches()


@pytest.mark.parametrize(
    ("rows", "dtypes"),
    [
        pytest.param(COVERING, slice(-1, None), id="short"),
        pytest.param(samples.SMALL_SAMPLES, slice(None), id="all", marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize(("name", "bad", "good"), [("merge_attentions", 400, 40), *((f, 60, 4) for f in SOME_DTYPES)])
def test_fuzz_gate(name, bad, good, rows, dtypes, cuda_kernels, monkeypatch):
    fuzz = fuzz_worker
    monkeypatch.setattr(fuzz, "SMALL_SAMPLES", chosen(rows, functions=(name,)))
    monkeypatch.setattr(fuzz, "CALL_DTYPES", FUNCTIONS[name][dtypes])
    # Indices are not read on the host.
    monkeypatch.setattr(fuzz, "SPOIL", [s for s in fuzz.SPOIL if s is not fuzz.spoil_index])
    generator = random.Random(20261121)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, short = fuzz.short_calls(generator)
        _, wrong = fuzz.bad_calls(generator, bad)
        wrong += short + fuzz.good_calls(generator, good)
    assert not wrong, "\n".join(wrong[:20])


def test_number_of_parts_is_limited(cuda_kernels):
    out, lse = torch.zeros(1, 2, 1, 3), torch.zeros(1, 2, 1)
    merged, _ = vk.merge_attentions([out + 1] * 64, [lse] * 64)
    assert torch.equal(merged, out + 1)
    with pytest.raises(RuntimeError, match="vitkernels::merge_attentions: outs has 65 tensors, takes at most 64"):
        vk.merge_attentions([out] * 65, [lse] * 65)


@each_sized(
    [(s, some_tiles(s)) for s in CORE], last_dtype_of, short=[*COVERING, *(s for s in CORE if s.id.startswith("few"))]
)
def test_same_bits_in_any_order_of_warps(sample, dtype, sizes, cuda_kernels):
    call = sample.call(dtype, sizes=sizes)
    expected = differentiate(sample.function, call)
    for seed in (1, 2):
        cuda_kernels.configure(seed=seed)
        found = differentiate(sample.function, call)
        for a, b in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
            assert torch.equal(a, b), seed
