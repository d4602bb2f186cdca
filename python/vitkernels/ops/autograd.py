"""Gradients of operators, and the calls that record them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from vitkernels._torch_private import (
    apply_at_one_level,
    below_autograd,
    entry_of,
    has_below_autograd,
    is_batching,
    is_tracing,
    is_transformed,
)
from vitkernels.ops.autocast import Cast
from vitkernels.ops.schema import GRAD, NEED, Operator
from vitkernels.ops.vmap import batching_rule

__all__ = ["Call", "Gradient", "NoGradient", "register_autograd"]

Call = Callable[..., Any]

_library = torch.library.Library("vitkernels", "IMPL")  # type: ignore[no-untyped-call]


class NoGradient:
    """Of a backward operator: an error instead of a silent zero."""

    def __init__(self, op: Operator) -> None:
        self.op = op

    def save(self, ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        pass

    def differentiate(self, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        raise RuntimeError(f"vitkernels::{self.op.name}: second derivatives are not implemented")


class Gradient(NoGradient):
    """What an operator keeps of a call, and what its backward makes of that."""

    def __init__(self, op: Operator, backward: Operator, call_backward: Call) -> None:
        super().__init__(op)
        self.call, self.asked = call_backward, backward.arguments
        self.out_is_optional = GRAD + "out" in backward.optional
        self.incoming = [GRAD + name for name in op.results]
        self.found = [name.removeprefix(GRAD) for name in backward.results]
        needed = [name.removeprefix(NEED) for name in backward.arguments if name.startswith(NEED)]
        self.needs = {name: op.arguments.index(name) for name in needed}
        kept = set(backward.arguments) - set(op.arguments)
        self.kept = [i for i, name in enumerate(op.results) if name in kept]
        self.saved = [op.results[i] for i in self.kept] + [op.arguments[i] for i in op.tensors]

    def save(self, ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        tensors = [inputs[i] for i in self.op.tensors]
        if self.op.has_lists:
            ctx.lengths = [len(each) for each in tensors]
            tensors = list(chain(*tensors))
        ctx.save_for_backward(*[outputs[i] for i in self.kept], *tensors)
        unasked = [name not in self.asked for name in self.incoming]
        ctx.mark_non_differentiable(*[t for t, is_it in zip(outputs, unasked, strict=True) if is_it])
        ctx.others = [inputs[i] for i in self.op.others]
        ctx.set_materialize_grads(False)  # an unused lse costs nothing

    def differentiate(self, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        has_lists, names = self.op.has_lists, self.op.arguments
        if all(grad is None for grad in grads):
            return tuple([None] * n for n in ctx.lengths) if has_lists else (None,) * len(names)
        tensors = ctx.saved_tensors  # once: each look at it unpacks them
        given = dict(zip(self.saved, _split(tensors, ctx.lengths) if has_lists else tensors, strict=True))
        given |= zip(self.incoming, grads, strict=True)
        given |= zip((names[i] for i in self.op.others), ctx.others, strict=True)
        given |= {NEED + name: ctx.needs_input_grad[i] for name, i in self.needs.items()}
        if given["grad_out"] is None and not self.out_is_optional:
            given["grad_out"] = torch.zeros_like(given["outs"][0] if has_lists else given["out"])
        found = self.call(*[given[name] for name in self.asked])
        if has_lists:
            return tuple(_split(found, ctx.lengths))
        for i in self.op.tensors:
            if names[i] not in self.found and ctx.needs_input_grad[i]:
                raise RuntimeError(
                    f"vitkernels::{self.op.name}: {names[i]} requires a gradient, which it does not have"
                )
        by_name = {name: grad for name, grad in zip(self.found, found, strict=True) if given.get(NEED + name, True)}
        return tuple(by_name.get(name) for name in names)


def _split(tensors: Sequence[Tensor], lengths: Sequence[int]) -> list[list[Tensor]]:
    rest = iter(tensors)
    return [[next(rest) for _ in range(n)] for n in lengths]


def register_autograd(op: Operator, gradient: NoGradient, cast: Cast | None = None) -> Call:
    """Register ``gradient``, and return what calls ``op`` with less work in Python than ``torch.library`` has.

    Where no gradient is recorded, the operator's autograd part is left out; where one is, a function of our own records
    the same, which also suits the transforms of ``torch.func``.

    Calls of the operator itself, those of compiled graphs above all, come by the dispatcher.
    ``torch.library.register_autograd`` would have them drop the tangents of forward-mode differentiation.
    """
    overload, tensors = op.overload, op.tensors
    entry, (plain, transformed, at_one_level) = entry_of(overload), _recorders(op, gradient)

    def of_dispatcher(*args: Any) -> Any:
        if is_transformed() or (torch.is_grad_enabled() and _learns(args, tensors)):
            return at_one_level(*args)
        with below_autograd():
            return entry(*args)

    if has_below_autograd:
        _library.impl(op.name, of_dispatcher, "Autograd")  # type: ignore[no-untyped-call]
    else:
        torch.library.register_autograd(f"vitkernels::{op.name}", gradient.differentiate, setup_context=gradient.save)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or is_tracing():
            return overload(*args)
        if is_transformed():
            record = transformed
        elif is_batching():
            return overload(*args)
        elif torch.is_grad_enabled() and _learns(args, tensors):
            record = plain
        else:
            with below_autograd():
                return entry(*args)
        if cast is not None:  # first: the gradient is that of what autocast makes of the arguments
            args = cast(args, args[0].device.type)
        return record(*args)

    return call


def _learns(args: Sequence[Any], places: Sequence[int]) -> bool:
    for i in places:
        a = args[i]
        if a is None:
            continue
        if a.requires_grad if isinstance(a, Tensor) else isinstance(a, list) and _learns(a, range(len(a))):
            return True
    return False


def _recorders(op: Operator, gradient: NoGradient) -> Sequence[Call]:
    """What records a call of ``op``: in the fewest steps; for all transforms of ``torch.func`` that are at work; and
    for the one whose turn it is in the dispatcher.

    An ``autograd.Function`` finds tensors among its arguments, but not in lists.
    """

    entry, has_lists, save = entry_of(op.overload), op.has_lists, gradient.save

    def forward(*args: Any) -> Any:
        with below_autograd():
            output = entry(*(op.grouped(args) if has_lists else args))
        return tuple(output) if has_lists else output

    def setup_context(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        if has_lists:
            inputs = op.grouped(inputs)
            ctx.leaves = op.flat(op.leaves(inputs))
        save(ctx, inputs, output)

    def record(ctx: Any, *args: Any) -> Any:
        output = forward(*args)
        setup_context(ctx, args, output)
        return output

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        found = gradient.differentiate(ctx, *grads)
        return tuple(chain(*((None, *each) for each in found))) if op.has_lists else found

    def jvp(ctx: Any, *tangents: Any) -> None:
        names = ctx.leaves if op.has_lists else op.arguments
        carrying = [name for name, tangent in zip(names, tangents, strict=True) if tangent is not None]
        raise RuntimeError(
            f"vitkernels::{op.name}: forward-mode derivatives are not implemented, takes "
            f"{', '.join(carrying).replace('head_scale', 'scale')} without a tangent"
        )

    def recorder(**methods: Call) -> Any:
        methods |= {"backward": backward, "jvp": jvp}
        members = {name: staticmethod(method) for name, method in methods.items()}
        return type(op.name, (torch.autograd.Function,), members)

    plain, transformed = recorder(forward=record), recorder(forward=forward, setup_context=setup_context)
    transformed.vmap = staticmethod(batching_rule(op, transformed.apply))
    applied: list[Call] = [plain.apply, transformed.apply, apply_at_one_level(plain)]
    return [partial(_apply_flat, op, apply) for apply in applied] if op.has_lists else applied


def _apply_flat(op: Operator, apply: Call, *args: Any) -> Any:
    return apply(*op.flat(args))
