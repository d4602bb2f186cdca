"""Softmax attention through a few tokens that stand for all."""

from __future__ import annotations

from torch import Tensor

from vitkernels.functional.arguments import check_tensors
from vitkernels.functional.score import Score, operands
from vitkernels.functional.words import Words
from vitkernels.ops import attention as _ops

__all__ = ["agent_attention"]

# What the two steps call what the caller gave. The second has the values that the first computed.
_OF_AGENTS = Words("agent_attention", {"query": "agent", "bias": "agent_bias"})
_OF_QUERIES = Words("agent_attention", {"key": "agent", "bias": "query_bias"})


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
    r"""Attention of a few agents to all keys, and of every query to the agents: linear in the number of tokens.

    .. math::
        v^A_a = \sum_j \operatorname{softmax}_j(s_h \, a_a \cdot k_j + b^A_{aj}) \, v_j, \qquad
        o_i = \sum_a \operatorname{softmax}_a(s_h \, q_i \cdot a_a + b^Q_{ia}) \, v^A_a

    Args:
        query: ``(B, Nq, heads, d)``.
        key: ``(B, Nk, kv_heads, d)``; ``heads`` must be a multiple of ``kv_heads``.
        value: ``(B, Nk, kv_heads, dv)``; ``dv`` may differ from ``d``.
        agent: ``(B, n, heads, d)``, or batch size 1 to share the agents. Commonly the queries, pooled to a few tokens.
        agent_bias: :math:`b^A`, broadcastable to ``(B, heads, n, Nk)``, added to the logits of the agents. Never
            repeated over the batch.
        query_bias: :math:`b^Q`, broadcastable to ``(B, heads, Nq, n)``, added to the logits of the queries.
        scale: factor on all logits, a number or a differentiable tensor, ``(heads,)``, ``(1,)`` or ``()``. Default
            ``d ** -0.5``.

    All arguments that are tensors are differentiable, with the same bits in every run. The dtypes are those of
    :func:`vitkernels.attention`.

    Returns:
        ``(B, Nq, heads, dv)`` in the dtype of ``query``. Without agents it is zero.

    A NaN or infinity in a key, a value or an agent reaches all queries.

    Raises:
        RuntimeError: on a wrong rank, dtype, device or size, naming the argument and what it takes.

    Source: Han et al., "Agent Attention: On the Integration of Softmax and Linear Attention" (2024), eq. 5 and 6.
    """
    check_tensors(_OF_AGENTS.function, query=query, key=key, value=value, agent=agent)
    if query.dim() == agent.dim() == 4 and agent.shape[2] != query.shape[2]:
        raise RuntimeError(
            f"vitkernels::{_OF_AGENTS.function}: agent has {agent.shape[2]} heads, takes query's {query.shape[2]}"
        )
    agent_value = _attend(_OF_AGENTS, agent, key, value, Score(scale, bias=agent_bias))
    return _attend(_OF_QUERIES, query, agent.expand(agent_value.size(0), *agent.shape[1:]), agent_value,
                   Score(scale, bias=query_bias))  # fmt: skip


def _attend(words: Words, query: Tensor, key: Tensor, value: Tensor, score: Score) -> Tensor:
    try:
        query, key, terms, keys, _ = operands("attention", query, key, value, score)
        out: Tensor = _ops.attention(query, key, value, *terms, *keys, False, _ops.allow_tf32(query))[0]
    except RuntimeError as error:
        raise words.of(error, "attention") from None
    return out
