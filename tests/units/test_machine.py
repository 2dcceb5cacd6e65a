"""Any calls in any order, of VMs and of operators, on SQLite; `Machine` foretells what comes of each."""

from __future__ import annotations

import itertools
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import pytest
from attrs import evolve
from hypothesis import Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from chutes_proto.errors import Refusal
from chutes_proto.io.stores.sqlite import SqliteStore
from chutes_proto.keys import generations
from chutes_proto.keys.generations import Change, HandOut
from chutes_proto.keys.vault import NONCE_SIZE, Address, FreshKey, KeyEncryptionKey, Vault
from chutes_proto.secret import Secret
from chutes_proto.store._rows import (
    AuditRow,
    CountSealed,
    Exchange,
    GenerationRow,
    InsertAll,
    Scan,
    Vm,
    VmRow,
    VolumeRow,
)
from chutes_proto.store._run import Ask, Store, Unit
from chutes_proto.testing.store_suite._parts import (
    DAY,
    NOW,
    VAULT,
    attest,
    boot,
    confirm,
    dump,
    entropy,
    platform,
    read,
    sync,
)
from chutes_proto.tlog.tiles import WIDTH
from chutes_proto.units.log import SALT_SIZE, SequenceLog
from chutes_proto.units.operator import (
    AllowFormat,
    BindVm,
    ImportKeys,
    PurgeAudits,
    Purged,
    PurgeKeys,
    RebindVm,
    Restored,
    RestoreKey,
    RewrapKeys,
    Rewrapped,
    StoreRestored,
)
from chutes_proto.units.rotation import HandedKeys
from chutes_proto.units.volumes import VolumeKeys
from chutes_proto.wire.codes import Code
from tests.conftest import SOAK
from tests.store.memory import SealedStore
from tests.units.model import Key, Machine, Token

T = TypeVar("T")

VMS = [Vm("alice", "vm-0"), Vm("alice", "vm-1"), Vm("bob", "vm-0")]
PLATFORMS = ["north", "south", "west"]
NAMES_PER_PLATFORM = 2
VOLUMES = ["storage", "tdx-cache"]
KEKS = [VAULT.current, KeyEncryptionKey.from_bytes(b"n" * 32)]
VAULTS = [Vault(*KEKS), Vault(*reversed(KEKS))]
NOTHING: set[str] = set()

some_volumes = st.lists(st.sampled_from(VOLUMES), min_size=1, max_size=2, unique=True)


