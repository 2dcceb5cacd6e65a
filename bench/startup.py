"""The boot agent from the start of its process, installed and as a zipapp, beside ``python -c REFERENCE``.

The reference imports TLS and X.509, which no agent can do without. The first byte is the first one of the ClientHello
that reaches a server on loopback, after settings, config and disks were looked at and a throw-away key was made; a
reference ends when its process does. Both are medians, started by turns on one core. The peak memory is that of the
whole boot (VmHWM of its process) against a server that grants it, with one blank disk; its modules are counted too.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter, sleep

from attrs import frozen

from bench.measure import one_core
from tests.dev_server import DevServer, dev_server
from tools.agent_zipapp import build

REFERENCE = "import ssl, cryptography.x509"
TURNS = 40
SYSTEM = "/usr/bin/python3"
LIMITS = {"installed": 2.0, "zipapp": 2.5}
MEMORY_LIMIT = 1.3
HOTKEY = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"

_SAY_PEAK = "; print(open('/proc/self/status').read())"
_ENVIRONMENT = {"PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}


@frozen
class Subject:
    """An agent, and the interpreter that runs it."""

    name: str
    python: str
    agent: tuple[str, ...]

    @property
    def reference(self) -> list[str]:
        return [self.python, "-I", "-c", REFERENCE]


def run() -> None:
    one_core()
    with tempfile.TemporaryDirectory(prefix="chutes-proto-bench-") as folder:
        subjects = _subjects(Path(folder))
        print(f"{'first byte sent':>16}{'ms':>10}{'reference':>12}{'ratio':>8}{'limit':>8}")
        for subject in subjects:
            first, reference = _first_bytes(subject, Path(folder))
            limit = LIMITS[subject.name]
            print(f"{subject.name:>16}{first:>10.1f}{reference:>12.1f}{first / reference:>8.2f}{limit:>8.1f}")
        if shutil.which("cryptsetup", path=_ENVIRONMENT["PATH"]) is None:
            print("\nmemory and modules of a whole boot: cryptsetup is not installed")
            return
        print(
            f"\n{'whole boot':>16}{'MiB':>10}{'reference':>12}{'ratio':>8}{'limit':>8}{'modules':>10}{'reference':>12}"
        )
        with dev_server(Path(folder) / "platform") as server:
            for subject in subjects:
                peak, modules = _boot(subject, server, Path(folder))
                base, known = _reference_peak(subject), _reference_modules(subject)
                print(
                    f"{subject.name:>16}{peak / 1024:>10.1f}{base / 1024:>12.1f}{peak / base:>8.2f}"
                    f"{MEMORY_LIMIT:>8.1f}{modules:>10}{known:>12}"
                )


def _subjects(folder: Path) -> list[Subject]:
    found = [Subject("installed", sys.executable, (sys.executable, str(Path(sys.executable).with_name("chutes-proto"))))]
    has_cryptography = [SYSTEM, "-I", "-c", REFERENCE]
    if not Path(SYSTEM).exists() or subprocess.run(has_cryptography, capture_output=True, check=False).returncode:
        print(f"zipapp: {SYSTEM} has no cryptography (Debian: python3-cryptography)")
        return found
    zipapp = folder / "agent.pyz"
    build(zipapp, SYSTEM)
    return [*found, Subject("zipapp", SYSTEM, (SYSTEM, "-I", str(zipapp)))]


# --- the first byte ---


def _first_bytes(subject: Subject, folder: Path) -> tuple[float, float]:
    """Milliseconds: until the agent's first byte, and for the reference."""
    first: list[float] = []
    reference: list[float] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(60)
        ca = folder / "ca.pem"
        if not ca.exists():
            _ = ca.write_bytes(_any_ca())
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        settings = _settings(folder / f"{subject.name}-first", url, ca, "tsm")
        for _ in range(TURNS):
            start = perf_counter()
            _ = subprocess.run(subject.reference, check=True, env=_ENVIRONMENT)
            reference.append(perf_counter() - start)
            first.append(_first_byte([*subject.agent, *settings], listener))
    return median(first) * 1000, median(reference) * 1000


def _first_byte(command: Sequence[str], listener: socket.socket) -> float:
    start = perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=_ENVIRONMENT) as agent:
        try:
            with listener.accept()[0] as connection:
                assert connection.recv(1) == b"\x16", "a TLS handshake begins with this"
                return perf_counter() - start
        finally:
            agent.kill()


def _any_ca() -> bytes:
    import time

    from chutes_proto.auth.certificates import make_server_identity

    return make_server_identity(int(time.time()), os.urandom(32)).ca_pem


def _settings(folder: Path, url: str, ca: Path, quoter: str) -> list[str]:
    """The arguments of an agent with one blank disk."""
    folder.mkdir()
    disk, settings = folder / "disk.img", folder / "agent.toml"
    with disk.open("wb") as file:
        _ = file.truncate(64 * 1024 * 1024)
    said = {"ca_file": str(ca), "quoter": quoter, "hotkey": HOTKEY, "vm_name": f"vm-{folder.name}"}
    lines = [f"servers = [{json.dumps(url)}]", *(f"{key} = {json.dumps(value)}" for key, value in said.items())]
    _ = settings.write_text("\n".join([*lines, "[volumes.storage]", f"device = {json.dumps(str(disk))}", ""]))
    return ["agent", "run", "--images", "--config", str(settings)]


# --- the whole boot ---


def _boot(subject: Subject, server: DevServer, folder: Path) -> tuple[int, int]:
    """KiB at the peak, and modules imported."""
    quoter = f"command:{_quote_program(folder / f'{subject.name}-quote', server)}"
    arguments = _settings(folder / f"{subject.name}-boot", server.url, server.ca, quoter)
    with subprocess.Popen([*subject.agent, *arguments], stderr=subprocess.PIPE, env=_ENVIRONMENT) as agent:
        peak = 0
        while agent.poll() is None:
            peak = max(peak, _peak(Path(f"/proc/{agent.pid}/status")))
            sleep(0.005)
        said = agent.stderr.read().decode() if agent.stderr else ""
    assert agent.returncode == 0, said
    arguments = _settings(folder / f"{subject.name}-again", server.url, server.ca, quoter)
    python, *rest = subject.agent
    return peak, _modules([python, "-X", "importtime", *rest, *arguments])


def _quote_program(script: Path, server: DevServer) -> Path:
    out = script.with_suffix(".out")
    simulate = [sys.executable, "-m", "chutes_proto", "simulate", "--platform", str(server.platform), "--out", str(out)]
    lines = ["#!/bin/sh", "set -e", f'{shlex.join(simulate)} --report-data "$(cat)" >/dev/null']
    _ = script.write_text("\n".join([*lines, shlex.join(["cat", str(out / "quote.bin")]), ""]))
    script.chmod(0o755)
    return script


def _reference_peak(subject: Subject) -> int:
    done = subprocess.run(
        [subject.python, "-I", "-c", REFERENCE + _SAY_PEAK], capture_output=True, text=True, check=True
    )
    return _peak_in(done.stdout)


def _reference_modules(subject: Subject) -> int:
    python, *rest = subject.reference
    return _modules([python, "-X", "importtime", *rest])


def _modules(command: Sequence[str]) -> int:
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=_ENVIRONMENT)
    return len(re.findall(r"^import time: +[0-9]+ \|", done.stderr, re.MULTILINE))


def _peak(status: Path) -> int:
    try:
        return _peak_in(status.read_text())
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _peak_in(status: str) -> int:
    found = re.search(r"^VmHWM:\s+([0-9]+) kB", status, re.MULTILINE)
    return int(found[1]) if found else 0
