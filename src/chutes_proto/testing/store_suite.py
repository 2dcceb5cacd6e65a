"""The contract of a store, as cases that any store must pass.

A store's tests bring a `Harness` and run each of `CASES` with a new one. A case raises `AssertionError`.

Rules kept here:

* a case knows the store by `transact` alone, and what the store holds by `Scan`;
* entropy is made from labels, so two runs of a case do the same;
* what a store must do under a race is tried with as many callers at once as the harness can bring.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

from attrs import evolve, frozen

from chutes_proto.codes import Code
from chutes_proto.errors import Refused, StoreError
from chutes_proto.keys.generations import K3S_VOLUME
from chutes_proto.keys.vault import NONCE_SIZE, Address, FreshKey, KeyEncryptionKey, Vault
from chutes_proto.secret import Secret
from chutes_proto.store.rows import (
    ROWS,
    AttestationRow,
    AuditRow,
    BootRow,
    BootVolumeRow,
    Claim,
    CountClaims,
    CountRefusals,
    CountSealed,
    CountServerRefusals,
    DeleteServer,
    FindBoot,
    FindConfirm,
    FindLastBoot,
    FindLastBootFrom,
    FindServer,
    GenerationRow,
    GpuRow,
    Insert,
    IsRedeemed,
    NonceRow,
    Pin,
    Platform,
    PurgeGeneration,
    Put,
    RaiseHorizon,
    ReadAttestation,
    ReadAudit,
    ReadBoot,
    ReadBootVolumes,
    ReadGenerations,
    ReadGpu,
    ReadHorizon,
    ReadLiveGenerations,
    ReadNames,
    ReadOtherwiseSealed,
    ReadServer,
    ReadServers,
    ReadVm,
    ReadVolumes,
    RedeemNonce,
    RewrapGeneration,
    Row,
    Scan,
    ServerRow,
    SpendToken,
    StoreOp,
    SweepNonces,
    UpdateGeneration,
    Vm,
    VmRow,
    VoidTokens,
    VolumeRow,
)
from chutes_proto.store.run import Script, Store, Unit
from chutes_proto.units.boot import GrantBoot
from chutes_proto.units.operator import RewrapKeys, Rewrapped, StoreRestored
from chutes_proto.units.rotation import AttestVolumes, ConfirmNonce, ConfirmVolumes, Pair
from chutes_proto.units.servers import RegisterServer
from chutes_proto.units.volumes import ReadVolume, SyncVolumes, VolumeKeys

T = TypeVar("T")


class Harness(Protocol):
    """One empty store, and a way to call it from several places at once."""

    def open(self) -> Store:
        """A handle; all handles of one harness see the same rows, as different processes would."""
        ...

    def together(self, calls: Sequence[Callable[[], T]]) -> list[T | Exception]:
        """Make all calls at once, each in a thread of its own; what each returned or raised, in order."""
        ...


Case: TypeAlias = Callable[[Harness], None]

# --- requests to try a store with ---

NOW = 1_800_000_000
VAULT = Vault(KeyEncryptionKey.from_bytes(bytes(range(32))))
VM = Vm("5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY", "vm-0")
CALLERS = 8


def entropy(label: str, size: int) -> bytes:
    """Bytes that are another label's with no chance worth speaking of."""
    return hashlib.shake_256(label.encode()).digest(size)


def fresh(label: str) -> FreshKey:
    """The key that ``label`` stands for."""
    return FreshKey.from_entropy(entropy(f"key {label}", FreshKey.SIZE))


def platform(label: str) -> Platform:
    """A platform with an instance id."""
    return Platform(entropy(f"instance {label}", 16), entropy(f"ppid {label}", 16))


def boot(label: str, *, now: int = NOW, vm: Vm = VM) -> GrantBoot:
    """A boot of ``vm`` on platform ``home``; another label has another nonce, token, certificate and root entropy."""
    return GrantBoot(
        now=now,
        boot_id=entropy(f"boot {label}", 16).hex(),
        nonce=entropy(f"nonce {label}", 32),
        nonce_purpose="boot",
        nonce_issued_at=now - 5,
        vm=vm,
        platform=platform("home"),
        hotkey_proven=False,
        certificate=entropy(f"certificate {label}", 32),
        profile_name="profile",
        profile_version="1.0",
        exchange="base",
        token_needs_certificate=False,
        token_digest=entropy(f"token {label}", 32),
        quote_digest=entropy(f"quote {label}", 32),
        peer_address="192.0.2.1",
        vault=VAULT,
        root=fresh(f"root {label}"),
    )


def sync(granted: GrantBoot, body: str, *volumes: str, rekey: Sequence[str] = ()) -> SyncVolumes:
    """A sync with the token of ``granted``, from its VM and with its certificate, one second later."""
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
    """A read of one volume with the token of ``granted``, from its VM and with its certificate, one second later."""
    return ReadVolume(
        now=granted.now + 1,
        request_id=entropy(f"read {granted.boot_id} {volume}", 16).hex(),
        vm=granted.vm,
        token_digest=granted.token_digest,
        certificate=granted.certificate,
        volume=volume,
        vault=VAULT,
    )


def attest(granted: GrantBoot, body: str, *volumes: str, formatted: Sequence[str] | None = None) -> AttestVolumes:
    """An attestation of ``volumes`` with the quote nonce of ``granted``, a two-phase boot, one second later."""
    nonce = entropy(f"confirm {granted.boot_id}", 32)
    fresh_keys = {volume: fresh(f"{granted.boot_id} {body} {volume}") for volume in volumes}
    return AttestVolumes(
        now=granted.now + 1,
        request_id=entropy(f"request {granted.boot_id} {body}", 16).hex(),
        vm=granted.vm,
        nonce_digest=granted.token_digest,
        certificate=granted.certificate,
        body_digest=entropy(f"body {body}", 32),
        quote_digest=entropy(f"runtime quote {body}", 32),
        profile_name=granted.profile_name,
        profile_version=granted.profile_version,
        pin=granted.platform.pin,
        peer_address=granted.peer_address,
        volumes=volumes,
        formatted=None if formatted is None else frozenset(formatted),
        fresh={**fresh_keys, K3S_VOLUME: fresh(f"{granted.boot_id} {body} k3s")},
        confirm_nonces=(ConfirmNonce(Secret(nonce), hashlib.sha256(nonce).digest()),),
        vault=VAULT,
    )


