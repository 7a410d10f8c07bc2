# SPDX-License-Identifier: MIT
"""`banger doctor`: is everything here that VMs need, and is it as the documentation promises?

`table` holds the checks, one row each; the modules beside it hold the probes, by subject. A probe reads, and
changes nothing. It works without either service, as any user, and says what it could not look at.
"""
