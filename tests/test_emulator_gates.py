"""The gates of the sample table, passed by CUDA kernels: the emulator runs them on CPU tensors."""

import random
import warnings

import fuzz_worker
import pytest
import samples
import test_autocast
import test_compile
import test_errors
import test_gradcheck
import test_layout
import test_reference
import test_registration
import torch
import vitkernels as vk
from calls import differentiate
from emulation import needs_emulator
from error_policy import FLOOR
from layouts import LAYOUTS

pytestmark = needs_emulator

# The functions of the table that have CUDA kernels.
FUNCTIONS = ("merge_attentions",)


def each(rows, tag=None):
    chosen = [s for s in rows if s.operator in FUNCTIONS and (tag is None or tag in s.tags)]
    assert chosen
    return pytest.mark.parametrize("sample", chosen, ids=str)


def gates(*functions):
    return pytest.mark.parametrize("gate", functions, ids=lambda f: f.__name__.removeprefix("test_"))


def test_functions_have_kernels(emulator):
    """Every operator with CUDA kernels is behind a function above."""
    names = {f"vitkernels::{name}{suffix}" for name in FUNCTIONS for suffix in ("", "_backward")}
    assert set(emulator.operators) == names


def launches_expected(sample):
    return all(n > 0 for letter, n in sample.sizes.items() if letter in "bqh")


@pytest.mark.parametrize("dtype", FLOOR, ids=lambda dtype: str(dtype).removeprefix("torch."))
@each(samples.SAMPLES)
def test_reference_gate(sample, dtype, cuda_kernels):
    test_reference.test_error_policy(sample, dtype)
    assert bool(cuda_kernels.launches()) == launches_expected(sample)


@gates(
    test_gradcheck.test_gradcheck, test_registration.test_opcheck, test_autocast.test_casts_the_data_alone,
    test_autocast.test_float64_stays, test_layout.test_expanded_gradients,
)  # fmt: skip
@each(samples.SMALL_SAMPLES)
def test_gate(gate, sample, cuda_kernels):
    gate(sample)
    assert bool(cuda_kernels.launches()) == launches_expected(sample)


@gates(
    test_registration.test_opcheck_traced, test_registration.test_second_derivatives_raise,
    test_registration.test_unused_outputs_cost_nothing, test_compile.test_compile_recompiles_at_most_once,
    test_compile.test_compile_dynamic_never_recompiles, test_compile.test_export,
)  # fmt: skip
@each(samples.SMALL_SAMPLES, tag="core")
def test_core_gate(gate, sample, cuda_kernels):
    torch._dynamo.reset()
    gate(sample)
    torch._dynamo.reset()
    assert cuda_kernels.launches()


@pytest.mark.parametrize("layout", LAYOUTS)
@each(samples.SAMPLES, tag="core")
def test_layout_gate(sample, layout, cuda_kernels):
    test_layout.test_strides_and_padding(sample, torch.bfloat16, layout)


@pytest.mark.parametrize(
    ("function", "call", "text"), [row for row in test_errors.ERRORS if row[0].__name__ in FUNCTIONS]
)
def test_errors_gate(function, call, text, cuda_kernels):
    test_errors.test_text(function, call, text)
    assert not cuda_kernels.launches()


def test_fuzz_gate(cuda_kernels, monkeypatch):
    monkeypatch.setattr(fuzz_worker, "SMALL_SAMPLES", [s for s in samples.SMALL_SAMPLES if s.operator in FUNCTIONS])
    generator = random.Random(20261121)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, wrong = fuzz_worker.bad_calls(generator, 400)
        wrong += fuzz_worker.good_calls(generator, 40)
    assert not wrong, "\n".join(wrong[:20])


def test_number_of_parts_is_limited(cuda_kernels):
    out, lse = torch.zeros(1, 2, 1, 3), torch.zeros(1, 2, 1)
    merged, _ = vk.merge_attentions([out + 1] * 64, [lse] * 64)
    assert torch.equal(merged, out + 1)
    with pytest.raises(RuntimeError, match="vitkernels::merge_attentions: outs has 65 tensors, takes at most 64"):
        vk.merge_attentions([out] * 65, [lse] * 65)


@pytest.mark.parametrize("seed", range(5))
@each(samples.SAMPLES, tag="core")
def test_same_bits_in_any_order_of_warps(sample, seed, cuda_kernels):
    call = sample.call(torch.float32)
    expected = differentiate(sample.function, call)
    cuda_kernels.configure(seed=seed + 1)
    found = differentiate(sample.function, call)
    for a, b in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
        assert torch.equal(a, b)
