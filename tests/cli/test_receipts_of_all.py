"""Every kind of audit row that the code can write has a receipt, which is shown and verified offline.

The kinds are read from the code: a new one fails here until it is made here, too.
"""

from __future__ import annotations

import ast
import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from itertools import product
from pathlib import Path
from typing import Any, get_args

from attrs import evolve

import chutes_proto
from chutes_proto.io.files import create_private
from chutes_proto.io.server.development import write_server
from chutes_proto.io.server.store_setup import StoreSetup, make_store_setup
from chutes_proto.io.stores.sealing import seal_store
from chutes_proto.keys.vault import KeyEncryptionKey, Vault
from chutes_proto.server import ServerConfig
from chutes_proto.store._run import Ask, Store
from chutes_proto.store.rows import (
    AttestationRow,
    AuditRow,
    GenerationRow,
    HostProfileRow,
    InsertAll,
    ReadAll,
    Revocable,
    Vm,
    VolumeRow,
)
from chutes_proto.testing._platform import PROFILE
from chutes_proto.testing.store_suite._parts import DAY, attest, boot, confirm, entropy, fresh, platform, read, sync
from chutes_proto.units.boot import GrantBoot, RecordMismatch, RecordRefusal, RootRotation
from chutes_proto.units.compare import Newer, Take
from chutes_proto.units.erasure import EraseVm, RepeatErasure
from chutes_proto.units.fleet import BeginMaintenance, NameHost, RegisterHost, RemoveHost, Window
from chutes_proto.units.nonces import Nonce
from chutes_proto.units.operator import (
    AllowFormat,
    BindVm,
    ImportKeys,
    PurgeBoots,
    PurgeKeys,
    RebindVm,
    RecordReload,
    RecordStart,
    RemoveRegistration,
    RestoreKey,
    RewrapKeys,
    StoreRestored,
)
from chutes_proto.units.records import AcceptedQuote, Quote
from chutes_proto.units.revocations import Allow, RepeatRevocation, Revoke
from chutes_proto.units.rotation import ConfirmRoot
from chutes_proto.units.servers import GrantRuntime, RecordRuntimeRefusal, RegisterServer, RemoveServer, RenameServer
from tests.cli.conftest import HOTKEY, Ended
from tests.cli.test_operating import PLATFORM
from tests.store.memory import MemoryStore

NOW = int(time.time()) - 100
WHY = "because"
MINE, OTHER = Vm(HOTKEY, "vm-1"), "5FHneW46xGXgs5mUiveU4sbTyGBzmstUspZC92UhjJM694ty"

# --- the kinds ---

PLACE = {"AuditRow": 2, "audit": 0, "_audit_host": 1, "_audit": 1, "_files_audit": 1}
"""Where the event is among the arguments of the calls that add an audit row."""
PLACE_OF_SERVERS = 2
HELPERS = {"event"}
"""An event that a function only passes on: its callers name it."""
COMPUTED: dict[str, set[str]] = {
    "f'{self.kind} revoked'": {f"{kind} revoked" for kind in get_args(Revocable)},
    "f'{self.kind} allowed'": {f"{kind} allowed" for kind in get_args(Revocable)},
    "done": {f"{kind} {what} again" for kind, what in product(get_args(Revocable), ("revoked", "allowed"))},
    "self.event": {"store restored", "loss accepted"},
    "ROWS_FORGED": {"rows forged"},
}
"""Events that are not written as a constant, by their expression."""
PASSED = {"boot", "attest volumes", "vm erased", "vm erased again"}
"""Events that reach a helper by a name or a further argument."""


def kinds() -> set[str]:
    """The events of all audit rows that the code can write."""
    found = set(PASSED)
    for path in sorted((Path(chutes_proto.__file__).parent).rglob("*.py")):
        if {"testing", "store"} & {*path.relative_to(Path(chutes_proto.__file__).parent).parts}:
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func).rpartition(".")[2]
            if name not in PLACE or not (node.args or node.keywords):
                continue
            place = PLACE_OF_SERVERS if (path.name, name) == ("servers.py", "_audit") else PLACE[name]
            if len(node.args) <= place:  # by keyword, in the helper of `Records`
                assert [each.value for each in node.keywords if each.arg == "event"], ast.unparse(node)
                continue
            event = node.args[place]
            if isinstance(event, ast.Constant):
                found.add(str(event.value))
            elif ast.unparse(event) not in HELPERS:
                found |= COMPUTED[ast.unparse(event)]
    return found


# --- one of each ---


