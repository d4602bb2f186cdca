"""Loops in machine code, the model of their speed, and how many instructions the main loops of the kernels may have."""

import operator
import re

import pytest
from support import emulation
from vitkernels import _library

from tools import cuda_report, pipe_model, sass

# As nvdisasm prints it: a loop with a block for a term, one that is rarely executed, a product out of line, and a loop.
CODE = """
	.section	.text._Z1kv,"ax",@progbits
.text._Z1kv:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   LDSM.16.M88.4 R4, [R0] ;
        /*0020*/              @!PT LDS RZ, [RZ] ;
        /*0030*/              @!P0 BRA `(.L_x_1) ;
        /*0040*/                   FADD R8, R8, R9 ;
        /*0050*/                   FADD R8, R8, R9 ;
.L_x_1:
        /*0060*/                   BRA.DIV UR4, `(.L_x_7) ;
        /*0070*/               @P1 BRA `(.L_x_5) ;
        /*0080*/                   BRA `(.L_x_2) ;
.L_x_2:
        /*0090*/              @!P2 BRA `(.L_x_3) ;
        /*00a0*/                   VOTE.ANY R3, PT, P0 ;
        /*00b0*/                   NANOSLEEP RZ ;
        /*00c0*/                   MUFU.EX2 R8, R8 ;
.L_x_3:
        /*00d0*/                   MUFU.EX2 R9, R9 ;
.L_x_4:
        /*00e0*/                   SHFL.BFLY PT, R9, R9, 0x1, 0x1f ;
        /*00f0*/               @P3 BRA `(.L_x_4) ;
        /*0100*/                   BRA.U UP0, `(.L_x_0) ;
        /*0110*/                   EXIT ;
.L_x_5:
        /*0120*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0130*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0140*/                   BRA `(.L_x_2) ;
.L_x_7:
        /*0150*/                   WARPSYNC.COLLECTIVE R2, `(.L_x_8) ;
.L_x_8:
        /*0160*/                   BRA `(.L_x_1) ;
"""


def test_pass_through_a_loop():
    (code,) = sass.parse(CODE).values()
    assert len(code) == CODE.count("/*")
    (loop,) = sass.loops(code)
    assert loop.opcodes == (
        "LDSM.16.M88.4", "LDS", "BRA", "BRA.DIV", "BRA", "HMMA.16816.F32.BF16", "HMMA.16816.F32.BF16", "BRA", "BRA",
        "MUFU.EX2", "SHFL.BFLY", "BRA", "BRA.U",
    ), "over the term and the rare block, through the product"  # fmt: skip
    assert loop.longest == len(loop.opcodes) + 2, "the term, but not the rare block"
    assert loop.slots_per_hmma == 6.5 and loop.ldsm_per_hmma == 0.5


def test_loops_inside_a_loop():
    def hmma(count, then):
        return [*[sass.Instruction("HMMA.16816.F32")] * count, sass.Instruction("BRA", True, then)]

    assert [len(loop.opcodes) for loop in sass.loops([*hmma(1, 0), *hmma(2, 2), sass.Instruction("EXIT")])] == [2, 3]
    # From the second loop back to the first: a pass of it contains one of either.
    nested = [sass.Instruction("MOV"), *hmma(1, 1), *hmma(2, 0), sass.Instruction("EXIT")]
    assert [(len(loop.opcodes), loop.count("HMMA")) for loop in sass.loops(nested)] == [(6, 3), (2, 1)]
    only_inside = [sass.Instruction("MOV"), *hmma(1, 1), sass.Instruction("BRA", True, 0), sass.Instruction("EXIT")]
    assert [len(loop.opcodes) for loop in sass.loops(only_inside)] == [2]


def test_model():
    products, exponentials = ("HMMA.16816.F32",) * 128, ("MUFU.EX2",) * 64
    flash_attention = sass.Loop(products + exponentials + ("FFMA",) * 371, 0)
    assert [round(x) for x in pipe_model.teraflops(flash_attention)] == [316, 474], "313 and 474 from its real code"
    assert flash_attention.scores == sass.Loop(exponentials + ("MUFU.EX2",) * 2, 0).scores == 64
    assert pipe_model.cycles(flash_attention) == {"issue": 563, "tensor": 1024, "special": 512, "fma": 371}
    more_integers = sass.Loop(products + ("IADD3",) * 1024, 0)
    assert [round(x) for x in pipe_model.teraflops(more_integers)] == [237, 237], "integers bound it"
    more_loads = sass.Loop(products + ("LDSM.16.M88.4",) * 128, 0)
    assert [round(x) for x in pipe_model.teraflops(more_loads)] == [237, 237], "shared memory bounds it"
    tf32 = sass.Loop(("HMMA.1688.F32.TF32",) * 128, 0)
    assert [round(x) for x in pipe_model.teraflops(tf32)] == [237, 237], "half the rate"


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "blocks"),
    [(255, 0, 128, 2), (168, 0, 128, 3), (236, 0, 256, 1), (32, 0, 1024, 2), (32, 0, 32, 32), (64, 99 * 1024, 128, 2)],
)
def test_blocks_of_an_sm(registers, shared, threads, blocks):
    assert pipe_model.blocks_per_sm(registers, shared, threads) == blocks


