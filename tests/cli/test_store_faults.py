"""A served server whose store fails under it: 503 with ``Retry-After``, and when it is back nothing is lost."""

from __future__ import annotations

import re
import shutil
import signal
import sqlite3
import ssl
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import httpx
import pytest
import trio
from attrs import define, field

from chutes_proto.auth.hotkey import HotkeyPair
from chutes_proto.boot._retry_policy import RetryPolicy
from chutes_proto.errors import Unavailable
from chutes_proto.io.files import create_private
from chutes_proto.io.server.development import write_server
from chutes_proto.io.server.setup import make_setup
from chutes_proto.io.stores import MAKE_SPACE
from chutes_proto.log import Record
from chutes_proto.secret import Secret
from chutes_proto.server import ServerConfig
from chutes_proto.store._rows import GenerationRow, Scan
from chutes_proto.store._run import Ask
from chutes_proto.testing._platform import SimulatedPlatform
from chutes_proto.wire.codes import Code
from chutes_proto_trio import BootAgent, MinerClient
from tests.cli.conftest import HOTKEY, Ended, Server
from tests.postgres import Cluster, schema
from tests.small_disk import fill, remount, schema_on_small_disk, small_disk
from tests.waiting import async_wait_until

PLATFORM = SimulatedPlatform(bytes(32))
VOLUMES = ("storage", "tdx-cache")
ONCE = RetryPolicy(attempts=1)
PATIENT = RetryPolicy(attempts=100, base=0.2, cap=1.0)

pytestmark = pytest.mark.trio

Start = Callable[..., Server]


@define
class Agent:
    """One boot of the VM, and what its agent logs."""

    server: Server
    retry: RetryPolicy = PATIENT
    delayed: trio.Event = field(factory=trio.Event)
    agent: BootAgent = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.agent = BootAgent(
            self.server.url,
            hotkey=HOTKEY,
            vm_name="vm-1",
            quoter=PLATFORM.quote,
            ca_pem=self.server.ca.read_bytes(),
            retry=self.retry,
            log=self.log,
        )

    async def __aenter__(self) -> Agent:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.agent.__aexit__(None, None, None)

    def log(self, record: Record) -> None:
        if record.event == "boot_delayed":
            self.delayed.set()

    async def boot(self) -> bytes:
        grant = await self.agent.boot()
        return grant.root_passphrase.reveal()

    async def sync(self) -> dict[str, bytes]:
        keys = await self.agent.sync(dict.fromkeys(VOLUMES, False))
        return {key.volume: key.passphrase.reveal() for key in keys}


async def outlives(server: Server, begin: Callable[[], object], end: Callable[[], None], *, is_busy: bool) -> None:
    """A boot before the fault, whose sync falls into it; one that begins in it; one afterwards.

    ``is_busy``: the server waits for the store, so neither is answered before the fault ends. Else both are refused,
    and asked again.
    """
    keys: dict[str, bytes] = {}
    roots: list[bytes] = []

    async def sync() -> None:
        keys.update(await before.sync())

    async def boot() -> None:
        roots.append(await during.boot())

    with trio.fail_after(150):
        async with Agent(server) as before, Agent(server) as during:
            roots.append(await before.boot())
            begin()
            try:
                await (turns_away if is_busy else refuses)(server)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(sync)
                    nursery.start_soon(boot)
                    if is_busy:
                        await turns_away(server)
                    else:
                        await before.delayed.wait()
                        await during.delayed.wait()
                    assert not keys
                    assert len(roots) == 1
                    assert before.delayed.is_set() == during.delayed.is_set() == (not is_busy)
                    end()
            finally:
                end()
        assert {*keys} == {*VOLUMES}
        assert roots == [roots[0]] * 2
        assert await boot_and_sync(server) == (roots[0], keys)


async def turns_away(server: Server) -> None:
    """A miner is told to come again."""
    pair = HotkeyPair.from_secret(Secret(bytes(32)))
    client = MinerClient(
        server.url, hotkey=pair.hotkey.address, signer=pair.sign, ca_pem=server.ca.read_bytes(), retry=ONCE
    )
    async with client:
        with pytest.raises(Unavailable) as caught:
            _ = await client.servers()
    assert (caught.value.status, caught.value.code) == (503, Code.STORE_UNAVAILABLE)
    assert caught.value.retry_after > 0


