"""The modules on maps against the published ones, with the weights of these: outputs and all gradients."""

import inspect
import re

import pytest
import torch
import vitkernels as vk
from support.model_zoo import randomised
from support.nn_modules import MODULES
from torch import nn

pytest.importorskip("timm")
from timm.layers.halo_attn import HaloAttn
from timm.models.gcvit import WindowAttentionGlobal
from timm.models.maxxvit import MaxxVitTransformerCfg, PartitionAttentionCl
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse
from timm.models.swin_transformer_v2 import SwinTransformerV2Block


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def differentiated(function, module, x):
    x = x.clone().requires_grad_()
    out = function(x)
    (out * torch.linspace(-3, 3, out.numel()).cos().view(out.shape)).sum().backward()
    return {"output": out.detach(), "input": x.grad} | {name: p.grad for name, p in module.named_parameters()}


def check_same(ours, module, function, x, **tolerance):
    """``ours`` takes the weights of ``module`` and then does what ``function`` does with it."""
    missing = ours.load_state_dict(module.state_dict())
    assert not missing.missing_keys and not missing.unexpected_keys
    mine, theirs = differentiated(ours, ours, x), differentiated(function, module, x)
    assert mine.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(mine[name], theirs[name], **({"rtol": 1e-9, "atol": 1e-11} | tolerance), msg=name)


@pytest.mark.parametrize(("window", "shift"), [((4, 4), (0, 0)), ((4, 4), (2, 2)), ((3, 6), (1, 3)), ((12, 4), (0, 2))])
def test_window_attention_is_swins(window, shift):
    block = SwinTransformerBlock(24, (12, 12), 3, window_size=window, shift_size=shift)
    randomised(block)
    ours = vk.nn.WindowAttention(24, 3, window_size=window, shift_size=shift)
    check_same(ours, block.attn, block._attn, torch.randn(2, 12, 12, 24))


@pytest.mark.parametrize("shift", [0, 2])
def test_window_attention_v2_is_swins(shift):
    block = SwinTransformerV2Block(24, (8, 8), 3, window_size=4, shift_size=shift, pretrained_window_size=6)
    randomised(block)
    ours = vk.nn.WindowAttentionV2(24, 4, 3, pretrained_window_size=6, shift_size=shift)
    check_same(ours, block.attn, block._attn, torch.randn(2, 8, 8, 24), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("shift", [0, 2])
def test_window_attention_is_torchvisions(shift):
    """Its file has the table's index, which ours computes."""
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    theirs = randomised(swin.ShiftedWindowAttention(24, [4, 4], [shift, shift], 3))
    ours = vk.nn.WindowAttention(24, 3, window_size=4, shift_size=shift)
    check_same(ours, theirs, theirs, torch.randn(2, 8, 12, 24))


class Nothing(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


@pytest.mark.parametrize("shift", [0, 2])
def test_window_attention_is_transformers(shift):
    transformers = pytest.importorskip("transformers")
    from transformers.models.swin.modeling_swin import SwinLayer

    layer = SwinLayer(transformers.SwinConfig(window_size=4, attn_implementation="eager"), 24, (8, 12), 3, 0.0, shift)
    layer.layernorm_before, layer.mlp = nn.Identity(), Nothing()  # what is left is x and its attention
    randomised(layer)
    theirs = layer.attention
    projections = theirs.q_proj, theirs.k_proj, theirs.v_proj
    ours = vk.nn.WindowAttention(24, 3, window_size=4, shift_size=shift)
    ours.load_state_dict(
        {
            "relative_position_bias_table": theirs.relative_position_bias.relative_position_bias_table,
            "qkv.weight": torch.cat([p.weight for p in projections]),
            "qkv.bias": torch.cat([p.bias for p in projections]),
            "proj.weight": theirs.o_proj.weight,
            "proj.bias": theirs.o_proj.bias,
        }
    )
    x = torch.randn(2, 8, 12, 24)
    expected = layer(x.flatten(1, 2), (8, 12))[0].view_as(x) - x
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-6)  # its softmax is in float32


def test_files_with_an_index_load():
    ours = vk.nn.WindowAttention(24, 3, window_size=4)
    ours.load_state_dict(ours.state_dict() | {"relative_position_index": torch.zeros(16, 16, dtype=torch.int64)})


@pytest.mark.parametrize("head_first", [True, False])
def test_grid_attention_is_maxvits(head_first):
    cfg = MaxxVitTransformerCfg(dim_head=8, grid_size=(4, 3), window_size=(4, 3), head_first=head_first)
    partition = PartitionAttentionCl(24, "grid", cfg)
    randomised(partition)
    ours = vk.nn.GridAttention(24, dim_head=8, grid_size=(4, 3), head_first=head_first)
    check_same(ours, partition.attn, partition._partition_attn, torch.randn(2, 8, 9, 24))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"halo_size": 1, "num_heads": 2, "dim_head": 6, "qkv_bias": True},
        {"dim_out": 32, "scale_pos_embed": True},
        {"stride": 2, "avg_down": True},
        {"qk_ratio": 0.5, "dim_out": 48},
    ],
)
def test_halo_attention_is_timms(options):
    options = {"num_heads": 4, "block_size": 4, "halo_size": 2} | options
    theirs = randomised(HaloAttn(32, **options))
    ours = vk.nn.HaloAttention(32, **options)
    check_same(ours, theirs, theirs, torch.randn(2, 32, 8, 12))


