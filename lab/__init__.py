# SPDX-License-Identifier: MIT
"""The QEMU machine that plays the host. Not shipped; for tests, benchmarks and developers (docs/lab.md)."""
