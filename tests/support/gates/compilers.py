"""torch.compile, torch.export and AOTInductor, on calls whose sizes change."""

import torch
from support.calls import differentiate, outputs_of, replace, tensors
from support.devices import HALF, dtype_of
from torch.export import Dim
from torch.utils import _pytree as pytree

# From sizes that no two dimensions have in common: the compiler would take them to be equal for ever.
GROWTH = (12, 13, 14, 15)
DTYPE = torch.float32


def calls(sample):
    return [sample.call(dtype_of(sample, DTYPE), sizes=sample.small(grown)) for grown in GROWTH]


def check_close(found, expected):
    tolerance = {} if found.dtype in HALF else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found, expected, **tolerance)


def check_same(compiled, sample, call):
    for found, expected in zip(
        pytree.tree_leaves(differentiate(compiled, call)),
        pytree.tree_leaves(differentiate(sample.function, call)),
        strict=True,
    ):
        check_close(found, expected)


def first_changes(grown):
    """The calls at which a size differs for the first time: all of them the second, unless a table grows in steps."""
    of_calls = [
        [size for a in pytree.tree_leaves(call) for size in (a.shape if isinstance(a, torch.Tensor) else [a])]
        for call in grown
    ]
    sizes = zip(*of_calls, strict=True)
    return {next(i for i, size in enumerate(of_size) if size != of_size[0]) for of_size in sizes if len({*of_size}) > 1}


def recompiles_once_per_change(sample):
    # Until a size changes, the compiler takes it for a constant; from then on it is variable.
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(sample.function, fullgraph=True, backend="aot_eager")
    grown = calls(sample)
    for call in grown:
        check_same(compiled, sample, call)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 1 + len(first_changes(grown))


def dynamic_never_recompiles(sample):
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(sample.function, fullgraph=True, backend="aot_eager", dynamic=True)
        for call in calls(sample):
            check_same(compiled, sample, call)


class Module(torch.nn.Module):
    """A function with a call's tensors, and sizes if wanted, as the module's inputs, and what is left fixed."""

    def __init__(self, function, call, with_sizes):
        super().__init__()
        self.function = function
        variable = [n for n, a in call.items() if tensors(a) or (with_sizes and type(a) is int)]
        self.options = {name: a for name, a in call.items() if name not in variable}

    def forward(self, inputs):
        return self.function(**inputs, **self.options)

    def inputs(self, call):
        return replace({name: a for name, a in call.items() if name not in self.options}, torch.clone)


def export(sample, call, with_sizes):
    module = Module(sample.function, call, with_sizes)
    inputs = module.inputs(call)
    shapes = pytree.tree_map(dynamic, inputs)
    return module, torch.export.export(module, (inputs,), dynamic_shapes={"inputs": shapes})


def dynamic(argument):
    """Every size may change, one that is an argument as well."""
    return dict.fromkeys(range(argument.dim()), Dim.AUTO) if isinstance(argument, torch.Tensor) else Dim.DYNAMIC


def check_exported(run, module, sample):
    with torch.no_grad():
        for call in calls(sample):
            found = outputs_of(run(module.inputs(call)))
            for a, b in zip(found, outputs_of(sample.function(**call)), strict=True):
                check_close(a, b)


def exports(sample):
    module, program = export(sample, calls(sample)[0], with_sizes=True)
    assert any(node.target.namespace == "vitkernels" for node in program.graph.nodes if is_operator(node))
    check_exported(program.module(), module, sample)


def is_operator(node):
    return isinstance(node.target, torch._ops.OpOverload)
