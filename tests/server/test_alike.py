"""Servers of one store that must be configured alike: what is compared, how it is told, and what is not kept."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from chutes_proto import effects
from chutes_proto.effects import Log, Now, Sleep, Transact
from chutes_proto.errors import StoreError
from chutes_proto.io.files import write_file
from chutes_proto.io.server.development import write_server
from chutes_proto.io.server.setup import make_setup
from chutes_proto.server import ServerConfig
from chutes_proto.server._alike import LIVE_SECONDS, Alike, watch_servers
from chutes_proto.server._readiness import Readiness
from chutes_proto.store._rows import NoteKeyServer, ReadKeyServers
from chutes_proto.store._run import Ask, Unit
from chutes_proto.testing._platform import SimulatedPlatform
from chutes_proto.testing.store_suite._parts import VM
from tests.store.memory import MemoryStore

NOW = 1_700_000_000
PRINT = """
import sys
from chutes_proto.io.server.setup import make_setup
from chutes_proto.server import ServerConfig
for key, digest in make_setup(ServerConfig.load(sys.argv[1])).alike.settings.items():
    print(key, digest)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    write_server(folder, SimulatedPlatform(bytes(32)), int(time.time()))
    return folder


def settings(place: Path, change: Callable[[str], str] = str) -> dict[str, str]:
    """The digests of another server with the same files, and its configuration after ``change``."""
    path = place / "other.toml"
    _ = path.write_text(change((place / "server.toml").read_text()))
    path.chmod(0o600)
    return dict(make_setup(ServerConfig.load(path)).alike.settings)


def test_every_process_finds_the_same(place: Path) -> None:
    found: set[str] = set()
    for seed in ("1", "2"):
        command = [sys.executable, "-c", PRINT, str(place / "server.toml")]
        environ = {**os.environ, "PYTHONHASHSEED": seed}
        found.add(subprocess.run(command, capture_output=True, text=True, check=True, env=environ).stdout)
    assert len(found) == 1
    assert dict(line.split() for line in found.pop().splitlines()) == settings(place)


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('volumes = ["storage"]', "volumes"),
        (f'blacklist = {{ "{VM.hotkey}" = "no" }}', "blacklist"),
        ("netuid = 65", "netuid"),
        ('signatures = "request"', "signatures"),
        ("rotate_after_hours = 1", "rotate_after_hours"),
        ('exchange_downgrade = "allow"', "exchange_downgrade"),
        ("runtime.fresh_seconds = 60", "runtime"),
        ("nonce.bind_address = true", "nonce"),
    ],
)
def test_a_setting_that_must_be_equal_is_named(place: Path, line: str, key: str) -> None:
    ours, theirs = settings(place), settings(place, lambda text: f"{line}\n{text}")
    assert {name for name in ours if ours[name] != theirs[name]} == {key}


def test_settings_of_one_machine_may_differ(place: Path) -> None:
    def change(text: str) -> str:
        return f'limits.connections = 7\ncontrol = "t"\n{text}'.replace("127.0.0.1:0", "127.0.0.1:1")

    assert settings(place, change) == settings(place)


def run(
    alike: Alike,
    store: MemoryStore,
    looks: int,
    now: int = NOW,
    reload: Callable[[], None] = lambda: None,
    readiness: Readiness | None = None,
) -> list[dict[str, object]]:
    """Let a server look so often; returns the fields of what it logs. ``reload`` is called after each.

    ``readiness`` has the fault of the store that it knows.
    """
    told: list[dict[str, object]] = []

    class Enough(Exception):
        pass

    def perform(effect: effects.Effect[object]) -> object:
        nonlocal looks
        match effect:
            case Now():
                return now
            case Transact(unit):
                return store.transact(unit)
            case Log(record):
                assert record.event == "configuration_differs"
                told.append(dict(record.fields))
                return None
            case Sleep():
                reload()
                looks -= 1
                if not looks:
                    raise Enough
                return None
            case _:
                raise AssertionError(effect)

    with pytest.raises(Enough):
        effects.run(watch_servers(alike, readiness or Readiness()), perform)
    return told


