"""What the tests ask of hooks in an accelerated model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import vitkernels as vk
from support.model_zoo import assert_close, output_of
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook


def assert_hooks_are_called(model: nn.Module, *inputs: Tensor, **kwargs: Any) -> set[str]:
    """Hooks on each module that an accelerated ``model`` does not call, and its stock model does, one at a time.

    Returns:
        The kinds of such modules: their names with ``*`` for numbers.
    """

    def output() -> dict[str, Tensor]:
        return {"output": output_of(model, *inputs, **kwargs)}

    with torch.no_grad(), unfused(model):
        vk.restore(model)
        with called_modules(model) as stock:
            expected = output()
        report = vk.accelerate(model)
        with called_modules(model) as ours:
            output()
        passed_over = {re.sub(r"\d+", "*", name): name for name in reversed([*stock]) if name not in ours}
        for name in passed_over.values():
            for kind in ("forward_hook", "forward_pre_hook"):
                seen: list[Any] = []
                handle = getattr(model.get_submodule(name), f"register_{kind}")(lambda *_, to=seen: to.append(1))
                assert_close(output(), expected)
                assert seen, f"{kind} of {name}"
                assert sum(part_is_named(name, entry) for entry in vk.accelerate(model).replaced) == 1, name
                handle.remove()
        assert vk.accelerate(model) == report
    return set(passed_over)


def part_is_named(name: str, entry: vk.integrations.Entry) -> bool:
    """Whether ``entry`` says that hooks on the module ``name`` put it on the stock path."""
    prefix = f"{entry.name}." if entry.name else ""
    return name.startswith(prefix) and f"stock path now: hooks on {name.removeprefix(prefix)}" in entry.reason


@contextmanager
def called_modules(model: nn.Module) -> Iterator[dict[str, None]]:
    """The names of the modules that are called inside, in the order in which they return."""
    names = {id(module): name for name, module in model.named_modules()}
    called: dict[str, None] = {}
    handle = register_module_forward_hook(lambda module, *_: called.setdefault(names.get(id(module), "")))
    try:
        yield called
    finally:
        handle.remove()


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """Let timm's modules compute without SDPA, step by step, so that softmax and dropout are modules' calls."""
    modules = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    for module in modules:
        module.fused_attn = False
    try:
        yield
    finally:
        for module in modules:
            module.fused_attn = True
