"""The package under test, or what stands in for it where it cannot be imported: peers are measured all the same."""

from __future__ import annotations

from typing import Any

from benchmarks.registry import Unavailable

__all__ = ["about", "vk"]


class _Missing:
    """Any attribute of it can be called, to be told why there is no package."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def __getattr__(self, name: str) -> _Missing:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise Unavailable(self._reason)


vk: Any
try:
    import vitkernels as vk
except ImportError as error:
    vk = _Missing(str(error))


def about() -> dict[str, Any]:
    """Version, instruction set and libraries, or why there are none."""
    if isinstance(vk, _Missing):
        return {"vitkernels": None, "isa": None, "backends": {"cpu": vk._reason, "cuda": vk._reason}}
    library = vk._library
    return {"vitkernels": vk.__version__, "isa": library.isa(), "backends": library.backends()}
