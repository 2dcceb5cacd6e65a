"""Cases of the store contract: transactions are atomic, serializable and durable."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from attrs import evolve, frozen

from chutes_proto.errors import Refused
from chutes_proto.keys.vault import NONCE_SIZE, Address, KeyEncryptionKey, Vault
from chutes_proto.store._rows import (
    ROWS,
    BootRow,
    Claim,
    GenerationRow,
    GpuRow,
    KeyringRow,
    NonceRow,
    Read,
    ReadAll,
    ReadTimes,
    Scan,
    ServerRow,
    SetHorizon,
    Vm,
)
from chutes_proto.store._run import Ask, Script, Store, Unit
from chutes_proto.testing._platform import PROFILE
from chutes_proto.testing.store_suite._parts import (
    CALLERS,
    DAY,
    NOW,
    VAULT,
    VM,
    Case,
    Harness,
    Interrupted,
    Interruption,
    attest,
    boot,
    cases_of,
    confirm,
    dump,
    entropy,
    expect,
    expect_refused,
    platform,
    read,
    sync,
)
from chutes_proto.units.boot import GrantBoot
from chutes_proto.units.nonces import SKEW, ForgetNonces, RaiseHorizon
from chutes_proto.units.operator import RewrapKeys, StoreRestored
from chutes_proto.units.records import SignedGpu, SignedGpus
from chutes_proto.units.rotation import Pair
from chutes_proto.units.servers import HostQuote, RegisterServer
from chutes_proto.wire.codes import Code

T = TypeVar("T")


def _granted(store: Store, label: str, **changes: Any) -> GrantBoot:
    """Boot, and return the boot."""
    granted = evolve(boot(label), **changes)
    _ = store.transact(granted)
    return granted


# --- transactions ---


def a_unit_that_raises_leaves_no_trace(harness: Harness) -> None:
    """A boot and a sync, stopped after each of their operations: the rows are as before, and then both succeed."""
    store = harness.open()
    first = _granted(store, "first")
    _ = store.transact(sync(first, "first", "storage", "tdx-cache"))
    second = boot("second")
    _leaves_no_trace(store, second)
    _leaves_no_trace(store, sync(second, "second", "storage", rekey=["storage"]))
    third = _granted(store, "third", exchange="two-phase")
    _leaves_no_trace(store, attest(third, "third", "storage", "tdx-cache"))
    _leaves_no_trace(store, confirm(attest(third, "third"), {"storage": True, "tdx-cache": False}))
    takeover = evolve(boot("fourth"), platform=platform("elsewhere"), hotkey_proven=True)
    _leaves_no_trace(store, takeover)


@frozen
class _ScanAll(Unit[tuple[object, ...]]):
    """All of a small store, in one transaction."""

    def script(self) -> Script[tuple[object, ...]]:
        found: list[object] = [(yield from ReadTimes()).horizon]
        for kind in ROWS:
            found += yield from Scan(kind)
        return tuple(found)


@frozen
class _InterruptedAtItsEnd(Unit[None]):
    """``unit``, interrupted after the last of its operations; `Interruption` says how many they were."""

    unit: Unit[Any]

    def script(self) -> Script[None]:
        script, reply, operations = self.unit.script(), None, 0
        while True:
            try:
                op = script.send(reply)
            except StopIteration:
                raise Interruption(operations) from None
            reply, operations = (yield from op), operations + 1


def _leaves_no_trace(store: Store, unit: Unit[Any]) -> None:
    """The rows are compared after all interruptions: none takes back what one before it has left."""
    before = store.transact(_ScanAll())
    operations = 0
    try:
        store.transact(_InterruptedAtItsEnd(unit))
    except Interruption as exc:
        (operations,) = exc.args
    for number in range(operations):
        with suppress(Interruption):
            _ = store.transact(Interrupted(unit, number))
    expect(store.transact(_ScanAll()), before, f"rows after interruptions of {type(unit).__name__}")
    _ = store.transact(unit)
    if operations < 5 or store.transact(_ScanAll()) == before:
        raise AssertionError(f"{type(unit).__name__} did almost nothing")


def an_exception_comes_out_unchanged(harness: Harness) -> None:
    """The very exception of a script, of any kind, and the store works on."""

    @frozen
    class Raise(Unit[None]):
        exc: BaseException

        def script(self) -> Script[None]:
            yield from Claim(NonceRow(bytes(32), "boot", NOW, NOW))
            raise self.exc

    store = harness.open()
    for exc in (Refused(Code.NONCE_INVALID, "no"), ValueError("no"), OSError("no"), KeyboardInterrupt()):
        try:
            store.transact(Raise(exc))
        except BaseException as caught:
            if caught is not exc:
                raise AssertionError(f"{exc!r} came out as {caught!r}") from caught
        expect(store.transact(Ask(Scan(NonceRow))), (), "rows after a roll-back")


def a_commit_is_seen_by_all(harness: Harness) -> None:
    """A second handle that was opened before sees what the first one wrote."""
    writer, reader = harness.open(), harness.open()
    granted = _granted(writer, "only")
    keys = reader.transact(sync(granted, "body", "storage"))
    again = writer.transact(sync(granted, "body", "storage"))
    expect(again, evolve(keys, replayed=True), "the answer given again by another handle")


# --- races ---


def _race(harness: Harness, units: Sequence[Unit[T]], *, winners: int = CALLERS, lost: Code | None = None) -> list[T]:
    """Run all units at once; return the results of ``winners`` units. All others must be refused with ``lost``."""
    outcomes = harness.together([partial(harness.open().transact, unit) for unit in units])
    results = [outcome for outcome in outcomes if not isinstance(outcome, Exception)]
    faults = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    refusals = [fault.code if isinstance(fault, Refused) else fault for fault in faults]
    expect(refusals, [lost] * (len(units) - winners), "refusals")
    return results


def _generations(harness: Harness, volume: str) -> list[GenerationRow]:
    return [row for row in harness.open().transact(Ask(ReadAll(GenerationRow, VM))) if row.volume == volume]


def one_nonce_grants_one_boot(harness: Harness) -> None:
    """Many boots with one nonce at once: one is granted."""
    nonce = boot("0").nonce
    units = [evolve(boot(str(index)), nonce=nonce) for index in range(CALLERS)]
    _ = _race(harness, units, winners=1, lost=Code.NONCE_INVALID)
    expect(len(harness.open().transact(Ask(Scan(BootRow)))), 1, "boots of one nonce")


def boots_at_once_agree_on_one_root_passphrase(harness: Harness) -> None:
    """Many first boots of one VM at once: one passphrase is made, all get it."""
    roots = [grant.root for grant in _race(harness, [boot(str(index)) for index in range(CALLERS)])]
    expect(roots, [roots[0]] * CALLERS, "root passphrases")
    expect(len(harness.open().transact(Ask(Scan(GenerationRow)))), 1, "keys that were made")


def one_token_is_redeemed_once(harness: Harness) -> None:
    """Many syncs with one token and different bodies at once: one is granted, and only its key is made."""
    granted = _granted(harness.open(), "only")
    units = [sync(granted, str(index), "storage") for index in range(CALLERS)]
    _ = _race(harness, units, winners=1, lost=Code.BOOT_TOKEN_INVALID)
    keys = harness.open().transact(Ask(Scan(GenerationRow)))
    expect([row.volume for row in keys], ["root", "storage"], "keys that were made")


def one_sync_sent_often_has_one_answer(harness: Harness) -> None:
    """One request, sent many times at once: all answers are the same, and nothing is done twice."""
    granted = _granted(harness.open(), "only")
    unit = sync(granted, "body", "storage", "tdx-cache", rekey=["storage"])
    answers = _race(harness, [evolve(unit, request_id=f"r{index}") for index in range(CALLERS)])
    expect(sorted(answer.replayed for answer in answers), [False] + [True] * (CALLERS - 1), "answers given again")
    passphrases = [answer.passphrases for answer in answers]
    expect(passphrases, [passphrases[0]] * CALLERS, "passphrases")
    keys = harness.open().transact(Ask(Scan(GenerationRow)))
    expect([(row.volume, row.generation) for row in keys], [("root", 1), ("storage", 1), ("tdx-cache", 1)], "keys")


def one_quote_nonce_hands_out_once(harness: Harness) -> None:
    """Many attestations with one quote nonce at once: those with one body agree, the others are refused."""
    granted = _granted(harness.open(), "only", exchange="two-phase")
    units = [attest(granted, str(index % 2), "storage") for index in range(CALLERS)]
    handed = _race(harness, units, winners=CALLERS // 2, lost=Code.QUOTE_NONCE_INVALID)
    expect([keys.volumes for keys in handed], [handed[0].volumes] * (CALLERS // 2), "keys that were handed out")
    keys = harness.open().transact(Ask(Scan(GenerationRow)))
    expect([row.volume for row in keys], ["k3s", "root", "storage"], "keys that were made")


def boots_at_once_are_handed_the_same_keys(harness: Harness) -> None:
    """Many two-phase boots of one VM attest at once: one first key, one candidate, and one of them may confirm."""
    boots = [_granted(harness.open(), str(index), exchange="two-phase") for index in range(CALLERS)]
    attests = [attest(granted, "body", "storage") for granted in boots]
    pairs = [keys.volumes[0][1] for keys in _race(harness, attests)]
    (first,) = [pair.next for pair in pairs if pair.current is None]
    others = [pair for pair in pairs if pair.current is not None]
    expect(others, [Pair(first, others[0].next)] * (CALLERS - 1), "keys of the others")
    confirms = [confirm(attested, {"storage": True}) for attested in attests]
    _ = _race(harness, confirms, winners=1, lost=Code.CONFIRM_NONCE_INVALID)
    states = [row.state for row in _generations(harness, "storage")]
    expect(sorted(states), ["active", "retired"], "generations")


def one_confirmation_decides(harness: Harness) -> None:
    """Two confirmations of one boot that differ, each sent often and at once: one decides, and is answered alike."""
    store = harness.open()
    for label in ("first", "second"):
        second = _granted(store, label, exchange="two-phase")
        _ = store.transact(attest(second, "body", "storage"))
    units = [confirm(attest(second, "body", "storage"), {"storage": index % 2 == 0}) for index in range(CALLERS)]
    (result,) = {*_race(harness, units, winners=CALLERS // 2, lost=Code.CONFIRM_NONCE_INVALID)}
    wanted = {"promoted": ["retired", "active"], "discarded": ["active", "retired"]}[result[0][1]]
    expect([row.state for row in _generations(harness, "storage")], wanted, "generations")


def one_platform_gets_a_free_name(harness: Harness) -> None:
    """Boots of many platforms under one free name at once: one platform gets it."""
    units = [evolve(boot(str(index)), platform=platform(str(index))) for index in range(CALLERS)]
    _ = _race(harness, units, winners=1, lost=Code.PLATFORM_MISMATCH)


def a_platform_gets_no_more_names_than_it_may(harness: Harness) -> None:
    """Boots of one platform under many names at once: only as many as are allowed are granted."""
    names = [Vm(VM.hotkey, f"vm-{index}") for index in range(CALLERS)]
    units = [evolve(boot(vm.name, vm=vm), claims_per_platform=3) for vm in names]
    _ = _race(harness, units, winners=3, lost=Code.PLATFORM_MISMATCH)


def servers_at_once_share_nothing(harness: Harness) -> None:
    """Many registrations at once that want one address, one signed GPU or one id: one of each has it."""
    codes = {"address": Code.HOST_TAKEN, "gpu": Code.GPU_TAKEN, "server_id": Code.SERVER_TAKEN}
    for number, (wanted, code) in enumerate(codes.items()):
        units = [_registration(f"{number}-{index}", f"{number}", wanted) for index in range(CALLERS)]
        _ = _race(harness, units, winners=1, lost=code)
        expect(len(harness.open().transact(Ask(Scan(ServerRow)))), number + 1, "servers")


def _registration(own: str, shared: str, wanted: str) -> RegisterServer:
    """A registration of hotkey ``own``, all of whose claims are its own but for the one that is ``wanted``.

    All declare one uuid, which keeps nobody out; a GPU is claimed by its signed serial number.
    """
    server_id = shared if wanted == "server_id" else own
    gpu = SignedGpu(shared if wanted == "gpu" else own, "53C2")
    pin = platform(own).pin
    return RegisterServer(
        now=NOW,
        request_id=entropy(own, 16).hex(),
        hotkey=own,
        server_id=server_id,
        name="name",
        host="a.example",
        address=shared if wanted == "address" else own,
        gpus=(GpuRow("gpu", server_id, "h200", "{}"),),
        profiles={PROFILE.identity: PROFILE},
        peer_address="",
        shown=HostQuote(entropy(own, 32), pin, *PROFILE.identity, None, SignedGpus("", (gpu,), is_required=True)),
    )


def boots_and_syncs_at_once_keep_every_key(harness: Harness) -> None:
    """Syncs of one VM with many tokens at once, half of them with ``rekey``: every key that was handed out is kept."""
    store = harness.open()
    boots = [_granted(store, str(index)) for index in range(CALLERS)]
    units = [sync(granted, "b", "storage", rekey=["storage"][index % 2 :]) for index, granted in enumerate(boots)]
    handed_out = {keys.passphrases[0][1].reveal() for keys in _race(harness, units)}
    rows = _generations(harness, "storage")
    expect([row.generation for row in rows], list(range(1, len(rows) + 1)), "numbers of the generations")
    expect(len(rows) in (CALLERS // 2, CALLERS // 2 + 1), True, f"{len(rows)} keys of {CALLERS // 2} rekeys")
    expect([row.state for row in rows].count("active"), 1, "active keys")
    answers = [store.transact(evolve(unit, request_id="again")) for unit in units]
    expect({answer.passphrases[0][1].reveal() for answer in answers}, handed_out, "keys given again")


def rewraps_at_once_wrap_each_key_once(harness: Harness) -> None:
    """Many rewraps at once, each of a few rows: one of them rewraps each key, and all keys open as before.

    The keys of the store itself are rewrapped, too.
    """
    store = harness.open()
    for index in range(CALLERS):
        _ = store.transact(sync(_granted(store, str(index)), "b", "storage", rekey=["storage"]))
    before = store.transact(Ask(Scan(GenerationRow)))
    total = len(before) + len(store.transact(Ask(Scan(KeyringRow))))
    few = -(-total // CALLERS)
    newer = KeyEncryptionKey.from_bytes(bytes(range(1, 33)))
    units = [
        RewrapKeys(NOW, entropy(f"rewrap {index}", few * NONCE_SIZE), Vault(newer, VAULT.current), "new key")
        for index in range(CALLERS)
    ]
    counts = [rewrapped.count for rewrapped in _race(harness, units)]
    expect(sum(counts), total, f"rewrapped keys, by {counts}")
    after = store.transact(Ask(Scan(GenerationRow)))
    opened = [
        [vault.open(Address(row.vm, row.volume, row.generation), row).reveal() for row in rows]
        for vault, rows in ((VAULT, before), (Vault(newer), after))
    ]
    expect(opened[1] == opened[0], True, "the keys under the new KEK alone are the same")


# --- durable facts ---


def a_token_is_refused_when_it_must_be(harness: Harness) -> None:
    """Unknown, expired, another's, redeemed, voided: nothing changes, and the token's owner is still served."""
    store = harness.open()
    granted = _granted(store, "only")
    good = sync(granted, "body", "storage")
    not_redeemed = (
        (evolve(good, token_digest=bytes(32)), Code.BOOT_TOKEN_INVALID),
        (evolve(good, now=granted.now + 600), Code.BOOT_TOKEN_INVALID),
        (evolve(good, vm=Vm("other", VM.name)), Code.HOTKEY_MISMATCH),
        (evolve(good, vm=Vm(VM.hotkey, "other")), Code.VM_NAME_MISMATCH),
        (evolve(good, certificate=bytes(32)), Code.BOOT_TOKEN_INVALID),
    )
    _all_refused(store, not_redeemed)
    keys = store.transact(good)
    redeemed = (
        (evolve(good, body_digest=bytes(32)), Code.BOOT_TOKEN_INVALID),
        (evolve(good, certificate=None), Code.BOOT_TOKEN_INVALID),
        (read(granted, "storage"), Code.BOOT_TOKEN_INVALID),
        *not_redeemed,
    )
    _all_refused(store, redeemed)
    last = evolve(good, now=granted.now + 599)
    expect(store.transact(last).passphrases, keys.passphrases, "the answer given again in the last second")
    _ = store.transact(StoreRestored(granted.now + 2))
    _all_refused(store, [(last, Code.BOOT_TOKEN_INVALID)])


def _all_refused(store: Store, units: Sequence[tuple[Unit[Any], Code]]) -> None:
    before = dump(store)
    for unit, code in units:
        expect_refused(partial(store.transact, unit), code)
    expect(dump(store), before, "rows after refusals")


def a_nonce_is_refused_when_it_must_be(harness: Harness) -> None:
    """Redeemed, redeemed and forgotten, or issued before a restore."""
    store = harness.open()
    first = _granted(store, "first")
    again = evolve(boot("again"), nonce=first.nonce)
    _all_refused(store, [(again, Code.NONCE_INVALID)])
    _ = store.transact(boot("a day later", now=NOW + DAY))
    expect(store.transact(RaiseHorizon(NOW + DAY)), True, "the horizon is raised after a day")
    expect(store.transact(ForgetNonces(NOW + DAY)), 1, "nonces that are forgotten after a day")
    kept = [row.value for row in store.transact(Ask(Scan(NonceRow)))]
    expect(kept, [boot("a day later").nonce.value], "nonces that are remembered after a day")
    _all_refused(store, [(evolve(again, now=NOW + DAY), Code.STORE_UNAVAILABLE)])
    horizon = store.transact(StoreRestored(NOW + 90_000)).horizon
    late = boot("late", now=horizon + 1)
    _all_refused(store, [(evolve(late, now=horizon), Code.STORE_UNAVAILABLE)])
    _all_refused(store, [(evolve(late, nonce=evolve(late.nonce, issued_at=horizon)), Code.STORE_UNAVAILABLE)])
    _ = store.transact(_after(store, horizon))


def _after(store: Store, horizon: int) -> GrantBoot:
    """A boot whose nonce was issued in the first second after a restore's horizon."""
    if store.transact(Ask(ReadTimes())).clock is None:
        return boot("after", now=horizon + 6)
    store.transact(Ask(SetHorizon(horizon - SKEW)))  # no case waits for a minute of the store's own clock
    return boot("after", now=horizon - SKEW + 6)


