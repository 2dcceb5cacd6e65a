"""Cases of the store contract: each operation on rows, and its reply."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from attrs import evolve

from chutes_proto.errors import RowNotAuthentic
from chutes_proto.store._rows import (
    ROWS,
    AttestationRow,
    AuditRow,
    AuditWanted,
    BootRow,
    BootVolumeRow,
    Claim,
    CountClaims,
    CountRefusals,
    CountRetired,
    CountRows,
    CountSealed,
    CountStates,
    DecideLoss,
    Delete,
    DeleteServer,
    EraseGeneration,
    ErasureRow,
    EvidenceRow,
    FindBeyond,
    FindDeclaration,
    FindLastBoot,
    FindLastBootFrom,
    FindLastBoots,
    FindNumber,
    FindRecent,
    FleetVm,
    Forget,
    ForgetKeyServers,
    GenerationRow,
    GpuDeviceRow,
    GpuRow,
    HostProfileRow,
    Insert,
    InsertAll,
    InsertBootVolumes,
    KeyringRow,
    KeyServer,
    LockLog,
    LogStateRow,
    LogTileRow,
    NonceRow,
    NoteKeyServer,
    NoteWhatIf,
    Pin,
    Platform,
    PurgeAudit,
    PurgeGeneration,
    PurgeTiles,
    Put,
    Read,
    ReadAll,
    ReadAudit,
    ReadBootVolumes,
    ReadClaims,
    ReadFleet,
    ReadGpus,
    ReadHostProfiles,
    ReadKeyServers,
    ReadLiveGenerations,
    ReadLog,
    ReadNames,
    ReadOld,
    ReadOtherwiseSealed,
    ReadPage,
    ReadRetired,
    ReadRevocation,
    ReadRevoked,
    ReadTile,
    ReadTimes,
    ReadUnclaimed,
    ReadUnsequenced,
    ReadVmVersions,
    ReadWhatIf,
    RevocationRow,
    RewrapGenerations,
    Row,
    Scan,
    Sequence,
    ServerRow,
    SetApart,
    SetHorizon,
    SetVersion,
    StoreOp,
    SweepNonces,
    UpdateGeneration,
    Vm,
    VmRow,
    VoidTokens,
    VolumeRow,
    WhatIf,
)
from chutes_proto.testing.store_suite._parts import (
    NOW,
    VM,
    Case,
    Contents,
    Harness,
    asking,
    cases_of,
    dump,
    entropy,
    expect,
    expect_fault,
)
from chutes_proto.units.contents import CountAll, Fill, without_rows_key

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
_VM = evolve(VmRow.of(VM, Platform(None, _PIN.value), NOW), proven=True, exchange="two-phase", last_boot_at=NOW)
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
_DEVICE = GpuDeviceRow("41A0", "n1", "53C2", NOW)
_VOLUME = VolumeRow(VM, "storage", in_use=True, format_allowed=False)
_OTHER = evolve(VM, name="another")
_HOST = HostProfileRow("ab" * 32, VM.hotkey, '{"cpu":{}}', NOW)
_NONCE = NonceRow(bytes(32), "boot", NOW - 60, NOW)
_INSERTED = (
    _BOOT,
    evolve(_BOOT, boot_id="b1", token_digest=bytes(32), spent_at=NOW, body_digest=b"\0\xff", voided_at=NOW),
    BootVolumeRow("b0", "storage", 0, 1, None, in_use=True),
    _HOST,
    evolve(_HOST, fingerprint="cd" * 32, name="8xh200", published="ef" * 32),
    _KEY,
    evolve(_KEY, generation=2, state="retired", delivered_at=NOW, retired_at=NOW, retirement="prune"),
    evolve(_KEY, generation=3, state="purged", sealed=None, kek_id=None, wrapped_key=None),
    evolve(_KEY, generation=4, state="candidate", provisional=True),
    _REFUSAL,
    evolve(_REFUSAL, attestation_id="a2", stage="runtime", pin=None, registration="r1", tcb_status="SWHardeningNeeded"),
    RevocationRow("hotkey", VM.hotkey, "leaked", NOW, NOW + 60),
    RevocationRow("vm", "hotkey/name", "left", NOW, None, NOW + 1),
    ErasureRow("e1", VM, NOW, "{}"),
    EvidenceRow("refused p 0", VM, "a1", "tcb_rejected", bytes(5000), "{}", NOW),
    EvidenceRow("vm h/n", VM, "b0", None, b"\0\xff", "{}", NOW),
    AuditRow(NOW, "vm", "zuerst", "granted", vm=VM, pin=_PIN, quote_digest=bytes(32), keys="storage/1 created"),
    AuditRow(NOW - 1, "operator", "afterwards", "done", evidence="{}", idx=0, salt=b"salt"),
    LogStateRow("audit", "a.example/log", 1, bytes(32)),
    LogTileRow(0, 0, bytes(32)),
    KeyringRow("audit", 1, "0123456789abcdef", b"wrapped", NOW),
)
_OTHER_SERVER = evolve(
    _SERVER, server_id="n2", registration="r2", name="b", address="2001:db8::1", window_id="w1", target="2.0"
)
_CLAIMED = (_SERVER, evolve(_OTHER_SERVER, boot_id="b0", pin=_PIN, updated_at=NOW, attested="a2"), _GPU, _DEVICE)
_BY_KIND: dict[type[Row], tuple[Row, ...]] = {
    kind: tuple(row for row in (*_INSERTED, _VM, _VOLUME, _NONCE, *_CLAIMED) if type(row) is kind) for kind in ROWS
}
"""Rows of all kinds, with and without their optional values, in the order of a scan."""


def rows_come_back_as_they_were(harness: Harness) -> None:
    """Every kind of row, with and without its optional values, through another handle; audit rows in their order."""
    ask = asking(harness.open())
    for row in _INSERTED:
        ask(Insert(row))
    for known in (_VM, _VOLUME):
        ask(Put(known))
    for claimed in _CLAIMED:
        expect(ask(Claim(claimed)), True, "a new row")
    expect(ask(Read(NonceRow, _NONCE.value)), None, "a nonce that is not there")
    expect(ask(Claim(_NONCE)), True, "a new nonce")
    expect(ask(Read(NonceRow, _NONCE.value)), _NONCE, "a nonce that is there")
    ask = asking(harness.open())
    for kind, rows in _BY_KIND.items():
        expect(without_rows_key(ask(Scan(kind))), rows, kind.TABLE)


def a_store_is_copied_whole(harness: Harness) -> None:
    """Every kind of row into a store that is empty, and none into one that is not."""
    rows = {kind: rows if not kind.KEY else frozenset(rows) for kind, rows in _BY_KIND.items()}
    store = harness.open()
    same_address = evolve(_SERVER, server_id="n9", registration="r9", name="z")
    contradictory = Fill(0, lambda: [(_BOOT,), (_SERVER, same_address)], NOW + 9, "again")
    expect_fault(lambda: store.transact(contradictory), "a copy of rows that contradict one another")
    expect(dump(store), Contents(0, {}), "rows after a copy of contradictory rows")
    store.transact(Fill(NOW, lambda: [*_BY_KIND.values()], NOW + 9, "moved"))
    copied = dump(harness.open())
    audit = AuditRow(NOW + 9, "operator", "store copied", "done", "moved")
    expect(copied, Contents(NOW, rows | {AuditRow: (*_BY_KIND[AuditRow], audit)}), "the copied rows")
    expect(store.transact(CountAll()), sum(map(len, copied.rows.values())), "the number of all rows")
    for more in ([*_BY_KIND.values()], list[tuple[Row, ...]]()):
        again = Fill(NOW, more.copy, NOW + 9, "again")
        expect_fault(partial(store.transact, again), "a copy into a store that is not empty")
    expect(dump(store), copied, "the rows after a copy that was refused")


def pages_are_complete(harness: Harness) -> None:
    """Pages of any size hold every row once, whatever order the store has."""
    ask = asking(harness.open())
    names = [Vm(hotkey, name) for hotkey in ("5A", "5a", "5-") for name in ("vm-1", "VM-1", "vm_1", "vm.2")]
    ask(InsertAll(tuple(evolve(_VM, vm=vm) for vm in names)))
    keyed = (*names[1:], Vm("5Z", "vm-9"), Vm("5z", "vm-8"))
    ask(InsertAll(tuple(evolve(_KEY, vm=vm) for vm in keyed)))
    ask(Insert(evolve(_KEY, vm=names[0], state="retired", retired_at=NOW, retirement="rekey")))
    ask(Insert(evolve(_KEY, vm=names[5], generation=2, state="retired", retired_at=NOW + 1, retirement="rekey")))
    expect(ask(CountRows(GenerationRow)), len(names) + 3, "keys")
    for limit in (1, 2, 5, 99):
        read = partial(_paged, ask, limit)
        claims = read(lambda after, limit: ReadPage(VmRow, after, limit))
        expect(sorted(row.vm for row in claims), sorted(names), f"claims in pages of {limit}")
        fleet = read(lambda after, limit: ReadFleet(None if after is None else after.vm, limit))
        expect(sorted(each.vm for each in fleet), sorted(names), f"VMs in pages of {limit}")
        unclaimed = read(ReadUnclaimed)
        expect(sorted(unclaimed), sorted(keyed[-2:]), f"unclaimed names in pages of {limit}")
        retired = read(lambda after, limit: ReadRetired(NOW + 1, after, limit))
        expect(sorted(retired), sorted((names[0], names[5])), f"names with retired keys in pages of {limit}")
        others = read(lambda after, limit: ReadOtherwiseSealed("new", limit, after))
        expect(len({(row.vm, row.generation) for row in others}), len(names) + 3, f"keys in pages of {limit}")
        expect(len(others), len(names) + 3, f"keys in pages of {limit}")
    expect(ask(CountRetired(NOW + 1)), 2, "names with retired keys")
    expect(ask(ReadRetired(NOW, None, 9)), (names[0],), "names with keys that were retired by then")


def _paged(
    ask: Callable[[StoreOp[Any]], Any], limit: int, read: Callable[[Any, int], StoreOp[tuple[Any, ...]]]
) -> list[Any]:
    """All that pages of ``limit`` hold."""
    found: list[Any] = []
    while page := ask(read(found[-1] if found else None, limit)):
        expect(len(page) <= limit, True, "the size of a page")
        found += page
    return found


def old_boots_are_deleted_but_those_that_are_needed(harness: Harness) -> None:
    """`ReadOld` finds what nothing needs, in pages; `Delete` deletes it, whatever order the store has."""
    ask = asking(harness.open())
    boots = [
        evolve(_BOOT, boot_id=f"b{number}", token_digest=bytes([number + 1]) * 32, created_at=NOW + number)
        for number in range(6)
    ]
    lonely = evolve(_BOOT, boot_id="b9", vm=Vm(VM.hotkey, "another"), token_digest=bytes(32))
    ask(InsertAll((*boots, lonely)))
    ask(Put(evolve(_VM, attested="b1", booted="b4")))
    expect(ask(Claim(evolve(_SERVER, boot_id="b2", attested="a3"))), True, "a new server")
    verdicts = [evolve(_REFUSAL, attestation_id=name, created_at=NOW) for name in ("b0", "b2", "a1", "a3", "b9", "a4")]
    ask(InsertAll(tuple(verdicts)))
    ask(Insert(BootVolumeRow("b0", "storage", 0, 1, None, in_use=False)))
    found = _paged(ask, 1, lambda after, limit: ReadOld(BootRow, NOW + 5, after, limit))
    expect([row.boot_id for row in found], ["b0", "b3"], "boots that nothing needs")
    ask(Delete(BootVolumeRow, ("b0", "b3")))
    ask(Delete(BootRow, ("b0", "b3")))
    expect([row.boot_id for row in ask(Scan(BootRow))], ["b1", "b2", "b4", "b5", "b9"], "boots that are left")
    found = _paged(ask, 2, lambda after, limit: ReadOld(AttestationRow, NOW + 1, after, limit))
    expect({row.attestation_id for row in found}, {"b0", "a1", "a4"}, "verdicts that nothing needs")
    ask(Delete(AttestationRow, ("b0", "a1")))
    expect(
        {row.attestation_id for row in ask(Scan(AttestationRow))}, {"b2", "a3", "b9", "a4"}, "verdicts that are left"
    )


def operations_reply_what_they_say(harness: Harness) -> None:
    """The replies of all operations that read, find or count."""
    ask = asking(harness.open())
    stranger = Vm(VM.hotkey, "vm-1")
    expect(ask(Read(VmRow, VM)), None, "a claim that is not there")
    ask(Put(evolve(_VM, proven=False)))
    ask(Put(_VM))
    expect(ask(Read(VmRow, VM)), _VM, "a claim that was replaced")
    expect(ask(Read(VmRow, stranger)), None, "another VM's claim")
    ask(Put(evolve(_VM, vm=stranger)))
    expect(ask(CountClaims(_PIN)), 2, "claims of a platform")
    expect(len(ask(ReadClaims(_PIN))), 2, "the VMs of a platform")
    expect(ask(ReadClaims(evolve(_PIN, kind="instance"))), (), "the VMs of another platform")
    expect(ask(CountClaims(evolve(_PIN, kind="instance"))), 0, "claims of another kind of platform id")
    ask(Insert(_BOOT))
    expect(ask(Read(BootRow, _BOOT.token_digest, "token_digest")), _BOOT, "the boot of a token")
    expect(ask(Read(BootRow, bytes(32), "token_digest")), None, "the boot of no token")
    ask(Insert(evolve(_REFUSAL, attestation_id="b0", code=None, created_at=NOW - 9, tcb_status="UpToDate")))
    ask(Insert(evolve(_BOOT, boot_id="b-1", token_digest=bytes([7]) * 32, created_at=NOW - 9)))
    booted = FleetVm(VM, NOW, _BOOT.profile_name, _BOOT.profile_version, "UpToDate")
    expect(ask(ReadFleet(None, 9)), (booted, FleetVm(stranger, NOW)), "VMs, and what their last boots ran on")
    one, other = KeyServer("a", "1.0", "{}", NOW), KeyServer("b", "1.0", "{}", NOW - 60)
    for server in (other, evolve(one, version="0.9", seen_at=NOW - 99), one):
        ask(NoteKeyServer(server))
    expect(ask(ReadKeyServers(NOW - 61)), (one, other), "key servers")
    expect(ask(ReadKeyServers(NOW - 60)), (one,), "key servers that were seen after a time")
    ask(ForgetKeyServers(NOW - 60))
    expect(ask(ReadKeyServers(0)), (one,), "key servers that were not forgotten")
    expect(ask(ReadWhatIf()), None, "no what-if")
    for what_if in (WhatIf(NOW, "{}"), WhatIf(NOW - 9, '{"judged":1}')):
        ask(NoteWhatIf(what_if))
        expect(ask(ReadWhatIf()), what_if, "the what-if that was noted last")
    for position, volume in enumerate(("zeta", "alpha")):
        ask(Insert(BootVolumeRow("b0", volume, position, 1, 2, in_use=False)))
    given = ask(ReadBootVolumes("b0"))
    expect([row.volume for row in given], ["zeta", "alpha"], "the volumes of a boot, by position")
    expect(ask(ReadBootVolumes("b1")), (), "the volumes of a boot that does not exist")
    ask(Insert(evolve(_KEY, volume="tdx-cache")))
    ask(Insert(_KEY))
    ask(Insert(evolve(_KEY, vm=stranger)))
    expect(ask(ReadAll(GenerationRow, VM)), (_KEY, evolve(_KEY, volume="tdx-cache")), "a VM's keys")
    unclaimed = Vm("another", VM.name)
    ask(Insert(evolve(_KEY, vm=unclaimed)))
    expect(ask(ReadNames(VM.name)), (VM, unclaimed), "VMs with one name")
    expect(ask(ReadNames(VM.name, "another")), (unclaimed,), "a hotkey's VM")
    expect(ask(ReadNames(VM.name, "none")), (), "the VM of a hotkey that has none")
    expect(ask(ReadNames("vm-2")), (), "VMs with a name that no VM has")
    known = VolumeRow(VM, "storage", in_use=False, format_allowed=True)
    ask(Put(evolve(known, in_use=True)))
    ask(Put(known))
    expect(ask(ReadAll(VolumeRow, VM)), (known,), "a VM's volumes")
    expect(ask(ReadAll(VolumeRow, stranger)), (), "another VM's volumes")
    granted = EvidenceRow("vm", VM, "b0", None, bytes(5000), "{}", NOW)
    refused = evolve(granted, evidence_id="refused", code="tcb_rejected")
    for evidence in (granted, refused, evolve(granted, evidence_id="another", vm=stranger)):
        ask(Put(evidence))
    expect(ask(ReadAll(EvidenceRow, VM)), (refused, granted), "a VM's evidence")
    revoked = RevocationRow("platform", str(_PIN), "stolen", NOW, None)
    for each in (evolve(revoked, kind="vm"), revoked, evolve(revoked, ends_at=NOW)):
        ask(Put(each))
    expect(ask(Scan(RevocationRow)), (evolve(revoked, ends_at=NOW), evolve(revoked, kind="vm")), "revocations")
    allowed = evolve(revoked, allowed_at=NOW + 1)
    ask(Put(allowed))
    expect(ask(ReadRevoked()), (evolve(revoked, kind="vm"),), "revocations after one was undone")
    expect(ask(ReadRevocation("platform", revoked.subject)), allowed, "a revocation that was undone")
    expect(ask(ReadRevocation("hotkey", revoked.subject)), None, "no revocation")
    ask(Insert(_HOST))
    ask(Put(evolve(_HOST, name="8xh200")))
    ask(Insert(evolve(_HOST, fingerprint="00" * 32, created_at=NOW + 1)))
    ask(Insert(evolve(_HOST, fingerprint="aa" * 32)))
    profiles = [row.fingerprint[:2] for row in ask(ReadHostProfiles(2))]
    expect(profiles, ["aa", "ab"], "the oldest host profiles")
    expect(ask(Read(HostProfileRow, _HOST.fingerprint)), evolve(_HOST, name="8xh200"), "a host profile that was named")
    ask(Delete(HostProfileRow, (_HOST.fingerprint,)))
    expect(ask(Read(HostProfileRow, _HOST.fingerprint)), None, "a host profile that was removed")
    ask(Insert(_REFUSAL))
    ask(Insert(evolve(_REFUSAL, attestation_id="a2", code=None)))
    ask(Insert(evolve(_REFUSAL, attestation_id="a3", created_at=NOW - 1)))
    expect(ask(CountRefusals(_PIN, NOW)), 1, "refusals since a time")
    expect(ask(CountRefusals(_PIN, NOW - 1)), 2, "refusals since an earlier time")
    expect(ask(CountRefusals(evolve(_PIN, value=bytes(16)), 0)), 0, "another platform's refusals")
    events = [AuditRow(NOW - number, "vm", f"event {number}", "granted") for number in range(5)]
    for row in events:
        ask(Insert(row))
    first = ask(ReadAudit(0, 3))
    rest = ask(ReadAudit(first[-1][0], 3))
    expect([row for _, row in (*first, *rest)], events, "audit rows in two pages")
    bounded = ask(ReadAudit(0, 9, through=first[1][0]))
    expect(bounded, first[:2], "audit rows up to a number")
    bounded = ask(ReadAudit(rest[-1][0], 9, backwards=True, through=first[2][0]))
    expect(bounded, (rest[0], first[2]), "audit rows down to a number")
    wanted = AuditWanted(since=NOW - 3, until=NOW - 1)
    expect([row for _, row in ask(ReadAudit(0, 9, wanted=wanted))], events[2:4], "audit rows of a time")
    wanted = AuditWanted(event="event 2", name=VM.name)
    expect([row for _, row in ask(ReadAudit(0, 9, wanted=wanted))], [], "audit rows of a VM")
    number = ask(ReadAudit(0, 9, wanted=AuditWanted(event="event 2")))[0][0]
    ask(Insert(evolve(events[2], vm=VM)))
    ask(Insert(evolve(events[2], vm=unclaimed)))
    of_any = [row.vm for _, row in ask(ReadAudit(0, 9, wanted=wanted))]
    expect(of_any, [VM, unclaimed], "audit rows of a VM of any hotkey")
    wanted = evolve(wanted, hotkey=VM.hotkey)
    expect([row.vm for _, row in ask(ReadAudit(0, 9, wanted=wanted))], [VM], "audit rows of one VM")
    expect(number, first[2][0], "the number of an audit row")
    denied = AuditRow(NOW, "vm", "boot", "refused", vm=evolve(VM, hotkey="denied"), request_id="request")
    ask(Insert(denied))
    ask(Insert(evolve(denied, decision="granted", request_id="another")))
    for wanted in (AuditWanted(request_id="request"), AuditWanted(hotkey="denied", refused=True)):
        expect([row for _, row in ask(ReadAudit(0, 9, wanted=wanted))], [denied], "audit rows of a request")
    last = rest[-1][0]
    for added, _ in ask(ReadAudit(last, 9)):
        _ = ask(Sequence(((added, 0, b"salt"),)))
        _ = ask(PurgeAudit(1, NOW + 1))
    newest = ask(ReadAudit(1 << 62, 4, backwards=True))
    oldest = ask(ReadAudit(newest[-1][0], 4, backwards=True))
    expect((*newest, *oldest), (*first, *rest)[::-1], "audit rows in two pages, backwards")
    _ = ask(Sequence(((first[0][0], 0, b"salt"), (first[1][0], 1, b"salt"), (first[2][0], 2, b"salt"))))
    expect(ask(FindRecent(0, first[1][1].at)), 1 if first[0][1].at < first[1][1].at else 0, "the first recent row")
    expect(ask(FindRecent(2, NOW + 1)), None, "a row from the future")
    ask(Put(LogTileRow(0, 0, bytes(32))))
    ask(Put(LogTileRow(0, 1, bytes(32))))
    ask(PurgeTiles(1))
    expect((ask(ReadTile(0, 0)), ask(ReadTile(0, 1))), (None, LogTileRow(0, 1, bytes(32))), "tiles after a purge")
    ask(PurgeAudit(2, NOW + 1))
    left = [number for number, _ in ask(ReadAudit(0, 9))]
    expect(left, [first[2][0], *(number for number, _ in rest)], "audit rows after the first two were purged")
    ask(Insert(events[0]))
    expect(ask(ReadAudit(rest[-1][0], 9))[0][1], events[0], "an audit row after a purge")


def a_log_is_sequenced(harness: Harness) -> None:
    """Rows get their places once, in the order in which they were written; the log's own rows are replaced."""
    ask = asking(harness.open())
    expect(ask(LockLog()), None, "the state of a log that has not begun")
    for state in (LogStateRow("audit", "a.example/log", 0, b"empty"), LogStateRow("audit", "a.example/log", 4, b"r")):
        ask(Put(state))
        expect(ask(LockLog()), state, "the state of a log")
    events = [AuditRow(NOW, "operator", f"event {number}", "done") for number in range(4)]
    for row in events:
        ask(Insert(row))
    waiting = ask(ReadUnsequenced(9))
    expect([row for _, row in waiting], events, "rows that are not sequenced")
    expect(ask(ReadUnsequenced(2)), waiting[:2], "as many as asked for")
    expect(ask(ReadUnsequenced(2, waiting[0][0])), waiting[1:3], "those after a number")
    places = tuple((number, index, b"salt %d" % index) for index, (number, _) in enumerate(waiting[:3]))
    expect(ask(Sequence(places)), 3, "rows that got a place")
    expect(ask(Sequence(((places[0][0], 7, b"other"), (waiting[3][0], 3, b"salt 3")))), 1, "rows that got one again")
    placed = [evolve(row, idx=index, salt=b"salt %d" % index) for index, row in enumerate(events)]
    expect(list(ask(ReadLog(0, 9))), placed, "the log")
    expect(list(ask(ReadLog(1, 2))), placed[1:3], "a page of the log")
    expect([ask(FindNumber(index)) for index in (2, 9)], [waiting[2][0], 0], "the number of an entry")
    expect(ask(ReadUnsequenced(9)), (), "rows that are left")
    for version in (2, 1, None):
        ask(Insert(evolve(events[0], vm=VM, vm_version=version)))
    expect(ask(ReadVmVersions((VM, _OTHER))), ((VM, None), (_OTHER, None)), "versions that are not sequenced")
    of_vm = ask(ReadUnsequenced(9))
    expect(ask(Sequence(tuple((number, 4 + at, b"salt") for at, (number, _) in enumerate(of_vm)))), 3, "rows of a VM")
    expect(ask(ReadVmVersions((_OTHER, VM))), ((_OTHER, None), (VM, 2)), "the versions that the log knows")
    ask(Insert(events[0]))
    (left,) = ask(ReadUnsequenced(9))
    expect_fault(lambda: ask(Sequence(((left[0], 3, b"salt"),))), "one place for two rows")
    expect(ask(FindBeyond(5, 9)), (of_vm[1][0], of_vm[2][0]), "rows with a place beyond a size")
    ask(SetApart((left[0], of_vm[0][0])))
    expect(ask(ReadUnsequenced(9)), (), "a row that was set apart")
    expect(ask(ReadVmVersions((VM,))), ((VM, 1),), "the versions without that of a row that was set apart")
    ask(SetApart((of_vm[1][0],)))
    expect(ask(FindBeyond(5, 9)), (of_vm[2][0],), "the one that is left")
    apart = [row for number, row in ask(ReadAudit(0, 99)) if number in {left[0], of_vm[0][0], of_vm[1][0]}]
    expect([row.is_forged for row in apart], [True] * 3, "rows that were set apart")
    expect(len({row.idx for row in apart}), 3, "their indexes")
    expect(ask(ReadTile(0, 0)), None, "a tile that is not there")
    for hashes in (bytes(32), bytes(64)):
        ask(Put(LogTileRow(0, 0, hashes)))
        expect(ask(ReadTile(0, 0)), LogTileRow(0, 0, hashes), "a tile")


