# SPDX-License-Identifier: MIT
"""One-command development machines on Firecracker microVMs."""

__version__ = "0.1.0"
