"""Calls every operator thousands of times with arguments that it must refuse; ``test_fuzz`` runs this.

The calls come from the samples: the functions, and the operators that these call, backward included. One argument is
spoiled in a way that is certainly wrong. A call that is accepted, or refused with an error that does not name the
operator, is reported; a crash ends the process.

    python -m support.fuzz_worker BAD_CALLS GOOD_CALLS SEED
"""

from __future__ import annotations

import inspect
import json
import math
import random
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from support.calls import Call, differentiate, operator_calls, replace, statistics_dtype
from support.devices import DEVICE, ON_CPU, why_not
from support.layouts import LAYOUTS
from support.samples import SMALL_SAMPLES, Sample
from support.samples_spatial import Table
from torch import Tensor
from torch.utils import _pytree as pytree

# No two dimensions have equal lengths by chance (heads are at most 4): equal lengths are lengths that must agree.
SIZES = {"b": 5, "q": 11, "k": 13, "d": 17, "v": 19, "a": 23, "n": 6, "t": 29, "u": 31, "z": 2, "y": 9, "x": 8}
# Of linear attention by a state; SIZES are those of its quadratic form.
MANY = {"q": 37, "k": 41}
CALL_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DTYPES = [
    *CALL_DTYPES, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64,
    torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


class Target(NamedTuple):
    """A function or an operator, and its declaration: the type of each argument, as text."""

    name: str
    function: Callable[..., Any]
    is_operator: bool
    types: dict[str, str]
    required: frozenset[str]
    loose: tuple[str, ...]
    """Arguments that are longer in this call than they need to be."""


class Slot(NamedTuple):
    """A tensor argument of a call, or an element of a list argument."""

    argument: str
    index: int | None
    tensor: Tensor


class NotApplicable(Exception):
    """The call has no argument that can be spoiled this way."""


def as_list(argument: Any) -> list[Any]:
    return argument if isinstance(argument, list) else [argument]


def is_wider(made: Any) -> bool:
    return isinstance(made, Table) and made.wider > 0


@cache
def targets(sample: Sample, dtype: torch.dtype) -> list[tuple[Target, Call]]:
    sizes = {a: SIZES.get(a, n) if n else 0 for a, n in sample.sizes.items()}
    if sample.operator == "linear_attention" and len(sample.id) % 2:  # half of the samples, about
        sizes |= {a: n for a, n in MANY.items() if sizes.get(a)}
    call = sample.call(dtype, sizes=sizes)
    parameters = inspect.signature(sample.function).parameters
    types = {p.name: str(p.annotation) for p in parameters.values()}
    required = frozenset(p.name for p in parameters.values() if p.default is p.empty)
    loose = tuple(name for name, made in sample.arguments.items() if any(map(is_wider, as_list(made))))
    found = [(Target(sample.operator, sample.function, False, types, required, loose), call)]
    for op, args in operator_calls(sample.function, call):
        declared = op._schema.arguments
        types = {a.name: str(a.type) for a in declared}
        required = frozenset(a.name for a in declared if not str(a.type).startswith("Optional"))
        target = Target(op._schema.name, op, True, types, required, loose)
        found.append((target, dict(zip(types, args, strict=True))))
    return found


def slots(call: Call) -> list[Slot]:
    found = []
    for name, argument in call.items():
        if isinstance(argument, Tensor):
            found.append(Slot(name, None, argument))
        elif isinstance(argument, list):
            found += [Slot(name, i, t) for i, t in enumerate(argument) if isinstance(t, Tensor)]
    return found


def choose(rng: random.Random, items: list[Any]) -> Any:
    if not items:
        raise NotApplicable
    return rng.choice(items)


def put(call: Call, slot: Slot, value: Any) -> Call:
    if slot.index is None:
        return {**call, slot.argument: value}
    members = list(call[slot.argument])
    members[slot.index] = value
    return {**call, slot.argument: members}


def is_data(target: Target, slot: Slot) -> bool:
    """Whether a tensor is read as it is given: others are converted, and may broadcast."""
    return slot.argument in target.required and (target.is_operator or slot.argument != "decay")


def spoil_rank(rng: random.Random, target: Target, call: Call) -> Call:
    slot = rng.choice(slots(call))
    # A tensor of rank 0 broadcasts: wrong only where a tensor is data.
    ranks = [r for r in range(7) if r != slot.tensor.dim() and (r > 0 or is_data(target, slot))]
    used = {n for other in slots(call) for n in other.tensor.shape}  # tensors with these lengths may broadcast
    shape = [rng.choice([n for n in range(2, 9) if n not in used] or [11]) for _ in range(rng.choice(ranks))]
    return put(call, slot, torch.ones(shape, dtype=slot.tensor.dtype, device=DEVICE))


def spoil_length(rng: random.Random, target: Target, call: Call) -> Call:
    slot = rng.choice(slots(call))
    # A size of a table is that of another tensor by chance alone.
    others = {
        n
        for other in slots(call)
        if other.tensor is not slot.tensor and not other.argument.endswith("_table")
        for n in other.tensor.shape
    }
    dims = range(slot.tensor.dim())
    if slot.argument == "query" and target.name.endswith("spatial_attention"):
        dims = [0, *dims[-2:]]  # on a map, there may be any number of queries
    if "groups" in call and slot.argument == "query":
        dims = dims[:-2]  # whose channels may be any number
    if not call.keys().isdisjoint(("w1", "filter", "weight", "region_graph", "key_index")):
        dims = [slot.tensor.dim() + d for d in decided(target, call, slot)]
    dim = choose(rng, [i for i in dims if slot.tensor.size(i) > 1 and slot.tensor.size(i) in others])
    shape = list(slot.tensor.shape)
    shape[dim] = rng.choice([n for n in (0, shape[dim] - 1, shape[dim] + 1) if n != 1])
    return put(call, slot, torch.zeros(shape, dtype=slot.tensor.dtype, device=DEVICE))


def spoil_dtype(rng: random.Random, target: Target, call: Call) -> Call:
    slot = rng.choice(slots(call))
    dtypes = [d for d in DTYPES if d != slot.tensor.dtype]
    if not slot.tensor.is_floating_point():  # indices
        dtypes = [d for d in dtypes if d not in (torch.int64, torch.int32)]
    elif not target.is_operator and not is_data(target, slot):  # converted, if it is floating-point
        dtypes = [d for d in dtypes if not d.is_floating_point]
    if slot.argument == "weight":  # in the precision of the statistics, or of the data
        dtypes = [d for d in dtypes if d not in (call["x"].dtype, statistics_dtype(call["x"].dtype))]
    if len(slots(call)) <= 2:  # with one tensor of data, any floating-point dtype is fine
        dtypes = [d for d in dtypes if d not in CALL_DTYPES]
    return put(call, slot, slot.tensor.detach().to(rng.choice(dtypes)))


def spoil_device(rng: random.Random, target: Target, call: Call) -> Call:
    slot = rng.choice(slots(call))
    return put(call, slot, slot.tensor.detach().to("meta" if ON_CPU else rng.choice(("meta", "cpu"))))


def spoil_layout(rng: random.Random, target: Target, call: Call) -> Call:
    slot = rng.choice(slots(call))
    tensor = slot.tensor.detach()
    ways = [tensor.to_sparse, lambda: torch.nested.nested_tensor([tensor], layout=torch.jagged)]
    if tensor.dtype == torch.float32 and target.is_operator:  # a function may convert it, and PyTorch then refuses
        ways += [tensor.contiguous().to_mkldnn] if ON_CPU else []
        ways.append(lambda: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8))
    if tensor.dim() == 0 or tensor.numel() == 0:
        raise NotApplicable
    return put(call, slot, rng.choice(ways)())


