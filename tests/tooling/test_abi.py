"""What the compiled libraries ask of their surroundings: torch's stable C functions, the C and C++ runtimes, only."""

import re
import shutil
import subprocess
from collections import Counter
from importlib import metadata

import pytest
from support.paths import ROOT, SUPPORT
from vitkernels import _library

OBJECTS = ROOT / "build" / "Release" / "CMakeFiles"
SYSTEM_LIBRARIES = ("libstdc++.so.", "libgcc_s.so.", "libm.so.", "libc.so.", "libgomp.so.", "ld-linux")

pytestmark = pytest.mark.skipif(shutil.which("nm") is None, reason="binutils are not installed")


each_library = pytest.mark.parametrize(
    "library", [_library.cpu_library_path(), *_library.cuda_library_paths()], ids=lambda path: path.stem
)


def lines(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def undefined_symbols(library):
    return [line.split()[-1] for line in lines("nm", "-D", "--undefined-only", str(library))]


def stable_symbols():
    text = (SUPPORT / "stable_symbols_2_10.txt").read_text()
    return {line for line in text.splitlines() if line and not line.startswith("#")}


@each_library
def test_torch_symbols_are_stable(library):
    used = {s for s in undefined_symbols(library) if re.match(r"(aoti_)?torch_", s)}
    assert used, "the library uses nothing of torch: is it the right file?"
    assert not used - stable_symbols()


@each_library
def test_other_symbols_have_a_version(library):
    """Those of the C and C++ runtimes do; one of torch's C++ or of Python's C API does not."""
    weak = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__", "vitkernels_emulates_amx"}
    others = {s for s in undefined_symbols(library) if not re.match(r"(aoti_)?torch_", s)} - weak
    assert not {s for s in others if not re.search(r"@(GLIBC|GLIBCXX|CXXABI|GCC|GOMP|LIBC|OMP)", s)}


@each_library
def test_needed_libraries(library):
    """The CUDA runtime is part of the CUDA library: torch's may be of another version."""
    dynamic = "\n".join(lines("readelf", "--dynamic", "--wide", str(library)))
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    torch_libraries = (
        {"libtorch_cpu.so"} if library == _library.cpu_library_path() else {"libtorch_cpu.so", "libtorch_cuda.so"}
    )
    assert {n for n in needed if not n.startswith(SYSTEM_LIBRARIES)} == torch_libraries


@each_library
def test_exported_symbols(library):
    """No function or variable that another library's could be taken for; no unique symbol, which outlives dlclose."""
    exported = [line.split()[-2:] for line in lines("nm", "-D", "--defined-only", str(library))]
    strong = {name for kind, name in exported if kind not in "WV"} - {"__bss_start", "_edata", "_end"}
    functions = {"vitkernels_isa", "vitkernels_isas_built", "vitkernels_isas_supported"}
    assert strong == (functions if library == _library.cpu_library_path() else set())


def objects_of(isa, pattern):
    """Those whose sources exist: a build folder keeps objects of sources that have gone."""
    folder = OBJECTS / f"kernels_{isa}.dir"
    return [o for o in sorted(folder.rglob(pattern)) if (ROOT / o.relative_to(folder).with_suffix("")).exists()]


@pytest.mark.parametrize("isa", _library.isas_built())
def test_code_stays_in_its_instruction_set(isa):
    """Weak functions are merged by name: those that an instruction set's objects hold must bear its name."""
    objects = objects_of(isa, "*.o")
    if not objects:
        pytest.skip(f"no objects in {OBJECTS}")
    weak = [line for o in objects for line in lines("nm", "--demangle", str(o)) if re.search(r" [WVu] ", line)]
    assert weak, "no weak symbol at all: templates would be some"
    runtime = "DW.ref.__gxx_personality_v0"  # data: the C++ runtime's handler of exceptions
    assert not [line for line in weak if f"vitkernels::{isa}::" not in line and runtime not in line]


DTYPES = ("double", "float", "BFloat16", "Float16")


def prefetches(objects):
    """How many are in the functions of each dtype."""
    counts, dtype = Counter(), None
    for line in lines("objdump", "--disassemble", "--demangle", "--no-show-raw-insn", *map(str, objects)):
        if function := re.match(r"[0-9a-f]+ <(.*)>:", line):
            found = re.search(rf"<(?:vitkernels::)?({'|'.join(DTYPES)})>", function[1])
            dtype = found and found[1]
        elif re.search(r"\s(prefetch|prfm)", line):
            counts[dtype] += 1
    return counts


@pytest.mark.skipif(shutil.which("objdump") is None, reason="binutils are not installed")
@pytest.mark.parametrize(("name", "tensors"), [("spatial_forward", 4), ("spatial_backward", 8)])
@pytest.mark.parametrize("isa", _library.isas_built())
def test_maps_are_prefetched(isa, name, tensors):
    """A compiler may drop a prefetch as dead code, which no result would show."""
    objects = objects_of(isa, f"{name}*.cpp.o")
    if not objects:
        pytest.skip(f"no objects in {OBJECTS}")
    counts = prefetches(objects)
    assert all(counts[dtype] >= tensors for dtype in DTYPES), counts


def test_wheel_is_for_every_python():
    try:
        wheel = metadata.distribution("vitkernels").read_text("WHEEL")
    except metadata.PackageNotFoundError:
        pytest.skip("not installed as a package")
    tags = re.findall(r"^Tag: (.+)$", wheel or "", re.MULTILINE)
    assert tags and all(tag.startswith("py3-none-") for tag in tags)
