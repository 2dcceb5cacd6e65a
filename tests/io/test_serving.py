"""What a server refuses before it serves, what it finds in its store, and its listeners from begin to end."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from attrs import evolve

from chutes_proto.errors import ConfigurationError, StoreError
from chutes_proto.io.drivers.sync import log_record
from chutes_proto.io.server import workers
from chutes_proto.io.server.control import ask_to_reload
from chutes_proto.io.server.development import write_server
from chutes_proto.io.server.listeners import open_listeners
from chutes_proto.io.server.reload import Running
from chutes_proto.io.server.serving import serve_until_stopped, supervise_until_stopped
from chutes_proto.io.server.setup import ServerSetup, make_setup
from chutes_proto.io.server.store_setup import check_store, make_store_setup, store_findings, store_place
from chutes_proto.io.stores.address import StorePlace
from chutes_proto.io.stores.sqlite import SqliteStore
from chutes_proto.server import ServerConfig
from chutes_proto.testing._platform import SimulatedPlatform
from chutes_proto.testing.store_suite._parts import VAULT
from tests.small_disk import fill, small_disk

Write = Callable[..., ServerConfig]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes the files of a server, and its configuration with these changes."""

    def changed(*changes: tuple[str, str]) -> ServerConfig:
        write_server(tmp_path, SimulatedPlatform(bytes(32)), int(time.time()))
        configuration = tmp_path / "server.toml"
        text = configuration.read_text()
        for old, new in changes:
            text = text.replace(old, new)
        _ = configuration.write_text(text)
        return ServerConfig.load(configuration)

    return changed


def silent(_: object) -> None: ...


# --- what is refused ---


def test_several_workers_need_a_file(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    setup = make_setup(evolve(write(), path=None))
    with pytest.raises(ConfigurationError, match="a worker reads the configuration from its file"):
        supervise_until_stopped(2, "asyncio", setup, silent, [])


def test_an_event_loop_that_is_not_installed_is_named(write: Write) -> None:
    setup = make_setup(write())
    with pytest.raises(ConfigurationError, match=r"curio is not installed; run: pip install 'chutes-proto\[curio\]'"):
        serve_until_stopped("curio", setup, setup.collateral, silent, [])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('roots = "simulated-root.der"', 'roots = "server.pem"', 'server.pem: .*; say "intel", or name a DER file'),
        ('kek_file = "kek"', 'kek_file = "kek"\nkek_previous_file = "old"', "old holds the same key as kek_file"),
        ('kek_file = "kek"', 'kek_file = "server.key"', "kek_file: .*server.key: "),
        ('kek_file = "kek"', 'kek_file = "nothing"', "kek_file: .*nothing: "),
    ],
)
def test_a_file_of_the_store_that_is_wrong_is_named(
    write: Write, old: str, new: str, told: str, tmp_path: Path
) -> None:
    config = write((old, new))
    _ = shutil.copy(tmp_path / "kek", tmp_path / "old")
    with pytest.raises(ConfigurationError, match=told):
        _ = make_store_setup(config)


def test_a_password_of_the_database_is_not_for_everybody(write: Write, tmp_path: Path) -> None:
    database = '"postgresql://keys:secret@host/keys"'
    config = write(('"sqlite:keys.db"', database))
    (tmp_path / "server.toml").chmod(0o644)
    with pytest.raises(ConfigurationError, match="too open"):
        _ = make_store_setup(config)
    (tmp_path / "server.toml").chmod(0o640)
    assert make_store_setup(config).store.path is None


# --- what is found in the store ---


def test_a_store_that_is_not_made_yet_is_no_fault(write: Write, tmp_path: Path) -> None:
    setup = make_store_setup(write())
    assert [str(each.detail) for each in check_store(setup.store, setup.vault)] == [f"{tmp_path}/keys.db: not made yet"]
    nowhere = StorePlace("sqlite:nowhere/keys.db", tmp_path, vault=VAULT)
    with pytest.raises(StoreError, match="its directory does not exist"):
        _ = nowhere.is_made()
    assert not list(tmp_path.glob("keys.db*"))


