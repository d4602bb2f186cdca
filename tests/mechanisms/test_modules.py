"""Mechanisms of the literature that are modules, with their parameters: each against its paper's formula."""

import math

import torch
import torch.nn.functional as F
import vitkernels as vk
from support.mechanisms import agree_module, convolution, linear, mlp, norm, plain, tokens


def heads(x, count, parts=1):
    """``parts`` tensors ``(B, N, count, d)`` from the channels of one."""
    b, n, c = x.shape
    found = x.view(b, n, parts, count, c // parts // count).unbind(2)
    return found[0] if parts == 1 else found


def attention(p, name, x, count):
    return linear(p, f"{name}.proj", plain(*heads(linear(p, f"{name}.qkv", x), count, 3)).flatten(2))


def cross_attention(p, name, x, context, count):
    k, v = heads(linear(p, f"{name}.kv", context), count, 2)
    return linear(p, f"{name}.proj", plain(heads(linear(p, f"{name}.q", x), count), k, v).flatten(2))


def layer(p, name, x, count):
    x = x + attention(p, f"{name}.attn", norm(p, f"{name}.norm1", x), count)
    return x + mlp(p, f"{name}.mlp", norm(p, f"{name}.norm2", x))


def test_relu_features_with_a_convolution_of_the_values():
    """SLAB's: what all heads share is added to the keys, and a depthwise convolution of the values to the result."""

    def formula(p, x):  # [B, 5, 7, 16]
        b, h, w, c = x.shape
        q, k, v = linear(p, "qkv", x.flatten(1, 2)).chunk(3, -1)
        q, k, v = heads(q, 2).relu(), heads(k + p["positional_encoding"], 2).relu(), heads(v, 2)
        pairs = torch.einsum("bihd,bjhd->bhij", q, k)
        out = torch.einsum("bhij,bjhd->bihd", pairs / (pairs.sum(-1, keepdim=True) + 1e-6), v).reshape(b, h, w, c)
        for i in range(2):
            of_head = v[:, :, i].transpose(1, 2).reshape(b, c // 2, h, w)
            near = convolution(p, "dwc", of_head, padding=2, groups=c // 2).permute(0, 2, 3, 1)
            out = out + F.pad(near, (c // 2 * i, c // 2 * (1 - i)))
        return linear(p, "proj", out)

    agree_module(vk.nn.SimplifiedLinearAttention(16, 2, (5, 7)), formula, tokens(2, 5, 7, 16))


def test_layer_norm_that_becomes_a_batch_norm():
    """SLAB's: a blend of the two, with a scaled input beside the batch norm; after a step of warming and two more."""

    def formula(p, x):
        flat = x.flatten(0, 1)
        spread = (flat.var(0, unbiased=False) + 1e-5).sqrt()
        batch_norm = (x - flat.mean(0)) / spread * p["norm2.bn.weight"] + p["norm2.bn.bias"]
        return 0.8 * 0.6 * norm(p, "norm1", x) + (1 - 0.8 * 0.6) * (batch_norm + p["norm2.alpha"] * x)

    module = vk.nn.ProgressiveRepBN(16, 5, warm=1, r0=0.8)
    for _ in range(3):
        module(torch.randn(2, 9, 16))
    agree_module(module, formula, tokens(2, 9, 16))


def test_angles_with_a_convolution_of_the_values():
    """Castling-ViT's and ShiftAddViT's: unit vectors out, and near values beside them."""

    def formula(p, x):
        q, k, v = heads(linear(p, "qkv", x), 2, 3)
        q, k = (t / t.norm(dim=-1, keepdim=True) for t in (q, k))
        out = v / 2 + torch.einsum("bihd,bjhd,bjhe->bihe", q, k, v) / math.pi
        out = out / out.norm(dim=-1, keepdim=True)
        filters = p["dconv.weight"][:, 0, :, 0]  # [H, 5]
        near = F.pad(v, (0, 0, 0, 0, 2, 2)).unfold(1, 5, 1)  # [B, N, H, d, 5]
        return linear(p, "proj", (out + torch.einsum("bnhdk,hk->bnhd", near, filters)).flatten(2))

    agree_module(vk.nn.LinearAngularAttention(16, 2, res_kernel_size=5), formula, tokens(2, 30, 16))


def test_block_of_compressed_tokens():
    """LookupViT's: few tokens read from many, compute, and write back through the same map."""

    def formula(p, x, compressed):
        q = heads(linear(p, "q", norm(p, "norm_q", compressed)), 2)
        k, v = heads(linear(p, "kv", norm(p, "norm_kv", x)), 2, 2)
        a = (torch.einsum("bihd,bjhd->bhij", q, k) / 8**0.5).softmax(-1)
        compressed = compressed + linear(p, "proj", torch.einsum("bhij,bjhd->bihd", a, v).flatten(2))
        compressed = layer(p, "layer", compressed, 2)
        values = heads(linear(p, "write_v", norm(p, "norm_write", compressed)), 2)
        x = x + linear(p, "write_proj", torch.einsum("bhij,bihd->bjhd", a, values).flatten(2))
        return x + mlp(p, "mlp", norm(p, "norm_mlp", x)), compressed

    agree_module(vk.nn.LookupViTBlock(16, 2), formula, tokens(2, 49, 16), tokens(2, 9, 16))


def test_proxies_of_windows():
    """PT-DiT's, on a video: means of windows attend to one another, all tokens to them, then to their own windows."""
    windows = (2, 3, 2)

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.far = vk.nn.ProxyTokenAttention(16, 2, windows)
            self.near = torch.nn.Linear(16, 48)

        def forward(self, x):
            x = x + self.far(x)
            q, k, v = self.near(x).unflatten(-1, (3, 2, 8)).unbind(-3)
            return x + vk.window_attention(q, k, v, windows).flatten(-2)

    def formula(p, x):  # [B, 4, 3, 6, 16]
        sizes, x = x.shape, x.flatten(1, 3)
        places = torch.cartesian_prod(*(torch.arange(n) for n in sizes[1:4])) // torch.tensor(windows)
        is_same = (places[:, None] == places).all(-1)  # [N, N]
        of_window = is_same.unique(dim=0).to(x)  # [windows, N]
        proxies = attention(p, "far.proxy_attn", of_window @ x / 12, 2)
        x = x + cross_attention(p, "far.cross_attn", x, proxies, 2)
        return (x + plain(*heads(linear(p, "near", x), 2, 3), is_same).flatten(2)).view(sizes)

    agree_module(Block(), formula, tokens(2, 4, 3, 6, 16))


def test_block_of_groups_and_latents():
    """FIT's, with latents of more channels than tokens."""

    def cross_layer(p, name, x, context):
        x = x + cross_attention(p, f"{name}.attn", norm(p, f"{name}.norm_q", x), norm(p, f"{name}.norm_kv", context), 2)
        return x + mlp(p, f"{name}.mlp", norm(p, f"{name}.norm2", x))

    def formula(p, x, latents):  # [B, 3, 7, 16], [B, 3, 2, 24]
        x = torch.stack([layer(p, "local_layers.0", t, 2) for t in x.unbind(1)], 1)
        pairs = zip(latents.unbind(1), x.unbind(1), strict=True)
        latents = torch.cat([cross_layer(p, "read", *pair) for pair in pairs], 1)
        for i in range(2):
            latents = layer(p, f"global_layers.{i}", latents, 2)
        latents = torch.stack(latents.chunk(3, 1), 1)
        pairs = zip(x.unbind(1), latents.unbind(1), strict=True)
        return torch.stack([cross_layer(p, "write", *pair) for pair in pairs], 1), latents

    module = vk.nn.FITBlock(16, 2, 24, num_global_layers=2, mlp_ratio=2)
    agree_module(module, formula, tokens(2, 3, 7, 16), tokens(2, 3, 2, 24))


def test_token_performer():
    """T2T-ViT's: random features, and values in place of the input beside the result."""

    def positive(p, x):
        return torch.exp(x @ p["w"].t() - x.square().sum(-1, keepdim=True) / 2) / p["w"].shape[0] ** 0.5

    def formula(p, x):
        k, q, v = linear(p, "kqv", norm(p, "norm1", x)).chunk(3, -1)
        pairs = positive(p, q) @ positive(p, k).transpose(1, 2)
        tokens = v + linear(p, "proj", pairs @ v / (pairs.sum(-1, keepdim=True) + 1e-8))
        return tokens + linear(p, "mlp.2", F.gelu(linear(p, "mlp.0", norm(p, "norm2", tokens))))

    agree_module(vk.nn.TokenPerformer(27, 16), formula, tokens(2, 30, 27))


def test_token_transformer():
    """T2T-ViT's: the factor on the logits is of the input's channels."""

    def formula(p, x):
        q, k, v = linear(p, "attn.qkv", norm(p, "norm1", x)).chunk(3, -1)
        tokens = v + linear(p, "attn.proj", (q @ k.transpose(1, 2) / 27**0.5).softmax(-1) @ v)
        return tokens + mlp(p, "mlp", norm(p, "norm2", tokens))

    agree_module(vk.nn.TokenTransformer(27, 16), formula, tokens(2, 30, 27))
