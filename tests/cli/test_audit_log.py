"""``audit verify``, ``checkpoint``, ``key`` and ``export DIR``, as an operator and an auditor run them."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from attrs import define, evolve

from chutes_proto.io.log_files import check_stored
from chutes_proto.io.server.development import write_server
from chutes_proto.io.server.store_setup import make_store_setup
from chutes_proto.secret import Secret
from chutes_proto.server import ServerConfig
from chutes_proto.store._rows import AuditRow, InsertAll
from chutes_proto.store._run import Ask
from chutes_proto.store._sql import columns
from chutes_proto.testing.store_suite._parts import NOW
from chutes_proto.tlog.merkle import leaf_hash, root_hash
from chutes_proto.tlog.notes import Checkpoint, Signer
from chutes_proto.tlog.tiles import Place, bundle, grow, reader, unbundle
from chutes_proto.units.log import SequenceLog
from tests.cli.conftest import Ended
from tests.cli.test_operating import PLATFORM
from tests.conftest import ROOT, SOAK
from tests.store.memory import MemoryStore

GO_PACKAGES = Path("/usr/share/gocode")
"""Where Debian has the sources of Go's packages."""
CLIENT = ROOT / "tests/tlog/client.go"


@define
class Site:
    """An operator's directory whose log has 602 entries, with a key of its own."""

    directory: Path
    run: Callable[..., Ended]

    def do(self, *arguments: object) -> Ended:
        return self.run(*arguments, "--config", self.directory / "server.toml")

    def json(self, *arguments: object) -> Any:
        return self.do(*arguments, "--json").json


@pytest.fixture
def logged(tmp_path: Path, command: Callable[..., Ended]) -> Site:
    write_server(tmp_path, PLATFORM, NOW)
    with (tmp_path / "server.toml").open("a") as file:
        file.write('\n[audit]\norigin = "keys.example/audit"\n')
    with closing(make_store_setup(ServerConfig.load(tmp_path / "server.toml")).store.open()) as store:
        rows = [AuditRow(NOW + number, "operator", f"event {number}", "done") for number in range(601)]
        rows[300] = evolve(rows[300], request_id="5" * 32)
        store.transact(Ask(InsertAll(tuple(rows))))
    return Site(tmp_path, command)


def change(site: Site, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(site.directory / "keys.db")) as connection, connection:
        connection.execute(statement, values)


def test_a_log_is_signed_verified_and_an_edit_is_found(logged: Site, tmp_path: Path) -> None:
    signed = logged.json("audit", "checkpoint")
    assert (signed["origin"], signed["size"]) == ("keys.example/audit", 602)
    kept = tmp_path / "kept"
    kept.write_text(signed["checkpoint"])
    assert logged.do("audit", "checkpoint").out == signed["checkpoint"]
    (key,) = logged.json("audit", "key")["keys"]
    assert key.startswith("keys.example/audit+")
    told = logged.json("audit", "verify", "--checkpoint", str(kept))
    assert told == {"ok": True, "size": 602, "first": 0, "checkpoint": 602, "findings": []}
    assert "a log that was set back is not found" in logged.do("audit", "verify").out
    change(logged, "UPDATE audit SET reason = 'forged' WHERE idx = 300")
    ended = logged.do("audit", "verify", "--checkpoint", str(kept))
    assert (ended.code, ended.out) == (1, "entry 300: it was changed, or its tile was\n")
    change(logged, "UPDATE audit SET reason = '' WHERE idx = 300")
    assert logged.do("audit", "verify").code == 0
    change(logged, "DELETE FROM audit WHERE idx < 10")
    found = json.loads(logged.do("audit", "verify", "--json").out)
    assert found["findings"] == [{"first": 0, "last": 9, "what": "it is missing, and no entry says that it was purged"}]
    # The root of the tree has a MAC: without any checkpoint, a tile that was changed contradicts it.
    change(logged, "UPDATE log_tile SET hashes = CAST(zeroblob(32) || substr(hashes, 33) AS BLOB) WHERE level = 1")
    ended = logged.do("audit", "verify")
    assert (ended.code, ended.out.splitlines()[-1]) == (
        1,
        "entries 10 to 601: one of them is not as the store's own state of 602 entries has it",
    )
    ended = logged.do("audit", "verify", "--checkpoint", str(kept))
    assert ended.out.endswith("entries 10 to 601: one of them is not as the checkpoint of 602 entries has it\n")