def spoil_type(rng: random.Random, target: Target, call: Call) -> Call:
    """Something other than a tensor. (For a Python function, Python's own error is enough.)"""
    if not target.is_operator:
        raise NotApplicable
    slot = rng.choice(slots(call))
    garbage = ["text", 3, 1.5, object(), [], {}, [slot.tensor], (None,)]
    return put(call, slot, rng.choice(garbage + ([None] if slot.argument in target.required else [])))


def spoil_list(rng: random.Random, target: Target, call: Call) -> Call:
    name = choose(rng, [name for name, argument in call.items() if isinstance(argument, list)])
    members = call[name]
    spoiled = rng.choice([[], members[1:], [*members, members[0]], [[*members]], members[0], [None] * len(members)])
    if rng.random() < 0.2:
        return {n: [] if isinstance(a, list) else a for n, a in call.items()}
    return {**call, name: spoiled}


def spoil_index(rng: random.Random, target: Target, call: Call) -> Call:
    slot = choose(rng, [s for s in slots(call) if not s.tensor.is_floating_point() and s.tensor.numel()])
    tensor = slot.tensor.clone()
    limits = torch.iinfo(tensor.dtype)
    tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice([-1, 100, 2**30, limits.min, limits.max])
    return put(call, slot, tensor)


def spoil_option(rng: random.Random, target: Target, call: Call) -> Call:
    wrong = {"float": [math.nan, math.inf, -math.inf], "Literal": ["l1", "", 2, True], "int": [-1, -(2**63)]}
    if target.is_operator:  # in Python, anything is true or false
        wrong["bool"] = ["yes", [True]]
    name, values = choose(rng, [(n, wrong[kind]) for n, text in target.types.items() for kind in wrong if kind in text])
    return {**call, name: rng.choice(values)}


