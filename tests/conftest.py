# SPDX-License-Identifier: MIT
"""What holds for every tier: no property is given up because the machine has other work to do."""

from __future__ import annotations

import hypothesis

hypothesis.settings.register_profile(
    "banger", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("banger")
