"""Start-up of the boot agent, installed and as a zipapp, compared with ``python -c REFERENCE``.

The reference imports TLS and X.509. The first byte is that of the ClientHello at a server on loopback, after the agent
has read settings and config volume and made an ephemeral key; a reference ends with its process. Both are medians,
started alternately on one core.

Memory is the peak of a process (VmHWM): at the first byte, and for a whole boot with one blank disk, against a server
that grants it; the modules of that boot are counted too. The libraries that every agent needs are then used one by one
in one process, without code of this project: the least memory that an agent can have.
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
MEMORY_LIMIT = 1.4
PIECES = (
    ("ssl", "import ssl"),
    (
        "a P-256 key and a signature with it",
        """
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
signed = ec.generate_private_key(ec.SECP256R1()).sign(b"", ec.ECDSA(hashes.SHA256()))
""",
    ),
    (
        "a TLS handshake",
        """
import socket, sys
context = ssl.create_default_context(cafile=sys.argv[1])
with socket.create_connection(("127.0.0.1", int(sys.argv[2]))) as plain:
    with context.wrap_socket(plain, server_hostname="127.0.0.1") as stream:
        assert stream.version() == "TLSv1.3"
""",
    ),
    (
        "argparse, json, tomllib, subprocess",
        """
import argparse, json, subprocess, tomllib
_ = argparse.ArgumentParser().parse_args([])
_ = subprocess.run(["true"], check=True)
""",
    ),
    ("attrs, cattrs, h11", "import attrs, cattrs, h11"),
)
"""Names, and code that uses them: all in one process, one after the other."""
HOTKEY = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"

_SAY_PEAK = "\nprint(open('/proc/self/status').read())\n"
_ENVIRONMENT = {"PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}


@frozen
class Subject:
    """An agent, its interpreter, and the path of the libraries that it includes, if the interpreter has none."""

    name: str
    python: str
    agent: tuple[str, ...]
    path: str = ""

    @property
    def reference(self) -> list[str]:
        return [self.python, "-I", "-c", REFERENCE]


def run() -> None:
    one_core()
    with tempfile.TemporaryDirectory(prefix="chutes-proto-bench-") as folder:
        subjects = _subjects(Path(folder))
        header = f"{'ms':>10}{'reference':>12}{'ratio':>8}{'limit':>8}{'MiB':>10}{'ratio':>8}{'limit':>8}"
        print(f"{'first byte sent':>16}{header}")
        for subject in subjects:
            first, reference, peak = _first_bytes(subject, Path(folder))
            memory = f"{peak / 1024:>10.1f}{peak / _reference_peak(subject):>8.2f}{MEMORY_LIMIT:>8.1f}"
            limit = LIMITS[subject.name]
            print(f"{subject.name:>16}{first:>10.1f}{reference:>12.1f}{first / reference:>8.2f}{limit:>8.1f}{memory}")
        with dev_server(Path(folder) / "platform") as server:
            if shutil.which("cryptsetup", path=_ENVIRONMENT["PATH"]) is None:
                print("\nmemory and modules of a whole boot: cryptsetup is not installed")
            else:
                _print_boots(subjects, server, Path(folder))
            _print_pieces(subjects, server)


def _print_boots(subjects: Sequence[Subject], server: DevServer, folder: Path) -> None:
    print(f"\n{'whole boot':>16}{'MiB':>10}{'reference':>12}{'ratio':>8}{'limit':>8}{'modules':>10}{'reference':>12}")
    for subject in subjects:
        peak, modules = _boot(subject, server, folder)
        base, known = _reference_peak(subject), _reference_modules(subject)
        ratio = f"{peak / base:>8.2f}{MEMORY_LIMIT:>8.1f}"
        print(f"{subject.name:>16}{peak / 1024:>10.1f}{base / 1024:>12.1f}{ratio}{modules:>10}{known:>12}")


def _print_pieces(subjects: Sequence[Subject], server: DevServer) -> None:
    peaks = [_piece_peaks(subject, server) for subject in subjects]
    print(f"\n{'no agent without':>36}" + "".join(f"{f'{subject.name}, MiB':>16}{'ratio':>8}" for subject in subjects))
    references = [_reference_peak(subject) for subject in subjects]
    for (name, _), *row in zip(PIECES, *peaks, strict=True):
        cells = (f"{peak / 1024:>16.1f}{peak / of:>8.2f}" for peak, of in zip(row, references, strict=True))
        print(f"{name:>36}" + "".join(cells))


def _subjects(folder: Path) -> list[Subject]:
    found = [
        Subject("installed", sys.executable, (sys.executable, str(Path(sys.executable).with_name("chutes-proto"))))
    ]
    has_cryptography = [SYSTEM, "-I", "-c", REFERENCE]
    if not Path(SYSTEM).exists() or subprocess.run(has_cryptography, capture_output=True, check=False).returncode:
        print(f"zipapp: {SYSTEM} has no cryptography (Debian: python3-cryptography)")
        return found
    zipapp = folder / "agent.pyz"
    build(zipapp, SYSTEM)
    return [*found, Subject("zipapp", SYSTEM, (SYSTEM, "-I", str(zipapp)), str(zipapp))]


# --- the first byte ---


def _first_bytes(subject: Subject, folder: Path) -> tuple[float, float, float]:
    """Return ms until the agent's first byte, ms of the reference, and the agent's peak in KiB until then."""
    first: list[float] = []
    reference: list[float] = []
    peaks: list[int] = []
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
            seconds, peak = _first_byte([*subject.agent, *settings], listener)
            first.append(seconds)
            peaks.append(peak)
    return median(first) * 1000, median(reference) * 1000, median(peaks)


def _first_byte(command: Sequence[str], listener: socket.socket) -> tuple[float, int]:
    start = perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=_ENVIRONMENT) as agent:
        try:
            with listener.accept()[0] as connection:
                assert connection.recv(1) == b"\x16", "a TLS handshake begins with this"
                return perf_counter() - start, _peak(Path(f"/proc/{agent.pid}/status"))
        finally:
            agent.kill()


def _any_ca() -> bytes:
    import time

    from chutes_proto.auth.server_identity import make_server_identity

    return make_server_identity(int(time.time()), os.urandom(32)).ca_pem


def _settings(folder: Path, url: str, ca: Path, quoter: str) -> list[str]:
    """Return the arguments of an agent with one blank disk."""
    folder.mkdir()
    disk, settings = folder / "disk.img", folder / "agent.toml"
    with disk.open("wb") as file:
        _ = file.truncate(64 * 1024 * 1024)
    values = {"ca_file": str(ca), "quoter": quoter, "hotkey": HOTKEY, "vm_name": f"vm-{folder.name}"}
    lines = [f"servers = [{json.dumps(url)}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    _ = settings.write_text("\n".join([*lines, "[volumes.storage]", f"device = {json.dumps(str(disk))}", ""]))
    return ["agent", "run", "--images", "--config", str(settings)]


# --- the whole boot ---


def _boot(subject: Subject, server: DevServer, folder: Path) -> tuple[int, int]:
    """Return the peak in KiB and the number of modules, of two boots: the first may compile edited modules."""
    quoter = f"command:{_quote_program(folder / f'{subject.name}-quote', server)}"
    python, *rest = subject.agent
    settings = _settings(folder / f"{subject.name}-boot", server.url, server.ca, quoter)
    modules = _modules([python, "-X", "importtime", *rest, *settings])
    settings = _settings(folder / f"{subject.name}-again", server.url, server.ca, quoter)
    with subprocess.Popen([*subject.agent, *settings], stderr=subprocess.PIPE, env=_ENVIRONMENT) as agent:
        peak = 0
        while agent.poll() is None:
            peak = max(peak, _peak(Path(f"/proc/{agent.pid}/status")))
            sleep(0.005)
        errors = agent.stderr.read().decode() if agent.stderr else ""
    assert agent.returncode == 0, errors
    return peak, modules


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


def _piece_peaks(subject: Subject, server: DevServer) -> list[int]:
    """Return the peak in KiB after each of `PIECES`."""
    found = f"import sys; sys.path.insert(0, {subject.path!r})\n" if subject.path else ""
    program = found + "".join(code + _SAY_PEAK for _, code in PIECES)
    command = [subject.python, "-I", "-c", program, str(server.ca), server.url.rpartition(":")[2]]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=_ENVIRONMENT)
    return [_peak_in(status) for status in done.stdout.split("Name:")[1:]]


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
