"""Microbenchmarks: every operator against what a user would pick instead, and against the machine's floor."""
