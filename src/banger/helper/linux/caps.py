# SPDX-License-Identifier: MIT
"""Linux capabilities: what the helper keeps, and giving up the rest."""

from __future__ import annotations

from typing import Final

from banger.helper.linux import libc

CAPABILITIES: Final = {
    "chown": 0,  # nodes, sockets and logs of a VM get its uid
    "dac_override": 1,  # the owner's directory is 0700
    "fowner": 3,  # modes of what belongs to a VM's uid
    "kill": 5,  # VMMs run as other uids
    "setgid": 6,  # e2fsprogs and the jailer become the VM's gid
    "setuid": 7,
    "net_admin": 12,  # bridge, taps, packet rules, forwarding
    "net_raw": 13,  # iptables-legacy, which speaks with the kernel through a raw socket
    "sys_admin": 21,  # loop, device-mapper; the jailer's mount and pid namespaces
    "mknod": 27,  # the jail's device nodes
}


def keep_only(names: frozenset[str]) -> None:
    """Drops every other Linux capability, for this process and all it starts."""
    kept = {CAPABILITIES[name] for name in names}
    with open("/proc/sys/kernel/cap_last_cap") as last:
        for number in range(int(last.read()) + 1):
            if number not in kept and libc.prctl(libc.PR_CAPBSET_READ, number):
                libc.prctl(libc.PR_CAPBSET_DROP, number)
    libc.capset(sum(1 << number for number in kept))


def no_new_privileges() -> None:
    """No program started by this thread, or by threads it starts, gains privileges by exec."""
    libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)


def effective() -> str:
    """The effective set, in hexadecimal, as the kernel reports it."""
    with open("/proc/thread-self/status") as status:
        return next(line.split()[1] for line in status if line.startswith("CapEff:"))