# Instructions and LDSM for each HMMA of the main loop. That of the forward's resident kernel is a whole query tile,
# from the copy of the next to the stores.
LIMITS = {
    "attention_plain<{}, 32, false>": (7.3, 0.35),
    "attention_plain<{}, 64, false>": (5.0, 0.35),
    "attention_plain<{}, 128, false>": (4.6, 0.35),
    "attention_plain<{}, 64, true>": (6.0, 0.35),
    "attention_resident<{}, 64, false>": (5.4, 0.53),
    "attention_resident<{}, 64, true>": (6.0, 0.53),
    "attention_backward_keys<PlainKeysKernel<{}, 32, false, false>>": (5.6, 0.4),
    "attention_backward_keys<PlainKeysKernel<{}, 64, false, false>>": (4.5, 0.4),
    "attention_backward_keys<PlainKeysKernel<{}, 128, false, false>>": (3.5, 0.65),
    "attention_backward_keys<PlainKeysKernel<{}, 64, true, false>>": (5.0, 0.4),
    "attention_backward_keys<PlainKeysKernel<{}, 64, false, true>>": (4.5, 0.5),
    "attention_backward_keys<PlainKeysKernel<{}, 64, true, true>>": (5.4, 0.5),
    "attention_backward_queries<PlainQueriesKernel<{}, 32, false>>": (5.6, 0.35),
    "attention_backward_queries<PlainQueriesKernel<{}, 64, false>>": (4.5, 0.35),
    "attention_backward_queries<PlainQueriesKernel<{}, 128, false>>": (3.5, 0.45),
    "attention_backward_queries<PlainQueriesKernel<{}, 64, true>>": (4.5, 0.35),
    "spatial_attention_plain<SpatialPlainForwardKernel<{}, 32>>": (6.6, 0.35),
    "spatial_attention_plain<SpatialPlainForwardKernel<{}, 64>>": (4.8, 0.35),
    "spatial_attention_plain<SpatialPlainForwardKernel<{}, 128>>": (3.8, 0.4),
    # The whole work on a window: at 32 columns 1600 and 2900 instructions for the four warps of a head.
    "window_attention<WindowForwardKernel<{}, 32>>": (12.5, 0.57),
    "window_attention<WindowForwardKernel<{}, 64>>": (8.0, 0.57),
    "window_attention_backward<WindowBackwardKernel<{}, 32>>": (9.06, 0.65),
    "window_attention_backward<WindowBackwardKernel<{}, 64>>": (6.2, 0.6),
    # The widest of its loops over the depth, of the first product.
    "monarch_multiply<MonarchKernel<{}, 1>>": (3.5, 0.38),
    "monarch_multiply<MonarchKernel<{}, 2>>": (3.8, 0.38),
    "monarch_grad_weight<MonarchGradWeightKernel<{}>>": (4.2, 0.5),
}
# Of kernels that float16 has none of: it becomes float32 there.
BFLOAT16_LIMITS = {
    # Of the identity; relu adds half an instruction, other feature maps more.
    "linear_state<LinearStateKernel<{}, 32>>": (6.3, 0.7),
    "linear_state<LinearStateKernel<{}, 64>>": (3.8, 0.6),
    "linear_state<LinearStateKernel<{}, 128>>": (3.0, 0.36),
    "linear_output<LinearOutputKernel<{}, 64>>": (6.0, 0.4),
    "linear_output<LinearOutputKernel<{}, 128>>": (4.2, 0.6),
    # With the squares of channels.
    "channel_sum<ChannelSumKernel<{}, 32>>": (4.2, 1.05),
    "channel_sum<ChannelSumKernel<{}, 64>>": (2.9, 0.8),
    "channel_sum<ChannelSumKernel<{}, 128>>": (2.2, 0.5),
    "channel_grad<ChannelGradKernel<{}, 64>>": (7.3, 0.4),
    "channel_grad<ChannelGradKernel<{}, 128>>": (4.8, 0.6),
}
# The same of a kernel's second loop, with a table.
SECOND_LIMITS = {
    "spatial_attention_plain<SpatialPlainForwardKernel<{}, 32>>": (9.5, 0.35),
    "spatial_attention_plain<SpatialPlainForwardKernel<{}, 64>>": (6.6, 0.35),
    "spatial_attention_plain<SpatialPlainForwardKernel<{}, 128>>": (4.8, 0.4),
}
# Bytes of stack, and how many loads from it a pass of the loop may have.
SPILLS = {
    "attention_backward_keys<PlainKeysKernel<{}, 64, false, true>>": (8, 1),
    "attention_backward_keys<PlainKeysKernel<{}, 64, true, true>>": (8, 1),
}
# Registers of kernels whose loops depend on the sizes: two blocks of 256 threads fit a multiprocessor.
WITHOUT_SPILLS = {"spectral_gating<{}>": 128, "spectral_gating_grad<{}>": 128}
# Of kernels without matrix instructions: all of them, and the reads and the writes of shared memory among them, 64 bits
# each. A thread has 8 points; each kind of stage, radix 8, 4 or 2 in between, is there once forward and once back, and
# twice forward where two tensors are transformed.
TRANSFORM_LIMITS = {
    "long_conv<{}, 1, true>": (2250, 64),
    "long_conv<{}, 1, false>": (1950, 64),
    "long_conv_grad<{}, 1, true, true>": (3300, 96),
    "long_conv_grad<{}, 1, true, false>": (2250, 64),
}
LIBRARIES = [*_library.cuda_library_paths(), emulation.DIRECTORY / "libvitkernels_cuda_emulated.so"]


