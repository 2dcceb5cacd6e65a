"""Everything that this machine lacks, for `doctor`: Python, extras, the clock, cryptsetup, a source of quotes."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import Final

import attrs

from chutes_proto._extras import EXTRAS
from chutes_proto.errors import QuoteUnavailable
from chutes_proto.io.disks.cryptsetup import HOW_TO_INSTALL, find_cryptsetup
from chutes_proto.io.finding import Finding
from chutes_proto.io.quoters.choose import make_quoter, take_quote

ROLES: Final = {"vm": ("tls",), "server": ("tls", "hotkey"), "verifier": ()}
"""By use of a machine: the extras that it cannot do without."""

_OLDEST: Final = (3, 11)
_UNSYNCHRONIZED: Final = 5  # TIME_ERROR of adjtimex(2)


def check_machine(roles: Iterable[str]) -> Iterator[Finding]:
    """Look at everything that a machine needs for ``roles``, which are some of `ROLES`."""
    version = platform.python_version()
    is_new = tuple(map(int, platform.python_version_tuple()[:2])) >= _OLDEST
    yield Finding("ok" if is_new else "problem", "Python", version, "" if is_new else "apt-get install python3")
    needed = {extra for role in roles for extra in ROLES[role]}
    loops = [loop for loop in ("trio", "asyncio") if _is_installed(loop)]
    if "server" in roles and not loops:
        needed.add("trio")
    for extra in EXTRAS:
        remedy = f"pip install 'chutes-proto[{extra}]'"
        if _is_installed(extra):
            yield Finding("ok", f"extra {extra}", "installed")
        elif extra in needed:
            yield Finding("problem", f"extra {extra}", "not installed", remedy)
        else:
            yield Finding("note", f"extra {extra}", "not installed, and not needed for this", remedy)
    yield _clock()
    if "vm" in roles:
        yield _cryptsetup()
        yield from _quotes()


def _is_installed(extra: str) -> bool:
    return all(find_spec(module) is not None for module in EXTRAS[extra])


def _clock() -> Finding:
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))  # all zero: only asks
    if state == _UNSYNCHRONIZED:
        return Finding("note", "clock", f"{now}, not synchronized", "timedatectl set-ntp true")
    return Finding("ok" if state >= 0 else "note", "clock", now if state >= 0 else f"{now}, cannot be asked")


def _cryptsetup() -> Finding:
    program = find_cryptsetup()
    if program is None:
        return Finding("problem", "cryptsetup", "not installed", HOW_TO_INSTALL)
    done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=False)
    return Finding("ok", "cryptsetup", f"{program}, {done.stdout.strip() or done.stderr.strip()}")


def _quotes() -> Iterator[Finding]:
    """One source of quotes is enough; each is tried."""
    found: list[Finding] = []
    for name, what in (("tsm", "quote by configfs-TSM"), ("vsock", "quote by /dev/tdx_guest and vsock")):
        try:
            quote = take_quote(make_quoter(name), os.urandom(64))
            found.append(Finding("ok", what, f"{len(quote)} bytes"))
        except QuoteUnavailable as exc:
            found.append(Finding("problem", what, str(exc), "modprobe tdx_guest"))
    is_enough = any(finding.state == "ok" for finding in found)
    for finding in found:
        yield attrs.evolve(finding, state="note", remedy="") if is_enough and finding.state != "ok" else finding
