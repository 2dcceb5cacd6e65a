"""The parts of the cases of a store's contract: a harness, requests, and what to expect.

Rules kept here:

* a case uses `transact` alone, and reads the content of a store with `Scan`, or page by page;
* entropy is made from labels, so two runs of a case do the same;
* races are tried with `CALLERS` callers at once.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

from attrs import evolve, frozen

from chutes_proto.errors import Refusal, StoreError
from chutes_proto.keys.generations import K3S_VOLUME
from chutes_proto.keys.vault import FreshKey, KeyEncryptionKey, Vault
from chutes_proto.secret import Secret
from chutes_proto.store._rows import Platform, ReadTimes, Row, StoreOp, Vm
from chutes_proto.store._run import Ask, Script, Store, Unit
from chutes_proto.units.boot import GrantBoot
from chutes_proto.units.contents import pages
from chutes_proto.units.nonces import Nonce
from chutes_proto.units.rotation import AttestVolumes, ConfirmNonce, ConfirmVolumes
from chutes_proto.units.volumes import ReadVolume, SyncVolumes
from chutes_proto.wire.codes import Code

T = TypeVar("T")


class Harness(Protocol):
    """One empty store, and a way to call it from several threads at once."""

    def open(self) -> Store:
        """Return a handle; all handles of one harness see the same rows, as different processes would."""
        ...

    def together(self, calls: Sequence[Callable[[], T]]) -> list[T | Exception]:
        """Make all calls at once, each in its own thread; return their results and exceptions, in order."""
        ...


Case: TypeAlias = Callable[[Harness], None]
"""One case of the contract; it raises `AssertionError`."""


def cases_of(module: Mapping[str, Any]) -> tuple[Case, ...]:
    """Return the public functions of a module, in their order: every one is a case, so that none is forgotten."""
    public = ((name, value) for name, value in module.items() if not name.startswith("_") and inspect.isfunction(value))
    # From Python 3.13 on attrs gives `attrs.evolve` the module and name of each class's ``__replace__``.
    return tuple(value for name, value in public if (value.__module__, value.__name__) == (module["__name__"], name))


# --- requests to try a store with ---

NOW = 1_700_000_000
"""A time in the past of every store's own clock."""

DAY = 86_400
VAULT = Vault(KeyEncryptionKey.from_bytes(bytes(range(32))))
VM = Vm("5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY", "vm-0")
CALLERS = 8


def entropy(label: str, size: int) -> bytes:
    """Return ``size`` bytes that follow from the label."""
    return hashlib.shake_256(label.encode()).digest(size)


def fresh(label: str) -> FreshKey:
    """Return the new key of ``label``."""
    return FreshKey.from_entropy(entropy(f"key {label}", FreshKey.SIZE))


def platform(label: str) -> Platform:
    """Return a platform with an instance id."""
    return Platform(entropy(f"instance {label}", 16), entropy(f"ppid {label}", 16))


def boot(label: str, *, now: int = NOW, vm: Vm = VM) -> GrantBoot:
    """Return a boot of ``vm`` on platform ``home``; nonce, token, certificate and root key follow from ``label``."""
    return GrantBoot(
        now=now,
        boot_id=entropy(f"boot {label}", 16).hex(),
        nonce=Nonce(entropy(f"nonce {label}", 32), "boot", now - 5),
        vm=vm,
        platform=platform("home"),
        hotkey_proven=False,
        certificate=entropy(f"certificate {label}", 32),
        profile_name="profile",
        profile_version="1.0",
        tcb_status="UpToDate",
        exchange="base",
        token_needs_certificate=False,
        token_digest=entropy(f"token {label}", 32),
        quote_digest=entropy(f"quote {label}", 32),
        peer_address="192.0.2.1",
        vault=VAULT,
        root=fresh(f"root {label}"),
    )


def sync(granted: GrantBoot, body: str, *volumes: str, rekey: Sequence[str] = ()) -> SyncVolumes:
    """Return a sync with the token of ``granted``, from its VM and with its certificate, one second later."""
    return SyncVolumes(
        now=granted.now + 1,
        request_id=entropy(f"request {body}", 16).hex(),
        vm=granted.vm,
        token_digest=granted.token_digest,
        certificate=granted.certificate,
        body_digest=entropy(f"body {body}", 32),
        volumes=volumes,
        rekey=frozenset(rekey),
        formatted=None,
        fresh={volume: fresh(f"{granted.boot_id} {body} {volume}") for volume in volumes},
        vault=VAULT,
    )


