"""Decisions of real boots and the files that they rest on are entries of the log, of which each is proven offline."""

from __future__ import annotations

import base64
import hashlib
import json
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from socket import gethostname
from typing import Any

import pytest
from attrs import define
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from chutes_proto.effects import Effect, FetchCollateral
from chutes_proto.io.files import Files
from chutes_proto.io.server.development import write_server
from chutes_proto.io.server.reload import Running, prepare, record
from chutes_proto.io.server.serving import open_store
from chutes_proto.io.server.setup import make_setup
from chutes_proto.server import ServerConfig
from chutes_proto.server._app import App
from chutes_proto.testing import SimulatedPlatform
from tests.cli.conftest import Ended
from tests.cli.test_operating import NOW, PLATFORM
from tests.server.world import World

POLICY = '[tcb]\naccepted_statuses = ["UpToDate"]\n'


@define(eq=False)
class FromFiles(World):
    """A world whose collateral is that of the server's directory."""

    collateral: Any = None

    def perform(self, effect: Effect[Any]) -> Any:
        if isinstance(effect, FetchCollateral):
            return self.collateral.fetch(effect.identity, self.now)
        return super().perform(effect)


@define
class Site:
    """A server that has granted one boot, and refused one for its TCB and one for its measurements."""

    directory: Path
    command: Callable[..., Ended]

    @property
    def configuration(self) -> Path:
        return self.directory / "server.toml"

    def serve(self) -> None:
        setup = make_setup(ServerConfig.load(self.configuration))
        with closing(setup.store.open(make=True)) as store:
            world = FromFiles(App(setup.service), store, PLATFORM, NOW, collateral=setup.collateral)
            assert world.boot().status == 200
            for fault in ("tcb_out_of_date", "rtmr1"):
                world.platform = PLATFORM.having(fault)
                assert world.boot(vm_name=f"vm-{fault}").status == 403

    def rows(self, *options: object) -> Any:
        return self.command("audit", "list", *options, "--json", "--config", self.configuration).json["rows"]

    def prove(self, entry: object) -> Ended:
        return self.command("audit", "export", "--proof", entry, "--config", self.configuration)


@pytest.fixture
def site(tmp_path: Path, command: Callable[..., Ended]) -> Site:
    write_server(tmp_path, PLATFORM, NOW)
    text = (tmp_path / "server.toml").read_text()
    # A default that is a date is one in the document of reference values, too, which is JSON.
    text = text.replace("[profile_defaults]", "[profile_defaults]\nnot_before = 2024-02-29")
    (tmp_path / "server.toml").write_text(f'policy = "policy.toml"\n{text}')
    (tmp_path / "policy.toml").write_text(POLICY)
    site = Site(tmp_path, command)
    site.serve()
    return site


def entry_of(proof: str, key: str) -> Any:
    """Return the entry if its proof holds, otherwise None, as the reference tells: with SHA-256 and Ed25519 alone."""
    head, text, lines = proof.split("\n\n")
    form, extra, first, *path = head.split("\n")
    origin, size, root = text.split("\n")
    name, identifier, public = key.split("+", 2)
    raw = base64.b64decode(public)
    assert (form, raw[0], origin) == ("c2sp.org/tlog-proof@v1", 1, name)
    assert hashlib.sha256(name.encode() + b"\n" + raw).hexdigest()[:8] == identifier
    signatures = [base64.b64decode(line.split(" ")[2]) for line in lines.splitlines() if line.split(" ")[1] == name]
    (signature,) = [each[4:] for each in signatures if each[:4].hex() == identifier]
    try:
        Ed25519PublicKey.from_public_bytes(raw[1:]).verify(signature, f"{text}\n".encode())
    except InvalidSignature:
        return None

    def sha256(prefix: int, content: bytes) -> bytes:
        return hashlib.sha256(bytes([prefix]) + content).digest()

    entry = base64.b64decode(extra.removeprefix("extra "))
    n, last = int(first.removeprefix("index ")), int(size) - 1
    found = sha256(0, entry)
    for each in map(base64.b64decode, path):
        if n % 2 or n == last:
            found = sha256(1, each + found)
            while n % 2 == 0 and n:
                n, last = n // 2, last // 2
        else:
            found = sha256(1, found + each)
        n, last = n // 2, last // 2
    return json.loads(entry) if last == 0 and found == base64.b64decode(root) else None


