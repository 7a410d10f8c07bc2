# SPDX-License-Identifier: MIT
"""What holds for every tier, however the suite was started and whatever else the machine has to do."""

from __future__ import annotations

import signal

import hypothesis

# nohup, and a shell in the background, ignore some. What is ignored stays so in every program that a test
# starts; what is handled does not.
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)
hypothesis.settings.register_profile(
    "banger", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("banger")
