# SPDX-License-Identifier: MIT
"""The first config.toml of an installation: every key that there is, as a comment to take the mark from."""

from __future__ import annotations

from typing import Final

_HEAD: Final = """\
# What `banger` uses where a command says nothing. Every key is optional; docs/config.md says more of each.
# To set one, take the mark before it away, look with `bangerd --check-config`, then `banger system restart`.
"""
# Key, a value (the default, where there is one), and what it says.
_KEYS: Final = (
    ("image", '"debian-bookworm"', "The image of a VM for which none is named."),
    ("kernel", '"generic-6.12"', "The kernel, instead of the one that the image names."),
    ("vcpus", "2", "Virtual processors; absent: 2, or what a smaller host has."),
    ("memory_mib", "1024", "Memory in MiB; absent: 1024, or a quarter of a small host's."),
    ("disk_size_mib", "8192", "The work disk, /root, in MiB."),
    ("vms_memory_mib", "16384", "Memory of all VMs that run, together; absent: as much as the host has."),
    ("ipv6", "false", "Whether VMs get an IPv6 address too."),
    ("agent_deadline_s", "60.0", "How many seconds a start waits for the guest's agent."),
    ("agent_silence_s", "15.0", "How long an agent may be silent before its VM counts as running no more."),
    ("flush_deadline_s", "10.0", "How long a stop waits until the guest has written its file systems."),
    ("power_off_deadline_s", "4.0", "How long a stop then waits until the guest has ended."),
    ("dns", '["192.0.2.53"]', "Whom guests ask for names, instead of banger; up to 3 IPv4 addresses."),
    ("dns_listen", '"127.0.0.1:42069"', 'Where this host asks for names in .vm; "": nowhere.'),
    ("dns_route", "true", "Whether systemd-resolved is told, where it runs."),
    ("dns_guests", "true", "Whether guests are answered."),
    ("dns_upstream", '["192.0.2.53:53"]', "Who is asked for guests with NAT; absent: whom this host asks."),
    ("file_sync", '[{ source = "~/.gitconfig" }]', "Files of your home that every VM has in its /root."),
    (
        "insecure_registries",
        '["registry.lan:5000"]',
        "Registries without TLS, or with a certificate nobody vouches for.",
    ),
)


def text() -> str:
    """It sets nothing."""
    return _HEAD + "".join(f"\n# {what}\n# {key} = {value}\n" for key, value, what in _KEYS)