def test_a_stranger_verifies_grants_and_denials_with_the_key_alone(site: Site) -> None:
    for index, verdict in enumerate(["accepted", "tcb_rejected", "measurement_mismatch"]):
        proven = site.prove(index)
        assert proven.code == 0, proven.err
        key = site.command("audit", "key", "--config", site.configuration).out.strip()
        entry = entry_of(proven.out, key)
        assert json.loads(entry["evidence"])["verdict"] == verdict
        assert entry["decision"] == ("granted" if verdict == "accepted" else "refused")
        extra = proven.out.split("\n")[1].removeprefix("extra ")
        changed = base64.b64encode(base64.b64decode(extra).replace(b"vm", b"VM")).decode()
        assert entry_of(proven.out.replace(extra, changed), key) is None
        assert entry_of(proven.out.replace(f"\nindex {index}\n", f"\nindex {index + 1}\n"), key) is None
    assert json.loads(entry["evidence"]).keys() == {
        *("advisories", "collateral", "judged_at", "policy", "reference_values", "stage", "tcb_date", "tcb_status"),
        *("verdict", "verifier"),
    }


def test_a_reload_names_the_documents_of_before_and_after(site: Site) -> None:
    running = Running(make_setup(ServerConfig.load(site.configuration)))
    (site.directory / "policy.toml").write_text(f"{POLICY}# another one\n")
    with closing(running.setup.store.open()) as store:
        record(store, "root", prepare(running, store, Files()))
    (row,) = site.rows("--event", "reloaded")
    told = json.loads(row["evidence"])
    assert told["before"]["reference_values"] == told["after"]["reference_values"]
    assert told["before"]["policy"] != told["after"]["policy"]


def test_a_start_with_other_files_is_an_entry_of_that_server(site: Site) -> None:
    """Of several processes of a server one writes it; servers with different files write none in turns for ever."""

    def start(config: Path) -> None:
        with open_store(Running(make_setup(ServerConfig.load(config)))):
            pass

    def started() -> list[Any]:
        return [json.loads(row["evidence"]) for row in site.rows("--event", "started")]

    other = site.directory / "other.toml"
    other.write_text(site.configuration.read_text().replace("policy.toml", "other-policy.toml"))
    (site.directory / "other-policy.toml").write_text(f"{POLICY}# of another server\n")
    for config in (site.configuration, other, site.configuration, other):
        start(config)
    first, second = started()
    assert (first["before"], second["before"], first["after"] != second["after"]) == (None, None, True)
    (site.directory / "policy.toml").write_text(f"{POLICY}# another one\n")
    with ThreadPoolExecutor(4) as processes:
        list(processes.map(start, [site.configuration] * 4))
    (*_, changed) = found = started()
    assert (len(found), changed["before"], changed["after"] != first["after"]) == (3, first["after"], True)
    (site.directory / "gpus.toml").write_text("")
    text = f'gpu_evidence = {{ policy = "gpus.toml" }}\n{site.configuration.read_text()}'
    site.configuration.write_text(text)
    (site.directory / "simulated-root.der").write_bytes(SimulatedPlatform(b"other".ljust(32)).root_der)
    start(site.configuration)
    (row,) = site.rows("--event", "started", "--last", 1)
    assert row["reason"].endswith("server.toml: changed: gpu_policy, root")
    running = Running(make_setup(ServerConfig.load(site.configuration)))
    (site.directory / "policy.toml").write_text(POLICY)
    with closing(running.setup.store.open()) as store:
        record(store, "root", prepare(running, store, Files()))
    start(site.configuration)
    assert len(started()) == 4, "the reload has said it"
    request_id = f"files of {gethostname()}:{site.configuration}"
    assert site.rows("--request-id", request_id)[-1]["event"] == "reloaded"


def test_a_forged_row_hides_no_change_of_the_files(site: Site) -> None:
    """Who writes the database adds a row that says that the server went on with these files."""
    setup = make_setup(ServerConfig.load(site.configuration))
    with open_store(Running(setup)):
        pass
    (site.directory / "policy.toml").write_text(f"{POLICY}# another one\n")
    changed = make_setup(ServerConfig.load(site.configuration))
    with closing(sqlite3.connect(site.directory / "keys.db")) as database, database:
        columns = [name for _, name, *_ in database.execute("PRAGMA table_info(audit)") if name not in ("id", "idx")]
        (row,) = database.execute(f"SELECT {', '.join(columns)} FROM audit WHERE event = 'started'")
        values = dict(zip(columns, row, strict=True)) | {"evidence": json.dumps({"after": changed.judged_by})}
        places = ", ".join(f":{name}" for name in columns)
        _ = database.execute(f"INSERT INTO audit ({', '.join(columns)}) VALUES ({places})", values)
    with open_store(Running(changed)):
        pass
    rows = [row for row in site.rows("--event", "started") if not row["idx"] or row["idx"] >= 0]
    assert [json.loads(row["evidence"])["after"] for row in rows] == [setup.judged_by, changed.judged_by]
