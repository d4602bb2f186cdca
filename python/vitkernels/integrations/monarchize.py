"""``vk.monarchize`` and ``vk.expand_monarch``: linear layers of a model as Monarch matrices, and back."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from vitkernels.integrations.monarch_report import MonarchEntry, MonarchReport
from vitkernels.nn.hooks import has_hooks
from vitkernels.nn.monarch import MonarchLinear, why_not_projected

__all__ = ["MLP_TARGETS", "expand_monarch", "monarchize"]

#: The linear layers of the MLPs of timm, torchvision and transformers. Before an ``output.dense`` of a transformer's
#: attention, which is no part of its MLP, there is an ``attention``.
MLP_TARGETS = ("fc1", "fc2", "mlp.*", "intermediate.dense", "output.dense")
_ATTENTION_OUTPUT = ("attention.output.dense",)


def monarchize(
    model: nn.Module,
    *,
    nblocks: int = 4,
    targets: str | Sequence[str] | Callable[[str, nn.Linear], bool] | None = None,
) -> MonarchReport:
    """Replace linear layers of ``model`` by the nearest :class:`vitkernels.nn.MonarchLinear`, in place.

    The way of the paper from a dense model to a sparse one, which is trained further. (Without that, expect little of a
    model whose weights are far from Monarch matrices: the report has the error of each.) Parameters are new ones, so
    make the optimizer afterwards. A module that occurs several times in the model is replaced once, everywhere.

    Left alone, with a reason in the report, are subclasses of ``nn.Linear``, also parametrized ones; layers with hooks
    or a forward of their own; layers that share their weight with another module; layers whose weight the forward of
    the module right around them reads instead of calling them, as that of ``nn.TransformerEncoderLayer`` does; and
    layers that would not be smaller, or are so small that inner features would not connect all blocks.

    Args:
        model: any module that contains linear layers.
        nblocks: blocks of each factor.
        targets: which layers: a pattern or several, as of ``fnmatch``, for a name in ``model.named_modules()`` or its
            last components (``"fc1"``, ``"mlp.*"``, ``"blocks.0.attn.qkv"``), or a function of name and layer. By
            default the layers of MLPs in timm, torchvision and transformers: ``fc1``, ``fc2``, what is inside of an
            ``mlp``, ``intermediate.dense`` and, but for that of attention, ``output.dense``.

    Returns:
        Every layer asked for: parameters, FLOPs and error, or why it was left alone.

    Raises:
        RuntimeError: if ``model`` is not a ``torch.nn.Module``, ``nblocks`` is not a positive integer, ``targets`` are
            none, or nothing is such a layer. The model is as before then.

    Source: Dao et al., "Monarch: Expressive Structured Matrices for Efficient and Accurate Training" (2022),
    section 3.3.
    """
    _check(model, "monarchize")
    if not isinstance(nblocks, int) or isinstance(nblocks, bool) or nblocks < 1:
        raise RuntimeError(f"vitkernels.monarchize: nblocks is {nblocks!r}, takes an integer from 1 on")
    _check_targets(targets)
    modules = model.named_modules()
    layers: dict[str, nn.Module] = {name: m for name, m in modules if isinstance(m, (nn.Linear, MonarchLinear))}
    found = {name: m for name, m in layers.items() if _is_target(targets, name, m)}
    if not found:
        raise RuntimeError(
            f"vitkernels.monarchize: targets is {MLP_TARGETS if targets is None else targets!r}, takes what names one "
            f"of the model's linear layers: {_summary(layers)}"
        )

    def of_linear(linear: nn.Module) -> MonarchLinear | str:
        if isinstance(linear, MonarchLinear):
            return "a MonarchLinear already"
        if why := why_not_projected(linear):
            return f"it {why}"
        assert isinstance(linear, nn.Linear)
        if linear.weight.numel() == 0:
            return "its weight is empty"
        sizes = MonarchLinear(linear.in_features, linear.out_features, nblocks, device="meta")
        if sizes.blkdiag1.size(1) < nblocks:
            return f"with {nblocks} blocks some inputs would not reach some outputs"
        if _flops(sizes) >= _flops(linear):
            return f"with {nblocks} blocks it would not be smaller"
        return MonarchLinear.from_linear(linear, nblocks)

    return _replace(model, found, nn.Linear, of_linear)


def expand_monarch(model: nn.Module) -> MonarchReport:
    """Replace every :class:`vitkernels.nn.MonarchLinear` of ``model`` by the dense layer that computes the same.

    The way back of :func:`monarchize`, which does not bring back what the projection took. Parameters are new ones.

    Args:
        model: any module.

    Returns:
        Every ``MonarchLinear`` found: replaced, or why it was left alone (subclasses; hooks; shared weights).

    Raises:
        RuntimeError: if ``model`` is not a ``torch.nn.Module``.
    """
    _check(model, "expand_monarch")
    found: dict[str, nn.Module] = {n: m for n, m in model.named_modules() if isinstance(m, MonarchLinear)}
    return _replace(model, found, MonarchLinear, lambda layer: layer.to_linear())


def _replace(
    model: nn.Module,
    found: dict[str, nn.Module],
    stock_class: type[nn.Module],
    replacement: Callable[[Any], nn.Module | str],
) -> MonarchReport:
    """Put what ``replacement`` makes of each of ``found`` in its place, unless it says why not."""
    places, owners = _places(model), _owners(model)
    new: dict[int, nn.Module] = {}
    entries = []
    for name, layer in found.items():
        made: nn.Module | str = "it is the model itself, which cannot be replaced in place" if layer is model else ""
        made = made or _obstacle(layer, stock_class) or _sharing(layer, name, owners)
        if not made and stock_class is nn.Linear:
            made = _reader(places[id(layer)])
        made = made or replacement(layer)
        shape = (int(layer.in_features), int(layer.out_features))  # type: ignore[arg-type]
        if isinstance(made, str):
            entries.append(MonarchEntry(name, shape, "stock", made))
            continue
        new[id(layer)] = made
        monarch = made if isinstance(made, MonarchLinear) else layer
        error = made.projection_error if isinstance(made, MonarchLinear) else None
        parameters = (_parameters(layer), _parameters(made))
        flops = (_flops(layer), _flops(made))
        blocks = monarch.nblocks if isinstance(monarch, MonarchLinear) else None
        entries.append(MonarchEntry(name, shape, "replaced", "", blocks, parameters, flops, error or 0.0))
    # Nothing is changed before all are made: an error leaves the model as it was.
    for layer_id, made in new.items():
        for parent, child in places[layer_id]:
            parent._modules[child] = made
    return MonarchReport(tuple(entries))


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Where each module is registered: by identity, the parents and its names there."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for child, module in parent._modules.items():
            places.setdefault(id(module), []).append((parent, child))
    return places


class _Memory(NamedTuple):
    """The bytes of a storage that a parameter spans, or a parameter without memory."""

    storage: int
    begin: int
    end: int

    def overlaps(self, other: _Memory) -> bool:
        return self.storage == other.storage and self.begin < other.end and other.begin < self.end


_Owners = dict[int, list[tuple[_Memory, str]]]


def _owners(model: nn.Module) -> _Owners:
    """Which memory the parameters have, and the names of their modules, by storage."""
    owners: _Owners = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                memory = _memory(parameter)
                owners.setdefault(memory.storage, []).append((memory, name))
    return owners


def _memory(parameter: nn.Parameter) -> _Memory:
    # A lazy parameter has no storage, one on the meta device none of its own.
    if is_lazy(parameter) or parameter.is_meta or parameter.untyped_storage().data_ptr() == 0:
        return _Memory(id(parameter), 0, 1)
    size, begin = parameter.element_size(), parameter.storage_offset()
    end = begin + 1 + sum((n - 1) * s for n, s in zip(parameter.shape, parameter.stride(), strict=True))
    return _Memory(parameter.untyped_storage().data_ptr(), int(begin * size), int(end * size))


def _obstacle(layer: nn.Module, stock_class: type[nn.Module]) -> str:
    """What about ``layer`` itself a replacement would lose, or nothing."""
    if hasattr(layer, "parametrizations"):
        return "it is parametrized"
    if isinstance(layer, stock_class) and type(layer) is not stock_class:
        return f"a subclass of {stock_class.__name__}, {type(layer).__name__}, may compute something else"
    if "forward" in layer.__dict__:
        return "its forward is overridden on the instance"
    return "it has hooks" if has_hooks(layer) or _has_other_hooks(layer) else ""


def _has_other_hooks(layer: nn.Module) -> bool:
    """Whether there are hooks of its gradients, or of saving and loading it."""
    names = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
    of_gradients = ("_backward_hooks", "_post_accumulate_grad_hooks")
    return any(getattr(layer, name) for name in names) or any(
        getattr(p, name) for p in layer.parameters(recurse=False) for name in of_gradients
    )


def _sharing(layer: nn.Module, name: str, owners: _Owners) -> str:
    """With what it shares parameters, or parts of them, or nothing."""
    own = [_memory(p) for p in layer.parameters(recurse=False)]
    others = {o: None for m in own for memory, o in owners[m.storage] if o != name and memory.overlaps(m)}
    return f"it shares parameters with {', '.join(others)}" if others else ""


def _reader(parents: list[tuple[nn.Module, str]]) -> str:
    """Which module around a layer does without calling it, or nothing."""
    for parent, child in parents:
        if _reads_weight(type(parent), child):
            return f"{type(parent).__name__} reads the weight of its {child} without calling it"
    return ""


def _reads_weight(cls: type[nn.Module], child: str) -> bool:
    """Whether a forward of ``cls`` reads ``self.<child>.weight``, as far as its source can be seen."""
    pattern = re.compile(rf"\bself\.{re.escape(child)}\.(weight|bias)\b")
    for base in cls.__mro__:
        forward = vars(base).get("forward")
        try:
            if inspect.isfunction(forward) and pattern.search(inspect.getsource(inspect.unwrap(forward))):
                return True
        except (OSError, TypeError):  # written in an interactive session, or compiled
            continue
    return False


def _is_target(
    targets: str | Sequence[str] | Callable[[str, nn.Linear], bool] | None, name: str, layer: nn.Module
) -> bool:
    if callable(targets):
        return isinstance(layer, nn.Linear) and bool(targets(name, layer))
    if targets is None:
        return _matches(name, MLP_TARGETS) and not _matches(name, _ATTENTION_OUTPUT)
    return _matches(name, (targets,) if isinstance(targets, str) else targets)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(f".{name}", f"*.{pattern}") for pattern in patterns)


def _summary(layers: dict[str, nn.Module]) -> str:
    """Names with a star for each number, and how often each occurs."""
    names = Counter(re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name in layers)
    return ", ".join(_counted(names)) or "there is none"


def _counted(names: Counter[str]) -> Iterator[str]:
    for name, count in names.items():
        yield f"{count} x {name}" if count > 1 else name or "the model itself"


def _parameters(layer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in layer.parameters())


def _flops(layer: nn.Module) -> int:
    """Two for each multiply-add with a weight, for one row of inputs."""
    return 2 * sum(parameter.numel() for name, parameter in layer.named_parameters() if name != "bias")


def _check_targets(targets: object) -> None:
    patterns = [targets] if isinstance(targets, str) else targets
    if patterns is None or callable(patterns):
        return
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise RuntimeError(
            f"vitkernels.monarchize: targets is {targets!r}, takes a pattern, several, or a function of name and layer"
        )


def _check(model: object, function: str) -> None:
    if not isinstance(model, nn.Module):
        raise RuntimeError(f"vitkernels.{function}: model is a {type(model).__name__}, takes a torch.nn.Module")
