# SPDX-License-Identifier: MIT
"""What is measured from within the lab: runs there as root, by the Python that banger is installed with."""
