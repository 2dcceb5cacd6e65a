"""The canary: known passphrases in the store, and everything that anyone could read is searched for them.

A real server on either store, VMs of either exchange, refusals of every kind, faults, every command of an operator, and
all the time an eye on the command lines and environments of all processes.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import traceback
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import psycopg
import pytest

from chutes_proto.boot._retry_policy import RetryPolicy
from chutes_proto.errors import ChutesError
from chutes_proto.quote._measurements import Stage
from chutes_proto.testing._faults import FAULTS
from chutes_proto_trio import BootAgent
from tests.cli.conftest import HOTKEY, Ended
from tests.scenario.premises import REFUSED, Premises, Vm, Watch
from tests.waiting import wait_until

PLANTED = {
    "canary-1": {"storage": "canary:one+of/many & \\more%20", "tdx-cache": "a canary of this: " + "c4na7y" * 18},
    "canary-2": {"storage": "0123456789abcdef" * 8},
}
PIECE = 24


def forms(secret: bytes) -> Iterator[bytes]:
    """How a secret, or a piece of it, looks where it was let out."""
    text = secret.decode("ascii")
    for start in {0, len(text) // 2, max(0, len(text) - PIECE)}:
        piece = text[start : start + PIECE].encode()
        if len(piece) < PIECE and start:
            continue
        yield piece
        yield piece.hex().encode()
        yield piece.hex().upper().encode()
        yield piece[::-1]
        yield urllib.parse.quote(piece, safe="").encode()
        yield urllib.parse.quote_plus(piece).encode()
        yield json.dumps(piece.decode())[1:-1].encode()
        yield repr(piece)[2:-1].encode()
        for shift in range(3):  # base64 depends on where in the text the piece begins
            for encode in (base64.b64encode, base64.urlsafe_b64encode):
                yield encode(bytes(shift) + piece)[4 if shift else 0 : -4].rstrip(b"=")


def leaks(secrets: Iterable[bytes], heard: Iterable[bytes]) -> list[tuple[bytes, bytes]]:
    text = b"\n".join(dict.fromkeys(heard))
    found: list[tuple[bytes, bytes]] = []
    for form in {form for secret in secrets for form in forms(secret) if len(form) >= 12}:
        at = text.find(form)
        if at >= 0:
            found.append((form, text[max(0, at - 100) : at + 60]))
    return found


@pytest.mark.parametrize("form", sorted(set(forms(PLANTED["canary-1"]["storage"].encode()))))
def test_the_search_finds_each_form(form: bytes) -> None:
    if len(form) >= 12:
        assert leaks([PLANTED["canary-1"]["storage"].encode()], [b"at once " + form + b" and more"])
    whole = PLANTED["canary-2"]["storage"].encode()
    for shift in range(3):
        assert leaks([whole], [base64.b64encode(bytes(shift) + whole + b"!")])


@pytest.mark.trio
async def test_no_secret_is_anywhere(premises: Premises, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    # The store does not change what a process shows of itself: with PostgreSQL most commands are run in this one.
    do = premises.do if premises.store.startswith("sqlite:") else premises.here
    secrets = {text.encode() for volumes in PLANTED.values() for text in volumes.values()}
    with Watch() as watch:
        premises.plant(PLANTED)
        premises.start()
        secrets |= await base_exchange(premises)
        await refusals(premises)
        operating(premises, do)
        premises.stop()
        premises.edit('root_passphrase = "vm"', 'root_passphrase = "vm"\nexchange = "two-phase"')
        premises.start("--transport", "asyncio")
        secrets |= await two_phase(premises)
        operating(premises, premises.here, "--json")
        faults(premises, do)
    premises.close()
    rows = stored(premises)
    heard = [*premises.heard, *watch.seen, caplog.text.encode(), *(repr(r.__dict__).encode() for r in caplog.records)]
    assert any(b"import-fernet" in line for line in watch.seen), "nobody looked at the processes"
    assert b"POST" in caplog.text.encode(), "the clients' debug log is not there"
    assert b'"event":"refused"' in b"".join(premises.heard), "the server's log is not there"
    assert b"keys imported" in rows, "the rows are not there"
    assert len(secrets) > 20
    assert leaks(secrets, [*heard, rows]) == []


# --- what is done ---


async def base_exchange(premises: Premises) -> set[bytes]:
    """Boots of the agent, the command, and a deployed client; hands out what they were given."""
    given: set[bytes] = set()
    for name in (*PLANTED, "fresh"):
        vm = premises.vm(name)
        grant = vm.boot()
        given |= {grant["key"].encode(), grant["boot_token"].encode()}
        if name in PLANTED:
            assert vm.read(grant["boot_token"])["passphrase"] == PLANTED[name]["storage"]
        keys = vm.sync(grant["boot_token"], rekey=[] if name in PLANTED else ["tdx-cache"])
        given |= {keys[volume].encode() for volume in ("storage", "tdx-cache")}
        # a token is consumed: each refusal is heard
        _ = vm.sync(grant["boot_token"], "storage", status=401)
        _ = vm.read(grant["boot_token"], status=401)
    folder = premises.directory.with_name("keys")
    words = ["boot", premises.url, "--ca", premises.ca, "--hotkey", HOTKEY, "--platform", premises.platform_directory]
    for more in ([], ["--json"]):
        assert premises.run(*words, "--vm", "canary-1", "--keys", folder, *more).code == 0
    given |= {path.read_bytes() for path in folder.iterdir()}
    assert PLANTED["canary-1"]["storage"].encode() in given

    async with agent(premises, "canary-2") as booting:
        granted = await booting.boot()
        received = await booting.sync({"storage": True})
    premises.heard.append(repr([granted, received]).encode())
    assert received["storage"].passphrase.reveal().decode() == PLANTED["canary-2"]["storage"]
    return given


async def two_phase(premises: Premises) -> set[bytes]:
    """Rotations: lost, doubled, late and refused confirmations; hands out what was given."""
    given: set[bytes] = set()

    def attested(name: str) -> tuple[Vm, dict[str, Any]]:
        vm = premises.vm(name)
        answer = vm.attest(vm.boot()["luks_quote_nonce"], formatted=["storage"])
        given.update([answer["confirm_nonce"].encode(), answer["k3s_encryption_key"].encode()])
        for keys in answer["volumes"].values():
            given.update(key.encode() for key in keys.values() if key)
        return vm, answer

    for name in (*PLANTED, "fresh", "new"):
        _ = attested(name)  # and is never heard of again
        vm, answer = attested(name)
        late, first = vm, answer["confirm_nonce"]
        vm, answer = attested(name)
        _ = late.confirm(first, status=401, storage=True)
        for _ in range(2):
            _ = vm.confirm(answer["confirm_nonce"], storage=True, tdx_cache=False)
        _ = vm.confirm(answer["confirm_nonce"], status=401, storage=False)
    vm, answer = attested("canary-1")
    assert premises.here("keys", "restore", "canary-1", "storage", 1).code == 0
    _ = vm.confirm(answer["confirm_nonce"], status=409, storage=True)

    for answered in (False, True):
        async with agent(premises, "canary-2") as booting:
            try:
                async with booting.rotate({"storage": True}) as rotation:
                    premises.heard.append(repr(rotation).encode())
                    given.add(rotation.keys["storage"].next.reveal())
                    if not answered:
                        raise OSError("the disk is gone")
                    rotation.added("storage")
            except OSError:
                premises.heard.append(traceback.format_exc().encode())
    return given


async def refusals(premises: Premises) -> None:
    """Refusals by a server, reported by an agent."""
    vm = premises.vm("canary-1")
    grant = vm.boot()
    token, nonce = grant["boot_token"], vm.nonce()
    other = premises.vm("canary-2")
    _ = other.sync(token, status=401)
    _ = other.read(token, status=401)
    _ = vm.sync("00" * 32, status=401)
    _ = vm.sync("x" * 10_000, status=401)
    _ = vm.sync(token, "unknown", status=REFUSED)
    _ = vm.sync(token, rekey=["unknown"], status=REFUSED)
    _ = vm.ask("POST", "/servers/canary-1/luks", content=b"{" * 9000, headers={"x-boot-token": token}, status=REFUSED)
    _ = vm.ask("POST", "/servers/canary-1/luks", content=b"x" * 70_000, status=REFUSED)
    _ = vm.ask("GET", "/servers/canary-1/luks", status=REFUSED)
    _ = vm.ask("PUT", "/servers/canary-1/luks", status=REFUSED)
    _ = vm.attest("00" * 32, status=401)
    _ = vm.confirm("00" * 32, status=401, storage=True)
    _ = vm.boot(nonce, quote="AAAA", status=REFUSED)
    _ = vm.boot(nonce, vm_name="..", status=REFUSED)
    _ = vm.boot("00" * 32, status=401)
    honest = premises.platform
    for fault in [fault for fault in FAULTS.values() if fault.side != "collateral"][::7]:
        premises.platform = honest.having(fault)
        _ = premises.vm("canary-1").boot(status=REFUSED)
    premises.platform = honest

    async with agent(premises, "canary-1", quoter=lambda data: b"no quote at all") as booting:
        await told(premises, booting.boot())
    async with agent(premises, "canary-1") as booting:
        granted = await booting.boot()
        assert granted.boot_token is not None
        _ = vm.sync(granted.boot_token.reveal().decode(), status=401)  # another client key
        await told(premises, booting.sync({"unknown": False}))


async def told(premises: Premises, work: Any) -> None:
    with pytest.raises(ChutesError) as caught:
        await work
    premises.heard += [repr(caught.value).encode(), "".join(traceback.format_exception(caught.value)).encode()]


def operating(premises: Premises, do: Callable[..., Ended], *options: str) -> None:
    """Every command that an operator has, with ``options`` where it has these; those of keys run by ``do``."""
    other = ("--ppid", "00" * 16)
    home = premises.json("vm", "list")["vms"][0]["platform"].partition(":")[2]
    commands: list[tuple[object, ...]] = [
        ("vm", "list"),
        *(("keys", "history", name) for name in PLANTED),
        ("keys", "restore", "canary-1", "storage", 99),
        ("keys", "allow-format", "canary-1", "storage", "--reason", "a new disk"),
        ("keys", "purge"),
        ("keys", "purge", "--yes"),
        ("audit", "purge"),
        ("audit", "purge", "--yes"),
        ("keys", "rewrap"),
        ("vm", "bind", "canary-1", *other),
        ("vm", "rebind", "canary-1", *other, "--keep-keys"),
        ("vm", "rebind", "canary-1", "--instance", home, *other, "--keep-keys"),
        ("audit", "list"),
        ("audit", "list", "--vm", "canary-1", "--event", "boot"),
        ("store", "check"),
        ("store", "init"),
    ]
    for words in commands:
        run = do if words[0] == "keys" else premises.here
        assert run(*words, *options).code in (0, 1)
    assert do("audit", "export").code == 0
    assert do("serve", "--check").code == 0


def faults(premises: Premises, do: Callable[..., Ended]) -> None:
    """Faults of the server, in its log."""
    vm = premises.vm("canary-1")
    nonce = vm.nonce()  # the server may look at its store meanwhile, and gives none while it refuses it
    premises.sql("ALTER TABLE audit RENAME TO audit_away")
    assert vm.boot(nonce, status=503)["code"] == "store_unavailable"
    premises.sql("ALTER TABLE audit_away RENAME TO audit")
    # keys that do not open
    premises.turn("UPDATE generation SET wrapped_key = sealed WHERE vm = 'canary-2' AND volume = 'storage'")
    vm = premises.vm("canary-2")
    _ = wait_until(vm.is_served)  # the server may have looked at its store meanwhile, and looks again
    assert vm.attest(vm.boot()["luks_quote_nonce"], status=503)["code"] == "key_unavailable"
    assert do("store", "check").code == 0
    # keys that are wrapped under what the running server does not have
    nonces = [vm.nonce() for _ in range(2)]  # it gives none while its store is refused
    premises.new_key()
    assert do("keys", "rewrap", "--json").code == 1  # the spoilt ones are left
    assert premises.vm("canary-1").boot(nonces[0], status=503)["code"] == "store_unavailable"
    assert do("store", "restored", "--reason", "a trial").code == 0
    assert premises.vm("canary-1").boot(nonces[1], status=503)["code"] == "store_unavailable"
    key = premises.directory / "kek"
    kept = key.read_bytes()
    for wrong in (b"", kept[:31], kept + b"x", os.urandom(32)):
        _ = key.write_bytes(wrong)
        assert do("serve").code == 1
    _ = key.write_bytes(kept)


def agent(premises: Premises, name: str, **more: Any) -> BootAgent:
    def quoter(data: bytes) -> bytes:
        return platform.quote(data, stage=next(stages))

    stages: Iterator[Stage] = iter(["boot", "runtime", "boot", "runtime"])
    platform = premises.platform
    settings: dict[str, Any] = {"quoter": quoter, "ca_pem": premises.ca.read_bytes(), "retry": RetryPolicy(attempts=1)}
    return BootAgent(premises.url, hotkey=HOTKEY, vm_name=name, **settings | more)


def stored(premises: Premises) -> bytes:
    """All that the store has, as a thief would read it."""
    if premises.store.startswith("sqlite:"):
        return b"".join(path.read_bytes() for path in premises.directory.glob("keys.db*"))
    with psycopg.connect(premises.store) as connection:
        tables = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = current_schema()").fetchall()
        return b"\n".join(
            repr(row).encode()
            for (table,) in tables
            for row in connection.execute(f"SELECT * FROM {table}".encode()).fetchall()
        )
