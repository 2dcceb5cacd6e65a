"""`keys`, `vm`, `audit` and `store restored`, in SQLite and PostgreSQL: what an operator sees and changes.

No passphrase is ever shown, and none is in the store in the clear.
"""

from __future__ import annotations

import base64
import json
import os
import re
import sqlite3
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, redirect_stdout
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from attrs import define, evolve, frozen
from cryptography.fernet import Fernet

from chutes_proto.cli import output
from chutes_proto.cli.main import main
from chutes_proto.io.server.development import write_server
from chutes_proto.io.server.setup import make_setup
from chutes_proto.io.stores.postgres import PostgresStore
from chutes_proto.io.stores.sqlite import SqliteStore
from chutes_proto.keys.vault import Address, FreshKey, KeyEncryptionKey, Vault
from chutes_proto.server import ServerConfig
from chutes_proto.store import _sql as sql
from chutes_proto.store._rows import (
    AttestationRow,
    AuditRow,
    BootRow,
    GenerationRow,
    GpuRow,
    HostProfileRow,
    Insert,
    InsertAll,
    RewrapGenerations,
    Scan,
    Vm,
)
from chutes_proto.store._run import Ask, Script, Unit
from chutes_proto.store._sealing import ReadEpochs
from chutes_proto.testing._platform import SimulatedPlatform
from chutes_proto.testing.store_suite._parts import boot, sync
from chutes_proto.units.boot import RecordRefusal
from chutes_proto.units.fleet import RegisterHost
from chutes_proto.units.servers import RegisterServer
from tests.cli.conftest import PROGRAM, Ended, killed_after_a_line

PLATFORM = SimulatedPlatform(bytes(32))
HOTKEY = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"
NOW = int(time.time())


@define
class Site:
    """An operator's directory with a store in it, and the command line there."""

    directory: Path
    command: Callable[..., Ended]
    secrets: list[bytes]
    said: list[Ended]

    @property
    def configuration(self) -> Path:
        return self.directory / "server.toml"

    def do(self, *arguments: object) -> Ended:
        self.said.append(self.command(*arguments, "--config", self.configuration))
        return self.said[-1]

    def json(self, *arguments: object) -> Any:
        return self.do(*arguments, "--json").json

    def boot(self, label: str, *, vm: Vm | None = None, rekey: tuple[str, ...] = (), at: int = NOW) -> bytes:
        setup = make_setup(ServerConfig.load(self.configuration))
        granted = evolve(boot(label, now=at, vm=vm or Vm(HOTKEY, "vm-1")), vault=setup.service.vault)
        with closing(setup.store.open()) as store:
            root = store.transact(granted).root
            keys = store.transact(evolve(sync(granted, "body", "storage", rekey=rekey), vault=setup.service.vault))
        assert root is not None
        self.secrets += [root.reveal(), keys.passphrases[0][1].reveal()]
        return self.secrets[-1]

    def spoil(self, row: GenerationRow) -> None:
        """Alter how a row's data key is wrapped, as a fault of a disk would."""
        assert row.wrapped_key is not None
        with closing(make_setup(ServerConfig.load(self.configuration)).store.open()) as store:
            altered = row.wrapped_key[:-1] + bytes([row.wrapped_key[-1] ^ 1])
            store.transact(Ask(RewrapGenerations((evolve(row, wrapped_key=altered),))))

    def rows(self) -> tuple[GenerationRow, ...]:
        with closing(make_setup(ServerConfig.load(self.configuration)).store.open()) as store:
            return store.transact(Ask(Scan(GenerationRow)))


