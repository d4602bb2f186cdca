"""What ``make cuda-report`` reads from ptxas, and what it says of the library's kernels."""

import shutil
import struct
from dataclasses import replace

import pytest
from support import emulation
from vitkernels import _library

from tools import cuda_report, pipe_model, sass

pytestmark = pytest.mark.skipif(shutil.which("c++filt") is None, reason="binutils are not installed")


HASH = "49_GLOBAL__N__8500bb35_16_backward_cuda_cu_2c7c268e"
QUERIES = (
    f"_ZN10vitkernels{HASH}26attention_backward_queriesIN7cutlass6half_tELi256EEEvNS_27AttentionBackwardCudaParamsE"
)
FORWARD = f"_ZN10vitkernels{HASH}9attentionIN7cutlass10bfloat16_tELi64EEEvNS_19AttentionCudaParamsE"
# As ptxas 13.0 prints it.
RECORDED = f"""ptxas info    : 11 bytes gmem
ptxas info    : Compiling entry function '{QUERIES}' for 'sm_90'
ptxas info    : Function properties for {QUERIES}
    72 bytes stack frame, 104 bytes spill stores, 100 bytes spill loads
ptxas info    : Used 243 registers, used 1 barriers, 72 bytes cumulative stack size
ptxas info    : Compile time = 594.636 ms
ptxas info    : Compiling entry function '{FORWARD}' for 'sm_90'
ptxas info    : Function properties for {FORWARD}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 238 registers, used 1 barriers, 1024 bytes smem
ptxas info    : Compile time = 483.765 ms
"""


def test_recorded_output():
    backward, forward = cuda_report.parse(RECORDED)
    assert backward == cuda_report.Kernel("attention_backward_queries", "float16, 256", "90", 243, 72, 104, 100, 0)
    assert forward == cuda_report.Kernel("attention", "bfloat16, 64", "90", 238, 0, 0, 0, 1024)
    assert backward.spills and not backward.is_forward and forward.is_forward
    assert str(forward) == "attention<bfloat16, 64>" and forward.family == "attention<*, *>"


def test_spills_of_a_called_function():
    called = "ptxas info    : Function properties for _ZN1v3runEv\n"
    called += "    8 bytes stack frame, 104 bytes spill stores, 256 bytes spill loads\n"
    backward, forward = cuda_report.parse(RECORDED + called)
    assert (forward.stack, forward.spill_stores, forward.spill_loads) == (8, 104, 256)
    assert (backward.stack, backward.spill_stores, backward.spill_loads) == (72, 104, 100)


@pytest.mark.parametrize(
    ("demangled", "name", "arguments"),
    [
        ("void v::(anonymous namespace)::k<c10::BFloat16, (v::Side)8>(v::P)", "k", "bfloat16, 8"),
        (
            "void v::(anonymous namespace)::k<v::(anonymous namespace)::B<float, 64, 1> >(v::P)",
            "k",
            "B<float32, 64, 1>",
        ),
        ("v::plain(int)", "plain", ""),
    ],
)
def test_names(demangled, name, arguments):
    assert cuda_report.short_name(demangled) == (name, arguments)


def test_faults():
    backward, forward = cuda_report.parse(RECORDED)
    assert cuda_report.faults([backward, forward]) == [], "a backward kernel may spill"
    assert cuda_report.faults([replace(forward, spill_loads=8)]) == ["attention<bfloat16, 64> spills on sm_90"]
    decayed = replace(forward, name="decayed_linear", arguments="DecayedKernel<float32, 64, true>", spill_loads=20)
    assert cuda_report.faults([decayed]) == [] != cuda_report.faults([replace(decayed, spill_stores=60)])
    assert cuda_report.faults([replace(forward, stack=512)]) == [
        "attention<bfloat16, 64> has 512 bytes of stack on sm_90"
    ]
    assert cuda_report.faults([forward] * 13) == ["attention<*, *> has 13 instantiations on sm_90, takes 12"]