def read(granted: GrantBoot, volume: str) -> ReadVolume:
    """Return a read of one volume with the token of ``granted``, one second later, as `sync` does."""
    return ReadVolume(
        now=granted.now + 1,
        request_id=entropy(f"read {granted.boot_id} {volume}", 16).hex(),
        vm=granted.vm,
        token_digest=granted.token_digest,
        certificate=granted.certificate,
        volume=volume,
        vault=VAULT,
    )


def attest(
    granted: GrantBoot, body: str, *volumes: str, formatted: Sequence[str] | None = None, rotate_after: int = 0
) -> AttestVolumes:
    """Return an attestation of ``volumes`` with the quote nonce of ``granted``, a two-phase boot, one second later."""
    nonce = entropy(f"confirm {granted.boot_id}", 32)
    fresh_keys = {volume: fresh(f"{granted.boot_id} {body} {volume}") for volume in volumes}
    return AttestVolumes(
        now=granted.now + 1,
        request_id=entropy(f"request {granted.boot_id} {body}", 16).hex(),
        vm=granted.vm,
        nonce_digest=granted.token_digest,
        certificate=granted.certificate,
        body_digest=entropy(f"body {body}", 32),
        quote=evolve(granted.quote, digest=entropy(f"runtime quote {body}", 32)),
        peer_address=granted.peer_address,
        volumes=volumes,
        formatted=None if formatted is None else frozenset(formatted),
        fresh={**fresh_keys, K3S_VOLUME: fresh(f"{granted.boot_id} {body} k3s")},
        confirm_nonces=(ConfirmNonce(Secret(nonce), hashlib.sha256(nonce).digest()),),
        vault=VAULT,
        rotate_after=rotate_after,
    )


def confirm(attested: AttestVolumes, rotated: Mapping[str, bool]) -> ConfirmVolumes:
    """Return the confirmation of the keys that ``attested`` got, one second later."""
    body = repr(sorted(rotated.items()))
    return ConfirmVolumes(
        now=attested.now + 1,
        request_id=entropy(f"confirm {attested.request_id} {body}", 16).hex(),
        vm=attested.vm,
        nonce_digest=attested.confirm_nonces[0].digest,
        body_digest=entropy(f"body {body}", 32),
        rotated=tuple(rotated.items()),
        vault=VAULT,
    )


def asking(store: Store) -> Callable[[StoreOp[T]], T]:
    """Return a function that performs one operation of ``store`` in a transaction of its own."""
    return lambda op: store.transact(Ask(op))


class Interruption(Exception):
    """Raised by an `Interrupted` unit."""


@frozen
class Interrupted(Unit[T]):
    """``unit``, interrupted after ``operations`` of its operations; with fewer, it ends as usual."""

    unit: Unit[T]
    operations: int

    def script(self) -> Script[T]:
        """Perform the operations of the unit, then raise `Interruption`."""
        script = self.unit.script()
        reply: Any = None
        for _ in range(self.operations):
            try:
                op = script.send(reply)
            except StopIteration as stop:
                result: T = stop.value
                return result
            reply = yield from op
        script.close()
        raise Interruption


@frozen
class Contents:
    """The nonce horizon and all rows, by kind."""

    horizon: int
    rows: Mapping[type[Row], frozenset[Row] | tuple[Row, ...]]


def dump(store: Store) -> Contents:
    """Return the whole content of a store; of audit rows in the order in which they were written."""
    found: dict[type[Row], tuple[Row, ...]] = {}
    for page in pages(store, 2):
        found[type(page[0])] = (*found.get(type(page[0]), ()), *page)
    rows = {kind: frozenset(rows) if kind.KEY else rows for kind, rows in found.items()}
    return Contents(store.transact(Ask(ReadTimes())).horizon, rows)


def expect(found: object, wanted: object, what: str) -> None:
    """Raise `AssertionError` unless both are equal."""
    if found != wanted:
        raise AssertionError(f"{what}: {found!r}, not {wanted!r}")


def expect_fault(call: Callable[[], object], what: str) -> None:
    """Raise `AssertionError` unless the call raises `StoreError`."""
    try:
        reply = call()
    except StoreError:
        return
    raise AssertionError(f"{what} is accepted: {reply!r}")


def expect_refused(call: Callable[[], object], code: Code) -> None:
    """Raise `AssertionError` unless the call is refused with ``code``."""
    try:
        reply = call()
    except Refusal as exc:
        expect(exc.code, code, "code of the refusal")
    else:
        raise AssertionError(f"not refused: {reply!r}")