def tokens_are_redeemed_and_voided(harness: Harness) -> None:
    """`Put` redeems a boot's token; `VoidTokens` voids one VM's tokens, and changes no earlier time."""
    ask = asking(harness.open())
    other = evolve(_BOOT, boot_id="b1", vm=Vm("other", "vm"), token_digest=bytes(32))
    ask(Insert(_BOOT))
    ask(Insert(other))
    spent = evolve(_BOOT, spent_at=NOW + 1, body_digest=b"first")
    ask(Put(spent))
    expect(ask(Scan(BootRow)), (spent, other), "a redeemed token and another")
    ask(VoidTokens(VM, NOW + 3))
    ask(VoidTokens(VM, NOW + 4))
    expect(ask(Scan(BootRow)), (evolve(spent, voided_at=NOW + 3), other), "one VM's tokens voided")


def nonces_are_redeemed_once_and_swept(harness: Harness) -> None:
    """`Claim` succeeds once; `SweepNonces` removes the oldest, up to a number; `SetHorizon` also goes back."""
    ask = asking(harness.open())
    rows = tuple(NonceRow(bytes([9 - index]) * 32, "boot", NOW + index - 5, NOW + index) for index in range(4))
    for row in rows:
        expect(ask(Claim(row)), True, "a new nonce")
    expect(ask(Claim(evolve(rows[0], redeemed_at=NOW + 9))), False, "a nonce that was redeemed")
    expect(ask(SweepNonces(NOW - 1, 10)), (), "nonces too young to sweep")
    expect(ask(SweepNonces(NOW + 2, 2)), (rows[1], rows[0]), "the two oldest nonces, by value")
    expect(ask(Scan(NonceRow)), (rows[3], rows[2]), "the nonces that are left")
    ahead = NonceRow(bytes(32), "boot", NOW + 9, NOW)
    expect(ask(Claim(ahead)), True, "a nonce from the future")
    expect(ask(SweepNonces(NOW + 8, 10)), (rows[3], rows[2]), "the nonces that were issued and redeemed until then")
    expect(ask(SweepNonces(NOW + 9, 10)), (ahead,), "a nonce whose time has come")
    for horizon in (NOW, NOW + 1, NOW - 2):
        ask(SetHorizon(horizon))
        ask(DecideLoss(horizon))  # it moves nothing that units read
        expect(ask(ReadTimes()).horizon, horizon, "the horizon")
    ask(SetVersion(1 << 62))
    expect(ask(ReadTimes()).version, 1 << 62, "the version of the revocations")
    clock = ask(ReadTimes()).clock
    expect(clock is None or clock > NOW, True, f"the store's own clock says {clock}")