COLUMNS = "at, actor, event, decision, keys, peer_address, salt"
SHIFT = ("UPDATE audit SET idx = -idx - 1 WHERE idx > :at", "UPDATE audit SET idx = -idx WHERE idx < 0")
COPY = f"INSERT INTO audit ({COLUMNS}, reason, idx) SELECT {COLUMNS}, %s, :at + 1 FROM audit WHERE idx = :at"
EDITS: dict[str, tuple[str, ...]] = {
    "change": ("UPDATE audit SET reason = 'forged' WHERE idx = :at",),
    "remove": ("DELETE FROM audit WHERE idx = :at",),
    "swap": (
        "UPDATE audit SET idx = -1 WHERE idx = :at",
        "UPDATE audit SET idx = :at WHERE idx = :at + 1",
        "UPDATE audit SET idx = :at + 1 WHERE idx = -1",
    ),
    "insert": (*SHIFT, COPY % "'forged'"),
    "duplicate": (*SHIFT, COPY % "reason"),
}
STRIDE = 1 if SOAK else 199


@pytest.mark.parametrize("edit", EDITS)
def test_a_single_edit_of_a_store_of_1000_rows_is_found_by_its_index(edit: str) -> None:
    store = MemoryStore()
    store.transact(Ask(InsertAll(tuple(AuditRow(NOW, "operator", f"event {at}", "done") for at in range(1000)))))
    assert store.transact(SequenceLog(bytes(range(256)) * 63)) == 1000
    honest = store.image()
    for at in range(0, 999, STRIDE):
        edited = MemoryStore(honest)
        for statement in EDITS[edit]:
            edited.connection.execute(statement, {"at": at})
        found = check_stored(edited, 1000, (), lambda _, __: None).findings
        where = (at + 1, 1000) if edit in ("insert", "duplicate") else (at, at + (edit == "swap"))
        assert (found[0].first, found[-1].last) == where, (edit, at)


@pytest.mark.parametrize("column", columns(AuditRow))
def test_a_row_with_a_value_of_another_type_is_shown_as_forged(logged: Site, column: str) -> None:
    """SQLite takes any type in any column; whoever writes the file must not keep an operator from reading the rest."""
    value = "text" if column in {"salt", "quote_digest", "platform_id"} else b"\xff"
    with closing(sqlite3.connect(logged.directory / "keys.db", isolation_level=None)) as connection:
        connection.execute("PRAGMA ignore_check_constraints = 1")
        connection.execute(f"UPDATE audit SET {column} = ? WHERE id = 601", (value,))
    listed = logged.do("audit", "list", "--last", "9")
    assert listed.code == 0
    assert [line.split()[0] for line in listed.out.splitlines()].count("forged") == 1
    shown = logged.json("audit", "list", "--last", "9")["rows"]
    assert len(shown) == 9
    assert [row["idx"] for row in shown].count(-1) == 1
    assert len(logged.do("audit", "export").out.splitlines()) == 601
    assert logged.do("why", "vm-1").code == 1


def test_a_purged_log_is_whole_before_the_purge_is_an_entry(logged: Site) -> None:
    assert logged.json("audit", "checkpoint")["size"] == 602
    assert logged.json("audit", "purge", "--older-than", "365", "--yes", "--reason", "old")["rows"] == 512
    told = logged.json("audit", "verify")
    assert (told["ok"], told["size"], told["first"]) == (True, 602, 512)
    assert "an audit row says that the first 512 entries were purged" in logged.do("audit", "verify").out
    change(logged, "DELETE FROM audit WHERE idx < 600")
    ended = logged.do("audit", "verify")
    assert ended.code == 1
    assert "entries 512 to 599: it is missing, and no entry says that it was purged" in ended.out


