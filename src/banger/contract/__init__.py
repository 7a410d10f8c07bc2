# SPDX-License-Identifier: MIT
"""What all processes share: names, errors, resources, the wire contracts. No I/O, no imports of ours."""
