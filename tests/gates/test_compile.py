"""torch.compile, torch.export and AOTInductor, on calls whose sizes change."""

import pytest
import torch
from support.gates import compilers as gates
from support.samples import each_covering, each_tagged


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@each_covering
def test_compile_recompiles_once_per_change(sample):
    gates.recompiles_once_per_change(sample)


@each_covering
def test_compile_dynamic_never_recompiles(sample):
    gates.dynamic_never_recompiles(sample)


@each_tagged("deploy")
def test_compile_inductor(sample):
    compiled = torch.compile(sample.function, fullgraph=True, dynamic=True)
    for call in gates.calls(sample)[:2]:
        gates.check_same(compiled, sample, call)


@each_covering
def test_export(sample):
    gates.exports(sample)


@each_tagged("deploy")
def test_aot_inductor(sample, tmp_path):
    # AOTInductor takes no integers as inputs: the largest bounds stay fixed.
    module, program = gates.export(sample, gates.calls(sample)[-1], with_sizes=False)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "sample.pt2"))
    gates.check_exported(torch._inductor.aoti_load_package(package), module, sample)