def servers_are_claimed_found_and_deleted(harness: Harness) -> None:
    """All operations on servers: claims are unique; with a server its GPUs are deleted, and nothing else."""
    ask = asking(harness.open())
    ask(Insert(_BOOT))
    ask(Insert(evolve(_BOOT, boot_id="b1", token_digest=bytes(32), created_at=NOW + 1)))
    stranger = evolve(_BOOT, boot_id="b2", token_digest=b"2", vm=Vm("other", VM.name), created_at=NOW + 2)
    ask(Insert(stranger))
    expect(ask(Read(BootRow, "b0")), _BOOT, "a boot by its id")
    expect(ask(Read(BootRow, "b9")), None, "a boot that is not there")
    for newest in (FindLastBoot(VM), FindLastBootFrom(VM.hotkey, _BOOT.peer_address)):
        found = ask(newest)
        expect(found and found.boot_id, "b1", "the newest boot")
    expect(ask(FindLastBoot(Vm(VM.hotkey, "vm-1"))), None, "a boot of another name")
    several = ask(FindLastBoots((VM, Vm(VM.hotkey, "vm-1"), stranger.vm)))
    expect(sorted(boot.boot_id for boot in several), ["b1", "b2"], "the newest boots of several VMs")
    expect(ask(FindLastBootFrom(VM.hotkey, "")), None, "a boot from another address")
    expect(ask(Claim(_SERVER)), True, "a new server")
    fresh_server = evolve(_SERVER, server_id="n2", registration="r2", name="b", address="5.6.7.8")
    expect(ask(Claim(fresh_server)), True, "another server")
    expect(ask(Claim(_GPU)), True, "a new GPU")
    expect(ask(Claim(_DEVICE)), True, "a new device")
    before = dump(harness.open())
    third = evolve(_SERVER, server_id="n3", registration="r3", name="c", address="9.9.9.9")
    taken = {
        "id": evolve(third, server_id="n1"),
        "registration": evolve(third, registration="r1"),
        "name": evolve(third, name="vm-0"),
        "address": evolve(third, address="1.2.3.4"),
    }
    for what, second in taken.items():
        expect(ask(Claim(second)), False, f"a second server with one {what}")
    expect(ask(Claim(_GPU)), False, "a GPU that a server declares twice")
    expect(ask(Claim(evolve(_DEVICE, server_id="n2"))), False, "a device of two servers")
    expect(dump(harness.open()), before, "rows after claims that failed")
    expect(ask(Claim(evolve(third, hotkey="other", name="vm-0"))), True, "another hotkey's server of one name")
    expect(ask(Read(ServerRow, "n1")), _SERVER, "a server by its id")
    expect(ask(Read(ServerRow, "n9")), None, "a server that is not there")
    expect(ask(Read(ServerRow, "5.6.7.8", "address")), fresh_server, "the server at an address")
    expect(ask(Read(ServerRow, "5.6.7.9", "address")), None, "the server at no address")
    expect(ask(ReadAll(ServerRow, VM.hotkey)), (_SERVER, fresh_server), "servers of a hotkey")
    expect(ask(ReadGpus(("n1",))), (_GPU,), "the GPUs of a server")
    expect(ask(ReadGpus(("n3",))), (), "the GPUs of no server")
    expect(ask(ReadGpus(("n3", "n1"))), (_GPU,), "the GPUs of several servers")
    expect(ask(Claim(evolve(_GPU, server_id="n2"))), True, "a GPU that two servers declare")
    expect(ask(FindDeclaration("gpu-1")), "n1", "the first server that declares a GPU")
    expect(ask(FindDeclaration("gpu-2")), None, "a GPU that is not there")
    expect(ask(Read(GpuDeviceRow, "41A0")), _DEVICE, "a device")
    ask(Put(evolve(_DEVICE, serial_number="53C3")))
    expect(ask(Read(GpuDeviceRow, "41A0")), evolve(_DEVICE, serial_number="53C3"), "a device with other firmware")
    refusal = evolve(_REFUSAL, stage="runtime", registration="r1")
    ask(Insert(refusal))
    ask(Insert(evolve(refusal, attestation_id="a2", code=None)))
    ask(Insert(evolve(refusal, attestation_id="a3", created_at=NOW - 1)))
    ask(Insert(evolve(refusal, attestation_id="a4", registration="r2")))
    expect(ask(CountRefusals("r1", NOW)), 1, "refusals of a registration since a time")
    expect(ask(Read(AttestationRow, "a1")), refusal, "a verdict")
    expect(ask(Read(AttestationRow, "a9")), None, "a verdict that is not there")
    renamed = evolve(_SERVER, name="z", updated_at=NOW, attested="a1", pin=_PIN)
    ask(Put(renamed))
    expect(ask(Read(ServerRow, "n1")), renamed, "a server that was replaced")
    expect_fault(lambda: ask(Put(evolve(renamed, name="b"))), "one name for two servers")
    expect(ask(Read(ServerRow, "n1")), renamed, "a server after a name that is taken")
    ask(DeleteServer("n1"))
    expect(ask(Read(ServerRow, "n1")), None, "a deleted server")
    expect(ask(ReadGpus(("n1",))), (), "the GPUs of a deleted server")
    expect(ask(FindDeclaration("gpu-1")), "n2", "the other server that declares a GPU of a deleted one")
    expect(ask(Read(GpuDeviceRow, "41A0")), None, "a device of a deleted server")
    expect(len(ask(Scan(AttestationRow))), 4, "verdicts after their server is gone")
    expect(len(ask(Scan(ServerRow))), 2, "servers after one is gone")


