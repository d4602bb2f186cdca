"""``vk.accelerate``, ``vk.restore`` and ``vk.restored``: every library's integration over one model."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from threading import RLock
from types import ModuleType

from torch import nn

from vitkernels._library import backends
from vitkernels.integrations.handwritten import CALLS_SDPA, calls_sdpa
from vitkernels.integrations.report import Entry, Report, kind_of

__all__ = ["accelerate", "register_transformers", "restore", "restored"]

# A model of a library has imported these modules of it. Importing them for the user would cost seconds.
_INTEGRATIONS = {
    "torch.nn": "vitkernels.integrations.multihead",
    "torchvision.models.swin_transformer": "vitkernels.integrations.torchvision",
    "timm.layers.attention": "vitkernels.integrations.timm",
    "transformers.modeling_utils": "vitkernels.integrations.transformers",
}
_changing = RLock()  # models are changed by one thread at a time
_ATTENTION_NAME = re.compile(r"Attention|Attn")


def accelerate(model: nn.Module) -> Report:
    """Let the attention modules of ``model`` compute with the kernels, in place.

    Parameters, buffers, hooks, ``state_dict`` keys and the classes that ``isinstance`` sees stay; copies,
    pickles and compiled versions of the model stay accelerated. A module that the kernel's work includes, such as the
    dropout of the attention weights, is not called: while it has hooks, registered before or after, the attention
    around it takes the stock path. ``torch.fx`` traces the stock path; ``torch.jit.script`` and exporters to ONNX need
    :func:`restored`, and say so. A second call changes nothing.

    - torch, and so torchvision: ``nn.MultiheadAttention``. Of torchvision also the shifted windows of Swin and
      Swin V2.
    - timm: the softmax attention between all tokens of its transformers, hybrids and attention pools, and the
      blocks with windows or grids of Swin, Swin V2, MaxViT, DaViT, TinyViT and Twins. Windows of other families,
      talking heads and attention between channels stay as they are.
    - transformers: every attention module that goes through ``ALL_ATTENTION_FUNCTIONS`` and is set to
      ``"sdpa"``. The setting lives in the model's config, so a model that shares the config object follows.
      Beside these the modules of CvT, PVT and PVTv2, which compute on their own, and the layers of Swin and Swin V2.

    A subclass of a replaced class is left alone, since it may compute something else. So is a module that calls torch's
    ``scaled_dot_product_attention`` on its own: :func:`vitkernels.compat.scaled_dot_product_attention` takes its place
    there.

    Shifted windows are computed on the map: nothing is rolled or cut into windows, and hooks on the projections of
    such a block see the map. The libraries add -100 to the logits of pairs that a shift keeps apart; here such pairs do
    not exist, which differs where logits lie that far apart.

    Args:
        model: any module, an attention module itself included.

    Returns:
        Every attention module found, and why those that were left alone were.

    Raises:
        RuntimeError: if ``model`` is not a ``torch.nn.Module``.
    """
    _check(model, "accelerate")
    with _changing:
        entries = {entry.name: entry for library in _loaded() for entry in library.replace(model)}
    inside = tuple(f"{name}." if name else "" for name, entry in entries.items() if entry.status == "replaced")
    # What a replaced module has inside is part of it, and not an entry of its own.
    entries = {name: entry for name, entry in entries.items() if not name or not name.startswith(inside)}
    by_hand = {cls for cls in {type(module) for module in model.modules()} if calls_sdpa(cls)}
    for name, module in model.named_modules():
        if name in entries or name.startswith(inside):
            continue
        if type(module) in by_hand:
            entries[name] = Entry(name, kind_of(module), "stock", CALLS_SDPA)
        elif _looks_like_attention(module):
            entries[name] = Entry(name, kind_of(module), "stock", "no fused replacement")
    order = {name: position for position, (name, _) in enumerate(model.named_modules())}
    return Report(sorted(entries.values(), key=lambda entry: order[entry.name]), backends())


def restore(model: nn.Module) -> None:
    """Undo :func:`accelerate`, exactly.

    Args:
        model: a module, accelerated or not.

    Raises:
        RuntimeError: if ``model`` is not a ``torch.nn.Module``.
    """
    _check(model, "restore")
    with _changing:
        for library in _loaded():
            library.restore(model)


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Make ``model`` stock inside a ``with``; afterwards the modules that were accelerated are so again.

    For what needs the library's own operators::

        with vk.restored(model):
            torch.onnx.export(model, (images,), "model.onnx", dynamo=True)

    Parameters, hooks and training mode stay, and so does what the code inside changes. Models of transformers that were
    set to ``"vitkernels"`` by name compute with ``"sdpa"`` inside. Modules of :mod:`vitkernels.nn` have no stock form.

    The model is changed in place: other threads run it stock as well. Where such blocks of several threads
    overlap, it is accelerated again as soon as the first one ends.

    Args:
        model: a module, accelerated or not.

    Raises:
        RuntimeError: if ``model`` is not a ``torch.nn.Module``.
    """
    _check(model, "restored")
    undo = ExitStack()
    try:
        with _changing:
            for library in _loaded():
                undo.callback(library.suspend(model))
        yield
    finally:
        with _changing:
            undo.close()


def register_transformers() -> None:
    """Make ``"vitkernels"`` an attention implementation of transformers, importing transformers.

    Afterwards ``attn_implementation="vitkernels"`` and ``model.set_attn_implementation("vitkernels")`` work.
    """
    import_module("vitkernels.integrations.transformers")


def _check(model: object, function: str) -> None:
    if not isinstance(model, nn.Module):
        raise RuntimeError(f"vitkernels.{function}: model is a {type(model).__name__}, takes a torch.nn.Module")


def _loaded() -> list[ModuleType]:
    return [import_module(ours) for theirs, ours in _INTEGRATIONS.items() if theirs in sys.modules]


def _looks_like_attention(module: nn.Module) -> bool:
    """Named as attention, with parameters, and not merely a wrapper of a module that is."""

    def named(m: nn.Module) -> bool:
        return _ATTENTION_NAME.search(type(m).__name__) is not None and any(True for _ in m.parameters())

    return named(module) and not any(named(m) for m in module.modules() if m is not module)
