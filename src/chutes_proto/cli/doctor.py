"""``chutes-proto doctor``: what a machine or a configuration lacks, and the commands that mend it."""

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
import click

from chutes_proto._extras import EXTRAS
from chutes_proto.cli import console, output
from chutes_proto.cli.base import Command, answer, json_option, plain_option
from chutes_proto.cli.operator.checking import Finding, check_ends, check_setup
from chutes_proto.errors import ConfigurationError, FileUnavailable, QuoteUnavailable
from chutes_proto.io.disks.cryptsetup import HOW_TO_INSTALL, find_cryptsetup
from chutes_proto.io.quoters.choose import make_quoter, take_quote
from chutes_proto.server import ServerConfig

_OLDEST: Final = (3, 11)
_ROLES: Final = {"vm": ("tls",), "server": ("tls", "hotkey"), "verifier": ()}
"""By use of a machine: the extras that it cannot do without."""
_UNSYNCHRONIZED: Final = 5  # TIME_ERROR of adjtimex(2)
_COLOURS: Final[dict[str, output.State]] = {"ok": "good", "note": "warn", "problem": "bad"}


@click.command(
    "doctor",
    cls=Command,
    exits={
        0: "nothing is missing or wrong",
        1: "something is missing or wrong",
        2: "wrong usage, or a file that cannot be read",
    },
)
@click.option(
    "--for",
    "roles",
    type=click.Choice([*_ROLES]),
    multiple=True,
    help="look only at the needs of this use of the machine; repeatable (default: all)",
)
@click.option("--config", metavar="FILE", help="look at a key server's configuration instead")
@json_option
@plain_option
def command(roles: tuple[str, ...], config: str | None) -> int:
    """Find what a machine or a configuration lacks, and the commands that mend it.

    Looks at this machine: Python, extras, the clock; for a VM also cryptsetup, and whether the TDX guest device or the
    kernel's configfs-TSM gives a quote. With --config looks at everything that a key server needs to start, at the
    permissions of its secrets, and at when its certificate and collateral expire. Changes nothing.

    Examples:
      chutes-proto doctor --for verifier
      chutes-proto doctor --config server.toml
      chutes-proto doctor --config server.toml --json

    See also: serve, agent, collateral check
    """
    if config and roles:
        raise click.UsageError("--for goes without --config")
    findings = [*(_configuration(config) if config else _machine(roles or tuple(_ROLES)))]
    is_complete = all(finding.state != "problem" for finding in findings)
    report = {"ok": is_complete, "findings": [attrs.asdict(finding) for finding in findings]}
    answer(report, lambda: _say(findings))
    return console.GRANTED if is_complete else console.REFUSED


def _say(findings: Iterable[Finding]) -> None:
    for finding in findings:
        output.prose(f"{finding.state:8} {finding.what}: {finding.detail}", _COLOURS[finding.state], rest=9)
        if finding.remedy:
            console.say(f"{'':8} run: {finding.remedy}")


def _configuration(path: str) -> Iterator[Finding]:
    from chutes_proto.io.server.setup import make_setup

    try:
        setup = make_setup(ServerConfig.load(path))
    except FileUnavailable:
        raise
    except ConfigurationError as exc:
        yield from map(Finding.of_problem, str(exc).splitlines())
        return
    yield from check_setup(setup)
    yield from check_ends(setup)


# --- a machine ---


def _machine(roles: tuple[str, ...]) -> Iterator[Finding]:
    version = platform.python_version()
    is_new = tuple(map(int, platform.python_version_tuple()[:2])) >= _OLDEST
    yield Finding("ok" if is_new else "problem", "Python", version, "" if is_new else "apt-get install python3")
    needed = {extra for role in roles for extra in _ROLES[role]}
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