def confirm(attested: AttestVolumes, rotated: Mapping[str, bool]) -> ConfirmVolumes:
    """The confirmation of what ``attested`` was handed, one second later."""
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


@frozen
class Ask(Unit[T]):
    """One operation as a transaction of its own."""

    op: StoreOp[T]

    def script(self) -> Script[T]:
        """The operation."""
        return (yield from self.op)


class Interruption(Exception):
    """What an `Interrupted` unit raises."""


@frozen
class Interrupted(Unit[T]):
    """``unit``, which raises `Interruption` after ``operations`` of its operations; with fewer, it ends as usual."""

    unit: Unit[T]
    operations: int

    def script(self) -> Script[T]:
        """The operations of the unit, one by one."""
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
class Everything(Unit[tuple[object, ...]]):
    """The horizon, then all rows of each kind."""

    def script(self) -> Script[tuple[object, ...]]:
        """One scan after the other."""
        found: tuple[object, ...] = ((yield from ReadHorizon()),)
        for kind in ROWS:
            found = (*found, (yield from Scan(kind)))
        return found


def dump(store: Store) -> tuple[object, ...]:
    """All that a store holds."""
    return store.transact(Everything())


def expect(found: object, wanted: object, what: str) -> None:
    """Raises `AssertionError` unless both are equal."""
    if found != wanted:
        raise AssertionError(f"{what}: {found!r}, not {wanted!r}")


def expect_refused(call: Callable[[], object], code: Code) -> None:
    """Raises `AssertionError` unless the call is refused with ``code``."""
    try:
        reply = call()
    except Refused as exc:
        expect(exc.code, code, "code of the refusal")
    else:
        raise AssertionError(f"not refused: {reply!r}")


def _codes(outcomes: Sequence[object]) -> list[Code | str]:
    """The codes of those that were refused. Raises `AssertionError` for any other fault."""
    faults = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    if strange := [fault for fault in faults if not isinstance(fault, Refused)]:
        raise AssertionError(f"neither granted nor refused: {strange!r}") from strange[0]
    return [fault.code for fault in faults if isinstance(fault, Refused)]


# --- rows and operations ---

_PIN = Pin("ppid", entropy("ppid", 16))
_BOOT = BootRow(
    boot_id="b0",
    vm=VM,
    pin=_PIN,
    certificate=entropy("certificate", 32),
    profile_name="profile",
    profile_version="1.0",
    exchange="base",
    quote_digest=entropy("quote", 32),
    token_digest=entropy("token", 32),
    token_expires_at=NOW + 600,
    token_needs_certificate=True,
    peer_address="2001:db8::1",
    created_at=NOW,
)
_KEY = GenerationRow(
    vm=VM,
    volume="storage",
    generation=1,
    state="active",
    sealed=entropy("sealed", 156),
    kek_id="0123456789abcdef",
    wrapped_key=entropy("wrapped", 60),
    provisional=False,
    created_at=NOW,
    origin="b0",
)
_VM = VmRow(
    vm=VM,
    pin=_PIN,
    instance_id=None,
    ppid=_PIN.value,
    proven=True,
    exchange="two-phase",
    created_at=NOW,
    last_boot_at=NOW,
)
_REFUSAL = AttestationRow(
    attestation_id="a1",
    stage="boot",
    vm=VM,
    pin=_PIN,
    code="measurement_mismatch",
    reason="RTMR1: ä ☃ ' \" ; --",
    profile_name=None,
    profile_version=None,
    quote_digest=bytes(32),
    peer_address="",
    created_at=NOW,
)

_SERVER = ServerRow(
    server_id="n1",
    registration="r1",
    hotkey=VM.hotkey,
    name="vm-0",
    host="a.example",
    address="1.2.3.4",
    boot_id=None,
    pin=None,
    created_at=NOW,
)
_GPU = GpuRow("gpu-1", "n1", "h200", '{"uuid":"GPU-1"}')


def rows_come_back_as_they_were(harness: Harness) -> None:
    """Every kind of row, with and without its optional values, through another handle; audit rows in their order."""
    store = harness.open()
    rows: tuple[Row, ...] = (
        _BOOT,
        evolve(_BOOT, boot_id="b1", token_digest=bytes(32), spent_at=NOW, body_digest=b"\0\xff", voided_at=NOW),
        BootVolumeRow("b0", "storage", 0, 1, None, in_use=True),
        _KEY,
        evolve(_KEY, generation=2, state="retired", delivered_at=NOW, retired_at=NOW, retirement="prune"),
        evolve(_KEY, generation=3, state="purged", sealed=None, kek_id=None, wrapped_key=None),
        evolve(_KEY, generation=4, state="candidate", provisional=True),
        _REFUSAL,
        evolve(_REFUSAL, attestation_id="a2", stage="runtime", pin=None, registration="r1"),
        AuditRow(NOW, "vm", "zuerst", "granted", vm=VM, pin=_PIN, quote_digest=bytes(32), keys="storage/1 created"),
        AuditRow(NOW - 1, "operator", "afterwards", "done"),
    )
    for row in rows:
        store.transact(Ask(Insert(row)))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType] - see `Insert`
    volume = VolumeRow(VM, "storage", in_use=True, format_allowed=False)
    for row in (_VM, volume):
        store.transact(Ask(Put(row)))
    other_server = evolve(
        _SERVER,
        server_id="n2",
        registration="r2",
        name="b",
        address="2001:db8::1",
        boot_id="b0",
        pin=_PIN,
        updated_at=NOW,
        attested="a2",
    )
    servers = (_SERVER, other_server, _GPU)
    for claimed in servers:
        expect(store.transact(Ask(Claim(claimed))), True, "a new row")
    nonce = NonceRow(bytes(32), "boot", NOW - 60, NOW)
    expect(store.transact(Ask(IsRedeemed(nonce.value))), False, "a nonce that is not there")
    expect(store.transact(Ask(RedeemNonce(nonce))), True, "a new nonce")
    expect(store.transact(Ask(IsRedeemed(nonce.value))), True, "a nonce that is there")
    other = harness.open()
    for kind in ROWS:
        wanted = tuple(row for row in (*rows, _VM, volume, nonce, *servers) if type(row) is kind)
        expect(other.transact(Ask(Scan(kind))), wanted, kind.TABLE)


