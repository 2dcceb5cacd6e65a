"""Ports of this machine for programs that are told one before they listen."""

from __future__ import annotations

import random
import socket
from contextlib import suppress
from itertools import chain
from pathlib import Path

_LOWEST = 10_000


def free_port() -> int:
    """A port of loopback on which nobody listens, and which neither the kernel nor another caller gives to anyone else.

    A port of ``bind(("", 0))`` that is closed again would be anyone's: so this one lies below those that the kernel
    gives out, and an abstract socket with its name keeps others that call this from it, until the process ends.
    """
    highest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    first = random.randrange(_LOWEST, highest)  # noqa: S311 - it keeps callers out of one another's way, no more
    for port in chain(range(first, highest), range(_LOWEST, first)):
        claim = socket.socket(socket.AF_UNIX)
        with suppress(OSError):
            claim.bind(f"\0chutes-proto-port-{port}")
            socket.create_server(("127.0.0.1", port)).close()
            _ = claim.detach()
            return port
        claim.close()
    raise OSError(f"no port between {_LOWEST} and {highest} is free")