def vm_events(store: Store, vault: Vault) -> None:
    """What VMs do."""

    def granted(label: str, **more: Any) -> GrantBoot:
        unit: GrantBoot = evolve(boot(label, now=NOW, vm=MINE), vault=vault, **more)
        _ = store.transact(unit)
        return unit

    def do(unit: Any, **more: Any) -> Any:
        return store.transact(evolve(unit, vault=vault, **more))

    first = granted("1")
    for number in range(2):
        do(sync(first, "body", "storage"), request_id=f"sync {number}")
    do(read(granted("read"), "storage"))
    refused = RecordRefusal(NOW, "r" * 32, MINE, platform("home"), "tcb_rejected", WHY, bytes(32), "192.0.2.1")
    assert store.transact(refused)
    assert store.transact(evolve(refused, request_id="s" * 32, stage="runtime"))
    assert store.transact(RecordMismatch(NOW, "m" * 32, MINE, "two-phase", "x", "192.0.2.1"))
    second = granted("2", exchange="two-phase")
    attested = evolve(attest(second, "body", "storage"), vault=vault)
    for number in range(2):
        do(attested, request_id=f"attest {number}")
    rotated = evolve(confirm(attested, {"storage": True}), vault=vault)
    for number in range(2):
        do(rotated, request_id=f"confirm {number}")
    nonce = entropy("root nonce", 32)
    rotation = RootRotation(fresh("build"), fresh("following"), fresh("caller"), nonce, True, 0)
    _ = granted("3", exchange="two-phase", rotation=rotation)
    confirmed = ConfirmRoot(NOW + 1, "root", MINE, nonce, bytes(32), True, vault)
    for number in range(2):
        do(confirmed, request_id=f"root {number}")


def miner_events(store: Store) -> None:
    """What miners do; the address of the last boots is 192.0.2.1."""
    profiles = {("profile", "1.0"): evolve(PROFILE, gpu_count=None)}
    registered = RegisterServer(NOW, "register", OTHER, "n0", "other", "192.0.2.1", "192.0.2.1", (), profiles, "")
    _ = store.transact(registered)
    mine = evolve(registered, hotkey=HOTKEY, server_id="n1", name=MINE.name)
    server = store.transact(mine)  # n0, which has no boot, yields
    nonce = Nonce(entropy("runtime nonce", 32), "runtime", NOW - 5)
    quote = AcceptedQuote(bytes(32), platform("home").pin, "profile", "1.0", "UpToDate")
    store.transact(GrantRuntime(NOW, "runtime", server, nonce, quote, "192.0.2.1"))
    refusal = RecordRuntimeRefusal(
        NOW, "no", server, bytes(32), Quote.refused(bytes(32)), "quote_rejected", "", WHY, ""
    )
    assert store.transact(refusal)
    window = Window("w1", "2.0", NOW, NOW + DAY, 1)
    assert not store.transact(BeginMaintenance(NOW, "maintenance", HOTKEY, "n1", window, "192.0.2.1")).reasons
    _ = store.transact(RenameServer(NOW, "rename", HOTKEY, "n1", "renamed", ""))
    _ = store.transact(RemoveServer(NOW, "remove", HOTKEY, "n1", ""))
    _ = store.transact(mine)
    _ = store.transact(RemoveRegistration(NOW, "n1", WHY))


def key_events(store: Store, vault: Vault) -> None:
    """What operators do with keys of VMs."""
    vm = Vm(HOTKEY, "vm-2")
    for number in range(5):
        granted = evolve(boot(f"k{number}", now=NOW, vm=vm), vault=vault)
        _ = store.transact(granted)
        _ = store.transact(evolve(sync(granted, "k", "storage", rekey=("storage",)), vault=vault))
    _ = store.transact(RestoreKey(NOW, vm, "storage", 1, WHY))
    store.transact(AllowFormat(NOW, MINE, "storage", WHY))
    store.transact(RebindVm(NOW, vm, platform("new"), True, vault, WHY))
    imported = Vm(HOTKEY, "imported")
    _ = store.transact(ImportKeys(NOW, imported, {"storage": fresh("imported")}, None, vault, WHY))
    store.transact(BindVm(NOW, imported, platform("imported"), WHY))
    newer, lost = MemoryStore(), Vm(HOTKEY, "lost")
    _ = newer.transact(ImportKeys(NOW, lost, {"storage": fresh("lost")}, None, vault, WHY))
    keys = newer.transact(Ask(ReadAll(GenerationRow, lost)))
    disks = newer.transact(Ask(ReadAll(VolumeRow, lost)))
    _ = store.transact(Take(NOW, (Newer(lost, keys, disks, None),), vault, WHY))
    assert store.transact(PurgeKeys(NOW + 900 * DAY, 1, WHY, (vm,), carry_out=True))
    after = Vault(KeyEncryptionKey.from_bytes(b"n" * 32), vault.current)
    assert store.transact(RewrapKeys(NOW, bytes(100_000), after, WHY)).count
    assert store.transact(RewrapKeys(NOW, bytes(100_000), Vault(vault.current, after.current), WHY)).count
    erased = store.transact(EraseVm(NOW, "e" * 32, 1, imported, WHY, carry_out=True)).record
    assert erased is not None
    assert store.transact(RepeatErasure(NOW, 2, evolve(erased, erasure_id="f" * 32))) is not None