def operations_reply_what_they_say(harness: Harness) -> None:
    """The replies of all operations that read, find or count."""
    ask = harness.open().transact
    stranger = Vm(VM.hotkey, "vm-1")
    expect(ask(Ask(ReadVm(VM))), None, "a claim that is not there")
    ask(Ask(Put(evolve(_VM, proven=False))))
    ask(Ask(Put(_VM)))
    expect(ask(Ask(ReadVm(VM))), _VM, "a claim that was replaced")
    expect(ask(Ask(ReadVm(stranger))), None, "another VM's claim")
    ask(Ask(Put(evolve(_VM, vm=stranger))))
    expect(ask(Ask(CountClaims(_PIN))), 2, "claims of a platform")
    expect(ask(Ask(CountClaims(evolve(_PIN, kind="instance")))), 0, "claims of another kind of platform id")
    ask(Ask(Insert(_BOOT)))
    expect(ask(Ask(FindBoot(_BOOT.token_digest))), _BOOT, "the boot of a token")
    expect(ask(Ask(FindBoot(bytes(32)))), None, "the boot of no token")
    for position, volume in enumerate(("zeta", "alpha")):
        ask(Ask(Insert(BootVolumeRow("b0", volume, position, 1, 2, in_use=False))))
    given = ask(Ask(ReadBootVolumes("b0")))
    expect([row.volume for row in given], ["zeta", "alpha"], "what a boot was given, by position")
    expect(ask(Ask(ReadBootVolumes("b1"))), (), "what no boot was given")
    ask(Ask(Insert(evolve(_KEY, volume="tdx-cache"))))
    ask(Ask(Insert(_KEY)))
    ask(Ask(Insert(evolve(_KEY, vm=stranger))))
    expect(ask(Ask(ReadGenerations(VM))), (_KEY, evolve(_KEY, volume="tdx-cache")), "a VM's keys")
    unclaimed = Vm("another", VM.name)
    ask(Ask(Insert(evolve(_KEY, vm=unclaimed))))
    expect(ask(Ask(ReadNames())), (VM, stranger, unclaimed), "names that are claimed or have keys")
    expect(ask(Ask(ReadNames(VM.name))), (VM, unclaimed), "names that are called so")
    expect(ask(Ask(ReadNames("vm-2"))), (), "names that are called as none is")
    known = VolumeRow(VM, "storage", in_use=False, format_allowed=True)
    ask(Ask(Put(evolve(known, in_use=True))))
    ask(Ask(Put(known)))
    expect(ask(Ask(ReadVolumes(VM))), (known,), "what is known of a VM's disks")
    expect(ask(Ask(ReadVolumes(stranger))), (), "what is known of another VM's disks")
    ask(Ask(Insert(_REFUSAL)))
    ask(Ask(Insert(evolve(_REFUSAL, attestation_id="a2", code=None))))
    ask(Ask(Insert(evolve(_REFUSAL, attestation_id="a3", created_at=NOW - 1))))
    expect(ask(Ask(CountRefusals(_PIN, NOW))), 1, "refusals since a time")
    expect(ask(Ask(CountRefusals(_PIN, NOW - 1))), 2, "refusals since an earlier time")
    expect(ask(Ask(CountRefusals(evolve(_PIN, value=bytes(16)), 0))), 0, "another platform's refusals")
    told = [AuditRow(NOW - number, "vm", f"event {number}", "granted") for number in range(5)]
    for row in told:
        ask(Ask(Insert(row)))
    first = ask(Ask(ReadAudit(0, 3)))
    rest = ask(Ask(ReadAudit(first[-1][0], 3)))
    expect([row for _, row in (*first, *rest)], told, "audit rows in two pages")
    newest = ask(Ask(ReadAudit(1 << 62, 4, backwards=True)))
    oldest = ask(Ask(ReadAudit(newest[-1][0], 4, backwards=True)))
    expect((*newest, *oldest), (*first, *rest)[::-1], "audit rows in two pages, backwards")


def tokens_are_spent_once_and_voided(harness: Harness) -> None:
    """`SpendToken` holds once; `VoidTokens` reaches one VM's tokens, or all, and does not move a time that stands."""
    ask = harness.open().transact
    other = evolve(_BOOT, boot_id="b1", vm=Vm("other", "vm"), token_digest=bytes(32))
    ask(Ask(Insert(_BOOT)))
    ask(Ask(Insert(other)))
    expect(ask(Ask(SpendToken("b0", NOW + 1, b"first"))), True, "the first to spend a token")
    expect(ask(Ask(SpendToken("b0", NOW + 2, b"second"))), False, "the second to spend a token")
    expect(ask(Ask(SpendToken("b2", NOW, b""))), False, "the token of no boot")
    spent = evolve(_BOOT, spent_at=NOW + 1, body_digest=b"first")
    expect(ask(Ask(Scan(BootRow))), (spent, other), "a spent token and another")
    ask(Ask(VoidTokens(VM, NOW + 3)))
    expect(ask(Ask(Scan(BootRow))), (evolve(spent, voided_at=NOW + 3), other), "one VM's tokens voided")
    ask(Ask(VoidTokens(None, NOW + 4)))
    wanted = (evolve(spent, voided_at=NOW + 3), evolve(other, voided_at=NOW + 4))
    expect(ask(Ask(Scan(BootRow))), wanted, "all tokens voided")


def nonces_are_redeemed_once_and_swept(harness: Harness) -> None:
    """`RedeemNonce` holds once; `SweepNonces` takes the oldest, and no more than it may; the horizon never sinks."""
    ask = harness.open().transact
    rows = tuple(NonceRow(bytes([9 - index]) * 32, "boot", NOW + index - 5, NOW + index) for index in range(4))
    for row in rows:
        expect(ask(Ask(RedeemNonce(row))), True, "a new nonce")
    expect(ask(Ask(RedeemNonce(evolve(rows[0], redeemed_at=NOW + 9)))), False, "a nonce that was redeemed")
    expect(ask(Ask(SweepNonces(NOW - 1, 10))), (), "nonces too young to sweep")
    expect(ask(Ask(SweepNonces(NOW + 2, 2))), (rows[1], rows[0]), "the two oldest nonces, by value")
    expect(ask(Ask(Scan(NonceRow))), (rows[3], rows[2]), "the nonces that are left")
    for to, wanted in ((NOW, NOW), (NOW - 1, NOW), (NOW + 1, NOW + 1)):
        ask(Ask(RaiseHorizon(to)))
        expect(ask(Ask(ReadHorizon())), wanted, "the horizon")