def what_must_be_unique_is(harness: Harness) -> None:
    """A second row with a key, a second token, a second active key or candidate: `StoreError`, and nothing changes."""
    store = harness.open()
    ask = asking(store)
    ask(Insert(_BOOT))
    ask(Insert(_KEY))
    ask(Insert(evolve(_KEY, generation=2, state="candidate")))
    retired = evolve(_KEY, generation=3, state="retired", retired_at=NOW, retirement="rekey")
    ask(Insert(retired))
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
        expect_fault(partial(ask, op), what)
        expect(dump(store), before, f"rows after {what}")


def a_sealed_key_never_changes(harness: Harness) -> None:
    """`UpdateGeneration` writes state and times; an operation that says another key, or another state, changes no key.

    A store that authenticates rows may refuse the row afterwards: no unit does that.
    """
    ask = asking(harness.open())
    retired = evolve(_KEY, state="retired", provisional=True, delivered_at=NOW, retired_at=NOW + 1, retirement="rekey")
    ask(Insert(_KEY))
    ask(UpdateGeneration(retired))
    expect(ask(ReadAll(GenerationRow, VM)), (retired,), "a key after a change of state")
    another = partial(evolve, sealed=b"other", wrapped_key=b"other", kek_id="other")
    lies: dict[str, Callable[[GenerationRow], StoreOp[None]]] = {
        "an update to another key": lambda row: UpdateGeneration(another(row)),
        "a rewrap of another key": lambda row: RewrapGenerations((another(row),)),
        "an update of no key": lambda row: UpdateGeneration(evolve(row, generation=9)),
        "a rewrap of no key": lambda row: RewrapGenerations((evolve(row, generation=9),)),
        "a purge of an active key": PurgeGeneration,
    }
    for what, lie in lies.items():
        row = evolve(_KEY, vm=Vm(VM.hotkey, what))
        ask(Insert(row))
        ask(lie(row))
        with suppress(RowNotAuthentic):
            found = [(each.sealed, each.state) for each in ask(ReadAll(GenerationRow, row.vm))]
            expect(found, [(row.sealed, row.state)], f"a key after {what}")