def spoil_arguments(rng: random.Random, target: Target, call: Call) -> Call:
    if not target.is_operator:
        raise NotApplicable
    if rng.random() < 0.5:
        return {**call, "colour": 1}
    dropped = rng.choice(sorted(target.required))
    return {name: argument for name, argument in call.items() if name != dropped}


def decided(target: Target, call: Call, slot: Slot) -> list[int]:
    """The dimensions of a tensor, counted from the end, whose lengths other arguments determine."""
    name, count, is_backward = slot.argument, slot.tensor.dim(), "grad_out" in call
    free: set[int] = set()
    if any(other.tensor.numel() == 0 for other in slots(call)):
        return []  # nothing is read
    if "w1" in call and not is_backward:  # any rows, and any number of results
        free |= {"x": set(range(-count, -1)), "w2": {-2}}.get(name, set())
        return [d for d in range(-count, 0) if d not in free and slot.tensor.size(d) > 1]
    if "filter" in call:  # any lengths of signals and filters
        channels = -1 if call.get("channels_last") else -2
        if is_backward and name != "filter":
            return [d for d in range(-count, 0) if slot.tensor.size(d) > 1]
        axis = -2 if name == "filter" else channels
        return [axis] if slot.tensor.size(axis) > 1 else []
    if name == "region_graph":  # any number of routes, for all heads or each
        return [d for d in (-4, -2) if slot.tensor.size(d) > 1]
    if name in ("key_index", "query_index"):  # any length of the lists, for all heads or each; of the queries in a row
        are_counted = name == "key_index" and "key_count" in call and call["key_count"] is not None
        free |= {-1} if are_counted else {-3, -1}
        free |= set() if are_counted or "query_index" in call else {-2}
        return [d for d in range(-count, 0) if d not in free and slot.tensor.size(d) > 1]
    if "weight" in call:  # any batch
        free |= {-4} if name == "x" and not is_backward else set()
        return [d for d in range(-count, 0) if d not in free and slot.tensor.size(d) > 1]
    if target.name.endswith("channel_attention") and not is_backward:
        free |= {"query": {-2, -1} if "groups" in call else {-1}, "value": {-3}}.get(name, set())
        return [d for d in range(-count, 0) if d not in free and slot.tensor.size(d) > 1]
    if name == "query" and not is_backward and "value_q" not in call:
        free |= set(range(-3 if "cu_seqlens_q" in call else 1 - count, -2))  # any number of queries, on any map
    if name == "query" and call["key"].size(-2) < slot.tensor.size(-2):
        free.add(-2)  # more or fewer heads per kv head
    if name == "key" and "value_q" in call:
        free |= {-2} if is_backward else {-3, -2}
    if name in ("value", "value_q", "outs") and not is_backward:
        others = {"value": ("outside", "value_fill", "additional_values"), "outs": ("outs",)}.get(name, ())
        if not any(other.argument in others and other.tensor is not slot.tensor for other in slots(call)):
            free.add(-1)
    if any(name.startswith(loose) for loose in target.loose):
        free |= set(range(-count, 0))
    return [d for d in range(-count, 0) if d not in free and slot.tensor.size(d) > 1]


def is_for_all(argument: str) -> bool:
    """Whether the first dimension may be 1: one query for the whole batch, one table for all heads."""
    return argument == "query" or argument.endswith("_table") or argument.startswith("rel_pos")