def test_the_full_disk_of_a_server_that_runs_is_found(write: Write, tmp_path: Path) -> None:
    """Reading works there, and so does a transaction that writes nothing."""
    setup = make_store_setup(write(("sqlite:keys.db", "sqlite:disk/keys.db")))
    with small_disk(tmp_path / "disk") as disk, closing(setup.store.open()):
        filler = fill(disk)
        with pytest.raises(StoreError, match=r"its disk takes no data \(No space left on device\); make space"):
            _ = [*check_store(setup.store, setup.vault)]
        filler.unlink()
        assert [each.state for each in check_store(setup.store, setup.vault)] == ["ok", "note"]  # it has no mark
        assert not list(disk.glob("tmp*"))


class Odd(SqliteStore):
    """A store that has something to say."""

    @property
    def notes(self) -> list[str]:
        return ["disk: nearly full"]


def test_what_a_store_says_of_itself_is_found(tmp_path: Path) -> None:
    with closing(Odd(tmp_path / "keys.db")) as store:
        found = [(each.state, each.what, each.detail) for each in store_findings(store)]
    assert found == [("note", "disk", "nearly full")]


def test_only_a_server_compares_its_store_with_a_mark(write: Write, tmp_path: Path) -> None:
    config = write(('store = "sqlite:keys.db"', 'store = { url = "sqlite:keys.db", mark_file = "mark" }'))
    assert store_place(config, tmp_path).mark_file is None
    assert store_place(config, tmp_path, with_mark=True).mark_file == tmp_path / "mark"
    assert make_store_setup(config).mark_file == tmp_path / "mark"


# --- listeners ---


@pytest.fixture
def setup(write: Write, monkeypatch: pytest.MonkeyPatch) -> ServerSetup:
    monkeypatch.delenv("LISTEN_PID", raising=False)
    return make_setup(write(("listen = ", 'control = "control"\nlisten = ')))


def test_a_server_has_its_sockets_and_its_control_as_long_as_it_serves(setup: ServerSetup, tmp_path: Path) -> None:
    with open_listeners(Running(setup)) as held:
        assert not held.by_manager
        held.answer(setup.control_socket, lambda caller: {"ok": False, "error": caller}, log_record)
        assert not (tmp_path / "control").exists()
        held.begin()
        assert ask_to_reload(tmp_path / "control") == {"ok": False, "error": f"uid {os.geteuid()}"}
        (url,) = held.listeners.urls
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 60).close()
    assert not [*tmp_path.glob("control*")]


def test_a_worker_has_the_sockets_of_its_supervisor_and_answers_no_operator(setup: ServerSetup, tmp_path: Path) -> None:
    life, ours = os.pipe()
    channel, theirs = socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as given, channel, theirs:
        said = {
            "number": 1,
            "channel": os.dup(channel.fileno()),
            "files": workers._packed({"kek": b"secret"}),
            "sockets": [("listen", os.dup(given.fileno()))],
            "life": life,
            "workers": 2,
            "handed_over": True,
        }
        environment = {workers._VARIABLE: json.dumps(said)}
        worker = workers.given_by_supervisor(environment)
        assert environment == {}
        assert worker is not None
        assert (worker.number, worker.workers, worker.files.content) == (1, 2, {"kek": b"secret"})
        assert not any(map(os.get_inheritable, (life, worker.channel.fileno())))
        with open_listeners(Running(setup), worker=worker) as held:
            held.answer(setup.control_socket, lambda _: {"ok": True}, log_record)
            held.begin()
            assert (held.by_manager, held.life, held.control) == (True, life, None)
            assert held.listeners.sockets[0].socket.getsockname() == given.getsockname()
        worker.channel.close()
    os.close(life)
    os.close(ours)
    assert not [*tmp_path.glob("control*")]
    assert workers.given_by_supervisor({}) is None