def servers_are_claimed_found_and_deleted(harness: Harness) -> None:
    """What a server has is its own; all operations on servers; with a server go its GPUs, nothing else."""
    ask = harness.open().transact
    ask(Ask(Insert(_BOOT)))
    ask(Ask(Insert(evolve(_BOOT, boot_id="b1", token_digest=bytes(32), created_at=NOW + 1))))
    stranger = evolve(_BOOT, boot_id="b2", token_digest=b"2", vm=Vm("other", VM.name), created_at=NOW + 2)
    ask(Ask(Insert(stranger)))
    expect(ask(Ask(ReadBoot("b0"))), _BOOT, "a boot by its id")
    expect(ask(Ask(ReadBoot("b9"))), None, "a boot that is not there")
    for newest in (FindLastBoot(VM), FindLastBootFrom(VM.hotkey, _BOOT.peer_address)):
        found = ask(Ask(newest))
        expect(found and found.boot_id, "b1", "the newest boot")
    expect(ask(Ask(FindLastBoot(Vm(VM.hotkey, "vm-1")))), None, "a boot of another name")
    expect(ask(Ask(FindLastBootFrom(VM.hotkey, ""))), None, "a boot from another address")
    expect(ask(Ask(Claim(_SERVER))), True, "a new server")
    fresh_server = evolve(_SERVER, server_id="n2", registration="r2", name="b", address="5.6.7.8")
    expect(ask(Ask(Claim(fresh_server))), True, "another server")
    expect(ask(Ask(Claim(_GPU))), True, "a new GPU")
    before = dump(harness.open())
    third = evolve(_SERVER, server_id="n3", registration="r3", name="c", address="9.9.9.9")
    taken = {
        "id": evolve(third, server_id="n1"),
        "registration": evolve(third, registration="r1"),
        "name": evolve(third, name="vm-0"),
        "address": evolve(third, address="1.2.3.4"),
    }
    for what, second in taken.items():
        expect(ask(Ask(Claim(second))), False, f"a second server with one {what}")
    expect(ask(Ask(Claim(evolve(_GPU, server_id="n2")))), False, "a GPU of two servers")
    expect(dump(harness.open()), before, "rows after what was not claimed")
    expect(ask(Ask(Claim(evolve(third, hotkey="other", name="vm-0")))), True, "another hotkey's server of one name")
    expect(ask(Ask(ReadServer("n1"))), _SERVER, "a server by its id")
    expect(ask(Ask(ReadServer("n9"))), None, "a server that is not there")
    expect(ask(Ask(FindServer("5.6.7.8"))), fresh_server, "the server at an address")
    expect(ask(Ask(FindServer("5.6.7.9"))), None, "the server at no address")
    expect(ask(Ask(ReadServers(VM.hotkey))), (_SERVER, fresh_server), "servers of a hotkey")
    expect(ask(Ask(ReadGpu("gpu-1"))), _GPU, "a GPU")
    expect(ask(Ask(ReadGpu("gpu-2"))), None, "a GPU that is not there")
    refusal = evolve(_REFUSAL, stage="runtime", registration="r1")
    ask(Ask(Insert(refusal)))
    ask(Ask(Insert(evolve(refusal, attestation_id="a2", code=None))))
    ask(Ask(Insert(evolve(refusal, attestation_id="a3", created_at=NOW - 1))))
    ask(Ask(Insert(evolve(refusal, attestation_id="a4", registration="r2"))))
    expect(ask(Ask(CountServerRefusals("r1", NOW))), 1, "refusals of a registration since a time")
    expect(ask(Ask(ReadAttestation("a1"))), refusal, "a verdict")
    expect(ask(Ask(ReadAttestation("a9"))), None, "a verdict that is not there")
    renamed = evolve(_SERVER, name="z", updated_at=NOW, attested="a1", pin=_PIN)
    ask(Ask(Put(renamed)))
    expect(ask(Ask(ReadServer("n1"))), renamed, "a server that was replaced")
    try:
        ask(Ask(Put(evolve(renamed, name="b"))))
    except StoreError:
        expect(ask(Ask(ReadServer("n1"))), renamed, "a server after a name that is taken")
    else:
        raise AssertionError("taken: a name of two servers")
    ask(Ask(DeleteServer("n1")))
    expect(ask(Ask(ReadServer("n1"))), None, "a deleted server")
    expect(ask(Ask(ReadGpu("gpu-1"))), None, "a GPU of a deleted server")
    expect(len(ask(Ask(Scan(AttestationRow)))), 4, "verdicts after their server is gone")
    expect(len(ask(Ask(Scan(ServerRow)))), 2, "servers after one is gone")


def what_must_be_unique_is(harness: Harness) -> None:
    """A second row with a key, a second token, a second active key or candidate: `StoreError`, and nothing changes."""
    store = harness.open()
    ask = store.transact
    ask(Ask(Insert(_BOOT)))
    ask(Ask(Insert(_KEY)))
    ask(Ask(Insert(evolve(_KEY, generation=2, state="candidate"))))
    retired = evolve(_KEY, generation=3, state="retired", retired_at=NOW, retirement="rekey")
    ask(Ask(Insert(retired)))
    before = dump(store)
    wrong: dict[str, StoreOp[None]] = {
        "a second boot of one id": Insert(evolve(_BOOT, token_digest=bytes(32))),
        "a second boot with one token": Insert(evolve(_BOOT, boot_id="b1")),
        "a second generation of one number": Insert(evolve(retired, sealed=b"other")),
        "a second active generation": Insert(evolve(_KEY, generation=4)),
        "a second candidate": Insert(evolve(_KEY, generation=4, state="candidate")),
        "a retired generation made a second active one": UpdateGeneration(evolve(retired, state="active")),
        "a volume given to no boot": Insert(BootVolumeRow("b9", "storage", 0, 1, None, in_use=False)),
    }
    for what, op in wrong.items():
        try:
            ask(Ask(op))
        except StoreError:
            expect(dump(store), before, f"rows after {what}")
        else:
            raise AssertionError(f"taken: {what}")


