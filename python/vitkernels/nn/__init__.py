"""Modules whose parameters keep the names and shapes of the published implementations."""

from vitkernels.nn.attention import Attention

__all__ = ["Attention"]
