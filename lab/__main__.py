# SPDX-License-Identifier: MIT
"""Entry of `python -m lab`."""

from lab import cli

raise SystemExit(cli.main())
