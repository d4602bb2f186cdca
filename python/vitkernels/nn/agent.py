"""Attention through agents, which are pooled queries."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkernels.functional import agent_attention
from vitkernels.nn.maps import check_heads, check_input, integers, no_dropout

__all__ = ["AgentAttention"]

_AXES = "dhw"  # of a map, as the parameters are called
_TABLE = 7  # entries of a table on each axis
_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


class AgentAttention(nn.Module):
    """Attention through a few agents on a map of one to three axes; Agent Attention's module, fused.

    Parameter names and shapes on two axes are those of the paper's modules (``qkv``, ``proj``, ``dwc``, ``an_bias``,
    ``na_bias``, ``ah_bias``, ``aw_bias``, ``ha_bias``, ``wa_bias``, and with a class token ``ac_bias``, ``ca_bias``),
    so their published weights load. Other axes add ``ad_bias`` and ``da_bias``, or lack those of height. A map of
    another size than ``window_size``, and another ``agent_num``, are served by resizing the biases.

    Args:
        dim: channels of the map.
        num_heads: number of heads.
        window_size: sizes of the map that the biases are made for, one number for two equal axes.
        agent_num: number of agents: a square (cube) number for two (three) axes, or one number for each axis.
        qkv_bias: whether ``qkv`` has a bias.
        qk_scale: factor on the logits, default ``head_dim ** -0.5``.
        attn_drop: must be 0: the kernel has no dropout of attention weights.
        proj_drop: dropout of the output, in training.
        has_class_token: the input is ``(B, 1 + N, dim)``, a class token before those of the map.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        RuntimeError: if ``dim`` is not a multiple of ``num_heads``, or ``agent_num`` no square (cube).

    Source: Han et al., "Agent Attention: On the Integration of Softmax and Linear Attention" (2024), section 3.3.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        window_size: int | Sequence[int] = 14,
        agent_num: int | Sequence[int] = 49,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        has_class_token: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        name = "AgentAttention"
        no_dropout(name, attn_drop)
        check_heads(name, "dim", dim, num_heads)
        num_axes = len(window_size) if isinstance(window_size, (list, tuple)) else 2
        if not 1 <= num_axes <= len(_AXES):
            raise RuntimeError(f"vitkernels.nn.{name}: window_size is {window_size!r}, takes one to three sizes")
        self.window_size = _of_axes(name, "window_size", window_size, num_axes)
        self.agents = _agents_of_axes(name, agent_num, num_axes)
        self.agent_num, self.num_heads, self.scale = math.prod(self.agents), num_heads, qk_scale
        self.has_class_token = has_class_token
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[num_axes - 1]
        self.dwc = conv(dim, dim, 3, padding=1, groups=dim, **factory)

        def bias(*shape: int) -> nn.Parameter:
            return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape, **factory), std=0.02))

        self.an_bias = bias(num_heads, self.agent_num, *[_TABLE] * num_axes)
        self.na_bias = bias(num_heads, self.agent_num, *[_TABLE] * num_axes)
        for i, letter in enumerate(self._letters):
            of_axis = [n if i == j else 1 for j, n in enumerate(self.window_size)]
            setattr(self, f"a{letter}_bias", bias(1, num_heads, self.agent_num, *of_axis))
            setattr(self, f"{letter}a_bias", bias(1, num_heads, *of_axis, self.agent_num))
        if has_class_token:
            self.ac_bias = bias(1, num_heads, self.agent_num, 1)
            self.ca_bias = bias(1, num_heads, 1, self.agent_num)

    @property
    def _letters(self) -> str:
        return _AXES[-len(self.window_size) :]

    def forward(
        self, x: Tensor, size: Sequence[int] | None = None, agent_num: int | Sequence[int] | None = None
    ) -> Tensor:
        """Attend through agents.

        Args:
            x: ``(B, *map, dim)``, or ``(B, N, dim)`` where ``size`` is given or there is a class token.
            size: sizes of the map, default ``window_size`` where ``x`` does not tell them.
            agent_num: of this call, as in the constructor.

        Returns:
            The shape of ``x``.

        Raises:
            RuntimeError: if ``x`` has another shape than that, naming what it takes.
        """
        num_axes = len(self.window_size)
        is_flat = self.has_class_token or size is not None
        check_input(self, x, "(B, N, dim)" if is_flat else "(B, " + "map, " * num_axes + "dim)")
        sizes = _of_axes("AgentAttention", "size", size or self.window_size, num_axes) if is_flat else x.shape[1:-1]
        if 0 in sizes:
            raise RuntimeError(
                f"vitkernels.nn.AgentAttention: x has shape {tuple(x.shape)}, takes a map of one token or more"
            )
        agents = self.agents if agent_num is None else _agents_of_axes("AgentAttention", agent_num, num_axes)
        leading = int(self.has_class_token)
        if is_flat and x.shape[1] != math.prod(sizes) + leading:
            raise RuntimeError(
                f"vitkernels.nn.AgentAttention: x has shape {tuple(x.shape)}, takes {leading + math.prod(sizes)} "
                f"tokens, those of a map {tuple(sizes)}" + (" and one more" if leading else "")
            )
        tokens = x if is_flat else x.flatten(1, -2)
        qkv = self.qkv(tokens)  # [B, N, 3 dim]
        q, k, v = torch.unflatten(qkv, -1, (3, self.num_heads, -1)).unbind(-3)  # [B, N, heads, d]
        of_map = [self._map(t[:, leading:], sizes) for t in (q, v)]  # [B, dim, *map]
        pooled = _POOLS[num_axes - 1](of_map[0], agents).flatten(2)  # [B, dim, agents]
        agent = torch.unflatten(pooled.transpose(1, 2), -1, (self.num_heads, -1))  # [B, agents, heads, d]
        agent_bias, query_bias = self._biases(sizes, agents)
        out = agent_attention(q, k, v, agent, agent_bias=agent_bias, query_bias=query_bias, scale=self.scale).flatten(2)
        convolved = self.dwc(of_map[1]).flatten(2).transpose(1, 2)  # [B, N, dim]
        out = out + (F.pad(convolved, (0, 0, 1, 0)) if leading else convolved)
        output: Tensor = self.proj_drop(self.proj(out))
        return output if is_flat else torch.unflatten(output, 1, tuple(sizes))

    def _map(self, tokens: Tensor, sizes: Sequence[int]) -> Tensor:
        return torch.unflatten(tokens.flatten(2).transpose(1, 2), 2, tuple(sizes))

    def _biases(self, sizes: Sequence[int], agents: Sequence[int]) -> tuple[Tensor, Tensor]:
        """``agent_bias (heads, n, N)`` and ``query_bias (heads, N, n)`` for a map and agents of these sizes."""
        agent_bias = _resized(self.an_bias, sizes)  # [heads, n, *map]
        query_bias = _resized(self.na_bias, sizes).movedim(1, -1)  # [heads, *map, n]
        for i, (letter, n, built) in enumerate(zip(self._letters, sizes, self.window_size, strict=True)):
            of_agents, of_queries = getattr(self, f"a{letter}_bias")[0], getattr(self, f"{letter}a_bias")[0]
            if n != built:
                of_agents = _resized_axis(of_agents, 2 + i, n)
                of_queries = _resized_axis(of_queries, 1 + i, n)
            agent_bias, query_bias = agent_bias + of_agents, query_bias + of_queries
        agent_bias, query_bias = agent_bias.flatten(2), query_bias.flatten(1, -2)
        if self.has_class_token:
            agent_bias = torch.cat([self.ac_bias[0], agent_bias], -1)
            query_bias = torch.cat([self.ca_bias[0], query_bias], 1)
        if tuple(agents) != tuple(self.agents):
            agent_bias = self._for_agents(agent_bias.transpose(1, 2), agents).transpose(1, 2)
            query_bias = self._for_agents(query_bias, agents)
        return agent_bias, query_bias

    def _for_agents(self, bias: Tensor, agents: Sequence[int]) -> Tensor:
        """``(heads, N, n)`` for another number of agents, which lie on a map as well."""
        return _resized(torch.unflatten(bias, -1, self.agents), agents).flatten(2)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window_size={self.window_size}, agent_num={self.agent_num}"


