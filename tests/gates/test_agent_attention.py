"""Attention through agents: the function in every dtype, and the module against the formula of its paper."""

import pytest
import torch
import vitkernels as vk
from support.calls import differentiate
from support.devices import DTYPES
from support.error_policy import check_sample
from support.samples_named import NAMED_SAMPLES
from torch.nn import functional as F

SAMPLES = [s for s in NAMED_SAMPLES if s.operator == "agent_attention"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_error_policy(sample, dtype):
    check_sample(sample, dtype, slack=2.0)  # two steps


def test_same_bits():
    call = SAMPLES[0].call(torch.float32)
    first, second = ([t for each in differentiate(vk.agent_attention, call) for t in each] for _ in range(2))
    assert all(torch.equal(*both) for both in zip(first, second, strict=True))


def test_biases_are_not_repeated():
    """A bias for all batches is read where it is: a thousand of them cost nothing."""
    q = torch.randn(1, 50, 1, 8).expand(1000, -1, -1, -1)
    out = vk.agent_attention(q, q, q, q[:, :4], agent_bias=torch.randn(4, 50), query_bias=torch.randn(50, 4))
    assert torch.equal(out, out[:1].expand_as(out))


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"agent": torch.zeros(2, 6, 4, 7)}, "key has size 8 in dimension 3, takes 7 (agent's head dimension)"),
        ({"agent": torch.zeros(3, 6, 4, 8)}, "key has size 2 in dimension 0, takes 3 (agent's batch size)"),
        ({"agent": None}, "agent is None, takes a tensor"),
        ({"agent_bias": torch.zeros(33, 6)}, "agent_bias has shape (33, 6), takes one that broadcasts to (2, 4, 6,"),
        ({"query_bias": torch.zeros(6, 17)}, "query_bias has shape (6, 17), takes one that broadcasts to (2, 4, 17,"),
        ({"query_bias": torch.zeros(17, 6).bool()}, "query_bias is torch.bool, takes a floating dtype"),
        ({"scale": "1"}, "scale is '1', takes a number"),
        ({"value": torch.zeros(2, 32, 2, 5)}, "value has size 32 in dimension 1, takes 33 (key's number of tokens)"),
    ],
)  # fmt: skip
def test_errors_are_the_callers(wrong, text):
    call = SAMPLES[0].call(torch.float32)
    with pytest.raises(RuntimeError) as raised:
        vk.agent_attention(**call | wrong)
    assert str(raised.value).startswith("vitkernels::agent_attention: ") and text in str(raised.value)


def resized(t, sizes):
    modes = ["linear", "bilinear", "trilinear"]
    return F.interpolate(t, size=tuple(sizes), mode=modes[len(sizes) - 1])


