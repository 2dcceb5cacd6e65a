"""What each operation on rows does, and replies."""

from __future__ import annotations

from attrs import evolve

from chutes_proto.errors import StoreError
from chutes_proto.store._run import Store
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
    PurgeAudit,
    PurgeGeneration,
    Put,
    RaiseHorizon,
    Read,
    ReadAudit,
    ReadBootVolumes,
    ReadGenerations,
    ReadLiveGenerations,
    ReadNames,
    ReadOtherwiseSealed,
    ReadServers,
    ReadTimes,
    ReadVm,
    ReadVolumes,
    RedeemNonce,
    RewrapGeneration,
    Row,
    Scan,
    ServerRow,
    SetHorizon,
    SpendToken,
    StoreOp,
    SweepNonces,
    UpdateGeneration,
    Vm,
    VmRow,
    VoidTokens,
    VolumeRow,
)
from chutes_proto.testing.store_suite import (
    NOW,
    VM,
    Ask,
    Case,
    Harness,
    dump,
    entropy,
    expect,
)
from chutes_proto.units.contents import Contents, ReadContents, WriteContents

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
_VOLUME = VolumeRow(VM, "storage", in_use=True, format_allowed=False)
_NONCE = NonceRow(bytes(32), "boot", NOW - 60, NOW)
_INSERTED = (
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
_OTHER_SERVER = evolve(_SERVER, server_id="n2", registration="r2", name="b", address="2001:db8::1")
_CLAIMED = (
    _SERVER,
    evolve(_OTHER_SERVER, boot_id="b0", pin=_PIN, updated_at=NOW, attested="a2"),
    _GPU,
)
_BY_KIND: dict[type[Row], tuple[Row, ...]] = {
    kind: tuple(row for row in (*_INSERTED, _VM, _VOLUME, _NONCE, *_CLAIMED) if type(row) is kind) for kind in ROWS
}
"""Rows of all kinds, with and without their optional values, as a scan gives them."""


def rows_come_back_as_they_were(harness: Harness) -> None:
    """Every kind of row, with and without its optional values, through another handle; audit rows in their order."""
    _write_rows_of_every_kind(harness.open())
    other = harness.open()
    for kind, rows in _BY_KIND.items():
        expect(other.transact(Ask(Scan(kind))), rows, kind.TABLE)


def a_store_is_copied_whole(harness: Harness) -> None:
    """Every kind of row into a store that is empty, and none into one that is not."""
    contents = Contents(NOW, tuple(row for rows in _BY_KIND.values() for row in rows))
    store = harness.open()
    same_address = evolve(_SERVER, server_id="n9", registration="r9", name="z")
    _expect_not_filled(store, Contents(0, (_BOOT, _SERVER, same_address)))
    expect(store.transact(ReadContents()), Contents(0, ()), "what is there of rows that contradict one another")
    store.transact(WriteContents(contents, NOW + 9, "moved"))
    copied = harness.open().transact(ReadContents())
    told = AuditRow(NOW + 9, "operator", "store copied", "done", "moved")
    expect(copied, Contents(NOW, (*contents.rows, told)), "what is there")
    for other in (contents, Contents(0, ())):
        _expect_not_filled(store, other)
    expect(store.transact(ReadContents()), copied, "what is there still")


def _expect_not_filled(store: Store, contents: Contents) -> None:
    try:
        store.transact(WriteContents(contents, NOW + 9, "again"))
    except StoreError:
        return
    raise AssertionError("a store was filled that is not empty, or with rows that contradict one another")


def _write_rows_of_every_kind(store: Store) -> None:
    for row in _INSERTED:
        store.transact(Ask(Insert(row)))
    for known in (_VM, _VOLUME):
        store.transact(Ask(Put(known)))
    for claimed in _CLAIMED:
        expect(store.transact(Ask(Claim(claimed))), True, "a new row")
    expect(store.transact(Ask(IsRedeemed(_NONCE.value))), False, "a nonce that is not there")
    expect(store.transact(Ask(RedeemNonce(_NONCE))), True, "a new nonce")
    expect(store.transact(Ask(IsRedeemed(_NONCE.value))), True, "a nonce that is there")


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
    ask(Ask(PurgeAudit(first[0][0], rest[0][0], NOW - 1)))
    between = range(first[1][0], rest[0][0] + 1)
    left = [pair for pair in (*first, *rest) if pair[0] not in between or pair[1].at >= NOW - 1]
    expect(list(ask(Ask(ReadAudit(0, 9)))), left, "audit rows after the old ones between two numbers were purged")
    ask(Ask(PurgeAudit(0, first[0][0], NOW + 1)))
    expect(list(ask(Ask(ReadAudit(0, 9)))), left[1:], "audit rows after the first was purged")
    ask(Ask(Insert(told[0])))
    expect(ask(Ask(ReadAudit(rest[-1][0], 9)))[0][1], told[0], "an audit row after a purge")


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
    """`RedeemNonce` holds once; `SweepNonces` takes the oldest, and no more than it may; `RaiseHorizon` only raises."""
    ask = harness.open().transact
    rows = tuple(NonceRow(bytes([9 - index]) * 32, "boot", NOW + index - 5, NOW + index) for index in range(4))
    for row in rows:
        expect(ask(Ask(RedeemNonce(row))), True, "a new nonce")
    expect(ask(Ask(RedeemNonce(evolve(rows[0], redeemed_at=NOW + 9)))), False, "a nonce that was redeemed")
    expect(ask(Ask(SweepNonces(NOW - 1, 10))), (), "nonces too young to sweep")
    expect(ask(Ask(SweepNonces(NOW + 2, 2))), (rows[1], rows[0]), "the two oldest nonces, by value")
    expect(ask(Ask(Scan(NonceRow))), (rows[3], rows[2]), "the nonces that are left")
    ahead = NonceRow(bytes(32), "boot", NOW + 9, NOW)
    expect(ask(Ask(RedeemNonce(ahead))), True, "a nonce from the future")
    expect(ask(Ask(SweepNonces(NOW + 8, 10))), (rows[3], rows[2]), "what was issued and redeemed until then")
    expect(ask(Ask(SweepNonces(NOW + 9, 10))), (ahead,), "a nonce whose time has come")
    for to, wanted in ((NOW, NOW), (NOW - 1, NOW), (NOW + 1, NOW + 1)):
        ask(Ask(RaiseHorizon(to)))
        expect(ask(Ask(ReadTimes())).horizon, wanted, "the horizon")
    ask(Ask(SetHorizon(NOW - 2)))
    expect(ask(Ask(ReadTimes())).horizon, NOW - 2, "the horizon set back")
    clock = ask(Ask(ReadTimes())).clock
    expect(clock is None or clock > NOW, True, f"the store's own clock says {clock}")


def servers_are_claimed_found_and_deleted(harness: Harness) -> None:
    """What a server has is its own; all operations on servers; with a server go its GPUs, nothing else."""
    ask = harness.open().transact
    ask(Ask(Insert(_BOOT)))
    ask(Ask(Insert(evolve(_BOOT, boot_id="b1", token_digest=bytes(32), created_at=NOW + 1))))
    stranger = evolve(_BOOT, boot_id="b2", token_digest=b"2", vm=Vm("other", VM.name), created_at=NOW + 2)
    ask(Ask(Insert(stranger)))
    expect(ask(Ask(Read(BootRow, "b0"))), _BOOT, "a boot by its id")
    expect(ask(Ask(Read(BootRow, "b9"))), None, "a boot that is not there")
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
    expect(ask(Ask(Read(ServerRow, "n1"))), _SERVER, "a server by its id")
    expect(ask(Ask(Read(ServerRow, "n9"))), None, "a server that is not there")
    expect(ask(Ask(FindServer("5.6.7.8"))), fresh_server, "the server at an address")
    expect(ask(Ask(FindServer("5.6.7.9"))), None, "the server at no address")
    expect(ask(Ask(ReadServers(VM.hotkey))), (_SERVER, fresh_server), "servers of a hotkey")
    expect(ask(Ask(Read(GpuRow, "gpu-1"))), _GPU, "a GPU")
    expect(ask(Ask(Read(GpuRow, "gpu-2"))), None, "a GPU that is not there")
    refusal = evolve(_REFUSAL, stage="runtime", registration="r1")
    ask(Ask(Insert(refusal)))
    ask(Ask(Insert(evolve(refusal, attestation_id="a2", code=None))))
    ask(Ask(Insert(evolve(refusal, attestation_id="a3", created_at=NOW - 1))))
    ask(Ask(Insert(evolve(refusal, attestation_id="a4", registration="r2"))))
    expect(ask(Ask(CountServerRefusals("r1", NOW))), 1, "refusals of a registration since a time")
    expect(ask(Ask(Read(AttestationRow, "a1"))), refusal, "a verdict")
    expect(ask(Ask(Read(AttestationRow, "a9"))), None, "a verdict that is not there")
    renamed = evolve(_SERVER, name="z", updated_at=NOW, attested="a1", pin=_PIN)
    ask(Ask(Put(renamed)))
    expect(ask(Ask(Read(ServerRow, "n1"))), renamed, "a server that was replaced")
    try:
        ask(Ask(Put(evolve(renamed, name="b"))))
    except StoreError:
        expect(ask(Ask(Read(ServerRow, "n1"))), renamed, "a server after a name that is taken")
    else:
        raise AssertionError("taken: a name of two servers")
    ask(Ask(DeleteServer("n1")))
    expect(ask(Ask(Read(ServerRow, "n1"))), None, "a deleted server")
    expect(ask(Ask(Read(GpuRow, "gpu-1"))), None, "a GPU of a deleted server")
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


CASES: tuple[Case, ...] = (
    rows_come_back_as_they_were,
    a_store_is_copied_whole,
    operations_reply_what_they_say,
    servers_are_claimed_found_and_deleted,
    tokens_are_spent_once_and_voided,
    nonces_are_redeemed_once_and_swept,
    what_must_be_unique_is,
    of_many_keys_few_are_live,
    keys_are_wrapped_anew_and_purged,
    boots_are_found_by_their_confirm_nonce,
    a_sealed_key_never_changes,
)