def a_sealed_key_never_changes(harness: Harness) -> None:
    """`UpdateGeneration` writes state and times, whatever else the row says; it makes no row."""
    ask = harness.open().transact
    ask(Ask(Insert(_KEY)))
    retired = evolve(_KEY, state="retired", provisional=True, delivered_at=NOW, retired_at=NOW + 1, retirement="rekey")
    ask(Ask(UpdateGeneration(evolve(retired, sealed=b"other", wrapped_key=b"other", kek_id="other"))))
    ask(Ask(UpdateGeneration(evolve(retired, generation=2))))
    expect(ask(Ask(Scan(GenerationRow))), (retired,), "a key after a change of state")


def of_many_keys_few_are_live(harness: Harness) -> None:
    """`ReadLiveGenerations` replies with what `ReadGenerations` does, but for retired keys that nothing asks for."""
    ask = harness.open().transact
    old = evolve(_KEY, state="retired", retired_at=NOW, retirement="rekey")
    rows = [
        evolve(old, generation=1),
        evolve(old, generation=2, retirement="prune"),
        evolve(old, generation=3, provisional=True, retirement="superseded"),
        evolve(old, generation=4),
        evolve(_KEY, generation=5),
        evolve(old, generation=6),
        evolve(old, generation=7, retirement="dropped"),
        evolve(_KEY, generation=8, state="candidate"),
        evolve(old, generation=9),
        evolve(old, generation=10),
        evolve(old, volume="tdx-cache", generation=4),
        evolve(old, volume="tdx-cache", generation=5),
    ]
    ask(Ask(Insert(_BOOT)))
    ask(Ask(Insert(BootVolumeRow("b0", "storage", 0, 4, 7, in_use=False))))
    ask(Ask(Insert(BootVolumeRow("b0", "tdx-cache", 1, None, 5, in_use=False))))
    for row in (*rows, *(evolve(row, vm=Vm(VM.hotkey, "vm-1")) for row in rows)):
        ask(Ask(Insert(row)))
    live = [rows[index] for index in (1, 2, 4, 7, 9, 11)]
    expect([*ask(Ask(ReadLiveGenerations(VM)))], live, "keys on which a request may depend")
    given = [rows[index] for index in (1, 2, 3, 4, 6, 7, 9, 11)]
    expect([*ask(Ask(ReadLiveGenerations(VM, "b0")))], given, "the same, and what a boot was given")
    expect([*ask(Ask(ReadLiveGenerations(VM, "b1")))], live, "the same, and what no boot was given")
    expect(ask(Ask(ReadLiveGenerations(Vm("another", VM.name)))), (), "another VM's")


def keys_are_wrapped_anew_and_purged(harness: Harness) -> None:
    """`RewrapGeneration` changes the wrapping alone, `PurgeGeneration` a retired key alone; both are counted."""
    ask = harness.open().transact
    retired = evolve(_KEY, generation=2, state="retired", retired_at=NOW, retirement="superseded", provisional=True)
    for row in (_KEY, retired):
        ask(Ask(Insert(row)))
    kek = _KEY.kek_id or ""
    expect(ask(Ask(CountSealed())), ((kek, 2),), "keys under each key-encryption key")
    expect(ask(Ask(ReadOtherwiseSealed(kek, 9))), (), "keys under another one")
    expect(len(ask(Ask(ReadOtherwiseSealed("new", 1)))), 1, "as many keys as asked for")
    expect(ask(Ask(ReadOtherwiseSealed("new", 9))), (_KEY, retired), "keys under another one, all")
    wrapped = evolve(_KEY, kek_id="new", wrapped_key=b"anew")
    ask(Ask(RewrapGeneration(evolve(wrapped, sealed=b"other", state="retired"))))
    expect(ask(Ask(ReadGenerations(VM))), (wrapped, retired), "keys after one was wrapped anew")
    expect(ask(Ask(CountSealed())), tuple(sorted([(kek, 1), ("new", 1)])), "keys under two key-encryption keys")
    ask(Ask(PurgeGeneration(wrapped)))  # it is active
    ask(Ask(PurgeGeneration(retired)))
    nothing = evolve(retired, sealed=None, kek_id=None, wrapped_key=None)
    purged = evolve(nothing, state="purged", provisional=False)
    expect(ask(Ask(ReadGenerations(VM))), (wrapped, purged), "keys after one was purged")
    ask(Ask(RewrapGeneration(retired)))
    expect(ask(Ask(ReadGenerations(VM))), (wrapped, purged), "a purged key that was wrapped anew")


def boots_are_found_by_their_confirm_nonce(harness: Harness) -> None:
    """`FindConfirm`, and a boot's row that is replaced; two boots never have one confirm nonce."""
    ask = harness.open().transact
    ask(Ask(Insert(_BOOT)))
    expect(ask(Ask(FindConfirm(bytes(32)))), None, "the boot of no confirm nonce")
    ask(Ask(Insert(BootVolumeRow("b0", "storage", 0, 1, 2, in_use=True))))
    attested = evolve(_BOOT, confirm_digest=bytes(32), confirm_expires_at=NOW + 300)
    ask(Ask(Put(attested)))
    expect(ask(Ask(FindConfirm(bytes(32)))), attested, "the boot of a confirm nonce")
    confirmed = evolve(attested, confirm_body_digest=b"body")
    ask(Ask(Put(confirmed)))
    expect(ask(Ask(FindBoot(_BOOT.token_digest))), confirmed, "a boot that confirmed")
    other = evolve(attested, boot_id="b9", token_digest=b"t" * 32)
    try:
        ask(Ask(Insert(other)))
    except StoreError:
        expect(ask(Ask(FindBoot(other.token_digest))), None, "a second boot with one confirm nonce")
    else:
        raise AssertionError("taken: two boots with one confirm nonce")


# --- transactions ---