def test_shared_query_is_gcvits():
    module = randomised(WindowAttentionGlobal(24, 3, (4, 4)))
    x, query = torch.randn(2, 8, 12, 24), torch.randn(2, 4, 4, 24, requires_grad=True)

    def theirs(x):
        windows = module(window_partition(x, (4, 4)).view(-1, 16, 24), query.flatten(1, 2))
        return window_reverse(windows.view(-1, 4, 4, 24), (4, 4), 8, 12)

    def ours(x):
        k, v = module.qkv(x).unflatten(-1, (2, 3, 8)).unbind(-3)
        table = module.rel_pos.relative_position_bias_table
        q = query.unflatten(-1, (3, 8))
        return module.proj(vk.window_attention(q, k, v, 4, bias_table=table, is_shared_query=True).flatten(-2))

    results = []
    for function in (ours, theirs):
        module.zero_grad()
        query.grad = None
        results.append(differentiated(function, module, x) | {"query": query.grad})
    for name in results[1]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-9, atol=1e-11, msg=name)


def neighborhood(x, module, kernel, dilation):
    """The module's formula for a map of any axes, pixel by pixel: the published one of a small map."""
    q, k, v = module.qkv(x).unflatten(-1, (3, module.num_heads, -1)).unbind(-3)
    axes = [vk.Neighborhood(kernel, dilation=dilation)] * (x.dim() - 2)
    table = None if module.rpb is None else module.rpb.flip(list(range(1, module.rpb.dim())))
    return module.proj(vk.reference.spatial_attention(q, k, v, axes, bias_table=table).flatten(-2))


@pytest.mark.parametrize("shape", [(17,), (9, 11), (4, 5, 6)])
def test_neighborhood_attention(shape):
    kind = getattr(vk.nn, f"NeighborhoodAttention{len(shape)}D")
    dilation = 1 if len(shape) == 3 else 2
    ours = randomised(kind(24, 3, 3, dilation=dilation, rel_pos_bias=True))
    assert [*ours.state_dict()] == ["rpb", "qkv.weight", "qkv.bias", "proj.weight", "proj.bias"]
    assert ours.rpb.shape == (3, *(5,) * len(shape))
    check_same(ours, ours, lambda x: neighborhood(x, ours, 3, dilation), torch.randn(2, *shape, 24))


@pytest.mark.parametrize("shape", [(17,), (9, 11), (4, 5, 6)])
def test_neighborhood_attention_is_nattens(shape):
    natten = pytest.importorskip("natten")
    name = f"NeighborhoodAttention{len(shape)}D"
    options = {"embed_dim": 24, "num_heads": 3, "kernel_size": 3, "qk_scale": 0.2}
    theirs = randomised(getattr(natten, name)(**options)).float().requires_grad_(False)  # on the CPU it has none
    ours = getattr(vk.nn, name)(**options).float()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, *shape, 24).float()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


class LePEAttention(nn.Module):
    """One direction of CSWin, by the paper: partition into stripes, attend, add the convolution of the values."""

    def __init__(self, dim):
        super().__init__()
        self.get_v = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim)


