"""What the compiled library asks of its surroundings: torch's stable C functions, the C and C++ runtimes, no more."""

import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
from vitkernels import _library

HERE = Path(__file__).parent
OBJECTS = HERE.parent / "build" / "Release" / "CMakeFiles"
SYSTEM_LIBRARIES = ("libstdc++.so.", "libgcc_s.so.", "libm.so.", "libc.so.", "libgomp.so.", "ld-linux")

pytestmark = pytest.mark.skipif(shutil.which("nm") is None, reason="binutils are not installed")


def lines(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def undefined_symbols():
    return [line.split()[-1] for line in lines("nm", "-D", "--undefined-only", str(_library.cpu_library_path()))]


def stable_symbols():
    text = (HERE / "stable_symbols_2_10.txt").read_text()
    return {line for line in text.splitlines() if line and not line.startswith("#")}


def test_torch_symbols_are_stable():
    used = {s for s in undefined_symbols() if re.match(r"(aoti_)?torch_", s)}
    assert used, "the library uses nothing of torch: is it the right file?"
    assert not used - stable_symbols()


def test_other_symbols_have_a_version():
    """Those of the C and C++ runtimes do; one of torch's C++ or of Python's C API does not."""
    weak = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__", "vitkernels_emulates_amx"}
    others = {s for s in undefined_symbols() if not re.match(r"(aoti_)?torch_", s)} - weak
    assert not {s for s in others if not re.search(r"@(GLIBC|GLIBCXX|CXXABI|GCC|GOMP|LIBC|OMP)", s)}


def test_needed_libraries():
    dynamic = "\n".join(lines("readelf", "--dynamic", "--wide", str(_library.cpu_library_path())))
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    assert "libtorch_cpu.so" in needed
    assert not [n for n in needed if n != "libtorch_cpu.so" and not n.startswith(SYSTEM_LIBRARIES)]


def test_exported_symbols():
    """No function or variable that another library's could be taken for; no unique symbol, which outlives dlclose."""
    exported = [line.split()[-2:] for line in lines("nm", "-D", "--defined-only", str(_library.cpu_library_path()))]
    strong = {name for kind, name in exported if kind not in "WV"} - {"__bss_start", "_edata", "_end"}
    assert strong == {"vitkernels_isa", "vitkernels_isas_built", "vitkernels_isas_supported"}


@pytest.mark.parametrize("isa", _library.isas_built())
def test_code_stays_in_its_instruction_set(isa):
    """Weak functions are merged by name: those that an instruction set's objects hold must bear its name."""
    objects = sorted((OBJECTS / f"kernels_{isa}.dir").rglob("*.o"))
    if not objects:
        pytest.skip(f"no objects in {OBJECTS}")
    weak = [line for o in objects for line in lines("nm", "--demangle", str(o)) if re.search(r" [WVu] ", line)]
    assert weak, "no weak symbol at all: templates would be some"
    runtime = "DW.ref.__gxx_personality_v0"  # data: the C++ runtime's handler of exceptions
    assert not [line for line in weak if f"vitkernels::{isa}::" not in line and runtime not in line]


def test_wheel_is_for_every_python():
    try:
        wheel = metadata.distribution("vitkernels").read_text("WHEEL")
    except metadata.PackageNotFoundError:
        pytest.skip("not installed as a package")
    tags = re.findall(r"^Tag: (.+)$", wheel or "", re.MULTILINE)
    assert tags and all(tag.startswith("py3-none-") for tag in tags)