def what_raises_leaves_no_trace(harness: Harness) -> None:
    """A boot and a sync, stopped after each of their operations: the rows are as before, and then both succeed."""
    store = harness.open()
    first = boot("first")
    _ = store.transact(first)
    _ = store.transact(sync(first, "first", "storage", "tdx-cache"))
    second = boot("second")
    _leaves_no_trace(store, second)
    _leaves_no_trace(store, sync(second, "second", "storage", rekey=["storage"]))
    third = evolve(boot("third"), exchange="two-phase")
    _ = store.transact(third)
    _leaves_no_trace(store, attest(third, "third", "storage", "tdx-cache"))
    _leaves_no_trace(store, confirm(attest(third, "third"), {"storage": True, "tdx-cache": False}))
    takeover = evolve(boot("fourth"), platform=platform("elsewhere"), hotkey_proven=True)
    _leaves_no_trace(store, takeover)


def _leaves_no_trace(store: Store, unit: Unit[Any]) -> None:
    before = dump(store)
    for operations in range(1000):
        try:
            _ = store.transact(Interrupted(unit, operations))
        except Interruption:
            expect(dump(store), before, f"rows after {operations} operations of {type(unit).__name__}")
        else:
            if operations < 5 or dump(store) == before:
                raise AssertionError(f"{type(unit).__name__} did next to nothing")
            return
    raise AssertionError(f"{type(unit).__name__} never ends")


def what_is_raised_comes_out_unchanged(harness: Harness) -> None:
    """The very exception of a script, of any kind, and the store works on."""

    @frozen
    class Raise(Unit[None]):
        exc: BaseException

        def script(self) -> Script[None]:
            yield from Put(_VM)
            raise self.exc

    store = harness.open()
    for exc in (Refused(Code.NONCE_INVALID, "no"), ValueError("no"), OSError("no"), KeyboardInterrupt()):
        try:
            store.transact(Raise(exc))
        except BaseException as caught:
            if caught is not exc:
                raise AssertionError(f"{exc!r} came out as {caught!r}") from caught
        expect(store.transact(Ask(Scan(VmRow))), (), "rows after a roll-back")


def what_was_committed_is_seen_by_all(harness: Harness) -> None:
    """A second handle that was opened before sees what the first one wrote."""
    writer, reader = harness.open(), harness.open()
    granted = boot("only")
    _ = writer.transact(granted)
    keys = reader.transact(sync(granted, "body", "storage"))
    again = writer.transact(sync(granted, "body", "storage"))
    expect(again, evolve(keys, replayed=True), "the answer given again by another handle")


# --- races ---


def _race(harness: Harness, units: Sequence[Unit[T]]) -> list[T | Exception]:
    stores = [harness.open() for _ in units]
    return harness.together([_caller(store, unit) for store, unit in zip(stores, units, strict=True)])


def _caller(store: Store, unit: Unit[T]) -> Callable[[], T]:
    return lambda: store.transact(unit)


def one_nonce_grants_one_boot(harness: Harness) -> None:
    """Many boots with one nonce at once: one is granted."""
    nonce = boot("0").nonce
    outcomes = _race(harness, [evolve(boot(str(index)), nonce=nonce) for index in range(CALLERS)])
    expect(_codes(outcomes), [Code.NONCE_INVALID] * (CALLERS - 1), "those that lost")
    expect(len(harness.open().transact(Ask(Scan(BootRow)))), 1, "boots of one nonce")


def boots_at_once_agree_on_one_root_passphrase(harness: Harness) -> None:
    """Many first boots of one VM at once: one passphrase is made, all get it."""
    outcomes = _race(harness, [boot(str(index)) for index in range(CALLERS)])
    expect(_codes(outcomes), [], "those that were refused")
    roots = [outcome.root for outcome in outcomes if not isinstance(outcome, Exception)]
    expect(roots, [roots[0]] * CALLERS, "root passphrases")
    expect(len(harness.open().transact(Ask(Scan(GenerationRow)))), 1, "keys that were made")


def one_token_is_spent_once(harness: Harness) -> None:
    """Many syncs with one token and different bodies at once: one is granted, and only its key is made."""
    granted = boot("only")
    _ = harness.open().transact(granted)
    outcomes = _race(harness, [sync(granted, str(index), "storage") for index in range(CALLERS)])
    expect(_codes(outcomes), [Code.BOOT_TOKEN_INVALID] * (CALLERS - 1), "those that lost")
    keys = harness.open().transact(Ask(Scan(GenerationRow)))
    expect([row.volume for row in keys], ["root", "storage"], "keys that were made")


def one_sync_sent_often_has_one_answer(harness: Harness) -> None:
    """One request, doubled on its way: one answer is the first one, all are the same, nothing is done twice."""
    granted = boot("only")
    _ = harness.open().transact(granted)
    unit = sync(granted, "body", "storage", "tdx-cache", rekey=["storage"])
    outcomes = _race(harness, [evolve(unit, request_id=f"r{index}") for index in range(CALLERS)])
    expect(_codes(outcomes), [], "those that were refused")
    answers = [outcome for outcome in outcomes if isinstance(outcome, VolumeKeys)]
    expect(sorted(answer.replayed for answer in answers), [False] + [True] * (CALLERS - 1), "answers given again")
    passphrases = [answer.passphrases for answer in answers]
    expect(passphrases, [passphrases[0]] * CALLERS, "passphrases")
    keys = harness.open().transact(Ask(Scan(GenerationRow)))
    expect([(row.volume, row.generation) for row in keys], [("root", 1), ("storage", 1), ("tdx-cache", 1)], "keys")