def of_many_keys_few_are_live(harness: Harness) -> None:
    """`ReadLiveGenerations` replies as `ReadAll` does, without retired keys that no request can need."""
    ask = asking(harness.open())
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
    ask(Insert(_BOOT))
    given_volumes = (
        BootVolumeRow("b0", "storage", 0, 4, 7, in_use=False),
        BootVolumeRow("b0", "tdx-cache", 1, None, 5, in_use=False),
    )
    ask(InsertBootVolumes(given_volumes))
    expect([*ask(ReadBootVolumes("b0"))], [*given_volumes], "the volumes of a boot")
    for row in (*rows, *(evolve(row, vm=Vm(VM.hotkey, "vm-1")) for row in rows)):
        ask(Insert(row))
    live = [rows[index] for index in (1, 2, 4, 7, 9, 11)]
    expect([*ask(ReadLiveGenerations(VM))], live, "keys on which a request may depend")
    given = [rows[index] for index in (1, 2, 3, 4, 6, 7, 9, 11)]
    expect([*ask(ReadLiveGenerations(VM, "b0"))], given, "the same, and the keys of a boot")
    expect([*ask(ReadLiveGenerations(VM, "b1"))], live, "the same, and the keys of a boot without any")
    expect(ask(ReadLiveGenerations(Vm("another", VM.name))), (), "another VM's")


