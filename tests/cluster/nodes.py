"""Three nodes with PostgreSQL, Patroni and etcd as in `examples/patroni`, each in a network namespace of its own.

A fourth namespace, ``apps``, holds the bridge between them, and the programs of a key server's machine. Nothing is
added to the network of the machine itself.
"""

from __future__ import annotations

import grp
import json
import math
import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from attrs import define, field

from tests.conftest import ROOT
from tests.waiting import wait_until

EXAMPLE = ROOT / "examples" / "patroni"
NODES = ("node1", "node2", "node3")
PASSWORD = "canary-password-of-the-database"
PROGRAMS = ("ip", "sysctl", "setpriv", "curl", "etcd", "patroni", "haproxy", "pgbouncer")
HEALING_SECONDS = 300.0
STABLE_SECONDS = 10.0
"""More than Patroni's loop_wait."""


def address(node: str) -> str:
    """The address of a node in the example."""
    return f"10.0.0.1{node[-1]}"


@define
class Nodes:
    """The cluster. ``edits`` are texts of `patroni.yml` and what stands there instead."""

    programs: Path
    edits: dict[str, str] = field(factory=dict[str, str])
    folder: Path = field(init=False)
    name: str = field(factory=lambda: f"chutes-{os.getpid()}")
    _patroni: dict[str, subprocess.Popen[bytes]] = field(factory=dict[str, "subprocess.Popen[bytes]"])
    _spawned: list[subprocess.Popen[bytes]] = field(factory=list["subprocess.Popen[bytes]"])
    _ends: ExitStack = field(factory=ExitStack)

    def __attrs_post_init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="chutes-proto-cluster-"))

    def __enter__(self) -> Nodes:
        try:
            self._ends.callback(shutil.rmtree, self.folder)
            self._ends.callback(lambda: [process.wait(60) for process in self._spawned])
            self._give(self.folder)
            self._remove_leftovers()
            self._make_network()
            for node in NODES:
                self._start_etcd(node)
            for node in NODES:
                self.start(node)
            self.heal()
            self._make_database()
        except BaseException:
            self._ends.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.close()

    # --- faults ---

    def processes(self, node: str, *names: str) -> list[int]:
        """The processes of a node with these names, which are those of their programs."""
        listed = _run("ip", "netns", "pids", self.namespace(node)).split()
        return [int(number) for number in listed if _name_of(number) in names]

    def signal(self, node: str, number: signal.Signals) -> None:
        """Send a signal to all of PostgreSQL and Patroni on a node; etcd goes on."""
        for process in self.processes(node, "patroni", "postgres"):
            try:
                os.kill(process, number)
            except ProcessLookupError:
                continue

    def kill(self, node: str) -> None:
        """End PostgreSQL and Patroni, as a crash of the machine does."""
        self.signal(node, signal.SIGKILL)
        _ = self._patroni.pop(node).wait(60)
        wait_until(lambda: not self.processes(node, "postgres"))

    def link(self, node: str, state: str) -> None:
        """Cut a node off from all others, etcd included (``down``), or connect it again (``up``)."""
        self.within("apps", "ip", "link", "set", node, state)

    def start(self, node: str) -> None:
        """Start Patroni, which starts PostgreSQL."""
        configuration = self.folder / f"{node}.yml"
        if not configuration.exists():
            _ = configuration.write_text(self._configured(node))
            configuration.chmod(0o600)
            self._give(configuration)
            data = self.folder / node
            data.mkdir(0o700)
            self._give(data)
        with (self.folder / f"{node}.log").open("ab") as log:
            self._patroni[node] = self.spawn(node, ["patroni", str(configuration)], log)

    # --- state ---

    def members(self) -> list[dict[str, Any]]:
        """All nodes as Patroni describes them, from the first node that can name a leader."""
        for node in NODES:
            told = self._ask(f"http://{address(node)}:8008/cluster")
            members: list[dict[str, Any]] = json.loads(told)["members"] if told else []
            if any(member["role"] == "leader" for member in members):
                return members
        return []

    def primary(self) -> str:
        """The node that Patroni answers for as the primary, or an empty text."""
        return next((node for node in NODES if self._ask(f"http://{address(node)}:8008/primary")), "")

    def is_healthy(self) -> bool:
        """Whether there are a primary and two standbys that follow it, one of them synchronous."""
        members = self.members()
        leader = next((member for member in members if member["role"] == "leader"), None)
        followers = [member for member in members if member["role"] != "leader"]
        return (
            leader is not None
            and leader["state"] == "running"
            and "timeline" in leader
            and len(followers) == len(NODES) - 1
            and all(
                (member["state"], member.get("timeline")) == ("streaming", leader["timeline"]) for member in followers
            )
            and any(member["role"] in ("sync_standby", "quorum_standby") for member in followers)
            and bool(self.primary())
        )

    def heal(self) -> None:
        """Return when the cluster is whole; fails with the ends of Patroni's logs where it does not become so.

        For a moment it looks whole after a partition, before its old primary notices that its time is over.
        """
        since = math.inf

        def is_whole() -> bool:
            nonlocal since
            since = min(since, time.monotonic()) if self.is_healthy() else math.inf
            return time.monotonic() - since > STABLE_SECONDS

        try:
            wait_until(is_whole, HEALING_SECONDS)
        except AssertionError:
            logs = (f"{node}: {(self.folder / f'{node}.log').read_text()[-1500:]}" for node in NODES)
            raise AssertionError(f"the cluster does not heal: {self.members()}\n" + "\n".join(logs)) from None

    def url(self, **query: str) -> str:
        """The URL of the example for a key server: all nodes, of which the one that can write is used."""
        hosts = ",".join(f"{address(node)}:5432" for node in NODES)
        more = "".join(f"&{key}={value}" for key, value in query.items())
        return f"postgresql://keys:{PASSWORD}@{hosts}/keys?target_session_attrs=read-write&connect_timeout=2{more}"

    # --- programs ---

    def namespace(self, place: str) -> str:
        """The network namespace of a node, or of ``apps``."""
        return f"{self.name}-{place}"

    def inside(self, place: str, command: Iterable[str]) -> list[str]:
        """A command line in the network namespace of ``place``."""
        return ["ip", "netns", "exec", self.namespace(place), *command]

    def within(self, place: str, *command: str) -> str:
        """Run a command in the network namespace of ``place``: what it prints."""
        return _run(*self.inside(place, command))

    def spawn(self, place: str, command: list[str], log: Any) -> subprocess.Popen[bytes]:
        """Start a program of PostgreSQL's user, which ends with the cluster."""
        user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", "--pdeathsig=KILL"]
        command = ["nice", *self.inside(place, [*user, *command])]
        self._spawned.append(subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log))
        return self._spawned[-1]

    def front(self, mode: str) -> str:
        """Start HAProxy, and with a ``mode`` pgbouncer before it: the URL for a key server."""
        for name in ("haproxy.cfg", "pgbouncer.ini"):
            text = (EXAMPLE / name).read_text()
            text = text.replace("pool_mode = transaction", f"pool_mode = {mode}")
            _ = (self.folder / name).write_text(text.replace("/etc/pgbouncer", str(self.folder)))
        _ = (self.folder / "userlist.txt").write_text(f'"keys" "{PASSWORD}"\n')
        with (self.folder / "front.log").open("ab") as log:
            self.spawn("apps", ["haproxy", "-db", "-f", str(self.folder / "haproxy.cfg")], log)
            if mode:
                self.spawn("apps", ["pgbouncer", str(self.folder / "pgbouncer.ini")], log)
        return f"postgresql://keys:{PASSWORD}@127.0.0.1:{6432 if mode else 5000}/keys?connect_timeout=2"

    # --- set-up ---

    def _remove_leftovers(self) -> None:
        """Remove the namespaces of runs that were killed, and what still runs there."""
        for line in _run("ip", "netns", "list").splitlines():
            if (named := re.match(r"chutes-([0-9]+)-\w+", line)) and not Path(f"/proc/{named[1]}").exists():
                _remove(named[0])

    def _make_network(self) -> None:
        for place in ("apps", *NODES):
            _run("ip", "netns", "add", self.namespace(place))
            self._ends.callback(_remove, self.namespace(place))
            self.within(place, "ip", "link", "set", "lo", "up")
        self.within("apps", "ip", "link", "add", "bridge", "type", "bridge")
        self.within("apps", "ip", "address", "add", "10.0.0.1/24", "dev", "bridge")
        self.within("apps", "ip", "link", "set", "bridge", "up")
        for node in NODES:
            peer = ["peer", "name", "eth0", "netns", self.namespace(node)]
            self.within("apps", "ip", "link", "add", node, "type", "veth", *peer)
            self.within("apps", "ip", "link", "set", node, "master", "bridge", "up")
            self.within(node, "ip", "address", "add", f"{address(node)}/24", "dev", "eth0")
            self.within(node, "ip", "link", "set", "eth0", "up")
            self.within(node, "sysctl", "--quiet", "--load", str(EXAMPLE / "sysctl.conf"))

    def _start_etcd(self, node: str) -> None:
        lines = (EXAMPLE / "etcd.conf").read_text().splitlines()
        settings = dict(line.split("=", 1) for line in lines if line.startswith("ETCD_"))
        for key, value in settings.items():
            if key not in ("ETCD_INITIAL_CLUSTER", "ETCD_INITIAL_CLUSTER_TOKEN"):
                settings[key] = value.replace("10.0.0.11", address(node)).replace("node1", node)
        settings["ETCD_DATA_DIR"] = str(self.folder / f"{node}.etcd")
        with (self.folder / f"{node}.etcd.log").open("wb") as log:
            self.spawn(node, ["env", *(f"{key}={value}" for key, value in settings.items()), "etcd"], log)

    def _configured(self, node: str) -> str:
        """The example's `patroni.yml` for this node, this machine's programs and folders, and no watchdog."""
        edits = {
            "name: node1 ": f"name: {node} ",
            "listen: 10.0.0.11": f"listen: {address(node)}",
            "connect_address: 10.0.0.11": f"connect_address: {address(node)}",
            "/var/lib/postgresql/patroni\n": f"{self.folder / node / 'data'}\n",
            "/var/lib/postgresql/patroni.pgpass": str(self.folder / node / "pgpass"),
            "/usr/lib/postgresql/17/bin": str(self.programs),
            "/var/run/postgresql": str(self.folder / node),
            "mode: required": "mode: 'off'",
            **self.edits,
        }
        text = (EXAMPLE / "patroni.yml").read_text()
        for old, new in edits.items():
            assert old in text, old
            text = text.replace(old, new)
        return text

    def _make_database(self) -> None:
        """As README.md has it: the role and the database of the key servers."""
        self._sql(f"CREATE ROLE keys LOGIN PASSWORD '{PASSWORD}'")
        self._sql("CREATE DATABASE keys OWNER keys ENCODING 'UTF8' TEMPLATE template0")
        probe = "CREATE SCHEMA probe; CREATE TABLE probe.probe (at timestamptz DEFAULT clock_timestamp())"
        self._sql(f"{probe}; GRANT ALL ON SCHEMA probe TO keys; GRANT ALL ON probe.probe TO keys", "keys")

    def _sql(self, text: str, database: str = "postgres") -> None:
        node = self.primary()
        user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        psql = [str(self.programs / "psql"), "--host", str(self.folder / node), "--quiet", "--command", text]
        self.within(node, *user, *psql, "--set=ON_ERROR_STOP=1", database)

    def _ask(self, url: str) -> str:
        ask = ["curl", "--silent", "--fail", "--max-time", "2", url]
        done = subprocess.run(self.inside("apps", ask), capture_output=True, text=True, check=False)
        return (done.stdout or " ") if done.returncode == 0 else ""

    def _give(self, path: Path) -> None:
        os.chown(path, pwd.getpwnam("postgres").pw_uid, grp.getgrnam("postgres").gr_gid)


def _remove(namespace: str) -> None:
    """End all that runs in a namespace of ours, and it."""

    def all_ended() -> bool:
        running = _run("ip", "netns", "pids", namespace).split()
        for process in running:
            try:
                os.kill(int(process), signal.SIGKILL)
            except ProcessLookupError:
                continue
        return not running

    wait_until(all_ended)
    _run("ip", "netns", "delete", namespace)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def _name_of(process: str) -> str:
    try:
        return Path(f"/proc/{process}/comm").read_text().strip()
    except OSError:
        return ""