BOTH = pytest.mark.parametrize("site", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture
def site(request: pytest.FixtureRequest, tmp_path: Path, command: Callable[..., Ended]) -> Iterator[Site]:
    write_server(tmp_path, PLATFORM, NOW)
    site = Site(tmp_path, command, [], [])
    if getattr(request, "param", "sqlite") == "postgresql":
        text = site.configuration.read_text()
        site.configuration.write_text(text.replace("sqlite:keys.db", request.getfixturevalue("migrated_schema")))
    yield site
    shown = "".join(ended.out + ended.err for ended in site.said).encode()
    kept = b"".join(row.sealed or b"" for row in site.rows())
    assert not [secret for secret in site.secrets if secret in shown + kept], "a passphrase in the clear"


def test_a_rekeyed_key_is_restored(site: Site) -> None:
    first = site.boot("1")
    site.boot("2", rekey=("storage",))
    history = site.json("keys", "history", "vm-1")
    assert [(g["volume"], g["generation"], g["state"]) for g in history["generations"]] == [
        ("root", 1, "active"),
        ("storage", 1, "retired"),
        ("storage", 2, "active"),
    ]
    assert "storage/1  retired" in site.do("keys", "history", f"{HOTKEY}/vm-1").out
    assert site.do("keys", "restore", "vm-1", "storage", 1, "--reason", "not formatted").code == 0
    assert site.boot("3") == first
    (row,) = site.json("audit", "list", "--event", "key restored")["rows"]
    assert row["reason"].endswith(": not formatted")
    assert (row["vm"], row["keys"]) == ("vm-1", "storage/2 retired, storage/1 active")
    wrong = site.do("keys", "restore", "vm-1", "storage", 9, "--json")
    assert (wrong.code, wrong.json["ok"], "not there" in wrong.err) == (1, False, True)
    assert site.do("keys", "restore", "vm-1", "storage", 10**17).code == 1


@BOTH
def test_a_purge_says_first_what_it_would_do(site: Site) -> None:
    for label in "12345":
        site.boot(label, rekey=("storage",), at=NOW - 100 * 86_400)
    assert [g["generation"] for g in site.json("keys", "purge")["generations"]] == [1, 2]
    assert all(row.sealed for row in site.rows())
    assert site.json("keys", "purge", "--older-than", 101, "--yes")["generations"] == []
    done = site.json("keys", "purge", "vm-1", "--yes")
    assert (done["purged"], done["older_than_days"], len(done["generations"])) == (True, 90, 2)
    assert [row.state for row in site.rows() if not row.sealed] == ["purged", "purged"]
    assert "nothing to purge" in site.do("keys", "purge", "--yes").out
    early = site.do("keys", "purge", "--older-than", 89, "--yes")
    assert (early.code, "retention_days" in early.err) == (1, True)
    gone = site.do("keys", "restore", "vm-1", "storage", 1)
    assert (gone.code, "it is purged" in gone.err) == (1, True)


@BOTH
def test_of_many_vms_one_at_a_time_is_read(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vm-1", "vm-2"):
        for label in "12345":
            site.boot(f"{name} {label}", vm=Vm(HOTKEY, name), rekey=("storage",), at=NOW - 100 * 86_400)
    with monkeypatch.context() as patch:
        patch.delitem(sql._SCANS, GenerationRow)
        assert {row["vm"] for row in site.json("vm", "list")["vms"]} == {"vm-1", "vm-2"}
        assert len(site.json("keys", "history", "vm-2")["generations"]) == 6
        ended = site.do("keys", "purge", "--yes")
    assert [line.split("  ")[:2] for line in ended.out.splitlines()[1:-1]] == [
        [f"{HOTKEY}/{name}", f"storage/{generation}"] for name in ("vm-1", "vm-2") for generation in (1, 2)
    ]
    assert "4 passphrases deleted" in ended.out
    assert [row["vm"] for row in site.json("audit", "list", "--event", "keys purged")["rows"]] == ["vm-1", "vm-2"]


def new_key(site: Site) -> str:
    """A new key-encryption key, the old one beside it; returns the configuration without the old one."""
    (site.directory / "kek").rename(site.directory / "kek.old")
    (site.directory / "kek").write_bytes(os.urandom(32))
    (site.directory / "kek").chmod(0o600)
    text = site.configuration.read_text()
    site.configuration.write_text(f'kek_previous_file = "kek.old"\n{text}')
    return text


@BOTH
def test_a_new_key_encryption_key(site: Site) -> None:
    first = site.boot("1")
    text = new_key(site)
    done = site.do("keys", "rewrap")
    assert (done.code, "2 keys wrapped" in done.out, "keys wrapped: 2 of 2" in done.err) == (0, True, True)
    assert site.json("keys", "rewrap")["rewrapped"] == 0
    site.configuration.write_text(text)
    assert site.boot("2") == first


@BOTH
def test_a_rewrap_that_was_killed_goes_on_with_the_keys_that_are_left(site: Site) -> None:
    """Meanwhile keys are under two KEKs, and a server opens them all."""
    old = KeyEncryptionKey.from_bytes((site.directory / "kek").read_bytes())
    keys = [sealed_key(Vault(old), number) for number in range(2100)]
    with closing(make_setup(ServerConfig.load(site.configuration)).store.open(make=True)) as store:
        for begin in range(0, len(keys), 1000):
            store.transact(Ask(InsertAll(tuple(keys[begin : begin + 1000]))))
    _ = new_key(site)
    new = KeyEncryptionKey.from_bytes((site.directory / "kek").read_bytes())
    rewrapping = [*PROGRAM, "keys", "rewrap", "--config", site.configuration]
    assert killed_after_a_line(rewrapping) == "keys wrapped: 1000 of 2100\n"
    assert {row.kek_id for row in site.rows()} == {old.kek_id, new.kek_id}
    assert opened(Vault(new, old), site.rows()) == opened(Vault(old), keys)
    done = site.json("keys", "rewrap")
    assert 0 < done["rewrapped"] < 2100
    assert done["sealed_under"] == {new.kek_id: 2101}
    with closing(make_setup(ServerConfig.load(site.configuration)).store.open()) as store:
        assert store.transact(Ask(ReadEpochs())) == (2,)
    assert opened(Vault(new), site.rows()) == opened(Vault(old), keys)


@BOTH
def test_a_rewrap_whose_store_is_taken_away_says_to_run_it_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.boot("1")
    new_key(site)
    url = ServerConfig.load(site.configuration).store.url
    with ExitStack() as stack:

        @contextmanager
        def progress(_doing: str) -> Iterator[Callable[..., object]]:
            yield lambda *_: stack.enter_context(taken(site.directory, url))

        with monkeypatch.context() as patch:
            patch.setattr(output, "progress", progress)
            for store in (SqliteStore, PostgresStore):
                patch.setitem(store.__init__.__kwdefaults__ or {}, "busy_seconds", 0.1)
            ended = site.do("keys", "rewrap")
    assert (ended.code, "run the command again, and it does what is left" in ended.err) == (1, True)
    assert site.json("keys", "rewrap")["rewrapped"] == 0
    assert not site.do("store", "check").err


@contextmanager
def taken(directory: Path, url: str) -> Iterator[None]:
    """Somebody else has all of a store for himself."""
    if url.startswith("sqlite:"):
        with closing(sqlite3.connect(directory / "keys.db", isolation_level=None)) as connection:
            _ = connection.execute("BEGIN IMMEDIATE")
            yield
    else:
        with psycopg.connect(url) as connection:
            _ = connection.execute("LOCK TABLE fact IN ACCESS EXCLUSIVE MODE")
            yield


def sealed_key(vault: Vault, number: int) -> GenerationRow:
    vm = Vm(HOTKEY, f"vm-{number}")
    sealed = vault.seal(Address(vm, "storage", 1), FreshKey.from_entropy(os.urandom(FreshKey.SIZE)))
    made = (sealed.sealed, sealed.kek_id, sealed.wrapped_key)
    return GenerationRow(vm, "storage", 1, "active", *made, provisional=False, created_at=NOW, origin="a boot")


def opened(vault: Vault, rows: Iterable[GenerationRow]) -> dict[Vm, bytes]:
    return {row.vm: vault.open(Address(row.vm, row.volume, row.generation), row).reveal() for row in rows}


def test_a_broken_row_stops_no_rewrap(site: Site) -> None:
    site.boot("1")
    key = next(row for row in site.rows() if row.volume == "root")
    kept = site.rows()
    site.spoil(key)
    new_key(site)
    for done in (0, 1):  # the second run finds the rest done
        ended = site.do("keys", "rewrap", "--json")
        assert (ended.code, ended.json["ok"], ended.json["rewrapped"]) == (1, False, 1 - done)
        assert ended.json["broken"] == [f"{HOTKEY}/vm-1 root/1"]
        assert "root/1: it does not open" in ended.err
    assert "1 are still under another KEK" in site.do("keys", "rewrap").out
    assert [row.sealed for row in site.rows()] == [row.sealed for row in kept]


def test_rewrap_without_the_old_key_changes_nothing(site: Site) -> None:
    site.boot("1")
    before = site.rows()
    (site.directory / "kek").write_bytes(os.urandom(32))
    ended = site.do("keys", "rewrap")
    assert (ended.code, "name the file of that KEK, and get it back from its backup" in ended.err) == (1, True)
    assert site.rows() == before


def test_a_rotation_before_the_last_one_has_ended_changes_nothing(site: Site) -> None:
    first = site.boot("1")
    text = new_key(site)
    assert site.do("keys", "rewrap").code == 0
    (site.directory / "kek").rename(site.directory / "kek.2")
    (site.directory / "kek.old").rename(site.directory / "kek")
    site.configuration.write_text(f'kek_previous_file = "kek.2"\n{text}')
    other = site.boot("2", vm=Vm(HOTKEY, "vm-2"))  # by a server that seals under the older KEK still
    (site.directory / "kek").rename(site.directory / "kek.1")
    (site.directory / "kek").write_bytes(os.urandom(32))
    (site.directory / "kek").chmod(0o600)
    ended = site.do("keys", "rewrap")
    assert (ended.code, "2 under" in ended.err) == (1, True), ended
    (site.directory / "kek.2").rename(site.directory / "kek")
    site.configuration.write_text(f'kek_previous_file = "kek.1"\n{text}')
    assert site.do("keys", "rewrap").code == 0
    site.configuration.write_text(text)
    assert (site.boot("3"), site.boot("4", vm=Vm(HOTKEY, "vm-2"))) == (first, other)


def test_one_format_is_allowed(site: Site) -> None:
    site.boot("1")
    assert site.do("keys", "allow-format", "vm-1", "storage").code == 0
    assert site.json("keys", "history", "vm-1")["volumes"] == [
        {"volume": "storage", "in_use": True, "format_allowed": True}
    ]
    unknown = site.do("keys", "allow-format", "vm-1", "tdx-cache")
    assert (unknown.code, "no disk 'tdx-cache'" in unknown.err) == (1, True)
    unnamed = site.do("audit", "list", "--event", "format alowed", "--json")
    assert (unnamed.code, unnamed.json["rows"]) == (0, [])
    assert "no row has the event 'format alowed' here; the newest rows have: boot, format allowed" in unnamed.err
    of_another = site.do("audit", "list", "--event", "format allowed", "--vm", "vm-9")
    assert (of_another.code, of_another.err) == (0, "")
    (row,) = site.json("audit", "list", "--event", "format allowed")["rows"]
    assert (row["vm"], row["keys"]) == ("vm-1", "storage")


# --- import ---


@pytest.fixture
def reference(site: Site) -> dict[str, Path]:
    """Rows of the reference system and their Fernet key."""
    key = Fernet.generate_key()
    fernet = Fernet(key)
    canary = b"f" * 128
    site.secrets.append(canary)
    quote = base64.b64encode(PLATFORM.quote(bytes(64))).decode()
    rows: list[dict[str, object]] = [
        {"miner_hotkey": HOTKEY, "vm_name": "vm-1", "volume_passphrases": {"storage": fernet.encrypt(canary).decode()}},
        {
            "miner_hotkey": HOTKEY,
            "vm_name": "vm-2",
            "volume_passphrases": {"tdx-cache": fernet.encrypt(b"verbatim").decode()},
            "last_boot_at": "2026-01-01T00:00:00Z",
            "boot_quote": quote,
        },
    ]
    files = {"rows": site.directory / "rows.jsonl", "key": site.directory / "fernet.key"}
    files["rows"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    files["key"].write_bytes(key + b"\n")
    files["key"].chmod(0o600)
    return files


def rename(files: dict[str, Path], member: str, value: object) -> None:
    """Another value in the last row."""
    *rows, last = files["rows"].read_text().splitlines()
    files["rows"].write_text("\n".join([*rows, json.dumps(json.loads(last) | {member: value})]))


def importing(site: Site, files: dict[str, Path], *more: object) -> Ended:
    return site.do("keys", "import-fernet", files["rows"], "--fernet-key-file", files["key"], *more)


@BOTH
def test_an_import(site: Site, reference: dict[str, Path]) -> None:
    done = importing(site, reference, "--json").json
    assert (done["ok"], done["imported"], done["there_already"]) == (True, 2, 0)
    assert importing(site, reference, "--json").json["there_already"] == 2
    listed = {row["vm"]: row["platform"] for row in site.json("vm", "list")["vms"]}
    assert listed["vm-1"] is None
    assert listed["vm-2"].startswith("instance:")
    # bound by the operator, the VM boots and is handed what it had
    home = boot("x").platform
    bound = ("--ppid", home.ppid.hex(), "--instance", (home.instance_id or b"").hex())
    assert site.do("vm", "bind", "vm-1", *bound).code == 0
    assert site.boot("1") == b"f" * 128


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda files: files["key"].write_bytes(Fernet.generate_key()), "does not open under this Fernet key"),
        (lambda files: files["key"].write_bytes(b"x"), "key: not a Fernet key, which is 44 characters"),
        (lambda files: files["key"].chmod(0o644), "which is too open"),
        (lambda files: files["rows"].write_text("\n"), "holds no rows"),
        (lambda files: files["rows"].write_text('{"miner_hotkey":1}\n'), "it takes the texts"),
        (lambda files: files["rows"].write_text('{"volume_passphrases":' + "[" * 9000), "line 1: "),
        (lambda files: files["rows"].write_bytes(b"x" * 2**20), "a line: has more than"),
        (lambda files: rename(files, "vm_name", "a/b"), "vm_name 'a/b': no boot can be of this name"),
        (lambda files: rename(files, "vm_name", "\0"), "no boot can be of this name"),
        (lambda files: rename(files, "miner_hotkey", HOTKEY + "1"), "is not a hotkey"),
        (lambda files: rename(files, "volume_passphrases", {"x" * 10_000: ""}), "not among the server's volumes"),
        (lambda files: rename(files, "volume_passphrases", {"storage": None}), "does not open under"),
        (
            lambda files: files["rows"].write_text(files["rows"].read_text().replace("tdx-cache", "other")),
            "not among the server's volumes",
        ),
        (
            lambda files: files["rows"].write_text(
                files["rows"].read_text().replace('"boot_quote": "', '"boot_quote": "A')
            ),
            "boot_quote",
        ),
    ],
)
def test_an_import_that_is_wrong_imports_nothing(
    site: Site, reference: dict[str, Path], spoil: Callable[[dict[str, Path]], object], told: str
) -> None:
    site.boot("1", vm=Vm(HOTKEY, "another"))
    before = site.rows()
    spoil(reference)
    ended = importing(site, reference)
    assert (ended.code, told in ended.err) == (2, True), ended.err
    assert site.rows() == before


