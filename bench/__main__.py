# SPDX-License-Identifier: MIT
"""`python -m bench`."""

import sys

from bench import main

sys.exit(main.main())