def test_two_servers_that_differ_tell_it_once_and_again_after_a_change() -> None:
    store = MemoryStore()
    one, other = Alike("one", {"volumes": "a", "netuid": "b"}), Alike("other", {"volumes": "a", "netuid": "c"})
    assert run(one, store, 2) == []
    assert run(other, store, 2) == [{"server": "one", "settings": ["netuid"]}]
    assert run(one, store, 3) == [{"server": "other", "settings": ["netuid"]}]
    assert [str(each) for each in one.differences()] == ["the server other on this store has another value of netuid"]
    assert run(Alike("other", one.settings), store, 1) == []
    assert run(one, store, 2) == []


def test_a_server_that_the_store_refuses_does_not_write_into_it() -> None:
    store, one = MemoryStore(), Alike("one", {"volumes": "a"})
    assert run(one, store, 2, readiness=Readiness("it is damaged")) == []
    assert not store.transact(Ask(ReadKeyServers(0)))
    assert run(one, store, 1) == []
    assert store.transact(Ask(ReadKeyServers(0))) == (one.row(NOW),)


def test_a_server_whose_row_the_store_did_not_take_tries_again() -> None:
    class Once(MemoryStore):
        def transact(self, unit: Unit[Any]) -> Any:
            if unit == Ask(NoteKeyServer(one.row(NOW))) and readiness.unwritten is None:
                raise StoreError("it is read-only")
            return super().transact(unit)

    def see() -> None:
        readiness.fault = readiness.unwritten
        seen.append(readiness.unwritten)

    one, readiness = Alike("one", {}), Readiness()
    seen: list[str | None] = []
    store = Once()
    assert run(one, store, 2, readiness=readiness, reload=see) == []
    assert seen == ["it is read-only", None]
    assert store.transact(Ask(ReadKeyServers(0))) == (one.row(NOW),)


def test_servers_that_reload_one_after_the_other_are_no_fault() -> None:
    store = MemoryStore()
    one, other = Alike("one", {"volumes": "new"}), Alike("other", {"volumes": "old"})
    store.transact(Ask(NoteKeyServer(other.row(NOW))))

    def reload() -> None:
        store.transact(Ask(NoteKeyServer(Alike("other", one.settings).row(NOW))))

    assert run(one, store, 3, reload=reload) == []


def test_a_server_that_has_ended_or_is_of_another_release_is_not_compared() -> None:
    store, one = MemoryStore(), Alike("one", {"volumes": "a"})
    old = Alike("other", {"volumes": "b"}).row(NOW)
    store.transact(Ask(NoteKeyServer(old)))
    assert run(one, store, 2) == [{"server": "other", "settings": ["volumes"]}]
    store.transact(Ask(NoteKeyServer(evolve(old, version="0.0.1"))))
    assert run(one, store, 2) == []
    store.transact(Ask(NoteKeyServer(evolve(old, seen_at=NOW - LIVE_SECONDS))))
    assert run(one, store, 2) == []
    assert one.others == ()


@pytest.mark.parametrize("text", ["", "[]", '{"volumes"', '{"volumes":1}', "[" * 100])
def test_a_row_that_is_damaged_differs(text: str) -> None:
    one = Alike("one", {"volumes": "a"})
    assert one.different_keys(evolve(one.row(NOW), name="other", configuration=text))


def test_a_passphrase_of_an_image_is_in_no_digest(place: Path) -> None:
    def served(passphrase: str) -> dict[str, str]:
        write_file(place / "image", passphrase.encode(), mode=0o600)
        return settings(place, lambda text: text.replace('"vm"', '"image"\nroot_passphrase_file = "image"'))

    assert served("a" * 64) == served("b" * 64) != settings(place)