def clocks_that_are_ahead_stop_no_boot(harness: Harness) -> None:
    """A sweep and a restore under a clock that is days ahead: no nonce counts twice, and a right clock repairs it."""
    store = harness.open()
    clock = store.transact(Ask(ReadTimes())).clock
    now = NOW if clock is None else clock
    first = boot("first", now=now)
    _ = store.transact(first)
    ahead = NonceRow(entropy("ahead", 32), "boot", now + 10 * DAY, now + 10 * DAY)
    _ = store.transact(Ask(Claim(ahead)))
    _ = store.transact(RaiseHorizon(now + 12 * DAY))
    _ = store.transact(ForgetNonces(now + 12 * DAY))
    if clock is None:  # then this was the latest time, and the clock went back since
        _all_refused(store, [(boot("right", now=now + 100), Code.STORE_UNAVAILABLE)])
    else:
        horizon = store.transact(Ask(ReadTimes())).horizon
        expect(horizon <= now - DAY + 60, True, f"horizon {horizon} after a sweep under a clock that is ahead")
        _all_refused(store, [(boot("wrong", now=now + DAY), Code.SERVER_FAULT)])
        _ = store.transact(boot("right", now=now + 1))
        expect(store.transact(Ask(Read(NonceRow, ahead.value))), ahead, "a redemption from the future is remembered")
    wrong = store.transact(StoreRestored(now + 30 * DAY))
    right = store.transact(StoreRestored(now + 100))
    expect((right.before, store.transact(Ask(ReadTimes())).horizon), (wrong.horizon, right.horizon), "horizons")
    latest = store.transact(Ask(ReadTimes())).clock
    if clock is None or latest is None:
        expect((wrong.horizon, right.horizon), (now + 30 * DAY + SKEW, now + 100 + SKEW), "horizons of two restores")
    else:
        between = clock + SKEW <= wrong.horizon <= right.horizon <= latest + SKEW
        expect(between, True, f"horizons {wrong.horizon} and {right.horizon} by a clock from {clock} to {latest}")
    _ = store.transact(_after(store, right.horizon))
    again = evolve(boot("again", now=right.horizon + 1), nonce=first.nonce)
    _all_refused(store, [(again, Code.STORE_UNAVAILABLE)])


