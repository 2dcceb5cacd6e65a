"""Key servers as an operator runs them, as processes: several are one, and one that is killed loses no key.

The same on the store alone, where a kill falls into a transaction more often, is in ``tests/store/test_processes.py``.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import trio

from chutes_proto.auth.certificates import ENTROPY_SIZE, make_client_identity
from chutes_proto.blocking.setup import load_setup
from chutes_proto.cli.development import write_server
from chutes_proto.errors import ChutesError
from chutes_proto.keys.vault import Address
from chutes_proto.store.rows import BootRow, GenerationRow, Scan
from chutes_proto.testing.platform import SimulatedPlatform
from chutes_proto.testing.store_suite import Ask, entropy
from chutes_proto_trio import BootAgent
from tests.cli.conftest import HOTKEY, Server
from tests.conftest import SOAK
from tests.store.test_processes import nothing_is_half_done

PLATFORM = SimulatedPlatform(bytes(32))
KILLS = 200 if SOAK else 3
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
        url = request.getfixturevalue("empty_schema")
        configuration.write_text(configuration.read_text().replace("sqlite:keys.db", url))
    load_setup(configuration).store.open(migrate=True).close()
    return directory


def serve(start: Start, site: Path) -> Server:
    return start("--config", site / "server.toml", ca=site / "ca.pem")


def agent(server: Server, label: str, vm: str) -> BootAgent:
    """A VM's boot agent with a client key of its own."""
    return BootAgent(
        server.url,
        hotkey=HOTKEY,
        vm_name=vm,
        quoter=PLATFORM.quote,
        ca_pem=server.ca.read_bytes(),
        identity=make_client_identity(int(time.time()), entropy(label, ENTROPY_SIZE)),
        log=lambda _: None,
    )


def test_first_boots_through_four_servers_get_one_root_passphrase(start: Start, site: Path) -> None:
    """64 boots of one VM at once, 16 with each server: 64 answers, one passphrase, one key."""
    servers = [serve(start, site) for _ in range(4)]
    answers: list[bytes] = []

    async def boot(index: int) -> None:
        async with agent(servers[index % 4], f"vm {index}", "vm-1") as vm:
            grant = await vm.boot()
        assert grant.root_passphrase is not None
        answers.append(grant.root_passphrase.reveal())

    async def all_at_once() -> None:
        with trio.fail_after(120):
            async with trio.open_nursery() as nursery:
                for index in range(64):
                    nursery.start_soon(boot, index)

    trio.run(all_at_once)
    assert len(answers) == 64
    assert len(set(answers)) == 1
    with closing(load_setup(site / "server.toml").store.open()) as store:
        assert len(store.transact(Ask(Scan(BootRow)))) == 64
        assert len(store.transact(Ask(Scan(GenerationRow)))) == 1


# httpx leaves the socket of a handshake that fails or is cancelled to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_killed_server_loses_nothing_and_leaves_no_half_unit(start: Start, site: Path) -> None:
    chance = random.Random(0)
    answered: list[tuple[str, dict[str, Any]]] = []
    setup = load_setup(site / "server.toml")

    async def work(server: Server, name: str, told: trio.MemorySendChannel[None]) -> None:
        for turn in count():
            vm = f"vm-{chance.randrange(4)}"
            volumes = tuple(chance.sample(VOLUMES, chance.randint(1, 2)))
            rekey = [volume for volume in volumes if chance.random() < 0.3]
            async with agent(server, f"{name} {turn}", vm) as booting:
                grant = await booting.boot()
                answered.append((vm, {"root": grant.root_passphrase}))
                keys = await booting.sync(volumes, formatted=(), rekey=rekey)
                answered.append((vm, dict(keys.passphrases)))
                await told.send(None)

    async def storm(server: Server, name: str) -> None:
        tell, told = trio.open_memory_channel[None](0)
        with trio.fail_after(120):
            async with trio.open_nursery() as nursery:
                for index in range(6):
                    nursery.start_soon(work, server, f"{name} {index}", tell)
                for _ in range(chance.randint(3, 20)):
                    await told.receive()
                server.process.kill()
                nursery.cancel_scope.cancel()

    for number in range(KILLS):
        server = serve(start, site)
        try:
            trio.run(storm, server, str(number))
        except* ChutesError:  # an agent saw the end first
            assert server.process.wait(20)
        gc.collect()
        with closing(setup.store.open()) as store:
            store.check()
            nothing_is_half_done(store)
            vault = setup.service.vault
            there = {
                (row.vm.name, row.volume, vault.open(Address(row.vm, row.volume, row.generation), row).reveal())
                for row in store.transact(Ask(Scan(GenerationRow)))
            }
        assert {(vm, volume, key.reveal()) for vm, keys in answered for volume, key in keys.items()} <= there