_POWERS = {2: "square", 3: "cube"}
_POOLS: tuple[Callable[..., Tensor], ...] = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)


def _of_axes(module: str, name: str, option: int | Sequence[int], num_axes: int) -> tuple[int, ...]:
    if num_axes == 1 and isinstance(option, (list, tuple)) and len(option) == 1:
        option = option[0]
    return integers(module, name, option, num_axes)


def _agents_of_axes(module: str, agent_num: int | Sequence[int], num_axes: int) -> tuple[int, ...]:
    if isinstance(agent_num, (list, tuple)):
        return _of_axes(module, "agent_num", agent_num, num_axes)
    (count,) = integers(module, "agent_num", agent_num, 1)
    of_axis = round(count ** (1 / num_axes))
    if of_axis**num_axes != count:
        raise RuntimeError(
            f"vitkernels.nn.{module}: agent_num is {count}, takes a {_POWERS[num_axes]} number, or one for each axis"
        )
    return (of_axis,) * num_axes


def _resized(table: Tensor, sizes: Sequence[int]) -> Tensor:
    """``(a, b, *map)`` on a map of other sizes."""
    if tuple(table.shape[2:]) == tuple(sizes):
        return table
    resized: Tensor = F.interpolate(table, size=tuple(sizes), mode=_MODES[len(sizes)])
    return resized


def _resized_axis(table: Tensor, axis: int, n: int) -> Tensor:
    """``table`` with ``n`` entries on one axis."""
    rows = table.movedim(axis, -1)
    resized: Tensor = F.interpolate(rows.flatten(0, -2)[None], size=n, mode="linear")[0]
    return torch.unflatten(resized, 0, rows.shape[:-1]).movedim(-1, axis)
