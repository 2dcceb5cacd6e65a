"""Ports that are given to programs before they listen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT
from tools.ports import free_port


def test_no_two_callers_get_the_same_port_and_the_kernel_gives_it_to_nobody() -> None:
    ask = "from tools.ports import free_port; print(*[free_port() for _ in range(300)]); input()"
    command = [sys.executable, "-c", ask]
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        theirs = set(map(int, other.stdout.readline().split()))
        ours = {free_port() for _ in range(300)}
        _ = other.communicate("\n")
    assert (len(theirs), len(ours), theirs & ours) == (300, 300, set())
    assert max(theirs | ours) < lowest