def test_an_import_over_other_keys(site: Site, reference: dict[str, Path]) -> None:
    first = site.boot("1")
    ended = importing(site, reference, "--json")
    assert (ended.code, ended.json["imported"]) == (1, 1)
    assert "another key already" in ended.json["refused"][0]
    assert site.boot("2") == first


# --- names, audit, store ---


@BOTH
def test_vms_are_listed_and_rebound(site: Site) -> None:
    first = site.boot("1")
    assert f"{HOTKEY}/vm-1  instance:" in site.do("vm", "list").out
    other = ("--ppid", "00" * 16)
    assert site.do("vm", "bind", "vm-1", *other).code == 1
    assert site.do("vm", "rebind", "vm-1", *other).code == 2  # say which
    assert site.do("vm", "rebind", "vm-1", *other, "--keep-keys").code == 0
    assert site.json("vm", "list")["vms"][0]["platform"] == "ppid:" + "00" * 16
    home = boot("x").platform
    back = ("--ppid", home.ppid.hex(), "--instance", (home.instance_id or b"").hex())
    assert site.do("vm", "rebind", "vm-1", *back, "--new-keys").code == 0
    assert site.boot("2") != first
    assert site.do("vm", "rebind", "vm-1", "--ppid", "zz", "--keep-keys").code == 2


