"""A fleet that boots, reboots and rotates against two key servers; a program, because it runs in a network namespace.

    python -m tests.cluster.load SITE DATABASE SERVER SERVER

SITE is the directory of the servers' configuration, DATABASE a URL without hosts, through which each node is asked
whether it can write. Each line on standard input is a command, each answer one line of JSON:

* ``check``: what the store lacks of all that was answered until now;
* ``settle``: the time, once each VM is up by a boot that began after the command;
* ``report BEGIN END``: figures of a time, on the clock of `time.monotonic`;
* ``end``: the fleet stops, each VM boots until its disks open, and everything is checked once more.

There are four kinds of VM. `BootAgent` boots half of them; a client with the schedule of image 1.4.0 boots the others:
three attempts at nonce and boot together, 2 s apart, 30 s for each request, everything after them once.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psycopg
import trio
from attrs import define, field, frozen

from chutes_proto.auth.binding import report_data
from chutes_proto.auth.client_identity import ENTROPY_SIZE
from chutes_proto.boot import ClientIdentity, make_client_identity
from chutes_proto.errors import ChutesError
from chutes_proto.io.http.tls import client_context
from chutes_proto.io.server.setup import make_setup
from chutes_proto.io.stores.postgres.connection import Connection
from chutes_proto.keys.vault import Address
from chutes_proto.server import ServerConfig
from chutes_proto.store._rows import GenerationRow, Scan
from chutes_proto.store._run import Ask
from chutes_proto.testing._platform import SimulatedPlatform
from chutes_proto.testing.store_suite._parts import entropy
from chutes_proto.wire.codec import encode_quote
from chutes_proto_trio import BootAgent
from tests.cli.conftest import HOTKEY
from tests.cluster.nodes import NODES, address
from tests.store.test_processes import nothing_is_half_done
from tests.waiting import async_wait_until

PLATFORM = SimulatedPlatform(bytes(32))
ROTATING = PLATFORM.having("mrtd")
"""An image of its own: its profile has the two-phase exchange."""
VOLUMES = ("storage", "tdx-cache")
OF_A_KIND = 3
PAUSE_SECONDS = (2.0, 4.0)
REPLACED = 0.1
"""How often a VM of the base exchange finds blank disks; a deployed client then asks for new keys."""
ATTEMPTS, BETWEEN_SECONDS, REQUEST_SECONDS = 3, 2.0, 30.0
"""The schedule of image 1.4.0."""
SETTLING_SECONDS = 300.0
OPENS_WITHIN = 3
"""After so many boots the disk of a rotating VM has opened: superseded and new key are offered alternately."""


class GaveUpError(Exception):
    """A deployed client has used up its attempts: the VM powers off."""


AFTER_A_LOST_CONFIRMATION = "the disk did not open, once, after a confirmation without an answer"
"""A deployed client takes a key off whose confirmation was not answered. If it was recorded, one boot opens nothing."""


@frozen
class Answer:
    """An answer of a server, or why there was none."""

    at: float
    seconds: float
    status: int
    path: str
    said: str


@frozen
class Boot:
    """A boot that ended, and why it was given up, if it was."""

    at: float
    kind: str
    seconds: float
    fault: str


@define
class Vm:
    """A VM: its kind, and the keys in the LUKS header of each disk."""

    kind: str
    name: str
    disks: dict[str, set[bytes]]
    root: bytes | None = None
    unopened: int = 0
    is_unconfirmed: bool = False
    """Whether a deployed client heard no answer to the confirmation of its last boot."""
    up_since: float = 0.0
    """When the last boot that brought it up began."""


@define
class Fleet:
    """All VMs, and everything that they were answered."""

    site: Path
    servers: list[str]
    chance: random.Random
    answers: list[Answer] = field(factory=list[Answer])
    boots: list[Boot] = field(factory=list[Boot])
    lost: list[str] = field(factory=list[str])
    answered: set[tuple[str, str, bytes]] = field(factory=set[tuple[str, str, bytes]])
    vms: list[Vm] = field(factory=list[Vm])
    ending: bool = False
    _boot_number: int = 0

    def __attrs_post_init__(self) -> None:
        for kind in self.ways():
            for index in range(OF_A_KIND):
                volumes = VOLUMES if "base" in kind else VOLUMES[:1]
                self.vms.append(Vm(kind, f"{kind}-{index}".replace(" ", "-"), {volume: set() for volume in volumes}))

    def ways(self) -> dict[str, Callable[[Vm], Awaitable[None]]]:
        """The kinds of VM, and how each boots."""
        return {
            "agent base": self.agent_base,
            "agent rotating": self.agent_rotating,
            "deployed base": self.deployed_base,
            "deployed rotating": self.deployed_rotating,
        }

    async def live(self, vm: Vm) -> None:
        """Boot again and again."""
        while not self.ending:
            await self.boot(vm)
            await trio.sleep(self.chance.uniform(*PAUSE_SECONDS))

    async def boot(self, vm: Vm) -> bool:
        """Boot once. Returns whether the VM is up."""
        began, fault = time.monotonic(), ""
        try:
            await self.ways()[vm.kind](vm)
        except ChutesError as exc:
            fault = f"{type(exc).__name__}: {getattr(exc, 'code', '')} {exc}"
        except GaveUpError as exc:
            fault = str(exc)
        else:
            vm.up_since = began
        now = time.monotonic()
        self.boots.append(Boot(now, vm.kind, now - began, fault))
        return not fault

    async def settled(self) -> float:
        """Return the time once no boot is left that met a fault, and each VM is up."""
        asked = time.monotonic()
        await async_wait_until(lambda: all(vm.up_since > asked for vm in self.vms), SETTLING_SECONDS)
        return time.monotonic()

    # --- our agent ---

    async def agent_base(self, vm: Vm) -> None:
        async with self.agent(vm, PLATFORM.quote) as agent:
            grant = await agent.boot()
            self.take_root(vm, grant.root_passphrase.reveal())
            keys = await agent.sync({volume: bool(slots) for volume, slots in vm.disks.items()})
        for key in keys:
            self.answered.add((vm.name, key.volume, key.passphrase.reveal()))
            self.open(vm, key.volume, key.passphrase.reveal(), may_format=key.may_format)

    async def agent_rotating(self, vm: Vm) -> None:
        stage: Any = "boot"
        disk = vm.disks["storage"]
        async with self.agent(vm, lambda data: ROTATING.quote(data, stage=stage)) as agent:
            _ = await agent.boot()
            stage = "runtime"
            async with agent.rotate({"storage": bool(disk)}) as rotation:
                pair = rotation.keys["storage"]
                following = pair.next.reveal()
                current = None if pair.current is None else pair.current.reveal()
                opens = self.open_rotating(vm, current or following, following)
                if opens:
                    disk.add(following)
                    rotation.added("storage")
                else:
                    rotation.left_out("storage")
        if not opens:
            raise GaveUpError("the disk did not open")
        disk.intersection_update({following})  # the confirmation was heard: no other key is needed

    @asynccontextmanager
    async def agent(self, vm: Vm, quoter: Any) -> AsyncIterator[BootAgent]:
        identity = self.new_identity()
        async with self.client(identity) as client:
            url = self.chance.choice(self.servers)
            settings: dict[str, Any] = {"hotkey": HOTKEY, "vm_name": vm.name, "quoter": quoter, "log": lambda _: None}
            async with BootAgent(url, identity=identity, client=client, **settings) as agent:
                yield agent

    # --- a deployed client ---

    async def deployed_base(self, vm: Vm) -> None:
        identity = self.new_identity()
        if self.chance.random() < REPLACED:
            for slots in vm.disks.values():
                slots.clear()
        async with self.client(identity) as client:
            granted = await self.deployed_boot(client, vm, identity, PLATFORM)
            self.take_root(vm, granted["key"].encode())
            body: dict[str, Any] = {"volumes": list(VOLUMES)}
            if blank := [volume for volume, slots in vm.disks.items() if not slots]:
                body["rekey"] = blank
            headers = {"x-boot-token": granted["boot_token"], "x-chutes-hotkey": HOTKEY}
            keys = await self.once(client, f"/servers/{vm.name}/luks", json=body, headers=headers)
        for volume in VOLUMES:
            self.answered.add((vm.name, volume, keys[volume].encode()))
            self.open(vm, volume, keys[volume].encode(), may_format=True)

    async def deployed_rotating(self, vm: Vm) -> None:
        identity = self.new_identity()
        disk = vm.disks["storage"]
        async with self.client(identity) as client:
            granted = await self.deployed_boot(client, vm, identity, ROTATING)
            nonce = granted["luks_quote_nonce"]
            headers = {"x-quote-nonce": nonce, "x-chutes-hotkey": HOTKEY}
            body = {"quote": quote(ROTATING, nonce, identity, "runtime"), "volumes": ["storage"]}
            handed = await self.once(client, f"/servers/{vm.name}/luks/attest", json=body, headers=headers)
            pair = handed["volumes"]["storage"]
            current = None if pair["current"] is None else pair["current"].encode()
            following = pair["next"].encode()
            opener = following if current is None else current
            self.answered |= {(vm.name, "storage", opener), (vm.name, "storage", following)}
            was_unconfirmed, vm.is_unconfirmed = vm.is_unconfirmed, False
            if not self.open_rotating(vm, opener, opener):
                raise GaveUpError(AFTER_A_LOST_CONFIRMATION if was_unconfirmed else "the disk did not open")
            added = current is not None
            headers = {"x-confirm-nonce": handed["confirm_nonce"], "x-chutes-hotkey": HOTKEY}
            report = {"volumes": {"storage": {"rotated": added}}}
            if added:
                disk.add(following)
            try:
                _ = await self.once(client, f"/servers/{vm.name}/luks/confirm", json=report, headers=headers)
            except GaveUpError:  # it takes the new key off again, and boots on
                vm.is_unconfirmed = True
                disk.intersection_update({opener})
            else:
                disk.intersection_update({following if added else opener})

    async def deployed_boot(
        self, client: httpx.AsyncClient, vm: Vm, identity: ClientIdentity, platform: SimulatedPlatform
    ) -> dict[str, Any]:
        """Nonce and boot, three times at most."""
        told: list[str] = []
        for attempt in range(ATTEMPTS):
            if attempt:
                await trio.sleep(BETWEEN_SECONDS)
            answer = await self.request(client, "GET", "/servers/nonce", params={"miner_hotkey": HOTKEY})
            if answer is not None and answer.status_code == httpx.codes.OK:
                nonce = answer.json()["nonce"]
                body = {"quote": quote(platform, nonce, identity, "boot"), "miner_hotkey": HOTKEY, "vm_name": vm.name}
                headers = {"x-chutes-nonce": nonce}
                answer = await self.request(client, "POST", "/servers/boot/attestation", json=body, headers=headers)
                if answer is not None and answer.status_code == httpx.codes.OK:
                    granted: dict[str, Any] = answer.json()
                    return granted
            told.append(said(answer))
            if answer is not None and answer.status_code in (401, 403, 404):
                break
        raise GaveUpError(f"boot: {', '.join(told)}")

    async def once(self, client: httpx.AsyncClient, path: str, **request: Any) -> dict[str, Any]:
        """A request that is not repeated: the members of its answer."""
        answer = await self.request(client, "POST", path, **request)
        if answer is None or answer.status_code != httpx.codes.OK:
            raise GaveUpError(f"{path.rsplit('/', 1)[1]}: {said(answer)}")
        members: dict[str, Any] = answer.json()
        return members

    async def request(self, client: httpx.AsyncClient, method: str, path: str, **request: Any) -> httpx.Response | None:
        """The answer of either server, or None where none came in time."""
        with trio.move_on_after(REQUEST_SECONDS):
            try:
                return await client.request(method, self.chance.choice(self.servers) + path, **request)
            except httpx.HTTPError:
                return None
        return None

    # --- what was answered ---

    def take_root(self, vm: Vm, passphrase: bytes) -> None:
        self.answered.add((vm.name, "root", passphrase))
        if vm.root not in (None, passphrase):
            self.lost.append(f"{vm.name}: another root passphrase")
        vm.root = passphrase

    def open(self, vm: Vm, volume: str, passphrase: bytes, *, may_format: bool) -> None:
        """Open a disk of the base exchange, or format a blank one."""
        slots = vm.disks[volume]
        if slots and passphrase not in slots:
            self.lost.append(f"{vm.name}: the key of {volume} does not open its disk")
        elif not slots and may_format:
            slots.add(passphrase)
        elif not slots:
            self.lost.append(f"{vm.name}: {volume} is blank and may not be formatted")

    def open_rotating(self, vm: Vm, opener: bytes, following: bytes) -> bool:
        """Open the disk of a rotating VM with either key, or format a blank one with the first."""
        slots = vm.disks["storage"]
        self.answered |= {(vm.name, "storage", opener), (vm.name, "storage", following)}
        if not slots:
            slots.add(opener)
        opens = not slots.isdisjoint({opener, following})
        vm.unopened = 0 if opens else vm.unopened + 1
        if vm.unopened >= OPENS_WITHIN:
            self.lost.append(f"{vm.name}: the disk did not open in {vm.unopened} boots")
        return opens

    def missing(self, *, whole: bool = False) -> int:
        """How many of the passphrases that were answered the store does not have."""
        answered = set(self.answered)
        setup = make_setup(ServerConfig.load(self.site / "server.toml"))
        vault = setup.service.vault
        with closing(setup.store.open()) as store:
            if whole:
                _ = store.check()
                nothing_is_half_done(store)
            there = {
                (row.vm.name, row.volume, vault.open(Address(row.vm, row.volume, row.generation), row).reveal())
                for row in store.transact(Ask(Scan(GenerationRow)))
            }
        return len(answered - there)

    # --- requests ---

    def new_identity(self) -> ClientIdentity:
        self._boot_number += 1
        return make_client_identity(int(time.time()), entropy(f"boot {self._boot_number}", ENTROPY_SIZE))

    def client(self, identity: ClientIdentity) -> httpx.AsyncClient:
        """A client whose answers are all noted."""
        context = client_context(identity, (self.site / "ca.pem").read_bytes())
        return httpx.AsyncClient(transport=Noting(self.answers, context), trust_env=False, timeout=60)


class Noting(httpx.AsyncHTTPTransport):
    """Notes each answer, and how long it took."""

    def __init__(self, answers: list[Answer], context: Any) -> None:
        super().__init__(verify=context)
        self._answers = answers

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        began, status, text = time.monotonic(), 0, ""
        try:
            response = await super().handle_async_request(request)
            status = response.status_code
            if status != httpx.codes.OK:
                body = await response.aread()
                text = json.loads(body).get("code", "")
                response = httpx.Response(status, headers=response.headers, stream=httpx.ByteStream(body))
            return response
        except BaseException as exc:
            text = type(exc).__name__
            raise
        finally:
            now = time.monotonic()
            path = request.url.path.rsplit("/", 1)[1]
            self._answers.append(Answer(now, now - began, status, path, text))


def quote(platform: SimulatedPlatform, nonce: str, identity: ClientIdentity, stage: Any) -> str:
    return encode_quote(platform.quote(report_data(bytes.fromhex(nonce), identity.spki_sha256), stage=stage))


def said(answer: httpx.Response | None) -> str:
    """An answer in two words."""
    return "no answer" if answer is None else f"{answer.status_code} {answer.json().get('code', '')}"


# --- whether there is a primary ---


@define
class Probe:
    """Commits on each node four times a second, to see when there is one that can."""

    database: str
    commits: list[float] = field(factory=list[float])

    def start(self) -> None:
        for node in NODES:
            threading.Thread(target=self._commit_on, args=(node,), daemon=True).start()

    def _commit_on(self, node: str) -> None:
        url = f"{self.database}?host={address(node)}&connect_timeout=2&target_session_attrs=read-write"
        while True:
            try:
                with Connection.connect(url, autocommit=True) as connection:
                    connection.answer_seconds = 2.0
                    while True:
                        _ = connection.execute("INSERT INTO probe.probe DEFAULT VALUES")
                        self.commits.append(time.monotonic())
                        time.sleep(0.25)
            except psycopg.Error:
                time.sleep(0.25)

    def gap(self, begin: float, end: float) -> float:
        """The longest time without a commit between two times."""
        times = [begin, *sorted(at for at in self.commits if begin < at < end), end]
        return max(later - earlier for earlier, later in pairwise(times))


def report(fleet: Fleet, probe: Probe, begin: float, end: float) -> dict[str, Any]:
    """Figures of a time."""
    answers = [answer for answer in fleet.answers if begin <= answer.at <= end]
    boots = [boot for boot in fleet.boots if begin <= boot.at <= end]
    up: defaultdict[str, list[float]] = defaultdict(list)
    for boot in boots:
        if not boot.fault:
            up[boot.kind].append(boot.seconds)
    return {
        "without_primary": round(probe.gap(begin, end), 2),
        "longest_answer": round(max((answer.seconds for answer in answers), default=0.0), 2),
        "answers": dict(Counter(f"{answer.status} {answer.said} {answer.path}".strip() for answer in answers)),
        "boots": dict(Counter(boot.kind for boot in boots)),
        "given_up": dict(
            Counter(boot.kind for boot in boots if boot.fault not in ("", AFTER_A_LOST_CONFIRMATION)),
        ),
        "why": dict(Counter(f"{boot.kind}: {boot.fault}"[:160] for boot in boots if boot.fault)),
        "boot_seconds": {kind: [round(median(took), 2), round(max(took), 2)] for kind, took in up.items()},
        "lost": list(fleet.lost),
    }


async def main(*arguments: str) -> None:
    site, database, *servers = arguments
    fleet = Fleet(Path(site), servers, random.Random(0))
    probe = Probe(database)
    probe.start()

    def tell(value: object) -> None:
        print(json.dumps(value), flush=True)

    async with trio.open_nursery() as nursery:
        for vm in fleet.vms:
            nursery.start_soon(fleet.live, vm)
        tell("ready")
        while True:
            line = await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)
            match line.split():
                case ["check"]:
                    tell(await trio.to_thread.run_sync(fleet.missing))
                case ["settle"]:
                    tell(await fleet.settled())
                case ["report", begin, end]:
                    tell(report(fleet, probe, float(begin), float(end)))
                case _:
                    fleet.ending = True
                    break
    if not line:
        return
    closed = []
    for vm in fleet.vms:
        before = len(fleet.lost)
        turns = [await fleet.boot(vm) for _ in range(OPENS_WITHIN)]
        if not turns[-1] or len(fleet.lost) > before:
            closed.append(vm.name)
    missing = await trio.to_thread.run_sync(partial(fleet.missing, whole=True))
    tell({"closed": closed, "missing": missing, "answered": len(fleet.answered), "lost": fleet.lost})


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
