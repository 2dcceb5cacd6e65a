"""Key servers as an operator runs them, as processes: several are one, and one that is killed loses no key.

The same on the store alone, where a kill falls into a transaction more often, is in ``tests/store/test_processes.py``.
"""

from __future__ import annotations

import gc
import random
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import trio
from attrs import define, field

from chutes_proto.auth.client_identity import ENTROPY_SIZE
from chutes_proto.boot import DEFAULT_RETRY, BootGrant, ClientIdentity, make_client_identity
from chutes_proto.boot._retry import begin
from chutes_proto.effects import Flow, Send
from chutes_proto.errors import ChutesError, TransportError, Unavailable
from chutes_proto.io.server.development import write_server
from chutes_proto.io.server.setup import make_setup
from chutes_proto.keys.vault import Address
from chutes_proto.secret import Secret
from chutes_proto.server import ServerConfig
from chutes_proto.store._rows import BootRow, GenerationRow, Scan
from chutes_proto.store._run import Ask
from chutes_proto.testing._platform import SimulatedPlatform
from chutes_proto.testing.store_suite._parts import entropy
from chutes_proto.wire import codec, vms
from chutes_proto.wire.names import Name
from chutes_proto_trio import BootAgent, HttpxSender, Performer, Quoter, client_context
from tests.cli.conftest import HOTKEY, Server
from tests.conftest import SOAK
from tests.store.test_processes import nothing_is_half_done

PLATFORM = SimulatedPlatform(bytes(32))
KILLS = 200 if SOAK else 4
VOLUMES = ("storage", "tdx-cache")

Start = Callable[..., Server]


