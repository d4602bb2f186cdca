"""Fused attention and Monarch layers for the models of other libraries, which stay optional imports."""

from vitkernels.integrations.accelerate import accelerate, register_transformers, restore, restored
from vitkernels.integrations.monarch_report import MonarchEntry, MonarchReport
from vitkernels.integrations.monarchize import expand_monarch, monarchize
from vitkernels.integrations.report import Entry, Report

__all__ = [
    "Entry",
    "MonarchEntry",
    "MonarchReport",
    "Report",
    "accelerate",
    "expand_monarch",
    "monarchize",
    "register_transformers",
    "restore",
    "restored",
]
