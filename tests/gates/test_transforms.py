"""The transforms of ``torch.func``, against what a loop of plain calls finds; and forward mode, which is refused."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import vitkernels as vk
from support import calls
from support.calls import Recorder, operator_calls, outputs_of
from support.devices import DEVICE, ON_CPU, dtype_of
from support.sample import Sample
from support.samples import CORE, COVERING, each_of
from support.samples_named import NAMED_SAMPLES
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

NAMED = NAMED_SAMPLES if ON_CPU else []
each_chosen = each_of([s for s in CORE if s.id != "no-batch"] + NAMED, short=COVERING + NAMED)


def learning(sample: Sample, seed: int = 0) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """The sum of a call's results, as a function of the tensors that can learn, and these, by their paths."""
    call = sample.call(dtype_of(sample, torch.float32), sizes=sample.small(), seed=seed)
    leaves, tree = pytree.tree_flatten_with_path(call)
    tensors = {
        pytree.keystr(path): leaf.detach().contiguous()
        for path, leaf in leaves
        if isinstance(leaf, Tensor) and leaf.requires_grad
    }

    def loss(tensors: dict[str, Tensor]) -> Tensor:
        changed = [tensors.get(pytree.keystr(path), leaf) for path, leaf in leaves]
        return sum(o.sin().sum() for o in outputs_of(sample.function(**pytree.tree_unflatten(changed, tree))))

    return loss, tensors


def batches(sample: Sample) -> tuple[Callable[..., Tensor], list[dict[str, Tensor]], dict[str, Tensor]]:
    """The loss, three batches of its tensors, and the same in one tensor each."""
    loss = learning(sample)[0]
    each = [learning(sample, seed)[1] for seed in range(3)]
    return loss, each, {name: torch.stack([tensors[name] for tensors in each]) for name in each[0]}


