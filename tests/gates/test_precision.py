"""How exact attention is: float32 follows PyTorch's setting of TF32, bfloat16 rounds no statistics."""

import pytest
import torch
import vitkernels as vk
from support.calls import Recorder, differentiate
from support.samples import SAMPLES

WITHOUT_TF32 = ("merge_attentions", "linear_attention", "linear_attention_varlen", "long_conv", "spectral_gating")
# The first sample of each operator whose products a GPU may round.
FIRST = {s.operator: s for s in reversed(SAMPLES) if s.operator not in WITHOUT_TF32}
each_operator = pytest.mark.parametrize("sample", FIRST.values(), ids=str)


def flag(op, args):
    return args[[a.name for a in op._schema.arguments].index("allow_tf32")]


def flags(function, call):
    """``allow_tf32`` of each operator that forward and backward call."""
    with Recorder() as recorder:
        differentiate(function, call)
    return [flag(op, args) for op, args in recorder.calls]


@each_operator
def test_operators_take_the_setting(sample, precision):
    for setting, allowed in (("highest", False), ("high", True), ("medium", True)):
        precision(setting)
        assert flags(sample.function, sample.call(torch.float32, sizes=sample.small())) == [allowed] * 2
        for dtype in (torch.float64, torch.bfloat16, torch.float16):
            assert flags(sample.function, sample.call(dtype, sizes=sample.small())) == [False] * 2


@each_operator
def test_setting_of_the_backend_counts(sample):
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert flags(sample.function, sample.call(torch.float32, sizes=sample.small())) == [True] * 2
    finally:
        matmul.fp32_precision = before


@each_operator
def test_compiled_code_follows_the_setting(sample, precision):
    run = []

    def backend(graph, inputs):
        allowed = [flag(n.target, n.args) for n in graph.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
        return lambda *args: run.append(allowed) or graph(*args)

    torch._dynamo.reset()
    compiled = torch.compile(sample.function, fullgraph=True, backend=backend)
    call = sample.call(torch.float32, sizes=sample.small())
    for setting in ("highest", "high", "highest"):
        precision(setting)
        compiled(**call)
    torch._dynamo.reset()
    assert run == [[False], [True], [False]]


@pytest.mark.parametrize("strict", [False, True])
@each_operator
def test_exported_code_keeps_the_setting(sample, strict, precision):
    class Module(torch.nn.Module):
        def forward(self, inputs):
            return sample.function(**inputs, **options)

    precision("high")
    call = sample.call(torch.float32, sizes=sample.small())
    inputs = {name: a.detach() for name, a in call.items() if isinstance(a, torch.Tensor)}
    options = {name: a for name, a in call.items() if name not in inputs}
    program = torch.export.export(Module(), (inputs,), strict=strict)
    precision("highest")
    with Recorder() as recorder:
        program.module()(inputs)
    assert [flag(op, args) for op, args in recorder.calls] == [True]


@pytest.mark.parametrize("name", ["attention", "window_attention"])
def test_lse_of_bfloat16(name):
    """Products of bfloat16 are exact and their sums are float32: so is an LSE, whatever probabilities round to."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 14, 14, 2, 32, generator=generator).to(torch.bfloat16)

    def lse(*qkv):
        if name == "attention":
            return vk.attention(*(t.flatten(1, 2) for t in qkv), return_lse=True)[1]
        return vk.window_attention(*qkv, 7, return_lse=True)[1]

    expected = lse(q.double(), k.double(), v.double())
    torch.testing.assert_close(lse(q, k, v).double(), expected, rtol=0, atol=2e-5)
