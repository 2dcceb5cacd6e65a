"""PostgreSQL under Patroni, whose primary is killed, paused and cut off while VMs boot: nothing acknowledged is lost.

The cluster is that of `examples/patroni`, without a watchdog, which containers do not have. It takes a minute a fault;
``CHUTES_PROTO_CLUSTER_FAULTS`` and ``CHUTES_PROTO_CLUSTER_SEED`` say how many there are and which.
"""

from __future__ import annotations

import fcntl
import json
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from attrs import define, evolve, field

from chutes_proto.io.server.development import write_server
from chutes_proto.quote import parse_quote
from chutes_proto.quote._layout import TdReport10
from chutes_proto.server._retry import LAST_START_SECONDS
from tests.cluster.load import AFTER_A_LOST_CONFIRMATION, PLATFORM, ROTATING
from tests.cluster.nodes import NODES, PASSWORD, PROGRAMS, Nodes
from tests.conftest import SOAK
from tests.postgres import programs
from tests.waiting import wait_until

FAULTS = int(os.environ.get("CHUTES_PROTO_CLUSTER_FAULTS", "30"))
IN_FRONT = min(FAULTS, 6)
"""How many faults there are with a proxy or a pooler in front."""
SEED = int(os.environ.get("CHUTES_PROTO_CLUSTER_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
KINDS = ("kill", "pause", "partition", "behind")
LASTS_SECONDS = (5.0, 45.0)
"""A fault lasts from less than Patroni's ttl, so that the old primary goes on, to more."""
BEHIND_SECONDS = 3.0
"""The standbys are cut off for this time before the primary is killed: less than Patroni's retry_timeout."""
FAIL_OVER_SECONDS = 180.0
_ASKED_ONCE = re.compile("deployed (base: luks|rotating: attest): ")
LATEST_ANSWER_SECONDS = 30.0
"""Deployed clients wait no longer."""


def _missing() -> str:
    """Why this machine cannot run the cluster, or an empty text."""
    if not SOAK:
        return "the cluster runs in make soak only: it takes minutes"
    if os.geteuid() != 0:
        return "network namespaces take root"
    path = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin"
    if missing := [name for name in PROGRAMS if shutil.which(name, path=path) is None]:
        packages = "iproute2 procps patroni python3-etcd etcd-server haproxy pgbouncer"
        return f"not installed: {', '.join(missing)} (Debian: {packages})"
    patroni = Path(str(shutil.which("patroni", path=path)))
    python = patroni.read_text().partition("\n")[0].removeprefix("#!").split()
    if subprocess.run([*python, "-c", "import patroni.dcs.etcd3"], capture_output=True, check=False).returncode:
        return "patroni cannot use etcd (Debian: python3-etcd)"
    if programs() is None:
        return "no PostgreSQL is installed"
    probe = f"chutes-{os.getpid()}-probe"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False).returncode:
        return "this machine does not allow network namespaces"
    subprocess.run(["ip", "netns", "delete", probe], check=True)
    return ""


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """Only one cluster at a time: its timing is measured. Skips where none can run."""
    if reason := _missing():
        pytest.skip(reason)
    with (Path(tempfile.gettempdir()) / "chutes-proto-cluster.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@define
class Load:
    """The fleet's program; `ask` sends it a command."""

    process: subprocess.Popen[str]
    _answers: queue.Queue[str] = field(factory=queue.Queue[str])

    def __attrs_post_init__(self) -> None:
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._answers.put(line)

    def ask(self, command: str = "") -> Any:
        assert self.process.stdin is not None
        if command:
            _ = self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
        return json.loads(self._answers.get(timeout=600))


@define
class Siege:
    """The cluster, two servers on it, a fleet, and faults of the primary."""

    nodes: Nodes
    load: Load
    chance: random.Random
    tell: Callable[[str], None]
    figures: list[dict[str, Any]] = field(factory=list[dict[str, Any]])

    def befall(self, number: int) -> None:
        """One fault of the primary, which ends; the cluster heals, and each VM is up before the next fault."""
        kind = KINDS[number % len(KINDS)] if number < len(KINDS) else self.chance.choice(KINDS)
        lasts = self.chance.uniform(*LASTS_SECONDS)
        old = self.nodes.primary()
        began = time.monotonic()
        undo = {"kill": self._kill, "pause": self._pause, "partition": self._cut, "behind": self._behind}[kind](old)
        try:
            time.sleep(max(0.0, began + lasts - time.monotonic()))
        finally:
            undo()
        self.nodes.heal()
        healed = time.monotonic()
        settled = self.load.ask("settle")
        figures = self.load.ask(f"report {began} {settled}")
        figures |= {"kind": kind, "lasted": round(lasts, 1), "healed": round(healed - began, 1)}
        figures |= {"failed_over": self.nodes.primary() != old, "missing": self.load.ask("check")}
        self.figures.append(figures)
        self.tell(json.dumps(figures))

    def _kill(self, node: str) -> Callable[[], None]:
        self.nodes.kill(node)
        return lambda: self.nodes.start(node)

    def _behind(self, node: str) -> Callable[[], None]:
        """Kill the primary while both standbys lack what it did last; without synchronous replication keys are lost."""
        standbys = [other for other in NODES if other != node]
        try:
            for standby in standbys:
                self.nodes.link(standby, "down")
            time.sleep(BEHIND_SECONDS)
            start = self._kill(node)
        finally:
            for standby in standbys:
                self.nodes.link(standby, "up")
        wait_until(lambda: self.nodes.primary() not in ("", node), FAIL_OVER_SECONDS)
        return start

    def _pause(self, node: str) -> Callable[[], None]:
        self.nodes.signal(node, signal.SIGSTOP)
        return lambda: self.nodes.signal(node, signal.SIGCONT)

    def _cut(self, node: str) -> Callable[[], None]:
        self.nodes.link(node, "down")
        return lambda: self.nodes.link(node, "up")


@contextmanager
def besieged(front: str, tell: Callable[[str], None], edits: dict[str, str]) -> Iterator[Siege]:
    """Everything runs, and the fleet boots."""
    folder = programs()
    assert folder is not None
    with Nodes(folder, edits) as nodes, ExitStack() as stack:
        url = nodes.url() if not front else nodes.front("" if front == "haproxy" else front)
        site = make_site(nodes.folder / "site", url)
        program = [sys.executable, "-m", "chutes_proto"]

        def start(name: str, *command: str) -> subprocess.Popen[str]:
            """Start a program of the key servers' machine, which ends with all this."""
            with (nodes.folder / f"{name}.log").open("wb") as log:
                process = subprocess.Popen(
                    ["nice", *nodes.inside("apps", command)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
            stack.callback(end, process)
            return process

        make = nodes.inside("apps", [*program, "store", "init", "--config", str(site / "server.toml")])
        wait_until(lambda: _succeeds(make))
        servers = [
            start(f"server{number}", *program, "serve", "--config", str(site / "server.toml")) for number in (1, 2)
        ]
        urls = [_url_of(server) for server in servers]
        database = f"postgresql://keys:{PASSWORD}@/keys"
        load = Load(start("load", sys.executable, "-m", "tests.cluster.load", str(site), database, *urls))
        try:
            assert load.ask() == "ready"
            yield Siege(nodes, load, random.Random(SEED), tell)
        except BaseException:
            for name in ("load", "server1", "server2"):
                tell(f"{name}: {(nodes.folder / f'{name}.log').read_text()[-2000:]}")
            raise


def make_site(site: Path, store: str) -> Path:
    """The directory of both servers, which know two images: one with the base exchange, one with the two-phase one."""
    site.mkdir()
    write_server(site, PLATFORM, int(time.time()))
    configuration = site / "server.toml"
    _ = configuration.write_text(configuration.read_text().replace("sqlite:keys.db", store))
    _ = configuration.write_text(f"rotate_after_hours = 0\n{configuration.read_text()}")
    base = PLATFORM.profile
    report = parse_quote(ROTATING.quote(bytes(64))).body
    assert isinstance(report, TdReport10)
    rotating = evolve(base, name="rotating", mrtd=report.mr_td)
    profiles = f'{base.to_toml()}\n{rotating.to_toml()}\nexchange = "two-phase"\n'
    _ = (site / "measurements.toml").write_text(profiles)
    return site


def end(process: subprocess.Popen[str]) -> None:
    """Kill a program, and close what was open to it."""
    process.kill()
    with suppress(BrokenPipeError), process:
        pass


def _url_of(server: subprocess.Popen[str]) -> str:
    assert server.stdout is not None
    return next(line.split()[-1] for line in server.stdout if line.split()[-1].startswith("https://"))


def _succeeds(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 0


@pytest.mark.parametrize("front", ["", "haproxy", "session", "transaction"], ids=lambda front: front or "direct")
def test_what_was_acknowledged_outlives_the_primary(
    front: str, figure: Callable[[str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every promise is checked after each fault and at the end, when each VM boots until its disks open."""
    lines: list[str] = []

    def tell(text: str) -> None:
        lines.append(text)
        _ = (tmp_path / "figures").write_text("\n".join(lines))
        with capsys.disabled():
            print(f"\n{front or 'direct'}, seed {SEED}: {text}", flush=True)

    with besieged(front, tell, {}) as siege:
        began = time.monotonic()
        _ = siege.load.ask("settle")
        for number in range(IN_FRONT if front else FAULTS):
            siege.befall(number)
        whole = siege.load.ask(f"report {began} {time.monotonic()}")
        end = siege.load.ask("end")
    tell(json.dumps({"whole": whole, "end": end}))
    told = summary(siege.figures)
    figure(f"seed {SEED}, {told}")
    assert not end["lost"], end["lost"]
    assert (end["missing"], end["closed"]) == (0, [])
    assert not any(figures["missing"] for figures in siege.figures)
    assert whole["longest_answer"] < LATEST_ANSWER_SECONDS
    given_up = {why: count for why, count in whole["why"].items() if not why.endswith(AFTER_A_LOST_CONFIRMATION)}
    assert given_up == sum(map(excused, siege.figures), Counter[str]())


def excused(figures: dict[str, Any]) -> Counter[str]:
    """Why deployed clients gave up and could not do otherwise, and how many: they ask once for their keys.

    After two faults at once the cluster may be without a primary for longer than the servers let requests wait. A boot
    has three attempts, so none is excused.
    """
    if figures["kind"] != "behind" or figures["without_primary"] <= LAST_START_SECONDS:
        return Counter()
    return Counter({why: count for why, count in figures["why"].items() if _ASKED_ONCE.match(why)})


def summary(all_figures: list[dict[str, Any]]) -> str:
    """The figures of all faults by kind, for people."""
    told: list[str] = []
    for kind in KINDS:
        some = [figures for figures in all_figures if figures["kind"] == kind]
        if not some:
            continue
        without = [figures["without_primary"] for figures in some]
        refused = sum(
            count for figures in some for answer, count in figures["answers"].items() if answer.startswith("503")
        )
        boots = sum((Counter(figures["boots"]) for figures in some), Counter[str]())
        given_up = sum((Counter(figures["given_up"]) for figures in some), Counter[str]())
        told.append(
            f"{len(some)} x {kind}: without a primary median {median(without):.1f} s, at most {max(without):.1f} s;"
            f" longest answer {max(figures['longest_answer'] for figures in some):.1f} s; {refused} x 503;"
            f" {given_up.total()} of {boots.total()} boots given up ({dict(given_up)})"
        )
    return "; ".join(told)