def in_a_loop(loss: Callable[..., Tensor], each: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    grads: list[tuple[Tensor, ...]] = []
    for tensors in each:
        leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        grads.append(torch.autograd.grad(loss(leaves), list(leaves.values())))
    return dict(zip(each[0], map(torch.stack, zip(*grads, strict=True)), strict=True))


@each_chosen
def test_vmap_and_grad(sample):
    loss, each, together = batches(sample)
    expected = in_a_loop(loss, each)
    leaves = {name: t.clone().requires_grad_() for name, t in together.items()}
    recorded = torch.autograd.grad(torch.func.vmap(loss)(leaves).sum(), list(leaves.values()))
    for found in (
        dict(zip(leaves, recorded, strict=True)),
        torch.func.grad(lambda tensors: torch.func.vmap(loss)(tensors).sum())(together),
        torch.func.vmap(torch.func.grad(loss))(together),
    ):
        torch.testing.assert_close(found, expected, equal_nan=True)


@each_chosen
def test_vmap_of_one_argument(sample):
    """Whatever argument has a batch, the gradients of the others are those of the sum over it."""
    loss, each, together = batches(sample)
    for name in together:
        own = [each[0] | {name: tensors[name]} for tensors in each]
        expected = {n: g if n == name else g.sum(0) for n, g in in_a_loop(loss, own).items()}

        def total(tensors, name=name):
            dims = ({n: 0 if n == name else None for n in tensors},)
            return torch.func.vmap(loss, dims)(tensors).sum()

        found = torch.func.grad(total)(each[0] | {name: together[name]})
        torch.testing.assert_close(found, expected, equal_nan=True)


def with_batched_gradients(function: Callable[..., object], call: calls.Call) -> None:
    """``is_grads_batched`` finds what a loop over the gradients does."""
    outputs, leaves = [o for o in outputs_of(function(**call)) if o.requires_grad], calls.learning(call)
    grads = [torch.randn(3, *o.shape, device=o.device).to(o.dtype) for o in outputs]

    def slopes(grads, **options):
        return torch.autograd.grad(outputs, leaves, grads, retain_graph=True, allow_unused=True, **options)

    each = zip(*(slopes(one) for one in zip(*grads, strict=True)), strict=True)
    expected = tuple(None if g[0] is None else torch.stack(g) for g in each)
    torch.testing.assert_close(slopes(grads, is_grads_batched=True), expected, equal_nan=True)


@each_chosen
def test_batched_gradients(sample):
    call = sample.call(dtype_of(sample, torch.float32), sizes=sample.small())
    with_batched_gradients(sample.function, call)
    for op, args in operator_calls(sample.function, call):
        if not calls.is_backward(op):
            with_batched_gradients(lambda args, op=op: op(*args), {"args": args})


def test_batched_gradients_of_data_are_one_call():
    q, k, v = (torch.randn(2, 5, 4, 8, device=DEVICE, requires_grad=True) for _ in range(3))
    out, lse = vk.attention(q, k, v, return_lse=True)
    merged, _ = vk.merge_attentions([out, out], [lse, lse])
    with Recorder() as recorder:
        torch.autograd.grad(merged, (q, k, v), torch.randn(3, *merged.shape, device=DEVICE), is_grads_batched=True)
    assert len(recorder.calls) == 2


@pytest.mark.parametrize("create_graph", [False, True])
def test_vectorised_jacobian(create_graph):
    """Through an operator that takes lists, which additional keys are merged by."""
    x = torch.randn(1, 3, 1, 4, device=DEVICE, requires_grad=True)

    def function(x):
        return vk.attention(x, x, x, additional_keys=x[:, :2], additional_values=x[:, :2])

    found = torch.autograd.functional.jacobian(function, x, create_graph, vectorize=True)
    torch.testing.assert_close(found, torch.autograd.functional.jacobian(function, x, create_graph))
    if create_graph:
        with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
            found.sin().sum().backward()


def test_batches_of_batched_gradients():
    """A backward that asks for batched gradients itself, under another batch."""
    q = torch.randn(1, 3, 1, 4, device=DEVICE, requires_grad=True)

    class Inner(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                out = vk.attention(q, q, q)
            return torch.autograd.grad(out, q, torch.stack([grad, 2 * grad]), is_grads_batched=True)[0].sum(0)

    x = torch.randn_like(q).requires_grad_()
    with_batched_gradients(lambda x: Inner.apply(x), {"x": x})


def test_vmap_is_sdpas():
    q, k, v = (torch.randn(4, 2, 9, 3, 8, device=DEVICE, requires_grad=True) for _ in range(3))
    weight = torch.ones(1, device=DEVICE, requires_grad=True)  # the sum wants a gradient, whatever its parts do
    (torch.func.vmap(vk.attention)(q, k, v).sin().sum() * weight).sum().backward()
    heads_first = [t.detach().transpose(-2, -3).requires_grad_() for t in (q, k, v)]
    torch.nn.functional.scaled_dot_product_attention(*heads_first).sin().sum().backward()
    for ours, theirs in zip((q, k, v), heads_first, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad.transpose(-2, -3))


def test_vmap_under_autocast():
    q, k, v = (torch.randn(3, 2, 9, 3, 8, device=DEVICE) for _ in range(3))

    def loss(q, k, v):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            out = vk.attention(q, k, v)
        assert out.dtype == torch.bfloat16
        return out.float().sin().sum()

    found = torch.func.vmap(torch.func.grad(loss))(q, k, v)
    expected = [torch.func.grad(loss)(*each) for each in zip(q, k, v, strict=True)]
    leaf = q[0].clone().requires_grad_()
    loss(leaf, k[0], v[0]).backward()
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=0)
    torch.testing.assert_close(found[0], leaf.grad, rtol=0, atol=0)


def test_vmap_of_nothing():
    with pytest.raises(RuntimeError, match="vitkernels::attention: vmap has no elements, takes one or more"):
        torch.func.vmap(vk.attention)(*[torch.ones(0, 1, 2, 1, 4, device=DEVICE)] * 3)


@each_chosen
def test_second_derivatives_raise(sample):
    loss, tensors = learning(sample)
    name = next(iter(tensors))

    def slope(t: Tensor) -> Tensor:
        return torch.func.grad(lambda t: loss(tensors | {name: t}))(t).sin().sum()

    with pytest.raises(RuntimeError, match=r"vitkernels::.*_backward: second derivatives are not implemented"):
        torch.func.grad(slope)(tensors[name])


@each_chosen
def test_a_tangent_is_refused(sample):
    """In forward mode a tangent that is dropped looks like a derivative of zero: any argument's raises, by its name."""
    loss, tensors = learning(sample)
    for path, primal in tensors.items():
        name = re.escape(re.sub(r"^\['(\w+)'\]", r"\1", path))  # as the caller gave it
        names = rf"(.*, )?{name}(,.*)?"
        match = rf"vitkernels::\w+: forward-mode derivatives are not implemented, takes {names} without a tangent"

        def of_one(t, path=path):
            return loss(tensors | {path: t})

        with pytest.raises(RuntimeError, match=match):
            torch.func.jvp(of_one, (primal,), (torch.ones_like(primal),))
        with forward_ad.dual_level(), torch.no_grad(), pytest.raises(RuntimeError, match=match):
            of_one(forward_ad.make_dual(primal, torch.ones_like(primal)))
        with pytest.raises(RuntimeError, match=match):
            torch.autograd.functional.jacobian(of_one, primal, vectorize=True, strategy="forward-mode")
        batch = torch.stack([primal] * 2)
        with pytest.raises(RuntimeError, match=match):
            torch.func.jvp(torch.func.vmap(of_one), (batch,), (torch.ones_like(batch),))


REFUSED = r"vitkernels::\w+: forward-mode derivatives are not implemented"


@each_chosen
def test_gradients_and_tangents_of_operators(sample):
    """Calls of the operator itself, as a compiled graph has them: ``grad`` is autograd's, a tangent is refused."""
    call = sample.call(dtype_of(sample, torch.float32), sizes=sample.small())
    for op, args in operator_calls(sample.function, call):
        if calls.is_backward(op):
            continue
        leaves, tree = pytree.tree_flatten(args)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]

        def total(tensors, op=op, leaves=leaves, tree=tree, places=places):
            given = dict(zip(places, tensors, strict=True))
            changed = [given.get(i, leaf) for i, leaf in enumerate(leaves)]
            return sum(o.sin().sum() for o in outputs_of(op(*pytree.tree_unflatten(tree, changed))))

        tensors = [leaves[i] for i in places]
        expected = torch.autograd.grad(total(tensors), tensors, allow_unused=True, materialize_grads=True)
        plain = [t.detach() for t in tensors]
        torch.testing.assert_close(torch.func.grad(total)(plain), list(expected), equal_nan=True)
        for i, expanded in enumerate(plain):
            primal = expanded.contiguous()  # PyTorch itself takes no tangent of an expanded tensor
            tangent = torch.ones_like(primal)

            def of_one(t, i=i, total=total, plain=plain):
                return total([*plain[:i], t, *plain[i + 1 :]])

            with pytest.raises(RuntimeError, match=REFUSED):
                torch.func.jvp(of_one, (primal,), (tangent,))
            with pytest.raises(RuntimeError, match=REFUSED):
                torch.func.jvp(torch.func.grad(of_one), (primal,), (tangent,))
            with forward_ad.dual_level(), torch.no_grad(), pytest.raises(RuntimeError, match=REFUSED):
                of_one(forward_ad.make_dual(primal, tangent))


