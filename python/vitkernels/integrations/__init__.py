"""Fused attention for the models of other libraries, which stay optional imports."""

from vitkernels.integrations.accelerate import accelerate, register_transformers, restore, restored
from vitkernels.integrations.report import Entry, Report

__all__ = ["Entry", "Report", "accelerate", "register_transformers", "restore", "restored"]
