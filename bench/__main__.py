# SPDX-License-Identifier: MIT
"""`python -m bench`."""

import sys

from bench import cli

sys.exit(cli.main())