def one_quote_nonce_hands_out_once(harness: Harness) -> None:
    """Many attestations with one quote nonce at once: those with one body agree, the others are refused."""
    granted = evolve(boot("only"), exchange="two-phase")
    _ = harness.open().transact(granted)
    outcomes = _race(harness, [attest(granted, str(index % 2), "storage") for index in range(CALLERS)])
    expect(_codes(outcomes), [Code.QUOTE_NONCE_INVALID] * (CALLERS // 2), "those that lost")
    handed = [outcome for outcome in outcomes if not isinstance(outcome, Exception)]
    expect([keys.volumes for keys in handed], [handed[0].volumes] * (CALLERS // 2), "keys that were handed out")
    keys = harness.open().transact(Ask(Scan(GenerationRow)))
    expect([row.volume for row in keys], ["k3s", "root", "storage"], "keys that were made")


def boots_at_once_are_handed_the_same_keys(harness: Harness) -> None:
    """Many two-phase boots of one VM attest at once: one first key, one candidate, and one of them may confirm."""
    boots = [evolve(boot(str(index)), exchange="two-phase") for index in range(CALLERS)]
    for granted in boots:
        _ = harness.open().transact(granted)
    attests = [attest(granted, "body", "storage") for granted in boots]
    outcomes = _race(harness, attests)
    expect(_codes(outcomes), [], "those that were refused")
    pairs = [outcome.volumes[0][1] for outcome in outcomes if not isinstance(outcome, Exception)]
    (first,) = [pair.next for pair in pairs if pair.current is None]
    others = [pair for pair in pairs if pair.current is not None]
    expect(others, [Pair(first, others[0].next)] * (CALLERS - 1), "keys of the others")
    settled = _race(harness, [confirm(attested, {"storage": True}) for attested in attests])
    expect(len(_codes(settled)), CALLERS - 1, "confirmations that do not count")
    rows = [row for row in harness.open().transact(Ask(ReadGenerations(VM))) if row.volume == "storage"]
    expect(sorted(row.state for row in rows), ["active", "retired"], "generations")


def one_confirmation_decides(harness: Harness) -> None:
    """Two confirmations of one boot that differ, each sent often and at once: one decides, and is answered alike."""
    store = harness.open()
    first, second = (evolve(boot(label), exchange="two-phase") for label in ("first", "second"))
    for granted in (first, second):
        _ = store.transact(granted)
        _ = store.transact(attest(granted, "body", "storage"))
    units = [confirm(attest(second, "body", "storage"), {"storage": index % 2 == 0}) for index in range(CALLERS)]
    outcomes = _race(harness, units)
    expect(_codes(outcomes), [Code.CONFIRM_NONCE_INVALID] * (CALLERS // 2), "those that lost")
    (result,) = {outcome for outcome in outcomes if not isinstance(outcome, Exception)}
    rows = [row for row in harness.open().transact(Ask(ReadGenerations(VM))) if row.volume == "storage"]
    told = {"promoted": ["retired", "active"], "discarded": ["active", "retired"]}[result[0][1]]
    expect([row.state for row in rows], told, "generations")


def one_platform_gets_a_free_name(harness: Harness) -> None:
    """Boots of many platforms under one free name at once: one platform gets it."""
    outcomes = _race(harness, [evolve(boot(str(i)), platform=platform(str(i))) for i in range(CALLERS)])
    expect(_codes(outcomes), [Code.PLATFORM_MISMATCH] * (CALLERS - 1), "those that lost")


def a_platform_gets_no_more_names_than_it_may(harness: Harness) -> None:
    """Boots of one platform under many names at once: as many are granted as there is room."""
    names = [Vm(VM.hotkey, f"vm-{index}") for index in range(CALLERS)]
    outcomes = _race(harness, [evolve(boot(vm.name, vm=vm), claims_per_platform=3) for vm in names])
    expect(_codes(outcomes), [Code.PLATFORM_MISMATCH] * (CALLERS - 3), "those that lost")


def servers_at_once_share_nothing(harness: Harness) -> None:
    """Many registrations at once that want one address, one GPU or one id: one of each has it."""
    for number, wanted in enumerate(("address", "gpu", "server_id")):
        units = [_registration(f"{number}-{index}", f"{number}", wanted) for index in range(CALLERS)]
        outcomes = _race(harness, units)
        codes = {"address": Code.HOST_TAKEN, "gpu": Code.GPU_TAKEN, "server_id": Code.SERVER_TAKEN}
        expect(_codes(outcomes), [codes[wanted]] * (CALLERS - 1), f"those that lost the {wanted}")
        expect(len(harness.open().transact(Ask(Scan(ServerRow)))), number + 1, "servers")


def _registration(own: str, shared: str, wanted: str) -> RegisterServer:
    """A registration of hotkey ``own``, all of whose claims are its own but for the one that is ``wanted``."""
    server_id = shared if wanted == "server_id" else own
    return RegisterServer(
        now=NOW,
        request_id=entropy(own, 16).hex(),
        hotkey=own,
        server_id=server_id,
        name="name",
        host="a.example",
        address=shared if wanted == "address" else own,
        gpus=(GpuRow(shared if wanted == "gpu" else own, server_id, "h200", "{}"),),
        profiles={},
        peer_address="",
    )


def boots_and_syncs_at_once_keep_every_key(harness: Harness) -> None:
    """Syncs of one VM with many tokens at once, half of them with ``rekey``: every key that was handed out is kept."""
    boots = [boot(str(index)) for index in range(CALLERS)]
    for granted in boots:
        _ = harness.open().transact(granted)
    units = [sync(granted, "b", "storage", rekey=["storage"][index % 2 :]) for index, granted in enumerate(boots)]
    outcomes = _race(harness, units)
    expect(_codes(outcomes), [], "those that were refused")
    handed_out = {outcome.passphrases[0][1].reveal() for outcome in outcomes if isinstance(outcome, VolumeKeys)}
    store = harness.open()
    rows = [row for row in store.transact(Ask(ReadGenerations(VM))) if row.volume == "storage"]
    expect([row.generation for row in rows], list(range(1, len(rows) + 1)), "numbers of the generations")
    expect(len(rows) in (CALLERS // 2, CALLERS // 2 + 1), True, f"{len(rows)} keys of {CALLERS // 2} rekeys")
    expect([row.state for row in rows].count("active"), 1, "active keys")
    answers = [store.transact(evolve(unit, request_id="again")) for unit in units]
    expect({answer.passphrases[0][1].reveal() for answer in answers}, handed_out, "keys given again")


def rewraps_at_once_wrap_each_key_once(harness: Harness) -> None:
    """Many rewraps at once, each of a few rows: every key is wrapped anew, by one of them, and opens as before."""
    store = harness.open()
    for index in range(CALLERS):
        granted = boot(str(index))
        _ = store.transact(granted)
        _ = store.transact(sync(granted, "b", "storage", rekey=["storage"]))
    before = store.transact(Ask(Scan(GenerationRow)))
    few = -(-len(before) // CALLERS)
    newer = KeyEncryptionKey.from_bytes(bytes(range(1, 33)))
    units = [
        RewrapKeys(NOW, entropy(f"rewrap {index}", few * NONCE_SIZE), Vault(newer, VAULT.current), "new key")
        for index in range(CALLERS)
    ]
    outcomes = _race(harness, units)
    expect(_codes(outcomes), [], "those that were refused")
    counts = [outcome.count for outcome in outcomes if isinstance(outcome, Rewrapped)]
    expect(sum(counts), len(before), f"keys wrapped anew, by {counts}")
    after = store.transact(Ask(Scan(GenerationRow)))
    opened = [_opened(vault, rows) for vault, rows in ((VAULT, before), (Vault(newer), after))]
    expect(opened[1] == opened[0], True, "keys under the new key-encryption key alone are those that were")


def _opened(vault: Vault, rows: Sequence[GenerationRow]) -> list[bytes]:
    return [vault.open(Address(row.vm, row.volume, row.generation), row).reveal() for row in rows]


# --- what a store must remember ---


def a_token_is_refused_when_it_must_be(harness: Harness) -> None:
    """Unknown, expired, another's, spent, voided: nothing changes, and the rightful caller is still served."""
    store = harness.open()
    granted = boot("only")
    _ = store.transact(granted)
    good = sync(granted, "body", "storage")
    unspent = (
        (evolve(good, token_digest=bytes(32)), Code.BOOT_TOKEN_INVALID),
        (evolve(good, now=granted.now + 600), Code.BOOT_TOKEN_INVALID),
        (evolve(good, vm=Vm("other", VM.name)), Code.HOTKEY_MISMATCH),
        (evolve(good, vm=Vm(VM.hotkey, "other")), Code.VM_NAME_MISMATCH),
        (evolve(good, certificate=bytes(32)), Code.BOOT_TOKEN_INVALID),
    )
    _all_refused(store, unspent)
    keys = store.transact(good)
    spent = (
        (evolve(good, body_digest=bytes(32)), Code.BOOT_TOKEN_INVALID),
        (evolve(good, certificate=None), Code.BOOT_TOKEN_INVALID),
        (read(granted, "storage"), Code.BOOT_TOKEN_INVALID),
        *unspent,
    )
    _all_refused(store, spent)
    last = evolve(good, now=granted.now + 599)
    expect(store.transact(last).passphrases, keys.passphrases, "the answer given again in the last second")
    store.transact(StoreRestored(granted.now + 2))
    _all_refused(store, [(last, Code.BOOT_TOKEN_INVALID)])


def _all_refused(store: Store, units: Sequence[tuple[Unit[Any], Code]]) -> None:
    before = dump(store)
    for unit, code in units:
        expect_refused(_caller(store, unit), code)
    expect(dump(store), before, "rows after refusals")


def a_nonce_is_refused_when_it_must_be(harness: Harness) -> None:
    """Redeemed, redeemed and forgotten, or issued before a restore."""
    store = harness.open()
    first = boot("first")
    _ = store.transact(first)
    again = evolve(boot("again"), nonce=first.nonce)
    _all_refused(store, [(again, Code.NONCE_INVALID)])
    _ = store.transact(boot("a day later", now=NOW + 86_400))
    kept = [row.value for row in store.transact(Ask(Scan(NonceRow)))]
    expect(kept, [boot("a day later").nonce], "nonces that are remembered after a day")
    _all_refused(store, [(again, Code.NONCE_INVALID)])
    store.transact(StoreRestored(NOW + 90_000))
    late = boot("late", now=NOW + 90_061)
    _all_refused(store, [(evolve(late, nonce_issued_at=NOW + 90_060), Code.NONCE_INVALID)])
    _ = store.transact(evolve(late, nonce_issued_at=NOW + 90_061))


def keys_live_as_documented(harness: Harness) -> None:
    """Made, kept, rekeyed, pruned, revived, made anew: no generation is ever missing, and each opens to what it was."""
    store = harness.open()
    seen: dict[tuple[str, int], bytes] = {}
    steps: tuple[tuple[tuple[str, ...], tuple[str, ...], list[tuple[str, int, str]]], ...] = (
        (("a", "b"), (), [("a", 1, "active"), ("b", 1, "active")]),
        (("a", "b"), ("a",), [("a", 1, "retired"), ("a", 2, "active"), ("b", 1, "active")]),
        (("b",), (), [("a", 1, "retired"), ("a", 2, "retired"), ("b", 1, "active")]),
        (("b", "a"), (), [("a", 1, "retired"), ("a", 2, "active"), ("b", 1, "active")]),
    )
    for index, (volumes, rekey, wanted) in enumerate(steps):
        granted = boot(str(index))
        _ = store.transact(granted)
        answer = store.transact(sync(granted, "body", *volumes, rekey=rekey))
        expect(tuple(volume for volume, _ in answer.passphrases), volumes, "volumes in the answer")
        rows = [row for row in store.transact(Ask(ReadGenerations(VM))) if row.volume != "root"]
        expect([(row.volume, row.generation, row.state) for row in rows], wanted, "generations")
        current = {row.volume: row.generation for row in rows if row.state == "active"}
        for volume, passphrase in answer.passphrases:
            known = seen.setdefault((volume, current[volume]), passphrase.reveal())
            expect(passphrase.reveal() == known, True, f"{volume} gets the passphrase of its active generation")
    expect(len(set(seen.values())), len(seen), "passphrases that differ")


CASES: tuple[Case, ...] = (
    rows_come_back_as_they_were,
    operations_reply_what_they_say,
    servers_are_claimed_found_and_deleted,
    tokens_are_spent_once_and_voided,
    nonces_are_redeemed_once_and_swept,
    what_must_be_unique_is,
    of_many_keys_few_are_live,
    keys_are_wrapped_anew_and_purged,
    boots_are_found_by_their_confirm_nonce,
    a_sealed_key_never_changes,
    what_raises_leaves_no_trace,
    what_is_raised_comes_out_unchanged,
    what_was_committed_is_seen_by_all,
    one_nonce_grants_one_boot,
    boots_at_once_agree_on_one_root_passphrase,
    one_token_is_spent_once,
    one_sync_sent_often_has_one_answer,
    one_quote_nonce_hands_out_once,
    boots_at_once_are_handed_the_same_keys,
    one_confirmation_decides,
    one_platform_gets_a_free_name,
    a_platform_gets_no_more_names_than_it_may,
    servers_at_once_share_nothing,
    boots_and_syncs_at_once_keep_every_key,
    rewraps_at_once_wrap_each_key_once,
    a_token_is_refused_when_it_must_be,
    a_nonce_is_refused_when_it_must_be,
    keys_live_as_documented,
)
