"""The wheel: what it holds, what it says of itself, and that it works in an environment of its own."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from email import message_from_bytes
from pathlib import Path
from zipfile import ZipFile

import pytest
import vitkernels as vk
from support.paths import ROOT
from vitkernels import _library

BUILD = ROOT / "build" / "Release"

needs_build = pytest.mark.skipif(
    importlib.util.find_spec("scikit_build_core") is None or not (BUILD / "CMakeCache.txt").exists(),
    reason="this package was not built here",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Made of the libraries that are built already."""
    folder = tmp_path_factory.mktemp("wheel")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-build-isolation", "--no-deps"]
    ran = subprocess.run(
        [*command, "--no-index", "--wheel-dir", folder, ROOT], env={**os.environ, "PATH": path}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (path,) = folder.glob("*.whl")
    return path


@needs_build
@pytest.mark.serial
def test_wheel_in_an_environment_of_its_own(wheel):
    ran = subprocess.run([sys.executable, ROOT / "tools" / "try_wheel.py", wheel], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(rf"^vitkernels +{re.escape(vk.__version__)}$", ran.stdout, re.MULTILINE)


@needs_build
@pytest.mark.serial
def test_contents_of_the_wheel(wheel):
    assert wheel.name.startswith(f"vitkernels-{vk.__version__}-py3-none-linux_")
    with ZipFile(wheel) as archive:
        names = archive.namelist()
        info = f"vitkernels-{vk.__version__}.dist-info/"
        assert not [name for name in names if not name.startswith(("vitkernels/", info))]
        package = {name.removeprefix("vitkernels/") for name in names if name.startswith("vitkernels/")}
        sources = {str(p.relative_to(ROOT / "python/vitkernels")) for p in ROOT.glob("python/vitkernels/**/*.py")}
        libraries = {p.name for p in [_library.cpu_library_path(), *_library.cuda_library_paths()]}
        assert package == sources | libraries | {"py.typed"}
        # (The CUDA library of a development build has them on purpose, for line numbers.)
        assert str(ROOT).encode() not in archive.read("vitkernels/libvitkernels_cpu.so"), "a path of this machine"
        metadata = message_from_bytes(archive.read(info + "METADATA"))
        assert info + "licenses/LICENSE" in names
    required = [value for value in metadata.get_all("Requires-Dist") if "extra ==" not in value]
    assert required == ["torch>=2.10"]
    models = [value for value in metadata.get_all("Requires-Dist") if "extra == " in value and "models" in value]
    assert models and not [value for value in models if "==" in value.partition(";")[0]], "ranges, not pins"
    classifiers = metadata.get_all("Classifier")
    assert all(f"Programming Language :: Python :: 3.{minor}" in classifiers for minor in range(10, 15))
    assert metadata["Requires-Python"] == ">=3.10" and metadata["Description-Content-Type"] == "text/markdown"


#: Newer than manylinux_2_28 has them. Its compiler links the parts of libstdc++ statically, and its libc has `exp` and
#: `log` of an older version; `__libc_single_threaded` is used by libstdc++'s headers where libc has it.
ABOVE_MANYLINUX_2_28 = {
    "__libc_single_threaded", "exp", "log",
    "_ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1Ev",
    "_ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEC1Ev",
    "_ZNKRSt7__cxx1115basic_stringbufIcSt11char_traitsIcESaIcEE3strEv",
    "_ZNOSt7__cxx1115basic_stringbufIcSt11char_traitsIcESaIcEE3strEv",
    "_ZSt28__throw_bad_array_new_lengthv",
}  # fmt: skip
MANYLINUX_2_28 = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}


def compiler():
    """The major version of the g++ that made the library, where binutils can tell."""
    if shutil.which("readelf") is None or shutil.which("nm") is None:
        return None
    command = ["readelf", "--string-dump=.comment", str(BUILD / "libvitkernels_cpu.so")]
    found = re.search(r"GCC: \(.*?\) (\d+)", subprocess.run(command, capture_output=True, text=True).stdout)
    return found and int(found[1])


@pytest.mark.skipif(compiler() != 12 or os.uname().machine != "x86_64", reason="another compiler binds other symbols")
def test_symbols_that_older_systems_lack_are_known():
    command = ["nm", "-D", "--undefined-only", str(_library.cpu_library_path())]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    above = set()
    for symbol, library, version in re.findall(r" (\S+)@(GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)$", listed, re.MULTILINE):
        if tuple(map(int, version.split("."))) > MANYLINUX_2_28[library]:
            above.add(symbol)
    assert above <= ABOVE_MANYLINUX_2_28
