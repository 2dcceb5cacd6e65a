"""Cosignatures of a witness under the checkpoints of a log. The witness is small, and written here."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from attrs import define, evolve, field, frozen
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from chutes_proto.errors import LogError
from chutes_proto.io.http.https import HttpGetter
from chutes_proto.io.http.tls import context_trusting
from chutes_proto.io.server.development import write_server
from chutes_proto.io.server.sequencer import Sequencer
from chutes_proto.io.server.store_setup import make_store_setup
from chutes_proto.io.server.witnesses import (
    LIMITS,
    Witness,
    Witnesses,
    cosign,
    read_witnessed,
    witnessed_path,
    witnessing,
)
from chutes_proto.io.stores.address import DurableStore, StorePlace
from chutes_proto.keys.vault import NONCE_SIZE
from chutes_proto.secret import Secret
from chutes_proto.server import ServerConfig
from chutes_proto.store._run import Ask
from chutes_proto.store.rows import AuditRow, InsertAll
from chutes_proto.testing.store_suite._parts import DAY, NOW, VAULT
from chutes_proto.tlog import merkle
from chutes_proto.tlog.notes import Checkpoint, Note, Signature, Signer, Verifier, decode_hash, open_checkpoint
from chutes_proto.tlog.witness import cosigned_by
from chutes_proto.units.log import OpenLogKey, ReadLogKeys
from tests.cli import conftest as cli
from tests.cli.conftest import Ended, Server
from tests.cli.test_operating import PLATFORM
from tests.conftest import SOAK
from tests.waiting import wait_until
from tools.ports import free_port

ORIGIN = "keys.example/audit"
command = cli.command
start = cli.start
GET = HttpGetter(context_trusting(None))


@frozen
class Log:
    """A store with a log of 300 entries and more, and the file of its checkpoint."""

    store: DurableStore
    sequencer: Sequencer
    file: Path

    def grow(self, count: int) -> Note:
        self.store.transact(Ask(InsertAll(tuple(AuditRow(NOW, "operator", "event", "done") for _ in range(count)))))
        self.sequencer.sequence()
        note = self.sequencer.checkpoint()
        assert note is not None
        return note

    @property
    def key(self) -> Verifier:
        return self.store.transact(ReadLogKeys(VAULT))[-1].verifier


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    with closing(StorePlace("sqlite:keys.db", tmp_path).open(migrate=True)) as store:
        file = tmp_path / "checkpoint"
        made = Log(store, Sequencer(store, lambda: VAULT, ORIGIN, file), file)
        _ = made.grow(300)
        yield made


@define
class SmallWitness:
    """A witness of c2sp.org/tlog-witness, written for these tests: it knows one log, and remembers what it signed."""

    log: Verifier
    seed: bytes = bytes(range(32))
    name: str = "witness.example/w1"
    signed: dict[str, Checkpoint] = field(factory=dict[str, Checkpoint])
    meanwhile: Callable[[], object] | None = None
    """Called once, between a decision and its answer."""

    @property
    def key(self) -> Verifier:
        public = Ed25519PrivateKey.from_private_bytes(self.seed).public_key()
        return Verifier(self.name, public.public_bytes(Encoding.Raw, PublicFormat.Raw), is_witness=True)

    def answer(self, body: bytes) -> tuple[int, bytes]:
        head, _, rest = body.partition(b"\n\n")
        first, *hashes = head.decode().split("\n")
        old = int(first.removeprefix("old "))
        try:
            checkpoint, note = open_checkpoint(rest, self.log)
        except LogError:
            return 403, b""
        known = self.signed.get(checkpoint.origin, Checkpoint(checkpoint.origin, 0, merkle.EMPTY_ROOT))
        if old != known.size:
            return 409, b"%d\n" % known.size
        path = [decode_hash(line) for line in hashes]
        try:
            merkle.verify_consistency(old, known.root, checkpoint.size, checkpoint.root, path)
        except LogError as exc:
            return 422, str(exc).encode()
        self.signed[checkpoint.origin] = checkpoint
        at = int(time.time())
        signature = Ed25519PrivateKey.from_private_bytes(self.seed).sign(
            f"cosignature/v1\ntime {at}\n{note.text}".encode()
        )
        line = Signature(self.key.name, self.key.identifier, at.to_bytes(8, "big") + signature)
        return 200, str(line).encode()


@pytest.fixture
def small(log: Log) -> SmallWitness:
    return SmallWitness(log.key)


@pytest.fixture
def witness(small: SmallWitness) -> Iterator[Witness]:
    with serving(small) as witness:
        yield witness


@contextmanager
def serving(small: SmallWitness) -> Iterator[Witness]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/prefix/add-checkpoint"
            status, body = small.answer(self.rfile.read(int(self.headers["content-length"])))
            meanwhile, small.meanwhile = small.meanwhile, None
            if meanwhile is not None:
                _ = meanwhile()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            _ = self.wfile.write(body)

        def log_message(self, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield Witness(f"http://127.0.0.1:{server.server_address[1]}/prefix/", small.key)
        finally:
            server.shutdown()
            thread.join()


def test_a_witness_cosigns_a_log_that_grows_and_no_other(log: Log, witness: Witness) -> None:
    witnesses = Witnesses(log.store, [witness], log.file)
    note = log.grow(1)
    whole, faults = witnesses.ask(note)
    assert faults == []
    assert cosigned_by(whole, [witness.key]) == (witness.key,)
    assert read_witnessed(witnessed_path(log.file)) == whole
    newer = log.grow(300)
    assert witnesses.ask(newer)[1] == [], "from the size that is kept"
    # Another server of the store has asked meanwhile: the witness says which size it knows.
    assert cosign(log.store, log.grow(5), witness, 0, GET).name == "witness.example/w1"
    # The log's key signs another history: the witness does not.
    size = Checkpoint.of(newer).size
    signer = log.store.transact(ReadLogKeys(VAULT))[-1]
    forged = signer.sign(Checkpoint(ORIGIN, size + 5, bytes(32)).text)
    with pytest.raises(LogError, match=r"witness http://.*: status 4"):
        cosign(log.store, forged, witness, size, GET)


def test_an_answer_that_is_not_the_witnesss_signature_is_not_kept(log: Log, witness: Witness) -> None:
    other = evolve(witness, key=Verifier("witness.example/w1", bytes(32), is_witness=True))
    whole, faults = Witnesses(log.store, [other], log.file).ask(log.grow(1))
    assert "has no signature of witness.example/w1" in faults[0]
    assert len(whole.signatures) == 1
    assert not witnessed_path(log.file).exists()
    silent = Witness(f"http://127.0.0.1:{free_port()}", witness.key)
    _, faults = Witnesses(log.store, [silent, witness], log.file).ask(log.grow(1))
    assert "no connection to" in faults[0]
    assert len(faults) == 1
    assert witnessed_path(log.file).exists(), "the one that answers counts"


def test_an_operator_asks_witnesses_on_demand(
    tmp_path: Path, command: Callable[..., Ended], small: SmallWitness, witness: Witness
) -> None:
    site = tmp_path / "site"
    site.mkdir()
    write_server(site, PLATFORM, NOW)
    text = (site / "server.toml").read_text()
    text = text.replace('store = "sqlite:keys.db"', 'store = { url = "sqlite:keys.db", mark_file = "mark" }')
    (site / "server.toml").write_text(f'{text}\n[audit]\norigin = "{ORIGIN}"\n')
    with closing(StorePlace("sqlite:keys.db", site).open()) as store:
        store.transact(Ask(InsertAll((AuditRow(NOW, "operator", "event", "done"),))))
    config = ("--config", site / "server.toml")
    assert command("audit", "checkpoint", *config).code == 0
    small.log = Verifier.parse(command("audit", "key", *config).out.strip())
    asked = command("audit", "checkpoint", "--witness", witness.url, "--witness-key", str(witness.key), *config)
    assert asked.code == 0, asked.err
    assert cosigned_by(Note.parse(asked.out.encode()), [witness.key]) == (witness.key,)
    receipt = tmp_path / "receipt.json"
    receipt.write_text(command("receipt", "show", 0, *config).out)
    proven = ("receipt", "verify", receipt, "--key", str(small.log))
    told = command(*proven, "--witness", str(witness.key), "--json").json
    (cosigned,) = told["cosigned"]
    assert (told["ok"], cosigned["witness"]) == (True, str(witness.key))
    assert abs(cosigned["at"] - time.time()) < DAY
    assert f"by {witness.key}" in command(*proven, "--witness", str(witness.key)).out
    assert command(*proven).code == 0, "who knows no witness verifies it, too"
    stranger = Verifier("witness.example/w1", bytes(32), is_witness=True)
    assert command(*proven, "--witness", str(witness.key), "--witness", str(stranger)).code == 12
    assert command(*proven, "--witness", str(small.log)).code == 2, "the key of a log"
    # An entry that no cosigned checkpoint has yet is proven by the log alone; so is one of a log that was rewritten.
    with closing(StorePlace("sqlite:keys.db", site).open()) as store:
        store.transact(Ask(InsertAll((AuditRow(NOW, "operator", "event", "done"),))))
    newest = json.loads(asked.out.split("\n")[1])
    receipt.write_text(command("receipt", "show", newest, *config).out)
    assert command(*proven).code == 0
    assert command(*proven, "--witness", str(witness.key)).code == 12
    kept = Note.parse(asked.out.encode())
    _ = witnessed_path(site / "mark.checkpoint").write_text(str(kept).replace(ORIGIN, "another.example"))
    shown = command("receipt", "show", 0, *config)
    assert (shown.code, "without the signatures of witnesses: " in shown.err) == (0, True)
    receipt.write_text(shown.out)
    assert command(*proven).code == 0
    witnessed_path(site / "mark.checkpoint").unlink()
    away = f"http://127.0.0.1:{free_port()}/"
    asked = command("audit", "checkpoint", "--witness", away, "--witness-key", str(witness.key), *config, "--json")
    assert (asked.code, asked.json["ok"], "no connection to" in asked.json["faults"][0]) == (1, False, True)
    assert command("audit", "checkpoint", "--witness", away, *config).code == 2


def test_a_witness_adds_no_line_to_what_is_told(log: Log, small: SmallWitness) -> None:
    class Refusing(SmallWitness):
        def answer(self, body: bytes) -> tuple[int, bytes]:
            return 500, b"no\r\nchutes-proto: all witnesses cosigned\n"

    with serving(Refusing(small.log)) as witness:
        (fault,) = Witnesses(log.store, [witness], log.file).round()
    assert fault == f"witness {witness.url}: status 500: no chutes-proto: all witnesses cosigned"


def test_a_server_asks_again_and_again(log: Log, witness: Witness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chutes_proto.io.server.witnesses.SECONDS", 0.01)
    told: list[str] = []
    with witnessing(Witnesses(log.store, [witness], log.file), told.append):
        wait_until(witnessed_path(log.file).exists)
        size = Checkpoint.of(log.grow(1)).size
        wait_until(lambda: Checkpoint.of(Note.parse(witnessed_path(log.file).read_bytes())).size == size)
    assert told == []


def test_a_witness_that_has_not_signed_is_asked_again_for_the_same_checkpoint(log: Log, witness: Witness) -> None:
    late = SmallWitness(Verifier("another.example", bytes(32)), bytes(range(1, 33)), "witness.example/w2")
    with serving(late) as second:
        witnesses = Witnesses(log.store, [witness, second], log.file)
        (fault,) = witnesses.round()
        assert fault == f"witness {second.url}: status 403", "it does not know the log's key yet"
        late.log = log.key
        assert witnesses.round() == []
    kept = read_witnessed(witnessed_path(log.file))
    assert kept is not None
    assert cosigned_by(kept, [witness.key, second.key]) == (witness.key, second.key)


def test_processes_of_a_server_ask_by_turns(log: Log, small: SmallWitness, witness: Witness) -> None:
    first, another = (Witnesses(log.store, [witness], log.file) for _ in range(2))
    note = log.grow(1)
    before = Checkpoint.of(note).size
    asked: list[list[str]] = []

    def meanwhile() -> None:
        _ = log.grow(1)
        asked.append(another.round())

    small.meanwhile = meanwhile
    assert first.ask(note)[1] == []
    assert asked == [[]]
    for size in (before, before + 1):  # the other one did not ask at that time, but does now
        kept = read_witnessed(witnessed_path(log.file))
        assert kept is not None
        assert Checkpoint.of(kept) == small.signed[ORIGIN], "what is kept is the newest that a witness has signed"
        assert small.signed[ORIGIN].size == size
        assert another.round() == []


def test_no_other_user_keeps_a_server_from_its_witnesses(log: Log, witness: Witness) -> None:
    """To lock a file it is enough to read it."""
    assert Witnesses(log.store, [witness], log.file).ask(log.grow(1))[1] == []
    kept = witnessed_path(log.file)
    assert kept.with_name(f"{kept.name}.lock").stat().st_mode & 0o077 == 0


def test_a_checkpoint_that_another_server_has_overtaken_is_no_alarm(
    log: Log, witness: Witness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, another = (Witnesses(log.store, [witness], tmp_path / name) for name in ("mine", "another"))
    older, newer = log.grow(1), log.grow(1)
    assert mine.round() == [], "before the first checkpoint"
    _ = (tmp_path / "mine").write_text(str(older))
    _ = (tmp_path / "another").write_text(str(newer))
    assert (another.round(), another.pause, mine.pause) == ([], 60.0, 60.0)
    why = f"witness {witness.url}: it has signed a checkpoint of {Checkpoint.of(newer).size} entries already"
    assert mine.ask(older)[1] == [why], "an operator who asks is told"
    assert [(mine.round(), mine.pause) for _ in range(3)] == [([], 2.0), ([], 2.0), ([why], 60.0)]
    told: list[str] = []
    monkeypatch.setattr("chutes_proto.io.server.witnesses.SECONDS", 0.01)
    _ = (tmp_path / "mine").write_text(str(newer))
    with witnessing(mine, told.append):
        wait_until(witnessed_path(tmp_path / "mine").exists)
    assert told == []


def test_a_witness_that_changes_its_key_is_named_by_the_new_one(
    log: Log, small: SmallWitness, witness: Witness
) -> None:
    before, note = small.key, log.grow(1)
    assert Witnesses(log.store, [witness], log.file).ask(note)[1] == []
    small.seed = bytes(range(1, 33))
    (fault,) = Witnesses(log.store, [witness], log.file).ask(log.grow(1))[1]
    assert "has no signature of witness.example/w1" in fault
    kept = read_witnessed(witnessed_path(log.file))
    assert kept is not None
    assert cosigned_by(kept, [before]) == (before,), "the newest that counts stays"
    whole, faults = Witnesses(log.store, [Witness(witness.url, small.key)], log.file).ask(log.grow(1))
    assert faults == []
    assert cosigned_by(whole, [before, small.key]) == (small.key,)


def test_a_cosignature_stays_when_its_witness_is_away(log: Log, witness: Witness) -> None:
    note = log.grow(1)
    other_seed = bytes(range(1, 33))
    with serving(SmallWitness(log.key, other_seed, "witness.example/w2")) as other:
        away = Witness(f"http://127.0.0.1:{free_port()}", other.key)
        assert len(Witnesses(log.store, [witness, away], log.file).ask(note)[1]) == 1
        gone = Witness(away.url, witness.key)
        whole, faults = Witnesses(log.store, [gone, other], log.file).ask(note)
    assert len(faults) == 1
    assert cosigned_by(whole, [witness.key, other.key]) == (witness.key, other.key)
    assert read_witnessed(witnessed_path(log.file)) == whole


def test_a_witness_that_does_not_answer_keeps_no_server_from_its_end(
    log: Log, witness: Witness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chutes_proto.io.server.witnesses.SECONDS", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hung = Witness(f"http://127.0.0.1:{silent.getsockname()[1]}", witness.key)
        with witnessing(Witnesses(log.store, [hung], log.file), print):
            connection, _ = silent.accept()
            ends = time.monotonic()
        assert time.monotonic() - ends < LIMITS.read
        connection.close()


def test_a_witness_that_has_seen_more_is_named(log: Log, small: SmallWitness, witness: Witness) -> None:
    small.signed[ORIGIN] = Checkpoint(ORIGIN, 1000, bytes(32))
    with pytest.raises(LogError, match=r"witness http://.*: a log of [0-9]+ entries does not extend one of 1000"):
        cosign(log.store, log.grow(1), witness, 0, GET)


def test_a_kept_file_that_is_damaged_is_named(log: Log, witness: Witness) -> None:
    path = witnessed_path(log.file)
    _ = path.write_bytes(b"damaged")
    with pytest.raises(LogError, match=rf"{path}: not a note"):
        _ = Witnesses(log.store, [witness], log.file).round()
    path.unlink()
    whole, _ = Witnesses(log.store, [witness], log.file).ask(log.grow(1))
    _ = path.write_text(str(whole).replace(ORIGIN, "other.example"))
    with pytest.raises(LogError, match=rf"{path}: the signature of {witness.key.name}.* does not verify"):
        _ = Witnesses(log.store, [witness], log.file).round()


@pytest.mark.skipif(not SOAK, reason="a server asks for the first time after a minute: part of `make soak`")
def test_a_witness_of_sigsum_cosigns_the_log_of_a_server(
    tmp_path: Path, command: Callable[..., Ended], start: Callable[..., Server]
) -> None:
    if shutil.which("sigsum-witness") is None:
        pytest.skip("Debian's package sigsum-go is not installed")
    # That witness takes only a log that is named after its key, so the key is there before the server.
    seed = bytes(range(32))
    named = Signer("x", Secret(seed)).verifier.key
    origin = f"sigsum.org/v1/tree/{hashlib.sha256(named).hexdigest()}"
    public = Ed25519PublicKey.from_public_bytes(named).public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    _ = (tmp_path / "log.pub").write_bytes(public + b"\n")
    sigsum("generate", "-o", tmp_path / "witness")
    name = f"sigsum.org/v1/witness/{sigsum('to-hash', '-k', tmp_path / 'witness.pub')}"
    key = sigsum("to-vkey", "-k", tmp_path / "witness.pub", "-n", name, "-t", "cosignature/v1")
    port = free_port()
    site = tmp_path / "site"
    site.mkdir()
    write_server(site, PLATFORM, int(time.time()))
    text = (site / "server.toml").read_text()
    text = text.replace('store = "sqlite:keys.db"', 'store = { url = "sqlite:keys.db", mark_file = "mark" }')
    audit = f'[audit]\norigin = "{origin}"\nwitnesses = [{{ url = "http://127.0.0.1:{port}/", key = "{key}" }}]\n'
    (site / "server.toml").write_text(f"{text}\n{audit}")
    config = ("--config", site / "server.toml")
    vault = make_store_setup(ServerConfig.load(site / "server.toml")).vault
    with closing(StorePlace("sqlite:keys.db", site).open()) as store:
        store.transact(Ask(InsertAll(tuple(AuditRow(NOW, "operator", "event", "done") for _ in range(300)))))
        Sequencer(store, lambda: vault, origin, None).sequence()
        signer = store.transact(OpenLogKey(NOW, vault, Secret(seed + bytes(NONCE_SIZE))))
    assert signer is not None
    assert command("audit", "key", *config).out.strip() == sigsum("to-vkey", "-k", tmp_path / "log.pub")

    # Debian builds it for a Go before 1.22, which takes "POST /add-checkpoint" for a path.
    program = [
        "env",
        "GODEBUG=httpmuxgo121=0",
        "sigsum-witness",
        "-k",
        tmp_path / "witness",
        "--log-key",
        tmp_path / "log.pub",
    ]
    state = tmp_path / "state"
    with running(*program, "--log-key", tmp_path / "log.pub", "--state-file", state, f"127.0.0.1:{port}"):
        wait_until(lambda: answers(port))
        path = witnessed_path(site / "mark.checkpoint")
        started = start(*config, "--workers", 2, ca=site / "server.pem")
        wait_until(path.exists, 180)
        first = Checkpoint.of(Note.parse(path.read_bytes())).size
        asked = command("audit", "checkpoint", *config)
        assert (asked.code, asked.err) == (0, "")
        size = Checkpoint.of(Note.parse(asked.out.encode())).size
        assert first <= size
        assert f"size={size}\n" in state.read_text()
        receipt = tmp_path / "receipt.json"
        _ = receipt.write_text(command("receipt", "show", 7, *config).out)
        told = command("receipt", "verify", receipt, "--key", signer.verifier, "--witness", key, "--json")
        assert (told.code, told.json["size"], told.json["cosigned"][0]["witness"]) == (0, size, key)
        known = Witness(f"http://127.0.0.1:{port}", Verifier.of_witness(key))
        with closing(StorePlace("sqlite:keys.db", site).open()) as store:
            for other, why in [
                (size, "status 422"),
                (size - 1, f"it has signed a checkpoint of {size} entries already"),
            ]:
                forged = signer.sign(Checkpoint(origin, other, bytes(32)).text)
                with pytest.raises(LogError, match=f"witness http://.*: {why}"):
                    _ = cosign(store, forged, known, other, GET)
        assert "audit log" not in started.stop(signal.SIGTERM).err


@contextmanager
def running(*command: object) -> Iterator[None]:
    """Another program, while the block runs."""
    with subprocess.Popen([*map(str, command)]) as process:
        try:
            yield
        finally:
            process.terminate()


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def sigsum(command: str, *arguments: object) -> str:
    """What Sigsum's own tool for keys says."""
    ran = subprocess.run(["sigsum-key", command, *map(str, arguments)], capture_output=True, text=True, check=True)
    return ran.stdout.strip()