def keys_live_as_documented(harness: Harness) -> None:
    """Made, kept, rekeyed, pruned, revived: no generation is ever lost, and each opens to the same passphrase."""
    store = harness.open()
    seen: dict[tuple[str, int], bytes] = {}
    steps: tuple[tuple[tuple[str, ...], tuple[str, ...], list[tuple[str, int, str]]], ...] = (
        (("a", "b"), (), [("a", 1, "active"), ("b", 1, "active")]),
        (("a", "b"), ("a",), [("a", 1, "retired"), ("a", 2, "active"), ("b", 1, "active")]),
        (("b",), (), [("a", 1, "retired"), ("a", 2, "retired"), ("b", 1, "active")]),
        (("b", "a"), (), [("a", 1, "retired"), ("a", 2, "active"), ("b", 1, "active")]),
    )
    for index, (volumes, rekey, wanted) in enumerate(steps):
        granted = _granted(store, str(index))
        answer = store.transact(sync(granted, "body", *volumes, rekey=rekey))
        expect(tuple(volume for volume, _ in answer.passphrases), volumes, "volumes in the answer")
        rows = [row for row in store.transact(Ask(ReadAll(GenerationRow, VM))) if row.volume != "root"]
        expect([(row.volume, row.generation, row.state) for row in rows], wanted, "generations")
        current = {row.volume: row.generation for row in rows if row.state == "active"}
        for volume, passphrase in answer.passphrases:
            known = seen.setdefault((volume, current[volume]), passphrase.reveal())
            expect(passphrase.reveal() == known, True, f"{volume} gets the passphrase of its active generation")
    expect(len(set(seen.values())), len(seen), "passphrases that differ")


CASES: tuple[Case, ...] = cases_of(globals())
