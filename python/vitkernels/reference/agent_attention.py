"""The definition of agent attention, in plain PyTorch."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from vitkernels.reference.attention import attention

__all__ = ["agent_attention"]


def agent_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agent: Tensor,
    *,
    agent_bias: Tensor | None = None,
    query_bias: Tensor | None = None,
    scale: float | Tensor | None = None,
) -> Tensor:
    """Same arguments, shapes and results as :func:`vitkernels.agent_attention`."""
    agent = agent.expand(key.size(0), *agent.shape[1:])
    agent_value = cast(Tensor, attention(agent, key, value, scale=scale, bias=agent_bias))
    return cast(Tensor, attention(query, agent, agent_value, scale=scale, bias=query_bias))