def test_a_name_of_several_hotkeys(site: Site) -> None:
    site.boot("1")
    site.boot("2", vm=Vm("other", "vm-1"))
    ended = site.do("keys", "history", "vm-1")
    assert (ended.code, "several hotkeys" in ended.err) == (1, True)
    assert site.do("keys", "history", "other/vm-1").code == 0
    for nobody in ("vm-9", f"{HOTKEY}/vm-9"):
        for words in (("history", nobody), ("restore", nobody, "storage", 1), ("purge", nobody)):
            ended = site.do("keys", *words)
            assert (ended.code, f"VM '{nobody}' does not exist" in ended.err) == (1, True)


def test_the_audit_rows(site: Site) -> None:
    site.boot("1")
    began = int(time.time())
    ended = site.do("store", "restored", "--reason", "disk failure")
    granted = re.search(r"void; boots are granted again after (\S+)\n", ended.out)
    assert granted is not None
    assert began <= datetime.fromisoformat(granted[1]).timestamp() - 60 <= time.time()
    assert f"nonce horizon: {granted[1]}\nnonce horizon before: 1970-01-01T00:00:00Z\n" in ended.out
    exported = [json.loads(line) for line in site.do("audit", "export").out.splitlines()]
    assert [row["event"] for row in exported] == ["boot", "sync", "store restored"]
    assert exported[0]["hotkey"] == HOTKEY
    assert exported[0]["profile"] == "profile 1.0"
    assert all(len(row["quote_digest"]) == 64 for row in exported[:2])
    assert exported[1]["keys"] == "storage/1 created"
    assert exported[2]["reason"].endswith(": disk failure")
    assert len(site.do("audit", "list", "--last", 2).out.splitlines()) == 1 + 2
    assert len(site.do("audit", "export", "--vm", "vm-1", "--event", "sync").out.splitlines()) == 1
    assert site.do("audit", "export", "--until", NOW - 9).out == ""
    day = datetime.fromtimestamp(NOW, UTC)
    for since in (day.isoformat(), day.strftime("%Y-%m-%dT%H:%M:%SZ"), day.strftime("%Y-%m-%d"), NOW):
        assert len(site.do("audit", "list", "--since", since).out.splitlines()) == 1 + 3
    assert site.do("audit", "list", "--since", "9999-01-01").out == "no audit rows\n"
    assert site.do("audit", "export", "--since", "9999-01-01").out == ""