@pytest.fixture(params=["sqlite", "postgresql"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An operator's directory, whose store has its schema."""
    directory = tmp_path / "site"
    directory.mkdir()
    write_server(directory, PLATFORM, int(time.time()))
    configuration = directory / "server.toml"
    if request.param == "postgresql":
        url = request.getfixturevalue("migrated_schema")
        configuration.write_text(configuration.read_text().replace("sqlite:keys.db", url))
    make_setup(ServerConfig.load(configuration)).store.open(make=True).close()
    return directory


def serve(start: Start, site: Path) -> Server:
    return start("--config", site / "server.toml", ca=site / "ca.pem")


def identity_of(label: str) -> ClientIdentity:
    """A client key of its own."""
    return make_client_identity(int(time.time()), entropy(label, ENTROPY_SIZE))


def agent(server: Server, label: str, vm: str, quoter: Quoter = PLATFORM.quote, **options: Any) -> BootAgent:
    """A VM's boot agent with a client key of its own."""
    settings: dict[str, Any] = {
        "hotkey": HOTKEY,
        "vm_name": vm,
        "quoter": quoter,
        "ca_pem": server.ca.read_bytes(),
        "identity": identity_of(label),
        "log": lambda _: None,
    }
    return BootAgent(server.url, **settings | options)


def sync_and_rekey(grant: BootGrant, volumes: tuple[str, ...], rekey: list[str]) -> Flow[dict[str, Secret]]:
    """A sync that asks for new passphrases, as deployed agents send it before they format a disk."""
    assert grant.boot_token is not None
    request = vms.VolumeSyncRequest(
        vm_name=Name(grant.vm_name),
        hotkey=grant.miner_hotkey,
        boot_token=grant.boot_token.reveal().decode(),
        volumes=volumes,
        rekey=tuple(rekey) or None,
        formatted=(),
    )
    budget = yield from begin(DEFAULT_RETRY)
    while True:
        try:
            response = yield from Send(codec.encode_request(vms.VOLUME_SYNC, request))
            answer = cast("vms.VolumeSyncAnswer", codec.decode_answer(vms.VOLUME_SYNC, response))
            return dict(answer.passphrases)
        except (Unavailable, TransportError) as exc:
            yield from budget.pause("sync", exc)


@pytest.mark.trio
async def test_first_boots_through_four_servers_get_one_root_passphrase(start: Start, site: Path) -> None:
    """64 boots of one VM at once, 16 with each server: 64 answers, one passphrase, one key."""
    servers = [serve(start, site) for _ in range(4)]
    answers: list[bytes] = []

    async def boot(index: int) -> None:
        async with agent(servers[index % 4], f"vm {index}", "vm-1") as vm:
            grant = await vm.boot()
        assert grant.root_passphrase is not None
        answers.append(grant.root_passphrase.reveal())

    with trio.fail_after(120):
        async with trio.open_nursery() as nursery:
            for index in range(64):
                nursery.start_soon(boot, index)
    assert len(answers) == 64
    assert len(set(answers)) == 1
    with closing(make_setup(ServerConfig.load(site / "server.toml")).store.open()) as store:
        assert len(store.transact(Ask(Scan(BootRow)))) == 64
        assert len(store.transact(Ask(Scan(GenerationRow)))) == 1


@define
class Fleet:
    """VMs that boot again and again, and all that they were answered; ``disks`` are the keys in a header, by VM."""

    chance: random.Random = field(factory=lambda: random.Random(0))
    answered: set[tuple[str, str, bytes]] = field(factory=set[tuple[str, str, bytes]])
    disks: defaultdict[str, list[bytes]] = field(factory=lambda: defaultdict[str, list[bytes]](list))
    rotations: int = 0

    async def sync(self, server: Server, label: str, index: int) -> None:
        """One boot of one of four VMs in the base exchange."""
        vm = f"vm-{self.chance.randrange(4)}"
        volumes = tuple(self.chance.sample(VOLUMES, self.chance.randint(1, 2)))
        rekey = [volume for volume in volumes if self.chance.random() < 0.3]
        context = client_context(identity_of(label), server.ca.read_bytes())
        async with httpx.AsyncClient(verify=context, trust_env=False) as client:
            async with agent(server, label, vm, client=client) as booting:
                grant = await booting.boot()
            self.answered.add((vm, "root", grant.root_passphrase.reveal()))
            performer = Performer(send=HttpxSender(client, server.url), log=lambda _: None)
            keys = await performer.run(sync_and_rekey(grant, volumes, rekey))
            self.answered |= {(vm, volume, key.reveal()) for volume, key in keys.items()}

    async def rotate(self, server: Server, label: str, index: int) -> bool:
        """One two-phase boot of a VM of its own; True if its disk opens."""
        vm, stage = f"rotating-{index}", "boot"
        disk = self.disks[vm]
        async with agent(server, label, vm, lambda data: PLATFORM.quote(data, stage=stage)) as booting:  # type: ignore[arg-type]
            _ = await booting.boot()
            stage = "runtime"
            async with booting.rotate({"storage": bool(disk)}) as rotation:
                pair = rotation.keys["storage"]
                opener, following = (pair.current or pair.next).reveal(), pair.next.reveal()
                self.answered |= {(vm, "storage", opener), (vm, "storage", following)}
                opens = opener in disk or not disk
                if opens:
                    disk[:] = [opener, following]
                    rotation.added("storage")
                else:
                    rotation.left_out("storage")
            if opens:  # and the confirmation is through
                disk[:] = [following]
                self.rotations += 1
        return opens

    def hear_nothing(self) -> None:
        """A VM without an answer to its confirmation keeps both keys, or takes the new one off the disk."""
        for disk in self.disks.values():
            del disk[self.chance.randint(1, 2) :]


# httpx leaves the socket of a handshake that fails or is cancelled to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.trio
async def test_a_killed_server_loses_nothing_and_leaves_no_half_unit(
    start: Start, site: Path, figure: Callable[[str], None]
) -> None:
    """Killed alternately in the middle of syncs and of rotations: every disk opens."""
    fleet, setup = Fleet(), make_setup(ServerConfig.load(site / "server.toml"))
    text = (site / "server.toml").read_text().replace('store = "', 'store.url = "')
    configuration = f'rotate_after_hours = 0\nstore.mark_file = "mark"\n{text}'

    def served(exchange: str) -> Server:
        """A new process, which serves all boots so."""
        _ = (site / "server.toml").write_text(f'{configuration}exchange = "{exchange}"\n')
        return serve(start, site)

    async def storm(server: Server, work: Callable[..., Any], name: str) -> None:
        tell, told = trio.open_memory_channel[None](0)

        async def go_on(index: int) -> None:
            for turn in count():
                await work(server, f"{name} {index} {turn}", index)
                await tell.send(None)

        with trio.fail_after(120):
            async with trio.open_nursery() as nursery:
                for index in range(6):
                    nursery.start_soon(go_on, index)
                for _ in range(fleet.chance.randint(3, 20)):
                    await told.receive()
                server.process.kill()
                nursery.cancel_scope.cancel()

    for number in range(KILLS):
        exchange, work = (("base", fleet.sync), ("two-phase", fleet.rotate))[number % 2]
        server = served(exchange)
        try:
            await storm(server, work, str(number))
        except* ChutesError:  # an agent saw the end first
            assert server.process.wait(60)
        fleet.hear_nothing()
        gc.collect()
        with closing(setup.store.open()) as store:
            store.check()
            nothing_is_half_done(store)
            vault = setup.service.vault
            there = {
                (row.vm.name, row.volume, vault.open(Address(row.vm, row.volume, row.generation), row).reveal())
                for row in store.transact(Ask(Scan(GenerationRow)))
            }
        assert fleet.answered <= there
    assert fleet.rotations

    server = served("two-phase")
    for index in range(6):
        assert [await fleet.rotate(server, f"end {index} {turn}", index) for turn in range(3)][-2:] == [True, True]
    figure(f"{KILLS} kills, {len(fleet.answered)} passphrases answered, {fleet.rotations} rotations")