def test_an_exported_log_is_verified_with_its_key_alone(logged: Site, tmp_path: Path) -> None:
    directory = tmp_path / "log"
    ended = logged.do("audit", "export", str(directory))
    assert "a log of 602 entries, 7 new files" in ended.err
    names = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    assert names == sorted(
        "checkpoint key tile/0/000 tile/0/001 tile/0/002.p/90 tile/1/000.p/2"
        " tile/entries/000 tile/entries/001 tile/entries/002.p/90".split()
    )
    key = (directory / "key").read_text().strip()
    told = logged.run("audit", "verify", str(directory), "--key", key, "--json")
    assert json.loads(told.out) == {"ok": True, "size": 602, "first": 0, "checkpoint": 602, "findings": []}
    assert "0 new files" in logged.do("audit", "export", str(directory)).err
    other = "another.example/log+" + key.split("+", 1)[1]
    assert logged.run("audit", "verify", str(directory), "--key", other).code == 2  # its id is of the name, too
    file = directory / "tile/entries/001"
    entries = [*unbundle(file.read_bytes())]
    for changed in (
        entries[44].replace(b"event 300", b"event 399"),
        b'{"event":"audit purged","keys":' + 60_000 * b"[",  # deeper than a parser follows, before Python 3.14
    ):
        assert changed != entries[44]
        file.write_bytes(bundle([*entries[:44], changed, *entries[45:]]))
        ended = logged.run("audit", "verify", str(directory), "--key", key)
        assert (ended.code, ended.out) == (1, "entry 300: it was changed, or its tile was\n")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("tile/entries/001", "entries 256 to 511: it is missing"),
        ("tile/0/001", "tile tile/0/001 has 0 hashes, not 256"),
        ("tile/1/000.p/2", "tile tile/1/000 has 0 hashes, not 2"),
        ("checkpoint", "checkpoint"),
    ],
)
def test_an_exported_log_that_lacks_a_file_is_refused(logged: Site, tmp_path: Path, name: str, why: str) -> None:
    directory = tmp_path / "log"
    assert logged.do("audit", "export", str(directory)).code == 0
    key = (directory / "key").read_text().strip()
    (directory / name).unlink()
    ended = logged.run("audit", "verify", str(directory), "--key", key)
    assert ended.code in (1, 2)
    assert why in " ".join((ended.out + ended.err).split())


def test_a_changed_entry_is_not_purged(logged: Site) -> None:
    """The entry that tells of the purge would be all that is left to be verified."""
    _ = logged.do("audit", "checkpoint")
    change(logged, "UPDATE audit SET reason = 'forged' WHERE idx = 300")
    ended = logged.do("audit", "purge", "--yes", "--reason", "old")
    told = "one of the entries 256 to 511 was changed or removed, or their tile was; nothing from there on is deleted"
    assert (ended.code, told in ended.err) == (1, True)
    assert logged.json("audit", "list")["rows"][300]["reason"] == "forged"


@pytest.mark.parametrize("name", ["checkpoint", "tile/entries/001", "tile/0/001"])
def test_a_pipe_in_an_exported_log_is_not_waited_for(logged: Site, tmp_path: Path, name: str) -> None:
    directory = tmp_path / "log"
    assert logged.do("audit", "export", str(directory)).code == 0
    key = (directory / "key").read_text().strip()
    (directory / name).unlink()
    os.mkfifo(directory / name)
    ended = logged.run("audit", "verify", str(directory), "--key", key)
    assert ended.code == 2
    assert f"{directory / name}: cannot be read: not a plain file" in " ".join(ended.err.split())


def test_a_changed_entry_is_not_exported(logged: Site, tmp_path: Path) -> None:
    """Its file would stay: an export replaces none that it wrote before."""
    directory = tmp_path / "log"
    _ = logged.do("audit", "checkpoint")
    change(logged, "UPDATE audit SET reason = 'forged' WHERE idx = 300")
    ended = logged.do("audit", "export", str(directory))
    assert (ended.code, "tile/0/001 contradicts its entries; see `chutes-proto audit verify`" in ended.err) == (1, True)
    change(logged, "UPDATE audit SET reason = '' WHERE idx = 300")
    assert logged.do("audit", "export", str(directory)).code == 0
    key = (directory / "key").read_text().strip()
    assert logged.run("audit", "verify", str(directory), "--key", key).code == 0