def keys_are_rewrapped_and_purged(harness: Harness) -> None:
    """`RewrapGenerations` changes the wrapping alone, `PurgeGeneration` a retired key alone; both are counted."""
    ask = asking(harness.open())
    retired = evolve(_KEY, generation=2, state="retired", retired_at=NOW, retirement="superseded", provisional=True)
    for row in (_KEY, retired):
        ask(Insert(row))
    kek = _KEY.kek_id or ""
    expect(ask(CountSealed()), ((kek, 2),), "keys under each KEK")
    expect(ask(CountStates()), (("active", 1), ("retired", 1)), "keys in each state")
    expect(ask(ReadOtherwiseSealed(kek, 9)), (), "keys under another one")
    expect(len(ask(ReadOtherwiseSealed("new", 1))), 1, "as many keys as asked for")
    expect(ask(ReadOtherwiseSealed("new", 9)), (_KEY, retired), "keys under another one, all")
    wrapped = evolve(_KEY, kek_id="new", wrapped_key=b"again")
    ask(RewrapGenerations((wrapped,)))
    expect(ask(ReadAll(GenerationRow, VM)), (wrapped, retired), "keys after one was rewrapped")
    expect(ask(CountSealed()), tuple(sorted([(kek, 1), ("new", 1)])), "keys under two KEKs")
    ask(PurgeGeneration(retired))
    nothing = evolve(retired, sealed=None, kek_id=None, wrapped_key=None)
    purged = evolve(nothing, state="purged", provisional=False)
    expect(ask(ReadAll(GenerationRow, VM)), (wrapped, purged), "keys after one was purged")
    ask(EraseGeneration(wrapped))
    gone = evolve(wrapped, state="purged", provisional=False, sealed=None, kek_id=None, wrapped_key=None)
    expect(ask(ReadAll(GenerationRow, VM)), (gone, purged), "an active key after its erasure")
    ask(Put(_VM))
    ask(Put(_VOLUME))
    for kind in (VmRow, VolumeRow):
        ask(Forget(kind, VM))
        expect(ask(Scan(kind)), (), "rows of a VM that is forgotten")


