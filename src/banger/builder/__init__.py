# SPDX-License-Identifier: MIT
"""Runs what packages bring: one build per process, as a uid that owns nothing, in a unit of its own."""