def formula(module, x, sizes, agents):
    """Equations 5 to 7 of the paper, with the parameters of its published modules."""
    leading, heads, axes = int(module.has_class_token), module.num_heads, len(sizes)
    b, n, c = x.shape
    q, k, v = module.qkv(x).reshape(b, n, 3, heads, c // heads).permute(2, 0, 3, 1, 4)
    on_map = [t.transpose(1, 2).reshape(b, n, c)[:, leading:].transpose(1, 2).reshape(b, c, *sizes) for t in (q, v)]
    pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[axes - 1]
    agent = pool(on_map[0], agents).reshape(b, heads, c // heads, -1).transpose(-1, -2)
    names = "dhw"[-axes:]
    first, second = resized(module.an_bias, sizes), resized(module.na_bias, sizes)
    first = first + sum(getattr(module, f"a{a}_bias")[0] for a in names)
    second = second.movedim(1, -1) + sum(getattr(module, f"{a}a_bias")[0] for a in names)
    first, second = first.flatten(2), second.flatten(1, -2)
    if leading:
        first, second = torch.cat([module.ac_bias[0], first], -1), torch.cat([module.ca_bias[0], second], 1)
    scale = (c // heads) ** -0.5
    agent_value = (agent @ k.transpose(-1, -2) * scale + first).softmax(-1) @ v
    out = ((q @ agent.transpose(-1, -2) * scale + second).softmax(-1) @ agent_value).transpose(1, 2).reshape(b, n, c)
    convolved = module.dwc(on_map[1]).flatten(2).transpose(1, 2)
    return module.proj(torch.cat([out[:, :leading], out[:, leading:] + convolved], 1))


@pytest.mark.parametrize(
    ("sizes", "agents", "has_class_token"),
    [((5, 7), (2, 2), False), ((14, 14), (3, 2), True), ((11,), (4,), False), ((2, 3, 4), (1, 2, 3), False)],
    ids=str,
)
def test_module_is_the_papers(sizes, agents, has_class_token):
    module = vk.nn.AgentAttention(16, 2, sizes, agents, True, has_class_token=has_class_token, dtype=torch.float64)
    x = torch.randn(2, sum([int(has_class_token)]) + torch.Size(sizes).numel(), 16, dtype=torch.float64)
    found = module(x, sizes)
    torch.testing.assert_close(found, formula(module, x, sizes, agents))
    if not has_class_token:
        torch.testing.assert_close(module(x.unflatten(1, sizes)), found.unflatten(1, sizes))
    grads = [
        torch.autograd.grad(f.cos().sum(), list(module.parameters()))
        for f in (found, formula(module, x, sizes, agents))
    ]
    torch.testing.assert_close(*grads)


def test_module_at_another_size():
    """Biases are resized, as a table for the new size would be."""
    module = vk.nn.AgentAttention(16, 2, (6, 6), 9, dtype=torch.float64)
    twin = vk.nn.AgentAttention(16, 2, (5, 8), (2, 4), dtype=torch.float64)
    state = module.state_dict()
    for letter, axis, n in (("h", 0, 5), ("w", 1, 8)):
        for name, place in ((f"a{letter}_bias", 3 + axis), (f"{letter}a_bias", 2 + axis)):
            t = state[name].movedim(place, -1)
            state[name] = resized(t.reshape(1, -1, t.size(-1)), (n,)).reshape(*t.shape[:-1], n).movedim(-1, place)
    for name, t in state.items():
        if name.endswith("_bias"):
            place = 1 if name[0] == "a" or name == "an_bias" else t.dim() - 1
            place = 2 if name in ("ah_bias", "aw_bias") else 1 if name in ("an_bias", "na_bias") else place
            rows = t.movedim(place, -1)
            by_agent = resized(rows.reshape(1, -1, 3, 3), (2, 4)).reshape(*rows.shape[:-1], 8)
            state[name] = by_agent.movedim(-1, place)
    twin.load_state_dict(state)
    x = torch.randn(2, 5, 8, 16, dtype=torch.float64)
    torch.testing.assert_close(module(x, agent_num=(2, 4)), twin(x))
    assert module(x[:0]).shape == (0, 5, 8, 16)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: vk.nn.AgentAttention(16, 3), "dim is 16, takes a multiple of num_heads (3)"),
        (
            lambda: vk.nn.AgentAttention(16, 2, agent_num=50),
            "agent_num is 50, takes a square number, or one for each axis",
        ),
        (lambda: vk.nn.AgentAttention(16, 2, (1, 2, 3, 4)), "window_size is (1, 2, 3, 4), takes one to three sizes"),
        (
            lambda: vk.nn.AgentAttention(16, 2, (4, 6))(torch.zeros(1, 24, 16)),
            "x has shape (1, 24, 16), takes (B, map,",
        ),
        (lambda: vk.nn.AgentAttention(16, 2, (4, 6))(torch.zeros(1, 0, 6, 16)), "takes a map of one token or more"),
        (
            lambda: vk.nn.AgentAttention(16, 2, (4, 6), has_class_token=True)(torch.zeros(1, 24, 16)),
            "x has shape (1, 24, 16), takes 25 tokens, those of a map (4, 6) and one more",
        ),
    ],
)
def test_module_refuses(call, text):
    with pytest.raises(RuntimeError) as raised:
        call()
    assert str(raised.value).startswith("vitkernels.nn.AgentAttention: ") and text in str(raised.value)
