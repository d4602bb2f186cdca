"""Check that includes and imports only point down: python tools/check_rooms.py [ROOT].

C++: op -> cpu | cuda -> the engine's root -> csrc/cpu | csrc/cuda -> csrc/common, and torch stays out of kernels.
Python: integrations -> nn, compat -> functional -> ops -> everything else.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

# What files of a room may include. An engine is a folder of csrc that has rooms of its own; `root` is the rest of it.
# No file may include another engine's files.
INCLUDES = {
    "schema": {"schema", "common"},
    "common": {"common", "schema"},
    "vocabulary/cpu": {"vocabulary/cpu", "common"},
    "vocabulary/cuda": {"vocabulary/cuda", "common"},
    "root": {"root", "common"},
    "cpu": {"cpu", "root", "vocabulary/cpu", "common"},
    "cuda": {"cuda", "root", "vocabulary/cuda", "common"},
    "op": {"op", "cpu", "cuda", "root", "vocabulary/cpu", "vocabulary/cuda", "common"},
}
# In addition to all of op/.
MAY_INCLUDE_TORCH = {
    "common/boxed.h",
    "common/check.h",
    "common/integer_argument.h",
    "common/parallel.h",
    "common/stable.h",
    "common/token_argument.h",
    "cuda/device.h",
    "cuda/read_integers.h",
    "cuda/library.cpp",
    "library.cpp",
}
SOURCES = {".h", ".cpp", ".cu", ".cuh"}

LAYERS = {"ops": 1, "functional": 2, "compat": 3, "nn": 3, "integrations": 4, "__init__": 5, "info": 6, "__main__": 7}


def room_of(path: str) -> tuple[str, str]:
    """The room of a file in csrc, and its engine, or ""."""
    parts = path.split("/")
    if len(parts) == 1:
        return "schema", ""
    if parts[0] == "common":
        return "common", ""
    if parts[0] in ("cpu", "cuda"):
        return f"vocabulary/{parts[0]}", ""
    return (parts[1] if len(parts) > 2 and parts[1] in ("op", "cpu", "cuda") else "root"), parts[0]


def includes_torch(path: str, includes: dict[str, list[str]], seen: set[str]) -> bool:
    seen.add(path)
    return any(
        name.startswith("torch/") or (name in includes and name not in seen and includes_torch(name, includes, seen))
        for name in includes[path]
    )


def cpp_violations(csrc: Path) -> Iterator[str]:
    files = [path for path in sorted(csrc.rglob("*")) if path.suffix in SOURCES]
    directive = re.compile(r'^\s*#\s*include\s*["<](.+?)[">]', re.MULTILINE)
    includes = {path.relative_to(csrc).as_posix(): directive.findall(path.read_text()) for path in files}
    for path, names in includes.items():
        room, engine = room_of(path)
        for name in names:
            if not (csrc / name).is_file():
                if name.startswith(("../", "./")):
                    yield f"csrc/{path} includes {name}, takes names that begin in csrc"
                continue
            other, other_engine = room_of(name)
            if other not in INCLUDES[room] or other_engine not in ("", engine):
                yield f"csrc/{path} ({room}) includes {name} ({other})"
        if room != "op" and path not in MAY_INCLUDE_TORCH and includes_torch(path, includes, set()):
            yield f"csrc/{path} includes torch, itself or through another file"


def imported_modules(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def python_violations(package: Path) -> Iterator[str]:
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package)
        layer = LAYERS.get(name.parts[0].removesuffix(".py"), 0)
        for module in imported_modules(path.read_text()):
            if module.startswith("."):
                yield f"{package.name}/{name} imports {module}, takes names that begin with {package.name}"
            parts = module.split(".")
            if parts[0] != package.name:
                continue
            other = parts[1] if len(parts) > 1 else "__init__"
            is_module = (package / other).is_dir() or (package / f"{other}.py").is_file()
            other_layer = LAYERS.get(other, 0) if is_module else LAYERS["__init__"]
            is_same = other == name.parts[0].removesuffix(".py")
            if other_layer > layer or (other_layer == layer and layer > 0 and not is_same):
                yield f"{package.name}/{name} imports {module}, which is not below it"


def violations(root: Path) -> list[str]:
    return [*cpp_violations(root / "csrc"), *python_violations(root / "python" / "vitkernels")]


if __name__ == "__main__":
    found = violations(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1])
    print("\n".join(found), file=sys.stderr)
    sys.exit(bool(found))