async def refuses(server: Server) -> None:
    """A boot is told to come again."""
    async with Agent(server, ONCE) as agent:
        with pytest.raises(Unavailable) as caught:
            _ = await agent.boot()
    assert (caught.value.status, caught.value.code) == (503, Code.STORE_UNAVAILABLE)
    assert caught.value.retry_after > 0


async def boot_and_sync(server: Server) -> tuple[bytes, dict[str, bytes]]:
    async with Agent(server) as agent:
        return await agent.boot(), await agent.sync()


def refused(server: Server) -> str:
    """Return what the operator was told, after the end."""
    return server.stop(signal.SIGTERM).err


def nothing_twice(site: Path) -> None:
    with closing(make_setup(ServerConfig.load(site / "server.toml")).store.open()) as store:
        store.check()
        rows = store.transact(Ask(Scan(GenerationRow)))
    assert sorted((row.volume, row.generation) for row in rows) == [("root", 1), ("storage", 1), ("tdx-cache", 1)]


def serve(start: Start, site: Path) -> Server:
    return start("--config", site / "server.toml", ca=site / "ca.pem")


def make_site(directory: Path, store: str) -> Path:
    site = directory / "site"
    site.mkdir()
    write_server(site, PLATFORM, int(time.time()))
    configuration = site / "server.toml"
    _ = configuration.write_text(configuration.read_text().replace("sqlite:keys.db", store))
    return site


# --- PostgreSQL ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
async def test_a_database_that_stops(start: Start, cluster: Cluster, number: signal.Signals, tmp_path: Path) -> None:
    stopped = False

    def stop() -> None:
        nonlocal stopped
        cluster.stop(number)
        stopped = True

    def go_on() -> None:
        nonlocal stopped
        if stopped:
            cluster.start()
            stopped = False

    with schema(cluster.url()) as url:
        site = make_site(tmp_path, url)
        make_setup(ServerConfig.load(site / "server.toml")).store.open(make=True).close()
        server = serve(start, site)
        await outlives(server, stop, go_on, is_busy=True)
        assert "no connection to the database" in refused(server)
        nothing_twice(site)


async def test_a_database_whose_disk_is_full(start: Start, cluster: Cluster, tmp_path: Path) -> None:
    """Reading works, and so does each change that finds room in a page: only a look at the disk tells."""
    with schema_on_small_disk(cluster) as (disk, url):
        site = make_site(tmp_path, url)
        make_setup(ServerConfig.load(site / "server.toml")).store.open(make=True).close()
        server = serve(start, site)
        filler = fill(disk)
        await refuses(server)
        _ = await async_wait_until(lambda: probe(server) == 503)  # a balancer is told
        filler.unlink()
        _ = await async_wait_until(lambda: probe(server) == 200)
        _ = await boot_and_sync(server)
        told = refused(server)
        assert told.count('"event":"store_refused"') == told.count('"event":"store_accepted"') == 1
        assert "the database's disk is full; this transaction changed nothing; make space" in told
        nothing_twice(site)


# --- SQLite ---


async def test_a_disk_that_is_full(start: Start, tmp_path: Path) -> None:
    site = make_site(tmp_path, "sqlite:disk/keys.db")
    with small_disk(site / "disk") as disk:
        server = serve(start, site)
        filler = disk / "filler"
        await outlives(server, lambda: fill(disk), lambda: filler.unlink(missing_ok=True), is_busy=False)
        _ = fill(disk)
        await refuses(server)
        _ = await async_wait_until(lambda: probe(server) == 503)  # a balancer is told
        filler.unlink()
        _ = await async_wait_until(lambda: probe(server) == 200)
        told = refused(server)  # whoever wrote first heard that the disk is full: the server's own work, maybe
        assert "its disk takes no data (No space left on device); make space: a server goes on by itself" in told
        assert '"event":"store_accepted"' in told
        nothing_twice(site)