def shorter(rng: random.Random, call: Call, slot: Slot, dim: int) -> Call:
    length, count = slot.tensor.size(dim), slot.tensor.dim()
    lengths = {0, 1, length // 2, max(length - 2, 0), length - 1}
    # A length of 1 is right for terms that broadcast, a scale and tables of all heads, and a query of the batch.
    is_first = dim == -count and (count > 2 or not slot.argument.startswith("rel_pos"))
    may_be_one = slot.argument in ("scale", "decay") or slot.argument.endswith(("bias", "multiplier", "query_weight"))
    if may_be_one or (is_first and is_for_all(slot.argument)):
        lengths.discard(1)
    shape = list(slot.tensor.shape)
    shape[dim] = rng.choice(sorted(lengths))
    return put(call, slot, torch.zeros(shape, dtype=slot.tensor.dtype, device=DEVICE))


def spoil_short(rng: random.Random, target: Target, call: Call) -> Call:
    """An argument is shorter than another one requires: reading on would read foreign memory."""
    slot = choose(rng, slots(call))
    return shorter(rng, call, slot, choose(rng, decided(target, call, slot)))


SPOIL = [
    spoil_rank, spoil_length, spoil_short, spoil_dtype, spoil_device, spoil_layout, spoil_type, spoil_list, spoil_index,
    spoil_option, spoil_arguments,
]  # fmt: skip
if not ON_CPU:
    SPOIL.remove(spoil_index)  # only kernels read indices


# A function may prepare a tensor with PyTorch's operations, which refuse some dtypes and layouts in their own words.
PYTORCHS_WORDS = re.compile("Expected a floating point or complex|not implemented for '|unsupported for Sparse")


def is_clear(error: Exception, target: Target) -> bool:
    if target.is_operator:
        return target.name in str(error) or target.name.replace("::", ".") in str(error)
    return bool(re.search(r"vitkernels(::|\.)", str(error)) or PYTORCHS_WORDS.search(str(error)))


def describe(call: Call) -> str:
    def text(argument: Any) -> str:
        if isinstance(argument, Tensor):
            return f"{tuple(argument.shape)} {argument.dtype} {argument.device} {argument.layout}"
        return f"[{', '.join(map(text, argument))}]" if isinstance(argument, list) else repr(argument)

    return ", ".join(f"{name}={text(argument)}" for name, argument in call.items())


def any_sample(rng: random.Random) -> tuple[Sample, torch.dtype]:
    """A target of any operator: those with few samples are chosen as often as the others."""
    operator = rng.choice(sorted({s.operator for s in SMALL_SAMPLES if not why_not(s)}))
    sample = rng.choice([s for s in SMALL_SAMPLES if s.operator == operator and not why_not(s)])
    return sample, rng.choice([dtype for dtype in CALL_DTYPES if not why_not(sample, dtype)])


def bad_calls(rng: random.Random, count: int) -> tuple[Counter[str], list[str]]:
    done: Counter[str] = Counter()
    wrong: list[str] = []
    while done.total() < count:
        target, call = rng.choice(targets(*any_sample(rng)))
        spoil = rng.choice(SPOIL)
        try:
            spoiled = spoil(rng, target, call)
        except NotApplicable:
            continue
        done[f"{'operator' if target.is_operator else 'function'} {target.name} {spoil.__name__}"] += 1
        wrong += [f"{spoil.__name__} {fault}" for fault in faults(target, spoiled)]
    return done, wrong


def faults(target: Target, spoiled: Call) -> list[str]:
    """What is wrong with the response to a bad call: nothing, or one line."""
    try:
        target.function(**spoiled)
        outcome = "was accepted"
    except Exception as error:
        if is_clear(error, target):
            return []
        outcome = f"raised {type(error).__name__}: {str(error)[:300]}"
    return [f"{target.name} {outcome}\n    {describe(spoiled)}"]


def short_calls(rng: random.Random) -> tuple[Counter[str], list[str]]:
    """Shorten every argument of every sample, forward and backward, in every dimension that others determine."""
    done: Counter[str] = Counter()
    wrong: list[str] = []
    for sample in SMALL_SAMPLES:
        if why_not(sample):
            continue
        for target, call in targets(sample, rng.choice([d for d in CALL_DTYPES if not why_not(sample, d)])):
            for slot in slots(call):
                for dim in decided(target, call, slot):
                    done[f"{target.name} {slot.argument}"] += 1
                    wrong += [f"{sample} {slot.argument} {f}" for f in faults(target, shorter(rng, call, slot, dim))]
    return done, wrong


def good_calls(rng: random.Random, count: int) -> list[str]:
    """Any layout of any tensor, at small sizes, 1 and 0 among them."""
    wrong = []
    for _ in range(count):
        sample, dtype = any_sample(rng)
        sizes = {a: rng.choice((0, 1, 2, 3, 17)) for a in "bqkatu"} | {a: rng.choice((1, 2, 3, 33)) for a in "dv"}
        if "groups" in sample.arguments:
            sizes["d"] = min(sizes["d"], 17)  # a group has the channels of several heads
        call = sample.call(dtype, sizes=sizes)
        expected = pytree.tree_leaves(differentiate(sample.function, replace(call, torch.clone)))
        odd = replace(call, lambda t: rng.choice(LAYOUTS)(t.clone()))
        found = pytree.tree_leaves(differentiate(sample.function, odd))
        for a, b in zip(found, expected, strict=True):
            if not torch.allclose(a, b, rtol=1e-2, atol=1e-2):
                wrong.append(f"{sample} {describe(odd)}")
    return wrong


if __name__ == "__main__":
    bad, good, seed = map(int, sys.argv[1:])
    warnings.simplefilter("ignore")
    torch.manual_seed(seed)
    rng = random.Random(seed)
    done, wrong = bad_calls(rng, bad)
    short, accepted = short_calls(rng)
    wrong += accepted + good_calls(rng, good)
    print(json.dumps({"bad": done, "short": short, "good": good, "wrong": wrong}))
