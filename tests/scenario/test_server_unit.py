"""The units of the key server, as they are shipped, under a real systemd in a virtual machine of Debian's kernel.

VMs boot there from outside while an operator restarts the service. The machine is emulated, so a server starts in a
minute and not in a second: VMs are patient here, and what is shown is that nothing was refused.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from chutes_proto.cli.main import main
from chutes_proto.io.files import write_file
from tests.conftest import ROOT
from tests.scenario.premises import Premises
from tests.scenario.test_restarts import load, wait_for_boots
from tests.scenario.test_virtual_machine import (
    GATEWAY,
    SECONDS,
    USR,
    WITH_SYSTEMD,
    Machine,
    image,
    machine,
    site,
    version,
    write_system,
    write_tree,
)
from tools.ports import free_port

__all__ = ["image", "machine", "site", "version"]  # fixtures

PATIENCE = 600
PYTHON = f"/usr/bin/python{sysconfig.get_python_version()}"
"""That of the system, of the version whose packages are here: the unit does not let the service read homes."""
UNIT = "chutes-proto.service"
PROGRAM = """\
#!/opt/chutes-proto/bin/python
import sys
from chutes_proto.cli.main import main
sys.exit(main())
"""
# The packages are those of this environment, which are only read, and this project's own beside them.
PACKAGES = """\
mkdir /run/packages
mount -t 9p -o ro,trans=virtio,version=9p2000.L,cache=loose,msize=262144 packages /run/packages
mount -t overlay -o "lowerdir=$rootmnt/opt/src:/run/packages" packages "$rootmnt/PLACE"
"""
EMULATED = """\
[Service]
TimeoutStartSec=15min
"""
# The operator's shell: it asks for one line after the other, outside, and answers with what each printed.
OPERATOR = """\
#!/bin/bash
trap "systemctl poweroff" EXIT
while exec 3<>/dev/tcp/HOST/PORT && read -r line <&3; do
    bash -c "$line" >&3 2>&1
    exec 3>&-
done
"""
SERVICE = """\
[Unit]
After=multi-user.target

[Service]
Type=oneshot
ExecStart=/usr/local/sbin/operator
StandardOutput=tty
StandardError=tty
TTYPath=/dev/console

[Install]
WantedBy=multi-user.target
"""

# The one line of hardening that the unit lacks; its comment says why.
WITHOUT_WRITE_AND_EXECUTE = (
    f"mkdir -p /run/systemd/system/{UNIT}.d; cd /run/systemd/system/{UNIT}.d;"
    ' printf "[Service]\\nMemoryDenyWriteExecute=yes\\nRestart=no\\n" >memory.conf; systemctl daemon-reload;'
    f" systemctl start {UNIT}; journalctl --no-pager --boot --output=cat --unit {UNIT}"
)


class Operator:
    """At a shell in the machine, as root."""

    def __init__(self) -> None:
        self._asked = socket.create_server(("127.0.0.1", 0))
        self._asked.settimeout(SECONDS)
        self.port = int(self._asked.getsockname()[1])

    def run(self, line: str) -> str:
        """What a command printed."""
        connection, _ = self._asked.accept()
        with connection, connection.makefile("rwb") as stream:
            _ = stream.write(f"{line}\n".encode())
            stream.flush()
            return stream.read().decode()

    def leave(self) -> None:
        """The machine switches itself off."""
        self._asked.accept()[0].close()
        self._asked.close()


def write_service(tree: Path, site: Premises) -> None:
    """What `init` writes, made complete as it says; the platform is a simulated one."""
    place, from_site = tree / "etc/chutes-proto", site.directory
    words = ("--name", "127.0.0.1", "--state", "/var/lib/chutes-proto")
    assert main(["init", str(place), *words]) == 0
    for name in ("server.pem", "server.key", "measurements.toml", "simulated-root.der"):
        _ = shutil.copy(from_site / name, place / name)
    _ = shutil.copytree(from_site / "collateral", place / "collateral")
    text = re.sub(r"\[collateral\].*?\n\n", "", (place / "server.toml").read_text(), flags=re.DOTALL)
    here = 'roots = "/etc/chutes-proto/simulated-root.der"\ncollateral.directory = "/etc/chutes-proto/collateral"\n'
    write_file(place / "server.toml", (here + text).encode(), mode=0o600)
    for path in (place, place / "collateral"):
        path.chmod(0o755)
    for path in (place / "simulated-root.der", *(place / "collateral").iterdir()):
        path.chmod(0o644)


def make_system(machine: Machine, site: Premises, operator: Operator) -> Path:
    """A file system with this machine's systemd, the server and its units."""
    tree = machine.folder / "root"
    units = {
        f"etc/systemd/system/{path.name}": path.read_text()
        for path in (ROOT / "examples/systemd").glob("chutes-proto.*")
    }
    shell = OPERATOR.replace("HOST", GATEWAY).replace("PORT", str(operator.port))
    files = {
        f"etc/systemd/system/{UNIT}.d/emulated.conf": EMULATED,
        "etc/systemd/system/operator.service": SERVICE,
        "usr/local/sbin/operator": shell,
        "opt/chutes-proto/bin/chutes-proto": PROGRAM,
        "etc/fstab": "",
    }
    write_tree(tree, units | files)
    write_system(tree)
    made = [PYTHON, "-m", "venv", "--without-pip", str(tree / "opt/chutes-proto")]
    _ = subprocess.run(made, check=True, timeout=SECONDS)
    for package in ROOT.glob("src/*"):
        _ = shutil.copytree(package, tree / "opt/src" / package.name)
    for directory in (tree / "opt").rglob("."):
        directory.chmod(0o755)
    write_service(tree, site)
    command = ["systemctl", f"--root={tree}", "enable", "--quiet", "chutes-proto.socket", UNIT, "operator.service"]
    _ = subprocess.run(command, check=True)
    return machine.file_system(tree)