class Calls(RuleBasedStateMachine):
    """Calls of the units; each outcome is foretold by the model, and equal on all stores, of which one is in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = SealedStore(VAULT)
        self.stores: list[Store] = [self.memory]
        self.now = NOW
        self.horizon = 0
        self.vault = VAULTS[0]
        self.of_rows = self.kek  # of the store's own key
        self.labels = itertools.count()
        self.vms: dict[Vm, Machine] = {}
        self.tokens: list[Token] = []

    def do(self, unit: Unit[T]) -> T | Code | str:
        """The result of the unit, or the code of its refusal."""
        outcomes: list[T | Code | str] = []
        for store in self.stores:
            try:
                outcomes.append(store.transact(unit))
            except Refusal as exc:
                outcomes.append(exc.code)
        assert outcomes[1:] == outcomes[:-1]
        return outcomes[0]

    def label(self) -> str:
        return str(next(self.labels))

    @property
    def kek(self) -> str:
        return self.vault.current.kek_id

    # --- boots ---

    @initialize(vm=st.sampled_from(VMS), exchange=st.sampled_from(["base", "two-phase"]))
    def first_boot(self, vm: Vm, exchange: Exchange) -> None:
        self.boot(vm, "north", False, False, exchange, "refuse", None)

    @rule(
        vm=st.sampled_from(VMS),
        home=st.sampled_from(PLATFORMS),
        proven=st.booleans(),
        needs_certificate=st.booleans(),
        exchange=st.sampled_from(["base", "two-phase"]),
        downgrade=st.sampled_from(["refuse", "allow"]),
        again=st.none() | st.integers(0, 50),
    )
    def boot(
        self,
        vm: Vm,
        home: str,
        proven: bool,
        needs_certificate: bool,
        exchange: Exchange,
        downgrade: Literal["refuse", "allow"],
        again: int | None,
    ) -> None:
        unit = evolve(
            boot(self.label(), now=self.now, vm=vm),
            platform=platform(home),
            hotkey_proven=proven,
            token_needs_certificate=needs_certificate,
            exchange=exchange,
            exchange_downgrade=downgrade,
            claims_per_platform=NAMES_PER_PLATFORM,
            vault=self.vault,
        )
        used = again is not None and bool(self.tokens)
        if used:
            assert again is not None
            old = self.tokens[again % len(self.tokens)].granted
            unit = evolve(unit, nonce=old.nonce)
        outcome = self.do(unit)
        known = self.vms.get(vm, Machine())
        room = sum(machine.platform == home for machine in self.vms.values()) < NAMES_PER_PLATFORM
        takes_over = known.platform not in (None, home)
        if known.platform is None:
            free = not known.holds_keys or proven
        else:
            free = not takes_over or (proven and not known.proven)
        if not free or ((known.platform is None or takes_over) and not room):
            assert outcome == Code.PLATFORM_MISMATCH
            return
        if known.two_phase and not takes_over and exchange == "base" and downgrade == "refuse":
            assert outcome == Code.EXCHANGE_DOWNGRADE
            return
        if self.now <= self.horizon or unit.nonce.issued_at <= self.horizon:
            assert outcome == Code.STORE_UNAVAILABLE
            return
        if used:
            assert outcome == Code.NONCE_INVALID
            return
        assert not isinstance(outcome, str)
        self.vms[vm] = known
        if takes_over:
            known.disown(self.now)
            self._void(vm)
            known.proven = known.two_phase = False
            known.attested = None
        if takes_over or known.platform is None:
            known.platform = home
        known.proven |= proven
        known.two_phase |= exchange == "two-phase"
        known.booted = True
        assert outcome.root is not None
        known.own("root", outcome.root.reveal(), self.kek, self.now)
        self.tokens.append(Token(unit, home))

    def _void(self, vm: Vm | None) -> None:
        for token in self.tokens:
            token.void |= vm in (None, token.granted.vm)

    # --- the base exchange ---

    def refusal(self, token: Token, vm: Vm, certificate: bytes | None) -> Code | None:
        granted = token.granted
        if granted.exchange != "base" or token.void or self.now >= granted.now + 600:
            return Code.BOOT_TOKEN_INVALID
        if vm.hotkey != granted.vm.hotkey:
            return Code.HOTKEY_MISMATCH
        if vm.name != granted.vm.name:
            return Code.VM_NAME_MISMATCH
        if certificate not in (None, granted.certificate) or (certificate is None and granted.token_needs_certificate):
            return Code.BOOT_TOKEN_INVALID
        return None

    @precondition(lambda self: self.tokens)
    @rule(
        which=st.integers(-3, 50),
        volumes=some_volumes,
        rekey=st.sets(st.sampled_from(VOLUMES)) | st.just(NOTHING),
        formatted=st.none() | st.frozensets(st.sampled_from(VOLUMES)),
        caller=st.sampled_from(["own", "own", "own", "bare", "other"]),
        vm=st.none() | st.none() | st.none() | st.sampled_from(VMS),
    )
    def sync(
        self,
        which: int,
        volumes: list[str],
        rekey: set[str],
        formatted: frozenset[str] | None,
        caller: str,
        vm: Vm | None,
    ) -> None:
        token = self.tokens[which % len(self.tokens)]
        rekey = rekey & set(volumes)
        unit = evolve(
            sync(token.granted, self.label(), *volumes, rekey=sorted(rekey)),
            now=self.now,
            vm=vm or token.granted.vm,
            certificate={"own": token.granted.certificate, "bare": None, "other": bytes(32)}[caller],
            formatted=formatted,
            vault=self.vault,
        )
        outcome = self.do(unit)
        if refusal := self.refusal(token, unit.vm, unit.certificate):
            assert outcome == refusal
        elif token.spent:
            assert outcome == Code.BOOT_TOKEN_INVALID
        else:
            assert isinstance(outcome, VolumeKeys)
            assert not outcome.replayed
            self.vms[unit.vm].synced(unit, outcome, self.kek)
            token.spent = unit, outcome

    @rule(
        vm=st.sampled_from(VMS),
        volumes=some_volumes,
        rekey=st.sets(st.sampled_from(VOLUMES), max_size=1),
        times=st.integers(1, 4),
    )
    def honest(self, vm: Vm, volumes: list[str], rekey: set[str], times: int) -> None:
        """A VM boots where it belongs and syncs, as nearly all do; and again."""
        for _ in range(times):
            if self._honest_boot(vm, "base"):
                self.sync(-1, volumes, rekey, None, "own", None)

    def _honest_boot(self, vm: Vm, exchange: Exchange) -> bool:
        known, before = self.vms.get(vm, Machine()), len(self.tokens)
        self.boot(vm, known.platform or "north", False, False, exchange, "allow", None)
        return len(self.tokens) > before

    @precondition(lambda self: any(token.spent for token in self.tokens))
    @rule(which=st.integers(0, 50), caller=st.sampled_from(["own", "own", "bare"]), other_body=st.booleans())
    def sync_again(self, which: int, caller: str, other_body: bool) -> None:
        spent = [token for token in self.tokens if token.spent]
        token = spent[which % len(spent)]
        assert token.spent is not None
        first, answer = token.spent
        body = bytes(32) if other_body else first.body_digest
        certificate = token.granted.certificate if caller == "own" else None
        unit = evolve(first, now=self.now, request_id=self.label(), certificate=certificate, body_digest=body)
        outcome = self.do(evolve(unit, vault=self.vault))
        if self.refusal(token, unit.vm, unit.certificate) or certificate is None or other_body:
            assert outcome == Code.BOOT_TOKEN_INVALID
        else:
            assert outcome == evolve(answer, replayed=True)

    @precondition(lambda self: self.tokens)
    @rule(which=st.integers(-3, 50), volume=st.sampled_from(VOLUMES), bare=st.booleans())
    def read(self, which: int, volume: str, bare: bool) -> None:
        token = self.tokens[which % len(self.tokens)]
        unit = evolve(read(token.granted, volume), now=self.now, request_id=self.label(), vault=self.vault)
        unit = evolve(unit, certificate=None) if bare else unit
        outcome = self.do(unit)
        known = self.vms[unit.vm].volumes[volume]
        if self.refusal(token, unit.vm, unit.certificate) or token.spent:
            assert outcome == Code.BOOT_TOKEN_INVALID
        elif known.active is None:
            assert outcome == Code.KEY_NOT_FOUND
        else:
            assert not isinstance(outcome, str)
            assert outcome.reveal() == known.active.text
            assert known.is_barred(True)

    # --- the two-phase exchange ---

    @precondition(lambda self: self.tokens)
    @rule(
        which=st.integers(-3, 50),
        volumes=some_volumes,
        formatted=st.none() | st.frozensets(st.sampled_from(VOLUMES)),
        caller=st.sampled_from(["own", "own", "own", "own", "other", "moved"]),
        vm=st.none() | st.none() | st.none() | st.sampled_from(VMS),
        again=st.booleans(),
    )
    def attest(
        self,
        which: int,
        volumes: list[str],
        formatted: frozenset[str] | None,
        caller: str,
        vm: Vm | None,
        again: bool,
    ) -> None:
        token = self.tokens[which % len(self.tokens)]
        granted, body = token.granted, self.label()
        unit = evolve(attest(granted, body, *volumes), formatted=formatted)
        if again and token.attested:
            unit = evolve(token.attested[0], request_id=entropy(f"again {body}", 16).hex())
        unit = evolve(unit, now=self.now, vm=vm or granted.vm, vault=self.vault)
        if caller == "other":
            unit = evolve(unit, certificate=bytes(32))
        if caller == "moved":
            unit = evolve(unit, quote=evolve(unit.quote, pin=platform("elsewhere").pin))
        outcome = self.do(unit)
        known = self.vms[granted.vm]
        if (
            granted.exchange != "two-phase"
            or token.void
            or self.now >= granted.now + 600
            or unit.vm != granted.vm
            or caller == "other"
            or (token.attested and not again)
        ):
            assert outcome == Code.QUOTE_NONCE_INVALID
        elif caller == "moved" or known.platform != token.home:
            assert outcome == Code.PLATFORM_MISMATCH
        elif token.attested:
            assert outcome == evolve(token.attested[1], replayed=True)
        else:
            assert isinstance(outcome, HandedKeys)
            known.handed(granted, unit, outcome, self.kek)
            token.attested = unit, outcome

    @precondition(lambda self: any(token.attested for token in self.tokens))
    @rule(
        which=st.integers(-3, 50),
        rotated=st.dictionaries(st.sampled_from(VOLUMES), st.booleans(), min_size=1),
        vm=st.none() | st.none() | st.none() | st.sampled_from(VMS),
        again=st.booleans(),
    )
    def confirm(self, which: int, rotated: dict[str, bool], vm: Vm | None, again: bool) -> None:
        attested = [token for token in self.tokens if token.attested]
        token = attested[which % len(attested)]
        assert token.attested is not None
        first, given = token.attested
        unit = token.confirmed[0] if again and token.confirmed else confirm(first, dict(sorted(rotated.items())))
        unit = evolve(unit, now=self.now, vm=vm or first.vm, request_id=self.label(), vault=self.vault)
        outcome = self.do(unit)
        known = self.vms[first.vm]
        if (
            token.void
            or self.now >= first.now + 300
            or unit.vm != first.vm
            or known.attested is not token.granted
            or (token.confirmed and token.confirmed[0].body_digest != unit.body_digest)
        ):
            assert outcome == Code.CONFIRM_NONCE_INVALID
        elif token.confirmed:
            assert outcome == (token.confirmed[1] if self._holds(known, token) else Code.ROTATION_SUPERSEDED)
        else:
            results = known.confirmed(unit, given)
            assert outcome == (Code.ROTATION_SUPERSEDED if results is None else results)
            if results is not None:
                token.confirmed = unit, results

    def _holds(self, known: Machine, token: Token) -> bool:
        """Whether what a confirmation decided is still so."""
        assert token.attested is not None
        assert token.confirmed is not None
        following = {name: pair.next.reveal() for name, pair in token.attested[1].volumes}
        active = {name: volume.active for name, volume in known.volumes.items()}
        promoted = [name for name, rotated in token.confirmed[0].rotated if rotated]
        return all((key := active[name]) is not None and key.text == following[name] for name in promoted)

    @rule(
        vm=st.sampled_from(VMS),
        volumes=some_volumes,
        rotated=st.none() | st.booleans(),
    )
    def honest_rotation(self, vm: Vm, volumes: list[str], rotated: bool | None) -> None:
        """A VM boots where it belongs, attests, and confirms unless it is killed before."""
        if self._honest_boot(vm, "two-phase"):
            self.attest(-1, volumes, None, "own", None, False)
            if rotated is not None:
                self.confirm(-1, dict.fromkeys(volumes, rotated), None, False)

    # --- time and the operator ---

    @rule(seconds=st.sampled_from([1, 30, 299, 300, 599, 600, DAY - 1, DAY]))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule(chance=st.integers(0, 9))
    def store_restored(self, chance: int) -> None:
        if chance:  # else most runs would be of voided tokens
            return
        outcome = self.do(StoreRestored(self.now))
        assert isinstance(outcome, Restored)
        self.horizon = outcome.horizon
        assert self.horizon == self.now + 60
        self._void(None)
        for machine in self.vms.values():
            for volume in machine.volumes.values():
                volume.doubt()

    @rule(vm=st.sampled_from(VMS), volume=st.sampled_from(VOLUMES))
    def allow_format(self, vm: Vm, volume: str) -> None:
        outcome = self.do(AllowFormat(self.now, vm, volume, "why"))
        known = self.vms.get(vm, Machine()).volumes[volume]
        assert outcome == (None if known.in_use else Code.KEY_NOT_FOUND)
        known.may_format |= known.in_use

    @rule(vm=st.sampled_from(VMS), volume=st.sampled_from([*VOLUMES, "root"]), generation=st.integers(1, 4))
    def restore_key(self, vm: Vm, volume: str, generation: int) -> None:
        outcome = self.do(RestoreKey(self.now, vm, volume, generation, "why"))
        known = self.vms.get(vm, Machine()).volumes[volume]
        chosen = known.keys[generation - 1] if generation <= len(known.keys) else None
        if chosen is None or chosen.state in ("active", "purged"):
            assert outcome == Code.KEY_NOT_FOUND
        else:
            assert not isinstance(outcome, str)
            known.restore(chosen, self.now)

    @rule(vm=st.sampled_from(VMS), days=st.integers(1, 3), carry_out=st.booleans(), later=st.integers(0, 4))
    def purge_keys(self, vm: Vm, days: int, carry_out: bool, later: int) -> None:
        self.now += later * DAY
        outcome = self.do(PurgeKeys(self.now, days * DAY, "why", (vm,), carry_out))
        assert not isinstance(outcome, str)
        gone = [
            ((vm, name, volume.keys.index(key) + 1), key)
            for name, volume in self.vms.get(vm, Machine()).volumes.items()
            for key in volume.purgeable(self.now - days * DAY)
        ]
        assert sorted((row.vm, row.volume, row.generation) for row in outcome) == sorted(place for place, _ in gone)
        for _, key in gone:
            if carry_out:
                key.state = "purged"

    @rule(others=st.sampled_from([1, 300]), batch=st.sampled_from([40, 500]))
    def sequence_log(self, others: int, batch: int) -> None:
        """Others write audit rows, one or many, and the next ones become entries of the log."""
        _ = self.do(Ask(InsertAll((AuditRow(self.now, "vm", "boot", "refused"),) * others)))
        rows = self._audit_rows()
        waiting = [row for row in rows if row.idx is None]
        assert self.do(SequenceLog(entropy(self.label(), SALT_SIZE * batch), "log")) == min(batch, len(waiting))
        assert [row for row in self._audit_rows() if row.idx is None] == waiting[batch:]

    @rule(days=st.integers(1, 3), carry_out=st.booleans(), span=st.sampled_from([256, 999]), later=st.integers(0, 4))
    def purge_audit(self, days: int, carry_out: bool, span: int, later: int) -> None:
        """Whole tiles of entries go, up to the first entry that is recent; rows that are not sequenced stay."""
        self.now += later * DAY
        before = self.now - days * DAY
        rows = self._audit_rows()
        entries = [row for row in rows if row.idx is not None]
        old = len(list(itertools.takewhile(lambda row: row.at < before, entries)))
        gone = entries[: old - old % WIDTH]
        count = 0
        beyond: int | None = 0
        while beyond is not None:
            outcome = self.do(PurgeAudits(self.now, before, "why", beyond, span, carry_out))
            assert isinstance(outcome, Purged)
            count, beyond = count + outcome.count, outcome.beyond
        assert count == len(gone)
        stay = rows[len(gone) :] if carry_out else rows
        left = self._audit_rows()
        assert left[: len(stay)] == stay
        assert {row.event for row in left[len(stay) :]} == ({"audit purged"} if carry_out and gone else set())

    def _audit_rows(self) -> tuple[AuditRow, ...]:
        return self.memory.transact(Ask(Scan(AuditRow)))

    @rule(turn=st.booleans())
    def rewrap_keys(self, turn: bool) -> None:
        """The current key-encryption key becomes the previous one; or a rewrap goes on that has nothing left to do."""
        if turn:
            self.vault = VAULTS[self.vault == VAULTS[0]]
        outcome = self.do(RewrapKeys(self.now, entropy(self.label(), 500 * NONCE_SIZE), self.vault, "why"))
        assert isinstance(outcome, Rewrapped)
        keys = [key for key in self._keys() if key.state != "purged"]
        assert outcome.count == sum(kek != self.kek for kek in (self.of_rows, *(key.kek for key in keys)))
        self.of_rows = self.kek
        assert self.memory.transact(Ask(CountSealed())) == (((self.kek, len(keys)),) if keys else ())
        for key in keys:
            key.kek = self.kek

    def _keys(self) -> list[Key]:
        return [key for vm in self.vms.values() for volume in vm.volumes.values() for key in volume.keys]

    @rule(
        vm=st.sampled_from(VMS),
        volumes=st.lists(st.sampled_from([*VOLUMES, "root"]), min_size=1, max_size=3, unique=True),
        home=st.none() | st.sampled_from(PLATFORMS),
        again=st.booleans(),
    )
    def import_keys(self, vm: Vm, volumes: list[str], home: str | None, again: bool) -> None:
        known = self.vms.get(vm, Machine())
        there = {name: key.text for name in volumes if (key := known.volumes[name].active) and again}
        texts = {name: there.get(name) or f"imported {self.label()}".encode() for name in volumes}
        keys = {
            name: FreshKey.of_passphrase(Secret(text), entropy(self.label(), FreshKey.SIZE))
            for name, text in texts.items()
        }
        outcome = self.do(ImportKeys(self.now, vm, keys, platform(home) if home else None, self.vault, "why"))
        anybody = known.platform not in (None, home) and known.booted and not known.proven
        for volume in (known.volumes[name] for name in volumes if name not in there):
            if volume.active or volume.find("pruned"):
                assert outcome == Code.KEY_NOT_FOUND
                return
            if anybody:
                assert outcome == Code.PLATFORM_MISMATCH
                return
        new = [name for name in volumes if name not in there]
        assert outcome == tuple(new)
        for name in new:
            _ = known.volumes[name].make(texts[name], self.kek, self.now)
            known.volumes[name].in_use |= name in VOLUMES
        known.platform = known.platform or home
        if new or known.platform:
            self.vms[vm] = known

    @rule(vm=st.sampled_from(VMS), home=st.sampled_from(PLATFORMS))
    def bind_vm(self, vm: Vm, home: str) -> None:
        outcome = self.do(BindVm(self.now, vm, platform(home), "why"))
        known = self.vms.get(vm, Machine())
        if known.platform:
            assert outcome == Code.PLATFORM_MISMATCH
        else:
            assert outcome is None
            known.platform = home
            self.vms[vm] = known

    @rule(vm=st.sampled_from(VMS), home=st.sampled_from(PLATFORMS), keep=st.booleans(), chance=st.integers(0, 2))
    def rebind_vm(self, vm: Vm, home: str, keep: bool, chance: int) -> None:
        known = self.vms.get(vm, Machine())
        if known.platform and chance:  # else most runs would be of voided tokens
            return
        outcome = self.do(RebindVm(self.now, vm, platform(home), keep, self.vault, "why"))
        if not known.platform:
            assert outcome == Code.PLATFORM_MISMATCH
            return
        assert outcome is None
        known.platform, known.booted, known.attested = home, False, None
        self._void(vm)
        if not keep:
            known.disown(self.now)
            known.proven = known.two_phase = False

    # --- what holds at every instant ---

    @invariant()
    def every_key_ever_given_is_there_and_opens(self) -> None:
        found: dict[tuple[Vm, str], list[Key]] = defaultdict(list)
        for row in self.memory.transact(Ask(Scan(GenerationRow))):
            of = found[row.vm, row.volume]
            if row.state == "purged":
                assert (row.sealed, row.kek_id, row.wrapped_key) == (None, None, None)
                of.append(Key(b"", "purged", ""))
                continue
            text = self.vault.open(Address(row.vm, row.volume, row.generation), row).reveal()
            state = row.state if row.state != "retired" else "pruned" if row.retirement == "prune" else "old"
            of.append(Key(text, state, row.kek_id or "", row.provisional, row.retired_at or 0))
        wanted = {
            (vm, name): [shown(key) for key in volume.keys]
            for vm, machine in self.vms.items()
            for name, volume in machine.volumes.items()
            if volume.keys
        }
        assert found == wanted

    @invariant()
    def disks_are_as_the_model_says(self) -> None:
        found = {
            (row.vm, row.volume): (row.in_use, row.format_allowed, row.handed)
            for row in self.memory.transact(Ask(Scan(VolumeRow)))
        }
        wanted = {
            (vm, name): (
                volume.in_use,
                volume.may_format,
                None if volume.handed is None else volume.keys.index(volume.handed) + 1,
            )
            for vm, machine in self.vms.items()
            for name, volume in machine.volumes.items()
        }
        blank = (False, False, None)
        assert {place: known for place, known in found.items() if known != blank} == {
            place: known for place, known in wanted.items() if known != blank
        }

    @invariant()
    def names_belong_to_whom_the_model_says(self) -> None:
        claims = self.memory.transact(Ask(Scan(VmRow)))
        assert {row.vm: (row.pin, row.proven, row.exchange == "two-phase") for row in claims} == {
            vm: (platform(machine.platform).pin, machine.proven, machine.two_phase)
            for vm, machine in self.vms.items()
            if machine.platform
        }


def shown(key: Key) -> Key:
    """The key as the rows have it: what is in force was not retired, and of what was purged nothing is known."""
    if key.state == "purged":
        return Key(b"", "purged", "")
    return evolve(key, since=key.since if key.state in ("old", "pruned") else 0)


class SqliteCalls(Calls):
    """The outcomes on a file are the same, and so are the rows in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.sqlite = SqliteStore(Path(self.folder.name) / "keys.db", vault=VAULT)
        self.stores.append(self.sqlite)

    def teardown(self) -> None:
        self.sqlite.check()
        found = dump(self.sqlite)
        self.sqlite.close()
        self.folder.cleanup()
        assert found == dump(self.memory)