def other_events(store: Store) -> None:
    """What operators do else."""
    subjects: dict[Revocable, str] = {"vm": f"{HOTKEY}/x", "hotkey": OTHER, "platform": "ppid:ffee"}
    for at, (kind, subject) in enumerate(subjects.items()):
        store.transact(Revoke(NOW, 10 + at, kind, subject, None, WHY))
        row = store.transact(Allow(NOW, 20 + at, kind, subject, WHY))
        for version, allowed_at in ((30, None), (40, NOW + 40)):
            again = evolve(row, created_at=NOW + 30, allowed_at=allowed_at)
            assert store.transact(RepeatRevocation(NOW, version + at, again))
    _ = store.transact(RegisterHost(HostProfileRow("3f9a".ljust(64, "0"), HOTKEY, "{}", NOW)))
    _ = store.transact(NameHost(NOW, "3f9a", "name", None, WHY))
    _ = store.transact(RemoveHost(NOW, "3f9a", WHY))
    store.transact(RecordReload(NOW, WHY, "{}"))
    assert store.transact(RecordStart(NOW, "server", {"policy": "00"}))
    _ = store.transact(StoreRestored(NOW, WHY))
    _ = store.transact(StoreRestored(NOW, WHY, "loss accepted"))
    assert store.transact(PurgeBoots(NOW, AttestationRow, NOW + DAY, WHY, carry_out=True)).rows


def with_one_of_each(setup: StoreSetup, tmp_path: Path) -> None:
    """Make a store of before seals; seal it, and do everything that has an audit row."""
    with closing(evolve(setup.store, vault=None).open(migrate=True)) as store:
        old = NOW - 900 * DAY
        _ = store.transact(Ask(InsertAll(tuple(AuditRow(old, "operator", "reloaded", "done") for _ in range(256)))))
        vm_events(store, setup.vault)
    with closing(setup.store.open()) as store:
        assert seal_store(store, setup.vault, WHY) is not None
        miner_events(store)
        key_events(store, setup.vault)
        other_events(store)
        with closing(sqlite3.connect(tmp_path / "keys.db")) as file, file:  # as an attacker does
            names = "at, actor, event, decision, reason, keys, peer_address"
            file.execute(f"INSERT INTO audit ({names}) VALUES ({NOW}, 'operator', 'forgery', 'done', '', '', '')")


def test_every_kind_of_entry_has_a_receipt(tmp_path: Path, command: Callable[..., Ended]) -> None:
    write_server(tmp_path, PLATFORM, NOW)
    config = ("--config", tmp_path / "server.toml")
    setup = make_store_setup(ServerConfig.load(tmp_path / "server.toml"))
    with_one_of_each(setup, tmp_path)
    (tmp_path / "kek").rename(tmp_path / "kek.previous")
    create_private(tmp_path / "kek", os.urandom(32))
    text = (tmp_path / "server.toml").read_text()
    _ = (tmp_path / "server.toml").write_text(f'kek_previous_file = "kek.previous"\n{text}')
    copied = tmp_path / "copy.toml"
    copied.write_text((tmp_path / "server.toml").read_text().replace("keys.db", "copy.db"))
    for words in (
        ("keys", "rewrap", *config),
        ("audit", "checkpoint", *config),
        ("audit", "purge", "--yes", "--reason", WHY, *config),
        ("store", "copy", "--from-config", tmp_path / "server.toml", "--config", copied),
    ):
        assert (ended := command(*words)).code == 0, ended.err
    events: set[str] = set()
    for file in (tmp_path / "server.toml", copied):
        assert command("audit", "checkpoint", "--config", file).code == 0  # every row gets its index, and the log a key
        key = command("audit", "key", "--config", file).out.split()
        keys = [word for each in key for word in ("--key", each)]
        rows = command("audit", "list", "--config", file, "--json").json["rows"]
        for row in rows:
            if row["event"] in events or row["event"] == "forgery":
                continue
            shown = command("receipt", "show", row["idx"], "--config", file)
            assert shown.code == 0, (row, shown.err)
            (tmp_path / "receipt.json").write_text(shown.out)
            ended = command("receipt", "verify", tmp_path / "receipt.json", *keys, "--json")
            assert ended.code == 0, (row, ended.out)
            told = ended.json["entry"]
            assert (told["event"], told["decision"], told["at"]) == (row["event"], row["decision"], row["at"])
            events.add(row["event"])
    assert events == kinds()