async def test_a_command_whose_disk_is_full_goes_on_once_there_is_space(
    start: Start, command: Callable[..., Ended], tmp_path: Path
) -> None:
    site = make_site(tmp_path, "sqlite:disk/keys.db")
    with small_disk(site / "disk") as disk:
        server = serve(start, site)
        _ = await boot_and_sync(server)
        _ = server.stop(signal.SIGTERM)
        _ = (site / "kek").rename(site / "kek.previous")
        create_private(site / "kek", bytes(range(32)))
        configuration = site / "server.toml"
        text = configuration.read_text()
        _ = configuration.write_text(f'kek_previous_file = "kek.previous"\n{text}')
        filler = fill(disk)
        rewrap = ("keys", "rewrap", "--config", configuration)
        ended = command(*rewrap)
        assert (ended.code, MAKE_SPACE in ended.err) == (1, True), ended.err
        filler.unlink()
        assert command(*rewrap).code == 0


def probe(server: Server) -> int:
    """Return the status that a balancer gets."""
    context = ssl.create_default_context(cafile=server.ca)
    with httpx.Client(verify=context, trust_env=False) as http:
        return http.get(f"{server.url}/servers/nonce", params={"miner_hotkey": HOTKEY}).status_code


async def test_a_file_that_another_program_holds(start: Start, tmp_path: Path) -> None:
    site = make_site(tmp_path, "sqlite:keys.db")
    server = serve(start, site)
    with closing(sqlite3.connect(site / "keys.db", isolation_level=None, check_same_thread=False)) as other:

        def release() -> None:
            if other.in_transaction:
                _ = other.execute("ROLLBACK")

        await outlives(server, lambda: other.execute("BEGIN EXCLUSIVE"), release, is_busy=True)
    assert re.search("no answer within 4.5 s|other transactions take too long", refused(server))
    nothing_twice(site)


async def test_a_file_that_is_gone_for_a_while(start: Start, tmp_path: Path) -> None:
    site = make_site(tmp_path, "sqlite:keys.db")
    server = serve(start, site)
    path, away = site / "keys.db", site / "away.db"

    def bring_back() -> None:
        if away.exists():
            _ = away.rename(path)

    await outlives(server, lambda: path.rename(away), bring_back, is_busy=False)
    assert "it was moved, removed or replaced while in use" in refused(server)
    nothing_twice(site)


def settled(connection: sqlite3.Connection) -> bool:
    """Whether the server has noted itself, and all audit rows are sequenced."""
    text = "SELECT EXISTS (SELECT 1 FROM key_server) AND NOT EXISTS (SELECT 1 FROM audit WHERE idx IS NULL)"
    return bool(connection.execute(text).fetchone()[0])


async def test_a_file_that_is_damaged_under_a_server(start: Start, tmp_path: Path) -> None:
    """It refuses and changes nothing more; the file stays for the operator, and a backup in its place serves again."""
    site = make_site(tmp_path, "sqlite:keys.db")
    path, backup = site / "keys.db", site / "backup.db"
    first = serve(start, site)
    given = await boot_and_sync(first)
    _ = first.stop(signal.SIGTERM)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        _ = other.execute("DELETE FROM key_server")  # the next server has the same name
    _ = shutil.copy(path, backup)
    server = serve(start, site)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        # A sound page that it has written to the log before would be moved into the file at its end.
        _ = await async_wait_until(lambda: settled(other))
        assert other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone() == (0, 0, 0)
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xa5" * len(content[4096:])
    with path.open("r+b") as file:  # never shorter meanwhile, which would be another fault
        _ = file.write(content)
    await refuses(server)
    assert "damaged; stop the server, keep the file, and restore a backup" in refused(server)
    is_as_it_was = path.read_bytes() == content  # told without their difference, which takes minutes to make
    assert is_as_it_was
    for beside in site.glob("keys.db*"):
        _ = beside.rename(site / f"broken {beside.name}")
    _ = shutil.copy(backup, path)
    assert await boot_and_sync(serve(start, site)) == given


async def test_a_disk_that_only_reads(start: Start, tmp_path: Path) -> None:
    site = make_site(tmp_path, "sqlite:disk/keys.db")
    with small_disk(site / "disk") as disk:
        first = serve(start, site)
        given = await boot_and_sync(first)
        _ = first.stop(signal.SIGTERM)
        remount(disk, "ro")
        before = (disk / "keys.db").read_bytes()
        with pytest.raises(AssertionError, match=r"cannot be opened; .*may this user write it"):
            _ = serve(start, site)
        assert (disk / "keys.db").read_bytes() == before
        remount(disk, "rw")
        assert await boot_and_sync(serve(start, site)) == given