STEPS = 40 if SOAK else 20
TestCalls = SqliteCalls.TestCase
TestCalls.settings = settings(settings(), stateful_step_count=STEPS)


# --- the model is not fooled ---

CONFIRM, HAND_OUT, RESTORE, PURGEABLE = (
    generations.confirm,
    generations.hand_out,
    generations.restore,
    generations.purgeable,
)


def hand_out_without_turns(*arguments: Any) -> HandOut:
    return HAND_OUT(*arguments[:3])


def confirm_pins_nothing(*arguments: Any, **more: Any) -> Change | None:
    change = CONFIRM(*arguments, **more)
    return change and evolve(change, updated=tuple(evolve(row, provisional=False) for row in change.updated))


def restored_over_is_pruned(*arguments: Any) -> Change | None:
    change = RESTORE(*arguments)
    fallen = [evolve(row, retirement=row.retirement and "prune") for row in change.updated] if change else []
    return change and evolve(change, updated=tuple(fallen))


def purge_keeps_fewer(rows: Any, now: int, retention: int, keep: int) -> Any:
    return PURGEABLE(rows, now, retention, keep - 1)


@pytest.mark.no_cover  # to measure what other tests cover doubles the time
@pytest.mark.parametrize(
    ("name", "broken", "early"),
    [
        ("prune", lambda *_: Change(), 0),
        ("disown", lambda *_: Change(), 0),
        ("hand_out", hand_out_without_turns, 4),
        ("confirm", confirm_pins_nothing, 0),
        ("restore", restored_over_is_pruned, 3),
        ("purgeable", purge_keeps_fewer, 4),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_model_is_not_fooled(
    name: str, broken: Callable[..., Any], early: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine fails where a rule of the keys is not kept, as it must; with the seed ``early`` it does so early."""

    @seed(early)
    class Seeded(Calls):
        pass

    monkeypatch.setattr(generations, name, broken)
    quick = settings(
        settings(),
        max_examples=2000,
        stateful_step_count=STEPS,
        database=None,
        derandomize=False,
        phases=[Phase.generate],
    )
    with pytest.raises(AssertionError):
        run_state_machine_as_test(Seeded, settings=quick)