def boots_are_found_by_their_confirm_nonce(harness: Harness) -> None:
    """`Read` by a confirm nonce, and a boot's row that is replaced; two boots never have one confirm nonce."""
    ask = asking(harness.open())
    ask(Insert(_BOOT))
    expect(ask(Read(BootRow, bytes(32), "confirm_digest")), None, "the boot of no confirm nonce")
    ask(Insert(BootVolumeRow("b0", "storage", 0, 1, 2, in_use=True)))
    attested = evolve(_BOOT, confirm_digest=bytes(32), confirm_expires_at=NOW + 300)
    ask(Put(attested))
    expect(ask(Read(BootRow, bytes(32), "confirm_digest")), attested, "the boot of a confirm nonce")
    confirmed = evolve(attested, confirm_body_digest=b"body")
    ask(Put(confirmed))
    expect(ask(Read(BootRow, _BOOT.token_digest, "token_digest")), confirmed, "a boot that confirmed")
    other = evolve(attested, boot_id="b9", token_digest=b"t" * 32)
    expect_fault(lambda: ask(Insert(other)), "one confirm nonce for two boots")
    expect(ask(Read(BootRow, other.token_digest, "token_digest")), None, "a second boot with one confirm nonce")


CASES: tuple[Case, ...] = cases_of(globals())