class CSWin(nn.Module):
    def __init__(self, dim, heads, split):
        super().__init__()
        self.heads, self.split = heads, split
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attns = nn.ModuleList([LePEAttention(dim // 2), LePEAttention(dim // 2)])
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        _, height, width, dim = x.shape
        halves = []
        for i, (h, w) in enumerate([(height, self.split), (self.split, width)]):
            q, k, v = (t.chunk(2, -1)[i] for t in self.qkv(x).chunk(3, -1))
            q, k, v = (window_partition(t, (h, w)) for t in (q, k, v))  # [stripes, h, w, dim / 2]
            encoding = self.attns[i].get_v(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            q, k, v = (t.flatten(1, 2).unflatten(-1, (self.heads // 2, -1)).transpose(1, 2) for t in (q, k, v))
            p = (q @ k.transpose(-1, -2) / (dim // self.heads) ** 0.5).softmax(-1)
            out = (p @ v).transpose(1, 2).flatten(2).view(-1, h, w, dim // 2) + encoding
            halves.append(window_reverse(out, (h, w), height, width))
        return self.proj(torch.cat(halves, -1))


def test_cross_shaped_window_attention_is_cswins():
    theirs = randomised(CSWin(32, 4, 2))
    check_same(vk.nn.CrossShapedWindowAttention(32, 4, 2), theirs, theirs, torch.randn(2, 6, 8, 32))


def test_last_stage_of_cswin_attends_to_the_map():
    module = randomised(vk.nn.CrossShapedWindowAttention(24, 3, last_stage=True))
    x = torch.randn(2, 4, 5, 24)
    q, k, v = module.qkv(x).flatten(1, 2).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
    encoding = module.attns[0].get_v(v.transpose(1, 2).reshape(2, 4, 5, 24).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    out = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 4, 5, 24)
    torch.testing.assert_close(module(x), module.proj(out + encoding))


class CCNet(nn.Module):
    """Criss-cross attention by the paper: affinities to the column, without the pixel, and to the row."""

    def __init__(self, dim):
        super().__init__()
        self.query_conv, self.key_conv = nn.Conv2d(dim, dim // 8, 1), nn.Conv2d(dim, dim // 8, 1)
        self.value_conv, self.gamma = nn.Conv2d(dim, dim, 1), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        q, k, v = self.query_conv(x), self.key_conv(x), self.value_conv(x)
        column = torch.einsum("bchw,bcgw->bhwg", q, k)
        column = column.masked_fill(torch.eye(x.size(2), dtype=torch.bool)[:, None], -torch.inf)
        row = torch.einsum("bchw,bchg->bhwg", q, k)
        p = torch.cat([column, row], -1).softmax(-1)
        p_column, p_row = p.split([x.size(2), x.size(3)], -1)
        out = torch.einsum("bhwg,bcgw->bchw", p_column, v) + torch.einsum("bhwg,bchg->bchw", p_row, v)
        return self.gamma * out + x


@pytest.mark.parametrize("size", [(5, 7), (1, 4), (4, 1)])
def test_criss_cross_attention_is_ccnets(size):
    theirs = randomised(CCNet(16))
    check_same(vk.nn.CrissCrossAttention(16), theirs, theirs, torch.randn(2, 16, *size))


BAD = [
    (lambda: vk.nn.WindowAttention(24, 3, attn_drop=0.1), "WindowAttention: attn_drop is 0.1, takes 0"),
    (lambda: vk.nn.WindowAttention(24, 3)(torch.zeros(2, 49, 24)), "x has shape (2, 49, 24), takes (B, height, width,"),
    (lambda: vk.nn.WindowAttention(96, 5), "WindowAttention: dim is 96, takes a multiple of num_heads (5)"),
    (lambda: vk.nn.WindowAttention(96, 7, 3), "WindowAttention: dim is 96, takes a multiple of num_heads (7)"),
    (lambda: vk.nn.WindowAttention(96, 0), "WindowAttention: num_heads is 0, takes an integer from 1 on"),
    (
        lambda: vk.nn.WindowAttention(96, 3, window_size=(7, 7, 7)),
        "window_size is (7, 7, 7), takes an integer from 1 on, or",
    ),
    (lambda: vk.nn.WindowAttention(96, 3, shift_size=-1), "shift_size is -1, takes an integer from 0 on"),
    (lambda: vk.nn.WindowAttention(96, 3, shift_size=7), "shift_size is 7, takes less than window_size (7)"),
    (
        lambda: vk.nn.WindowAttention(96, (7, 7), 3, True),
        "num_heads is (7, 7), takes an integer, or in the order (dim,",
    ),
    (lambda: vk.nn.WindowAttentionV2(96, 7, 5), "WindowAttentionV2: dim is 96, takes a multiple of num_heads (5)"),
    (lambda: vk.nn.GridAttention(24), "GridAttention: dim is 24, takes a multiple of dim_head (32)"),
    (lambda: vk.nn.GridAttention(24, 0), "GridAttention: dim_head is 0, takes an integer from 1 on"),
    (lambda: vk.nn.HaloAttention(32, stride=2), "HaloAttention: stride is 2, takes 1, or avg_down=True"),
    (lambda: vk.nn.HaloAttention(30), "HaloAttention: dim_out is 30, takes a multiple of num_heads (8)"),
    (lambda: vk.nn.HaloAttention(32, block_size=0), "HaloAttention: block_size is 0, takes an integer from 1 on"),
    (
        lambda: vk.nn.CrossShapedWindowAttention(32, 3),
        "CrossShapedWindowAttention: num_heads is 3, takes an even divisor",
    ),
    (
        lambda: vk.nn.CrossShapedWindowAttention(32, 4, 0),
        "CrossShapedWindowAttention: split_size is 0, takes an integer",
    ),
    (lambda: vk.nn.CrissCrossAttention(4), "CrissCrossAttention: in_dim is 4, takes an integer from 8 on"),
    (lambda: vk.nn.NeighborhoodAttention2D(24, 5, 3), "NeighborhoodAttention2D: embed_dim is 24, takes a multiple of"),
    (
        lambda: vk.nn.NeighborhoodAttention2D(24, 3, (3, 3, 3)),
        "NeighborhoodAttention2D: kernel_size is (3, 3, 3), takes",
    ),
    (
        lambda: vk.nn.NeighborhoodAttention2D(24, 3, 3, is_causal="no"),
        "NeighborhoodAttention2D: is_causal is 'no', takes",
    ),
    (lambda: vk.nn.GridAttention(0, 8), "GridAttention: dim is 0, takes an integer from 1 on"),
    (lambda: vk.nn.WindowAttention(0, 2), "WindowAttention: dim is 0, takes an integer from 1 on"),
    (lambda: vk.nn.HaloAttention(0, dim_out=8), "HaloAttention: dim is 0, takes an integer from 1 on"),
    (lambda: vk.nn.Attention(0), "Attention: dim is 0, takes an integer from 1 on"),
    (lambda: vk.nn.CrossShapedWindowAttention(0, 2), "CrossShapedWindowAttention: dim is 0, takes an integer from"),
]


@pytest.mark.parametrize(("call", "text"), BAD, ids=[text for _, text in BAD])
def test_bad_arguments_are_named(call, text):
    with pytest.raises(RuntimeError, match=re.escape(text)) as raised:
        call()
    assert str(raised.value).startswith("vitkernels.nn.")


@pytest.mark.parametrize("kind", MODULES)
def test_inputs_that_are_no_tensors_or_were_freed(kind):
    module, shape = MODULES[kind]()
    freed = torch.randn(shape)
    freed.untyped_storage().resize_(0)
    takes = {"a list": [], "of shape": freed}
    for what, x in takes.items():
        with pytest.raises(RuntimeError, match=rf"^vitkernels\.nn\.{kind}: x (is )?{what}.*, takes"):
            module(x)


@pytest.mark.parametrize("kind", MODULES)
def test_empty_inputs(kind):
    """No image gives no result; a map without tokens too, or an error of ours: of convolutions, or of a fixed size."""
    module, shape = MODULES[kind]()
    takes = "(B, 4, 6, 16) or (B, 24, 16)" if kind == "SpectralGating" else "a map of one token or more"
    channels = 1 if kind in ("CrissCrossAttention", "HaloAttention", "LiteMLA") else len(shape) - 1
    for axis in set(range(len(shape))) - {channels}:
        x = torch.randn([0 if i == axis else n for i, n in enumerate(shape)], requires_grad=True)
        try:
            out = module(x)
        except RuntimeError as error:
            assert axis > 0, error
            assert str(error).startswith(f"vitkernels.nn.{kind}: x has shape {tuple(x.shape)}, takes {takes}")
            continue
        assert out.shape == x.shape
        out.sum().backward()
        assert x.grad is not None


ORIGINALS = {
    "Attention": "timm.layers.attention.Attention",
    "HaloAttention": "timm.layers.halo_attn.HaloAttn",
    "WindowAttention": "timm.models.swin_transformer.WindowAttention",
    "NeighborhoodAttention2D": "natten.NeighborhoodAttention2D",
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_arguments_are_in_the_originals_order(name):
    path, _, theirs = ORIGINALS[name].rpartition(".")
    original = getattr(pytest.importorskip(path), theirs)
    taken = [[*inspect.signature(kind).parameters] for kind in (getattr(vk.nn, name), original)]
    shared = [parameter for parameter in taken[1] if parameter not in ("device", "dtype")]
    assert taken[0][: len(shared)] == shared


def test_swins_own_order():
    """``dim, window_size, num_heads``, as its authors have it."""
    ours = vk.nn.WindowAttention(24, (3, 4), 2, qkv_bias=False, qk_scale=0.5)
    twin = vk.nn.WindowAttention(24, 2, window_size=(3, 4), qkv_bias=False, qk_scale=0.5)
    twin.load_state_dict(ours.state_dict())
    x = torch.randn(1, 6, 8, 24)
    assert torch.equal(ours(x), twin(x))
    twin.scale = None
    assert not torch.allclose(ours(x), twin(x))