def test_budget_of_a_direction():
    backward, forward = cuda_report.parse(RECORDED)
    families = [replace(forward, name=f"attention_{i}") for i in range(5) for _ in range(10)]
    assert cuda_report.faults(families) == ["forward attention has 50 instantiations on sm_90, takes 48"]
    others = [replace(forward, name="merge"), replace(forward, arguments="bfloat16")] * 6
    assert cuda_report.faults([*families[:48], backward, *others]) == []
    assert cuda_report.summary([*families, backward])[-1].endswith("forward 50 of 48, backward 1 of 48.")


def test_table():
    kernels = [replace(k, architecture=a) for a in ("80", "90") for k in cuda_report.parse(RECORDED)]
    rows = cuda_report.table(kernels, {"attention<bfloat16, 64>": [33792, 256]})
    assert [len(row) for row in rows] == [8] * 3
    assert rows[1] == ["`attention_backward_queries<float16, 256>`", "243", "243", "104 + 100", "104 + 100", "72",
                       "0 + unknown", "unknown"]  # fmt: skip
    assert rows[2][5:] == ["0", "33792", "256"]
    assert (
        "`attention_backward_queries<float16, 256>` on sm_80, 243 registers, 204 bytes"
        in cuda_report.summary(kernels)[1]
    )


def test_loop_table():
    opcodes = ("HMMA.16816.F32",) * 16 + ("LDSM.16.M88.4",) * 4 + ("MUFU.EX2",) * 8 + ("LDL", "STL", "FFMA", "BRA")
    _, forward = cuda_report.parse(RECORDED)
    kernels = [replace(forward, loops=(sass.Loop(opcodes, 40),)), replace(forward, arguments="none")]
    rows = cuda_report.loop_table(kernels, {"attention<bfloat16, 64>": [33792, 256]})
    assert len({len(row) for row in rows}) == 1 and len(rows) == 2 + len(pipe_model.FLASH_ATTENTION_2)
    assert rows[-1] == [
        "`attention<bfloat16, 64>`", "32", "40", "16", "4", "8", "1", "2", "2.0", "4.0", "0.25", "238", "1 x 8",
        "316 / 474",
    ]  # fmt: skip
    assert cuda_report.loop_table(kernels, {})[-1][-2] == "unknown"


def fat_binary(*entries):
    body = b"".join(
        struct.pack("<HHIQIIHHI", kind, 0x101, 64, len(data), 0, 64, 0, 0, 80) + bytes(32) + data
        for kind, data in entries
    )
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_images_of_a_library():
    text = b".version 9.0\n.target sm_80\n.visible .entry k() { ret; }\n"
    library = (
        b"\x7fELF"
        + fat_binary((1, text + bytes(5)), (2, b"\x7fELF machine code"))
        + bytes(7)
        + fat_binary((1, b".version 9.0\n"))
    )
    assert list(cuda_report.ptx_images(library)) == [text], "kernels only, and only as PTX"
    with pytest.raises(SystemExit, match="compressed"):
        list(cuda_report.ptx_images(fat_binary((1, b"\x28\xb5\x2f\xfd"))))


LIBRARIES = [*_library.cuda_library_paths(), emulation.DIRECTORY / "libvitkernels_cuda_emulated.so"]


@pytest.mark.parametrize("architecture", ["80", pytest.param("90", marks=pytest.mark.full)])
def test_kernels_of_the_library(architecture):
    """No forward kernel spills more than it may, and none has more instantiations than dtypes and head dimensions."""
    programs, library = cuda_report.Programs.find(), next((path for path in LIBRARIES if path.exists()), None)
    if programs is None or library is None:
        pytest.skip("no ptxas" if programs is None else "built without CUDA")
    kernels = cuda_report.measure(programs, library, [architecture])
    assert {k.architecture for k in kernels} == {architecture} and any(not k.is_forward for k in kernels)
    assert cuda_report.faults(kernels) == []
