# SPDX-License-Identifier: MIT
"""Benchmarks, each beside its rival in one run: a machine's speed cancels out of a ratio."""