@contextmanager
def running(machine: Machine, site: Premises) -> Iterator[tuple[Operator, str]]:
    """The machine, from its boot until it is off; its operator and the URL of its server."""
    operator, port = Operator(), free_port()
    (packages,) = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    place = f"opt/chutes-proto/lib/python{sysconfig.get_python_version()}/site-packages"
    machine.words = WITH_SYSTEMD
    machine.shares["packages"] = packages
    machine.forwarded = f",hostfwd=tcp:127.0.0.1:{port}-:8443"
    machine.root_is_plain(make_system(machine, site, operator))
    machine.files["scripts/local-bottom/usr"] = USR + PACKAGES.replace("PLACE", place)
    with ThreadPoolExecutor() as threads:
        booted = threads.submit(machine.boot)
        try:
            yield operator, f"https://127.0.0.1:{port}"
        finally:
            operator.leave()
        said = booted.result(SECONDS)
    assert "Power down" in said


@pytest.mark.skipif(not Path(PYTHON).exists(), reason=f"{PYTHON}: not there, and a service cannot read another")
def test_the_service_runs_with_few_rights_and_a_restart_loses_no_boot(machine: Machine, site: Premises) -> None:
    with running(machine, site) as (operator, url):
        status = operator.run(f"systemctl status --no-pager --full chutes-proto.socket {UNIT}")
        assert status.count("Active: active (") == 2, status
        pid = operator.run(f"systemctl show --property=MainPID --value {UNIT}").strip()
        process = operator.run(f"cat /proc/{pid}/status /proc/{pid}/limits")
        assert re.search(r"^Uid:(\s+6[1-5]\d\d\d){4}$", process, re.M)  # of DynamicUser
        assert re.search(r"^CapBnd:\t0{16}$", process, re.M)
        assert re.search(r"^NoNewPrivs:\t1$", process, re.M)
        assert re.search(r"^Seccomp:\t2$", process, re.M)
        assert re.search(r"^Max core file size +0 +0 ", process, re.M)
        assert json.loads(operator.run("curl -s http://127.0.0.1:9464/readyz"))["ready"] is True
        with load(site, url, patience=PATIENCE) as vms:
            for _ in range(3):
                wait_for_boots(vms, seconds=SECONDS)
                assert operator.run(f"systemctl restart {UNIT}") == ""
            wait_for_boots(vms, seconds=SECONDS)
        assert [vm.retries for vm in vms] == [[]] * len(vms)
        # A command of root's leaves no file that the service's user cannot use.
        told = operator.run("/opt/chutes-proto/bin/chutes-proto vm list --config /etc/chutes-proto/server.toml")
        assert all(vm.name in told for vm in vms), told
        owners = operator.run("stat --format=%u /var/lib/private/chutes-proto/*").split()
        assert (len(set(owners)), "0" in owners) == (1, False)
        _ = operator.run(f"systemctl kill --signal=KILL {UNIT}; until systemctl is-active {UNIT}; do sleep 1; done")
        with load(site, url, patience=PATIENCE) as vms:
            wait_for_boots(vms, seconds=SECONDS)
        assert operator.run(f"systemctl stop chutes-proto.socket {UNIT}") == ""
        assert operator.run(f"systemctl show --property=Result --value {UNIT}").strip() == "success"
        journal = operator.run(f"journalctl --no-pager --boot --output=cat --unit {UNIT}")
        denied = operator.run(WITHOUT_WRITE_AND_EXECUTE)
    assert "Cannot allocate write+execute memory for ffi.callback()" in denied
    site.heard.append(journal.encode())
    records = [json.loads(line) for line in journal.splitlines() if line.startswith("{")]
    events = [record["event"] for record in records]
    assert (events.count("serving"), events.count("stopped")) == (5, 4), journal
    assert all(record["handed_over"] for record in records if record["event"] == "stopping")