def test_a_tile_that_lacks_a_hash_is_not_exported(
    logged: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file would stay, too. To sign a log of more entries reads only the newest of such tiles."""
    from chutes_proto.cli.operator import audit

    whole = audit._signed

    def then_damaged(*arguments: Any) -> Any:
        made = whole(*arguments)
        change(logged, "UPDATE log_tile SET hashes = substr(hashes, 33) WHERE level = 1")
        return made

    monkeypatch.setattr(audit, "_signed", then_damaged)
    ended = logged.do("audit", "export", str(tmp_path / "log"))
    assert (ended.code, "tile/1/000.p/2 lacks a hash; see `chutes-proto audit verify`" in ended.err) == (1, True)
    assert not (tmp_path / "log" / "checkpoint").exists()


def test_a_damaged_file_of_entries_is_named(logged: Site, tmp_path: Path) -> None:
    directory = tmp_path / "log"
    assert logged.do("audit", "export", str(directory)).code == 0
    key = (directory / "key").read_text().strip()
    os.truncate(directory / "tile/entries/001", 100)
    ended = logged.run("audit", "verify", str(directory), "--key", key)
    assert ended.code == 1
    assert f"{directory / 'tile/entries/001'}: not a bundle of entries" in " ".join(ended.err.split())


OWN = Signer("keys.example/audit", Secret(bytes(32)))


def write_log(directory: Path, entries: list[bytes], *, first: int = 0) -> Checkpoint:
    """A log as an operator can make it up, with a key of his own, from the bundle ``first`` on."""
    made = grow(0, [], map(leaf_hash, entries))
    files = {Place(level, number, len(hashes) // 32): hashes for (level, number), hashes in made.items()}
    for begin in range(first * 256, len(entries), 256):
        some = entries[begin : begin + 256]
        files[Place(None, begin // 256, len(some))] = bundle(some)
    for place, data in files.items():
        (directory / str(place)).parent.mkdir(parents=True, exist_ok=True)
        (directory / str(place)).write_bytes(data)
    root = root_hash(reader(lambda level, number: made[level, number]), len(entries))
    checkpoint = Checkpoint(OWN.name, len(entries), root)
    (directory / "checkpoint").write_text(str(OWN.sign(checkpoint.text)))
    return checkpoint


@pytest.mark.parametrize("has_last", [False, True])
def test_a_log_may_say_any_size(tmp_path: Path, command: Callable[..., Ended], has_last: bool) -> None:
    """A look at each tile that such a log would have would not end."""
    _ = write_log(tmp_path, [b"entry"] * 300)
    large = Checkpoint(OWN.name, 1 << 62, bytes(32))
    (tmp_path / "checkpoint").write_text(str(OWN.sign(large.text)))
    if has_last:
        last = tmp_path / str(Place(None, large.size // 256 - 1))
        last.parent.mkdir(parents=True)
        last.write_bytes(bundle([b"entry"] * 256))
    ended = command("audit", "verify", str(tmp_path), "--key", str(OWN.verifier))
    assert ended.code == 1
    assert "entries 512 to 767: it is missing" in ended.out


def test_the_names_in_a_log_add_no_line_and_are_not_endless(tmp_path: Path, command: Callable[..., Ended]) -> None:
    name = "a\nthe log of 2 entries is whole\n\x1b[31m" + 60_000 * "a"
    entry = json.dumps({"at": 1, "hotkey": "5G", "vm": name, "vm_version": 2}).encode()
    _ = write_log(tmp_path, [entry, entry.replace(b'"at": 1', b'"at": 2')])
    ended = command("audit", "verify", str(tmp_path), "--key", str(OWN.verifier))
    assert (ended.code, ended.out.count("\n")) == (1, 1)
    assert len(ended.out) < 1000


def test_a_checkpoint_is_not_passed_over_because_its_entries_were_purged(
    tmp_path: Path, command: Callable[..., Ended]
) -> None:
    """An operator who changed the first entries could delete them, and write an entry that says that they were old."""
    honest = [f"entry {number}".encode() for number in range(600)]
    purge = b'{"event":"audit purged","keys":"entries below 512: 512"}'
    signed = [write_log(tmp_path / str(size), honest[:size]) for size in (300, 600)]
    assert [each.size for each in signed] == [300, 600]
    old, new = (str(tmp_path / str(each.size) / "checkpoint") for each in signed)

    def verify(log: str, *files: str) -> Ended:
        named = [part for file in files for part in ("--checkpoint", file)]
        return command("audit", "verify", str(tmp_path / log), "--key", str(OWN.verifier), *named)

    _ = write_log(tmp_path / "forged", [b"forged"] * 600 + [purge], first=2)
    ended = verify("forged", old)
    what = "purged: the checkpoint of 300 entries cannot be compared; name one of 512 or more"
    assert (ended.code, ended.out) == (1, f"entries 0 to 299: {what}\n")
    assert verify("forged", old, new).code == 1
    _ = write_log(tmp_path / "purged", [*honest, purge], first=2)
    assert verify("purged", old).code == 1
    assert verify("purged", old, new).code == 0


@pytest.mark.parametrize(
    ("column", "value"),
    [("size", -5), ("origin", "keys.example/audit+0badc0de+AQ==\nkeys.example/audit"), ("origin", 100_000 * "a")],
)
def test_a_state_of_the_log_that_no_server_writes(logged: Site, column: str, value: object) -> None:
    """A loop over the tiles of fewer than no entries does not end; a name of two lines is a key that nobody has."""
    assert logged.do("audit", "checkpoint").code == 0
    change(logged, f"UPDATE log_state SET {column} = ?", value)
    for words in (("verify",), ("checkpoint",), ("key",), ("export", "log")):
        ended = logged.do("audit", *words)
        assert (ended.code, ended.out) == (1, "")
        assert "of table log_state is not authentic" in " ".join(ended.err.split())


@pytest.mark.skipif(not SOAK, reason="it compiles a program of Go: part of `make soak`")
def test_another_client_verifies_an_exported_log_and_a_proof(logged: Site, tmp_path: Path) -> None:
    if (go := shutil.which("go")) is None or not (GO_PACKAGES / "src/golang.org/x/mod/sumdb").is_dir():
        pytest.skip("Debian's packages golang-go and golang-golang-x-mod-dev are not installed")
    client, directory, proof = tmp_path / "client", tmp_path / "log", tmp_path / "entry.proof"
    environment = os.environ | {
        "GO111MODULE": "off",
        "GOPATH": str(GO_PACKAGES),
        "GOCACHE": str(tmp_path / "built"),
        "GOTOOLCHAIN": "local",
    }
    subprocess.run([go, "build", "-o", client, CLIENT], env=environment, check=True)
    assert logged.do("audit", "export", str(directory)).code == 0
    proof.write_text(logged.do("audit", "export", "--proof", 300).out)
    (key,) = logged.json("audit", "key")["keys"]

    def verify(key: str) -> tuple[int, str]:
        ran = subprocess.run([client, directory, key, proof], capture_output=True, text=True, check=False)
        return ran.returncode, ran.stdout or ran.stderr

    honest = (0, "the log of 602 entries is whole\nentry 300 is in the log of 602 entries\n")
    assert verify(key) == honest
    other = Signer("keys.example/audit", Secret(bytes(32))).verifier
    assert verify(str(other)) == (1, "note has no verifiable signatures\n")
    lines = [proof.read_text().index(name) + 20 for name in ("extra ", "index ")]
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != "key"]
    assert len(files) == 8
    for path, places in [(proof, lines), *((each, [0, 40, each.stat().st_size - 1]) for each in files)]:
        data = path.read_bytes()
        for at in {place % len(data) for place in places}:
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            assert verify(key)[0] == 1, (path, at)
        path.write_bytes(data)
    assert verify(key) == honest


def test_a_purge_beside_an_export_is_told_in_it(logged: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from chutes_proto.cli.operator import audit

    whole, purged = audit._signed, iter([True])

    def then_purged(*arguments: Any) -> Any:
        made = whole(*arguments)
        if next(purged, False):
            assert logged.json("audit", "purge", "--yes", "--reason", "old")["rows"] == 512
        return made

    monkeypatch.setattr(audit, "_signed", then_purged)
    assert logged.do("audit", "export", str(tmp_path / "log")).code == 0
    key = (tmp_path / "log" / "key").read_text().strip()
    told = logged.run("audit", "verify", str(tmp_path / "log"), "--key", key, "--json").json
    assert (told["ok"], told["first"], told["size"]) == (True, 512, 603)


def test_a_checkpoint_of_another_log_is_refused(logged: Site, tmp_path: Path) -> None:
    signed = logged.json("audit", "checkpoint")["checkpoint"]
    for name, text, why in [
        ("other", signed.replace("keys.example/audit", "keys.example/other"), "a checkpoint of another log"),
        (
            "unsigned",
            signed.replace("\N{EM DASH} keys.example/audit ", "\N{EM DASH} w.example "),
            "not signed by a key",
        ),
        ("cut", signed[:-9], "not a note"),
    ]:
        (tmp_path / name).write_text(text)
        ended = logged.do("audit", "verify", "--checkpoint", str(tmp_path / name))
        assert ended.code == 1
        assert why in " ".join(ended.err.split())
        assert "move the file away" not in " ".join(ended.err.split())


def test_the_checkpoint_beside_the_mark_that_is_of_no_key_of_the_log(logged: Site) -> None:
    """As after a second restore, of a backup from before the first one, whose new key is lost with it."""
    text = (logged.directory / "server.toml").read_text()
    beside = text.replace('store = "sqlite:keys.db"', 'store = { url = "sqlite:keys.db", mark_file = "store.mark" }')
    assert beside != text
    _ = (logged.directory / "server.toml").write_text(beside)
    signed = logged.json("audit", "checkpoint")["checkpoint"]
    file = logged.directory / "store.mark.checkpoint"
    _ = file.write_text(signed.replace("\N{EM DASH} keys.example/audit ", "\N{EM DASH} w.example "))
    ended = logged.do("audit", "verify")
    said = " ".join(ended.err.split())
    assert f"{file}: it is not signed by a key of this log; if the log is right, move the file away" in said
    assert ended.code == 1
    file.unlink()
    assert logged.do("audit", "verify").code == 0


def test_no_proof_is_made_of_an_entry_that_is_not_in_the_log(logged: Site) -> None:
    assert logged.do("audit", "export", "--proof", 300).code == 0
    for nothing in (602, 1 << 64, -1):
        assert "has no entry" in logged.do("audit", "export", "--proof", nothing).err
    change(logged, "UPDATE audit SET reason = 'forged' WHERE idx = 7")
    assert "leads to another root" in " ".join(logged.do("audit", "export", "--proof", 7).err.split())
    change(logged, "DELETE FROM audit WHERE idx = 8")
    assert "entry 8 is not there" in " ".join(logged.do("audit", "export", "--proof", 8).err.split())


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["audit", "verify"], "--config: name the server's configuration file"),
        (["audit", "verify", "log"], "it goes with --key"),
        (["audit", "verify", "log", "--key", "x"], "not a verifier key"),
    ],
)
def test_wrong_usage(logged: Site, arguments: list[str], why: str) -> None:
    ended = logged.run(*arguments)
    assert ended.code == 2
    assert why in " ".join(ended.err.split())


def test_an_export_of_rows_is_not_one_of_the_log(logged: Site, tmp_path: Path) -> None:
    for words in ((tmp_path / "log", "--last", 3), ("--proof", 3, "--last", 3), (tmp_path / "log", "--proof", 3)):
        assert "goes without the other" in logged.do("audit", "export", *words).err