def refuse(site: Site, label: str, vm: Vm) -> None:
    refusal = RecordRefusal(
        now=NOW,
        request_id=label,
        vm=vm,
        platform=boot("x").platform,
        code="measurement_mismatch",
        reason="RTMR1 differs",
        quote_digest=bytes(32),
        peer_address="192.0.2.1",
    )
    with closing(make_setup(ServerConfig.load(site.configuration)).store.open(make=True)) as store:
        assert store.transact(refusal)


@BOTH
def test_the_audit_rows_of_a_vm_that_was_only_ever_refused(site: Site) -> None:
    site.boot("1")
    refuse(site, "a", Vm(HOTKEY, "vm-9"))
    refuse(site, "b", Vm("another", "vm-9"))
    refuse(site, "c", Vm(HOTKEY, "vm-90"))

    def found(*arguments: object) -> list[str]:
        return [row["request_id"] for row in site.json("audit", "list", *arguments)["rows"]]

    assert found("--vm", "vm-9") == ["a", "b"]
    assert found("--vm", "vm-9", "--last", 1) == ["b"]
    assert found("--vm", "another/vm-9") == ["b"]
    assert found("--vm", f"{HOTKEY}/vm-9") == ["a"]
    exported = [json.loads(line) for line in site.do("audit", "export", "--vm", "vm-9").out.splitlines()]
    assert [row["hotkey"] for row in exported] == [HOTKEY, "another"]
    listed = site.do("audit", "list", "--vm", "vm-9").out
    assert re.search(rf"  {HOTKEY}/vm-9 +refused +- +measurement_mismatch: RTMR1 differs\n", listed)
    for nobody in ("vm-8", "another/vm-1", "vm-99"):
        ended = site.do("audit", "list", "--vm", nobody)
        assert (ended.code, ended.out, ended.err) == (0, "no audit rows\n", "")
        assert site.json("audit", "list", "--vm", nobody) == {"ok": True, "rows": []}
        assert site.do("audit", "export", "--vm", nobody).out == ""


