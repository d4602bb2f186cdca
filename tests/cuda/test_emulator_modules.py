"""The modules of ``vitkernels.nn`` and accelerated blocks of model families on a GPU: agreement with float64."""

import copy

import pytest
import torch
import vitkernels as vk
from support.devices import HALF
from support.emulation import needs_emulator
from support.error_policy import FLOOR, GRADIENT_FACTOR, OUTPUT_FACTOR, Standard, largest_error
from support.model_zoo import outputs_and_gradients, randomised
from support.nn_modules import MODULES, ON_CPU_ONLY

pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("transformers")
from timm.layers.attention import Attention
from timm.models import beit, davit, maxxvit, swin_transformer, swin_transformer_v2, tiny_vit, twins
from timm.models import vision_transformer_sam as sam
from torch.nn import LayerNorm
from torchvision.models import swin_transformer as torchvision_swin
from torchvision.models.vision_transformer import EncoderBlock
from transformers import SwinConfig, Swinv2Config, ViTConfig, ViTModel
from transformers.models.swin.modeling_swin import SwinLayer
from transformers.models.swinv2.modeling_swinv2 import Swinv2Layer

pytestmark = needs_emulator

DIM, HEADS, SIZE, WINDOW, SHIFT = 64, 2, (8, 12), 4, 2
MAP, SEQUENCE, TOKENS = (2, *SIZE, DIM), (2, 50, DIM), (2, 8 * 12, DIM)
SHIFTED = {"num_heads": HEADS, "window_size": WINDOW, "shift_size": SHIFT}
LAYER = {"dim": DIM, "input_resolution": SIZE, "num_heads": HEADS, "shift_size": SHIFT}
SMALL_VIT = {
    "hidden_size": DIM, "num_attention_heads": HEADS, "intermediate_size": DIM, "num_hidden_layers": 1,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip


def partition(kind):
    config = maxxvit.MaxxVitTransformerCfg(dim_head=DIM // HEADS, window_size=(4, 3), grid_size=(4, 3))
    return maxxvit.PartitionAttentionCl(DIM, kind, config)


def torchvision_block(version):
    block = getattr(torchvision_swin, f"SwinTransformerBlock{version}")
    return block(DIM, HEADS, [WINDOW, WINDOW], [SHIFT, SHIFT])


#: The forward's kernel in 16 bits, and what makes the module, the shape of its input, and its other arguments.
ROWS = {
    "AgentAttention": ("attention_plain", MODULES["AgentAttention"]),
    "Attention": ("attention_plain", MODULES["Attention"]),
    "CrissCrossAttention": ("spatial_attention", MODULES["CrissCrossAttention"]),
    "CrossShapedWindowAttention": ("window_attention", MODULES["CrossShapedWindowAttention"]),
    "GridAttention": ("window_attention", MODULES["GridAttention"]),
    "HaloAttention": ("spatial_attention", MODULES["HaloAttention"]),
    "MonarchLinear": ("monarch_multiply", MODULES["MonarchLinear"]),
    "MonarchMLP": ("monarch_multiply", MODULES["MonarchMLP"]),
    "MonarchMixer": ("long_conv", MODULES["MonarchMixer"]),
    "NeighborhoodAttention1D": ("spatial_attention_plain", MODULES["NeighborhoodAttention1D"]),
    "NeighborhoodAttention2D": ("spatial_attention_plain", MODULES["NeighborhoodAttention2D"]),
    "NeighborhoodAttention3D": ("spatial_attention_plain", MODULES["NeighborhoodAttention3D"]),
    "ProxyTokenAttention": ("attention_plain", MODULES["ProxyTokenAttention"]),
    "SpectralGating": ("spectral_gating", MODULES["SpectralGating"]),
    "TokenTransformer": ("attention_plain", MODULES["TokenTransformer"]),
    "WindowAttention": ("spatial_attention_plain", MODULES["WindowAttention"]),
    "WindowAttentionV2": ("spatial_attention", MODULES["WindowAttentionV2"]),
    "timm vit": ("attention_plain", lambda: (Attention(DIM, HEADS, qkv_bias=True), SEQUENCE)),
    "timm beit": ("attention_plain", lambda: (beit.Attention(DIM, HEADS, window_size=(4, 5)), (2, 21, DIM))),
    "timm sam": (
        "attention", lambda: (sam.Attention(DIM, HEADS, use_rel_pos=True, input_size=(4, 5)), (2, 4, 5, DIM)),
    ),
    "timm swin": ("window_attention", lambda: (swin_transformer.SwinTransformerBlock(DIM, SIZE, **SHIFTED), MAP)),
    "timm swin v2": (
        "window_attention", lambda: (swin_transformer_v2.SwinTransformerV2Block(DIM, SIZE, **SHIFTED), MAP),
    ),
    "timm maxvit windows": ("window_attention", lambda: (partition("block"), MAP)),
    "timm maxvit grid": ("window_attention", lambda: (partition("grid"), MAP)),
    # Windows of 5 do not fit the map.
    "timm davit": ("window_attention", lambda: (davit.SpatialBlock(DIM, HEADS, window_size=5), (2, DIM, *SIZE))),
    "timm tinyvit": ("window_attention", lambda: (tiny_vit.TinyVitBlock(DIM, HEADS, window_size=5), MAP)),
    "timm twins": ("window_attention", lambda: (twins.LocallyGroupedAttn(DIM, HEADS, ws=5), TOKENS, SIZE)),
    "timm twins global": (
        "attention_resident", lambda: (twins.GlobalSubSampleAttn(DIM, HEADS, sr_ratio=2), TOKENS, SIZE),
    ),
    "torchvision vit": ("attention_plain", lambda: (EncoderBlock(HEADS, DIM, DIM, 0.0, 0.0, LayerNorm), SEQUENCE)),
    "torchvision swin": ("window_attention", lambda: (torchvision_block(""), MAP)),
    "torchvision swin v2": ("window_attention", lambda: (torchvision_block("V2"), MAP)),
    "transformers vit": ("attention_plain", lambda: (ViTModel(ViTConfig(**SMALL_VIT)), (2, 3, 32, 32))),
    "transformers swin": (
        "window_attention",
        lambda: (SwinLayer(SwinConfig(window_size=WINDOW, attn_implementation="sdpa"), **LAYER), TOKENS, SIZE),
    ),
    "transformers swin v2": (
        "window_attention", lambda: (Swinv2Layer(Swinv2Config(window_size=WINDOW), **LAYER), TOKENS, SIZE),
    ),
}  # fmt: skip
assert ROWS.keys() >= MODULES.keys() - ON_CPU_ONLY, "a module without a row"
IN_FLOAT32 = {"timm vit": "attention", "timm swin": "spatial_attention"}
CALLS = [(name, dtype, kernel) for name, (kernel, _) in ROWS.items() for dtype in HALF]
CALLS += [(name, torch.float32, kernel) for name, kernel in IN_FLOAT32.items()]


def computed(module, x, *arguments, is_accelerated=False):
    """By a copy: the kernels take what was allocated under their eyes, and TinyViT keeps a table and its graph."""
    module, x = copy.deepcopy(module), x.clone().requires_grad_()
    if is_accelerated:
        vk.accelerate(module)
    return outputs_and_gradients(module, x, *arguments) | {"input": x.grad.double()}


def standards(module, inputs, *arguments):
    """Without CUDA kernels, by the stock module or ours; of the first of ``inputs``, with the largest error in any.

    In one of them, a gradient of few numbers is right by chance.
    """
    wide = copy.deepcopy(module).double()
    pairs = [(computed(module, x, *arguments), computed(wide, x.double(), *arguments)) for x in inputs]
    for name, truth in pairs[0][1].items():
        error = max(largest_error(plain[name], exact[name]) for plain, exact in pairs)
        yield Standard(name, truth, error, torch.float64)


@pytest.mark.parametrize(("name", "dtype", "kernel"), CALLS, ids=str)
def test_agrees(name, dtype, kernel, emulator):
    module, shape, *arguments = ROWS[name][1]()
    randomised(module.eval()).to(dtype)
    inputs = [torch.randn(shape).to(dtype) for _ in range(3)]
    emulator.reset()
    with emulator.on_cpu_tensors():
        found = computed(module, inputs[0], *arguments, is_accelerated=name not in MODULES)
    assert emulator.errors() == []
    launched = {launch.kernel.removeprefix("vitkernels::") for launch in emulator.launches()}
    assert kernel in launched and any("backward" in name or "grad" in name for name in launched), launched
    for standard in standards(module, inputs, *arguments):
        factor = OUTPUT_FACTOR if standard.name == "output" else GRADIENT_FACTOR
        # Twice the floor of an operator: a module rounds on both sides of it.
        standard.check(found.pop(standard.name), factor, 2 * FLOOR[dtype])
    assert not found