@pytest.mark.parametrize(
    ("dtype", "mangled"),
    [("bfloat16", "10bfloat16_t"), pytest.param("float16", "6half_t", marks=pytest.mark.full)],
)
def test_main_loops(dtype, mangled):
    """In few instructions on sm_90, and in registers."""
    programs, library = cuda_report.Programs.find(), next((path for path in LIBRARIES if path.exists()), None)
    if programs is None or library is None or programs.nvdisasm is None:
        pytest.skip("needs ptxas, nvdisasm and a library built with CUDA")
    templates = {re.search(r"(\w+)<{}", kernel)[1] for kernel in LIMITS | BFLOAT16_LIMITS}
    names = "|".join(f"{len(template)}{template}I" for template in sorted(templates))
    kernels = {str(k): k for k in cuda_report.measure(programs, library, ["90"], f"({names})N7cutlass{mangled}")}
    limits = LIMITS | (BFLOAT16_LIMITS if dtype == "bfloat16" else {})
    for name, (slots, ldsm), index in [(*x, 0) for x in limits.items()] + [(*x, 1) for x in SECOND_LIMITS.items()]:
        kernel, (stack, reloads) = kernels[name.format(dtype)], SPILLS.get(name, (0, 0))
        loop = sorted(kernel.loops, key=lambda loop: (-loop.count("HMMA"), loop.slots_per_hmma))[index]
        is_lean = loop.slots_per_hmma <= slots and loop.ldsm_per_hmma <= ldsm
        assert is_lean and kernel.stack <= stack and loop.count("LDL", "STL") <= reloads, (
            f"{kernel}: {loop.slots_per_hmma:.2f} instructions and {loop.ldsm_per_hmma:.2f} LDSM for each HMMA, "
            f"{kernel.stack} bytes of stack, takes {slots}, {ldsm} and {stack}"
        )


@pytest.mark.parametrize("architecture", [pytest.param("80", marks=pytest.mark.full), "90"])
def test_transforms_of_maps_stay_in_registers(architecture):
    programs, library = cuda_report.Programs.find(), next((path for path in LIBRARIES if path.exists()), None)
    if programs is None or library is None:
        pytest.skip("needs ptxas and a library built with CUDA")
    kernels = {str(k): k for k in cuda_report.measure(programs, library, [architecture], "spectral_gating")}
    for name, registers in WITHOUT_SPILLS.items():
        for dtype in ("float32", "bfloat16", "float16"):
            kernel = kernels[name.format(dtype)]
            assert kernel.registers <= registers and kernel.stack == 0 and not kernel.spills, kernel


@pytest.mark.parametrize(
    ("dtype", "mangled"),
    [("bfloat16", "N.*8BFloat16"), pytest.param("float32", "f", marks=pytest.mark.full)],
)
def test_transforms(dtype, mangled):
    """In few instructions on sm_90, in registers, and points of 64 bits in shared memory."""
    programs, library = cuda_report.Programs.find(), next((path for path in LIBRARIES if path.exists()), None)
    if programs is None or library is None or programs.nvdisasm is None:
        pytest.skip("needs ptxas, nvdisasm and a library built with CUDA")
    kernels = {str(k): k for k in cuda_report.measure(programs, library, ["90"], rf"\d+long_conv(_grad)?I{mangled}")}
    for name, (instructions, accesses) in TRANSFORM_LIMITS.items():
        kernel = kernels[name.format(dtype)]
        reads, writes, local = (
            [x for x in kernel.opcodes if x.startswith(prefix)] for prefix in ("LDS", "STS", ("LDL", "STL"))
        )
        assert {*reads} == {"LDS.64"} and {*writes} == {"STS.64"} and not local and not kernel.stack, name
        found = len(kernel.opcodes), len(reads), len(writes)
        assert all(map(operator.le, found, (instructions, accesses, accesses))), f"{kernel}: {found}"