@frozen
class Flood(Unit[None]):
    """Many audit rows, which are of ``size`` bytes and more together."""

    size: int
    at: int = NOW

    def script(self) -> Script[None]:
        for number in range(self.size // 2000):
            yield from Insert(AuditRow(self.at, "vm", f"event {number}", "granted", reason="x" * 2000))


@BOTH
def test_any_number_of_audit_rows(site: Site, tmp_path: Path) -> None:
    """An export has a part of them in memory at a time; a list has the newest."""
    size = 14_000_000
    with closing(make_setup(ServerConfig.load(site.configuration)).store.open(make=True)) as store:
        store.transact(Flood(size))
    assert site.json("audit", "list", "--last", 1)["rows"]  # and what the commands import is there
    tracemalloc.start()
    try:
        with (tmp_path / "export").open("w") as file, redirect_stdout(file):
            assert main(["audit", "export", "--config", str(site.configuration)]) == 0
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < size / 2
    exported = [json.loads(line) for line in (tmp_path / "export").read_text().splitlines()]
    assert [row["event"] for row in exported] == [f"event {number}" for number in range(size // 2000)]
    listed = site.json("audit", "list", "--since", NOW)["rows"]
    assert listed == exported[-1000:]
    assert site.json("audit", "list", "--last", 1001, "--event", "event 3")["rows"] == exported[3:4]


@BOTH
def test_audit_rows_are_purged_some_at_a_time(site: Site) -> None:
    with closing(make_setup(ServerConfig.load(site.configuration)).store.open(make=True)) as store:
        now = int(time.time())
        for days, count in ((800, 300), (400, 1000), (100, 300)):
            row = AuditRow(now - days * 86_400, "vm", f"{days} days ago", "granted")
            for _ in range(0, count, 1000):
                store.transact(Ask(InsertAll((row,) * min(count, 1000))))
    assert "nothing to purge" in site.do("audit", "purge").out  # nothing is sequenced
    assert site.json("audit", "checkpoint")["size"] == 1601
    old = site.json("audit", "purge")
    assert (old["purged"], old["older_than_days"], old["rows"]) == (False, 365, 1300 // 256 * 256)
    assert "with --yes they are deleted" in site.do("audit", "purge").out
    assert site.json("audit", "purge", "--older-than", 700, "--yes", "--reason", "because")["rows"] == 256
    ended = site.do("audit", "purge", "--yes")
    assert ended.out.endswith(f" deleted: {1300 // 256 * 256 - 256}\n")
    told = site.json("audit", "list", "--event", "audit purged")["rows"]
    assert [row["keys"] for row in told] == ["entries below 256: 256", "entries below 1280: 1024"]
    assert told[0]["reason"].endswith(": because")
    assert site.json("audit", "checkpoint")["size"] == 1603
    verified = site.json("audit", "verify")
    assert (verified["ok"], verified["first"], verified["size"]) == (True, 1280, 1603)
    assert "nothing to purge" in site.do("audit", "purge", "--yes").out
    early = site.do("audit", "purge", "--older-than", 364, "--yes")
    assert (early.code, "audit_days" in early.err) == (1, True)


@BOTH
def test_old_boots_are_purged_but_each_vms_newest(site: Site) -> None:
    for label, days in (("1", 300), ("2", 200), ("3", 100)):
        site.boot(label, at=int(time.time()) - days * 86_400)
    newest = boot("3").boot_id
    found = site.json("vm", "purge-boots")
    assert (found["purged"], found["older_than_days"], found["boots"], found["verdicts"]) == (False, 90, 2, 2)
    assert "2 boots and 2 verdicts" in site.do("vm", "purge-boots").out
    assert site.json("vm", "purge-boots", "--older-than", 250, "--yes", "--reason", "because")["boots"] == 1
    assert site.json("vm", "purge-boots", "--yes")["verdicts"] == 1
    assert "nothing to purge" in site.do("vm", "purge-boots", "--yes").out
    with closing(make_setup(ServerConfig.load(site.configuration)).store.open()) as store:
        assert [row.boot_id for row in store.transact(Ask(Scan(BootRow)))] == [newest]
        assert [row.attestation_id for row in store.transact(Ask(Scan(AttestationRow)))] == [newest]
    told = site.json("audit", "list", "--event", "boots purged")["rows"]
    assert [row["keys"].partition(" rows")[0] for row in told] == ["boot", "attestation"] * 2
    assert told[0]["reason"].endswith(": because")
    assert site.json("store", "check")["keys_sealed_under"]
    early = site.do("vm", "purge-boots", "--older-than", 89, "--yes")
    assert (early.code, "boot_days" in early.err) == (1, True)


PPID = ("--ppid", "00" * 16)


def test_a_name_is_bound_before_it_boots(site: Site) -> None:
    site.boot("1", vm=Vm(HOTKEY, "vm-2"))
    assert site.do("vm", "bind", f"{HOTKEY}/vm-1", *PPID).code == 0
    assert "not since it was bound" in site.do("vm", "list").out
    assert [row["last_boot_at"] for row in site.json("vm", "list")["vms"]] == [None, NOW]
    setup = make_setup(ServerConfig.load(site.configuration))
    grant = evolve(boot("2", now=NOW + 1, vm=Vm(HOTKEY, "vm-2")), vault=setup.service.vault)
    with closing(setup.store.open()) as store:
        _ = store.transact(
            evolve(grant, hotkey_proven=True, tcb_status="OutOfDate", advisories="INTEL-SA-1 INTEL-SA-2")
        )
    names = "profile_name profile_version tcb_status advisories last_boot_at proven ppid"
    last = site.json("vm", "list")["vms"][1]
    told = ["profile", "1.0", "OutOfDate", ["INTEL-SA-1", "INTEL-SA-2"], NOW + 1, True, grant.platform.ppid.hex()]
    assert [last[name] for name in names.split()] == told
    for shown in ("1.0", "OutOfDate", "INTEL-SA-1 INTEL-SA-2", "yes"):
        assert shown in site.do("vm", "list").out
    refused = site.do("vm", "bind", "other/vm-1", *PPID)
    assert (refused.code, "is not a hotkey" in refused.err) == (2, True)


@pytest.mark.parametrize("text", ["", "/a", "a/..", "a\0", "x" * 10_000, "a/b\udcff"])
def test_what_is_no_vm(site: Site, text: str) -> None:
    commands: list[list[object]] = [
        ["keys", "history", text],
        ["keys", "restore", text, "storage", 1],
        ["keys", "purge", text],
        ["keys", "allow-format", text, "storage"],
        ["vm", "bind", text, *PPID],
        ["vm", "rebind", text, *PPID, "--keep-keys"],
        ["audit", "list", "--vm", text],
    ]
    for words in commands:
        ended = site.do(*words)
        assert (ended.code, "a VM is HOTKEY/NAME or NAME" in ended.err) == (2, True), words


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["keys", "restore", "vm-1", "storage", "0"], "from 1 on"),
        (["keys", "restore", "vm-1", "storage", "9" * 5000], "from 1 on"),
        (["keys", "restore", "vm-1", "storage", "1", "--reason", "x" * 501], "one line of at most"),
        (["keys", "rewrap", "--reason", "a\nb"], "one line of at most"),
        (["store", "restored", "--reason", "\udcff"], "one line of at most"),
        (["audit", "list", "--last", "x"], "a whole number"),
        (["audit", "list", "--last", "0"], "1 or more"),
        (["audit", "export", "--last", "0"], "1 or more"),
        (["why", "vm-1", "--last", "0"], "1 or more"),
        (["audit", "list", "--since", "2026-05-02", "--until", "2026-05-01"], "before --until"),
        (["audit", "purge", "--older-than", "-1"], "a whole number"),
        (["audit", "purge", "--older-than", "999999"], "a whole number"),
        (["audit", "list", "--since", "yesterday"], "a time is a date or a time of RFC 3339"),
        (["audit", "list", "--until", "9" * 40], "a time is a date or a time of RFC 3339"),
    ],
)
def test_what_no_option_takes(site: Site, words: list[str], told: str) -> None:
    ended = site.do(*words)
    assert (ended.code, told in ended.err) == (2, True), ended.err


def test_another_volumes_name_is_only_not_there(site: Site) -> None:
    site.boot("1")
    before = site.rows()
    for code, volumes in ((1, ("root",)), (2, ("", "..", "a\0b", "x" * 10_000, "\udcff"))):
        for volume in volumes:
            assert site.do("keys", "restore", "vm-1", volume, 1).code == code
            assert site.do("keys", "allow-format", "vm-1", volume).code == code
    assert site.rows() == before


def test_there_must_be_a_store(site: Site) -> None:
    for arguments in (("vm", "list"), ("audit", "export"), ("keys", "rewrap"), ("store", "restored")):
        ended = site.do(*arguments)
        assert (ended.code, "not made yet" in ended.err) == (1, True)
    assert not (site.directory / "keys.db").exists()
    SqliteStore(site.directory / "keys.db").close()  # for the look at what was kept


def register(site: Site, server_id: str, address: str) -> None:
    unit = RegisterServer(
        now=NOW,
        request_id=server_id,
        hotkey=HOTKEY,
        server_id=server_id,
        name=server_id,
        host=address,
        address=address,
        gpus=(GpuRow(f"gpu-{server_id}", server_id, "h200", "{}"),),
        profiles={},
        peer_address="192.0.2.1",
    )
    with closing(make_setup(ServerConfig.load(site.configuration)).store.open()) as store:
        store.transact(unit)


def test_what_a_miner_holds_wrongly_is_free_again(site: Site) -> None:
    register(site, "n1", "198.51.100.1")
    register(site, "n2", "198.51.100.2")
    assert "n1  5Grwva" in site.do("registrations", "list").out
    listed = site.json("registrations", "list")["registrations"]
    assert [(row["server_id"], row["address"], row["boot_id"]) for row in listed] == [
        ("n1", "198.51.100.1", None),
        ("n2", "198.51.100.2", None),
    ]
    removed = site.do("registrations", "remove", "n1", "--reason", "the address is not theirs")
    assert (removed.code, removed.out.startswith("removed: n1 of 5Grwva")) == (0, True)
    assert [row["server_id"] for row in site.json("registrations", "list")["registrations"]] == ["n2"]
    (row,) = site.json("audit", "list", "--event", "registration removed")["rows"]
    assert row["reason"].endswith(": the address is not theirs; server n1 at 198.51.100.1")
    again = site.do("registrations", "remove", "n1", "--json")
    assert (again.code, again.json["ok"], "no server 'n1' is registered" in again.err) == (1, False, True)
    register(site, "n1", "198.51.100.1")  # its id, address and GPU are free


def test_an_operator_names_and_removes_a_class_of_hosts(site: Site) -> None:
    prints = [f"3f9{last}".ljust(64, "0") for last in "ab"]
    with closing(make_setup(ServerConfig.load(site.configuration)).store.open()) as store:
        for fingerprint in prints:
            _ = store.transact(RegisterHost(HostProfileRow(fingerprint, HOTKEY, '{"cpu":{"count":64}}', NOW)))
    assert [row["profile"] for row in site.json("hosts", "list")["hosts"]] == [{"cpu": {"count": 64}}] * 2
    named = site.do("hosts", "name", "3f9a", "--as", "8xh200", "--published", "AB" * 32, "--reason", "ours")
    assert (named.code, named.out) == (0, f"{prints[0]}: named 8xh200\n")
    assert [(row["name"], row["published"]) for row in site.json("hosts", "list")["hosts"]] == [
        ("8xh200", "ab" * 32),
        (None, None),
    ]
    for start, told in (("3f9", "several host profiles begin"), ("4", "no host profile begins")):
        ended = site.do("hosts", "remove", start)
        assert (ended.code, told in ended.err) == (1, True)
    for text in ("a\nb", "\udcff", "", "x" * 129):
        assert site.do("hosts", "name", "3f9b", "--as", text).code == 2, text
    assert site.do("hosts", "name", "3f9b", "--published", "ab").code == 2
    assert [site.do("hosts", "remove", start).code for start in ("", "vm", "0" * 65, "\udcff")] == [2] * 4
    assert site.do("hosts", "name", "3f9a").code == 0  # takes the name back
    assert site.do("hosts", "remove", "3f9a", "--reason", "gone").code == 0
    assert [row["name"] for row in site.json("hosts", "list")["hosts"]] == [None]
    rows = [(row["event"], row["reason"]) for row in site.json("audit", "list")["rows"]]
    assert [event for event, _ in rows] == ["host named", "host named", "host removed"]
    assert rows[0][1].endswith(f": ours; {prints[0]} is 8xh200")
    assert rows[2][1].endswith(f": gone; {prints[0]} of {HOTKEY}")