@pytest.mark.parametrize("fullgraph", [False, True])
def test_gradients_and_tangents_of_compiled_calls(fullgraph):
    q, w = torch.randn(1, 5, 2, 8, device=DEVICE), torch.randn(1, 5, 2, 8, device=DEVICE)

    def loss(q, scale):
        out, lse = vk.attention(q, q.sin(), q.cos(), scale=scale, return_lse=True)
        return (vk.merge_attentions([out, out * 2], [lse, lse])[0] * w).sum()

    def tangent(q, scale):
        return torch.func.jvp(lambda s: loss(q, s), (scale,), (torch.ones_like(scale),))[1]

    torch._dynamo.reset()
    scale = torch.full((2,), 0.3, device=DEVICE)
    slopes = torch.func.grad(loss, (0, 1))
    compiled = torch.compile(slopes, backend="aot_eager", fullgraph=fullgraph)
    torch.testing.assert_close(compiled(q, scale), slopes(q, scale))
    with pytest.raises(Exception, match=REFUSED):
        torch.compile(tangent, backend="aot_eager", fullgraph=fullgraph)(q, scale)


def test_forward_mode_without_a_tangent():
    q = torch.randn(1, 3, 1, 4, device=DEVICE, requires_grad=True)
    plain = vk.attention(q, q, q)
    with forward_ad.dual_level():
        assert torch.equal(vk.attention(q, q, q), plain)
        assert torch.equal(*vk.merge_attentions([plain] * 2, [torch.zeros(1, 3, 1, device=DEVICE)] * 2)[:1], plain)


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (2, None, 0)], ids=str)
def test_vmap_of_data_is_one_call(in_dims):
    q, k, v = (torch.randn(3, 2, 5, 4, 8, requires_grad=True) for _ in range(3))
    given = [t.movedim(0, dim) if dim is not None else t[0] for t, dim in zip((q, k, v), in_dims, strict=True)]
    with Recorder() as recorder:
        out, lse = torch.func.vmap(lambda *t: vk.attention(*t, return_lse=True), in_dims)(*given)
        merged = torch.func.vmap(lambda o, e: vk.merge_attentions([o, o], [e, e])[0])(out, lse)
        grads = torch.autograd.grad(merged.sum(), (q, k, v))
    assert len(recorder.calls) == 4
    expected = [vk.attention(q[i], k[i if in_dims[1] == 0 else 0], v[i]) for i in range(3)]
    torch.testing.assert_close(out, torch.stack(expected))
    torch.testing.assert_close(grads, torch.autograd.grad(sum(o.sum() for o in expected), (q, k, v)))
