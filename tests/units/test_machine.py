"""Any calls in any order, on memory and on SQLite, against a model of plain dicts that knows nothing of rows."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Literal, TypeVar

import pytest
from attrs import define, evolve, field
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from chutes_proto.blocking.sqlite import SqliteStore
from chutes_proto.codes import Code
from chutes_proto.errors import Refusal
from chutes_proto.keys import generations
from chutes_proto.keys.generations import Change
from chutes_proto.keys.vault import Address
from chutes_proto.store.memory import MemoryStore
from chutes_proto.store.rows import GenerationRow, Put, Scan, Vm, VmRow, VolumeRow
from chutes_proto.store.run import Store, Unit
from chutes_proto.testing.store_suite import NOW, VAULT, Ask, boot, dump, platform, read, sync
from chutes_proto.units.boot import GrantBoot
from chutes_proto.units.operator import StoreRestored
from chutes_proto.units.volumes import SyncVolumes, VolumeKeys

T = TypeVar("T")

VMS = [Vm("alice", "vm-0"), Vm("alice", "vm-1"), Vm("bob", "vm-0")]
PLATFORMS = ["north", "south", "west"]
NAMES_PER_PLATFORM = 2
VOLUMES = ["storage", "tdx-cache"]
NOTHING: set[str] = set()


@define
class Key:
    """One passphrase of a volume; ``pruned`` is what may come back."""

    text: bytes
    state: Literal["active", "pruned", "old"]


@define
class Machine:
    """What the model knows of a VM."""

    platform: str
    proven: bool
    keys: dict[str, list[Key]] = field(factory=lambda: defaultdict(list))
    in_use: set[str] = field(factory=set)
    may_format: set[str] = field(factory=set)


@define
class Token:
    """What the model knows of a token."""

    granted: GrantBoot
    void: bool = False
    spent: tuple[SyncVolumes, VolumeKeys] | None = None


class Calls(RuleBasedStateMachine):
    """Calls of the units; each outcome is foretold by the model, and equal on all stores."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.sqlite = SqliteStore(Path(self.folder.name) / "keys.db")
        self.memory = MemoryStore()
        self.stores: list[Store] = [self.memory, self.sqlite]
        self.now = NOW
        self.restored = 0
        self.count = 0
        self.vms: dict[Vm, Machine] = {}
        self.tokens: list[Token] = []

    def teardown(self) -> None:
        self.sqlite.check()
        memory, sqlite = (dump(store) for store in self.stores)
        assert memory == sqlite
        self.sqlite.close()
        self.folder.cleanup()

    def do(self, unit: Unit[T]) -> T | Code | str:
        """What the unit returns, or the code of its refusal."""
        outcomes: list[T | Code | str] = []
        for store in self.stores:
            try:
                outcomes.append(store.transact(unit))
            except Refusal as exc:
                outcomes.append(exc.code)
        assert outcomes[1:] == outcomes[:-1]
        return outcomes[0]

    def label(self) -> str:
        self.count += 1
        return str(self.count)

    # --- boots ---

    @initialize(vm=st.sampled_from(VMS))
    def first_boot(self, vm: Vm) -> None:
        self.boot(vm, "north", proven=False, binding="pin", needs_certificate=False, again=None)

    @rule(
        vm=st.sampled_from(VMS),
        home=st.sampled_from(PLATFORMS),
        proven=st.booleans(),
        binding=st.sampled_from(["pin", "pin", "pin", "off"]),
        needs_certificate=st.booleans(),
        again=st.none() | st.integers(0, 50),
    )
    def boot(
        self,
        vm: Vm,
        home: str,
        proven: bool,
        binding: Literal["pin", "off"],
        needs_certificate: bool,
        again: int | None,
    ) -> None:
        unit = evolve(
            boot(self.label(), now=self.now, vm=vm),
            platform=platform(home),
            hotkey_proven=proven,
            platform_binding=binding,
            token_needs_certificate=needs_certificate,
            claims_per_platform=NAMES_PER_PLATFORM,
        )
        used = again is not None and bool(self.tokens)
        if used:
            assert again is not None
            old = self.tokens[again % len(self.tokens)].granted
            unit = evolve(unit, nonce=old.nonce, nonce_issued_at=old.nonce_issued_at)
        outcome = self.do(unit)
        known = self.vms.get(vm)
        room = sum(machine.platform == home for machine in self.vms.values()) < NAMES_PER_PLATFORM
        takes_over = known is not None and known.platform != home and binding == "pin"
        if known is None or takes_over:
            free = known is None or (proven and not known.proven)
            if not (free and room):
                assert outcome == Code.PLATFORM_MISMATCH
                return
        if self.now <= self.restored:
            assert outcome == Code.STORE_UNAVAILABLE
            return
        if used or unit.nonce_issued_at <= self.restored:
            assert outcome == Code.NONCE_INVALID
            return
        assert not isinstance(outcome, str)
        if known is None:
            known = self.vms[vm] = Machine(home, proven)
        elif takes_over:
            self._take_over(vm, known, home)
        elif known.platform == home:
            known.proven |= proven
        (root,) = active(known.keys["root"]) or [Key(b"", "active")]
        assert outcome.root is not None
        if not root.text:
            assert all(outcome.root.reveal() != key.text for key in known.keys["root"])
            root.text = outcome.root.reveal()
            known.keys["root"].append(root)
        assert outcome.root.reveal() == root.text
        self.tokens.append(Token(unit))

    def _take_over(self, vm: Vm, known: Machine, home: str) -> None:
        known.platform, known.proven = home, True
        known.in_use.clear()
        known.may_format.clear()
        for keys in known.keys.values():
            for key in keys:
                key.state = "old"
        for token in self.tokens:
            token.void |= token.granted.vm == vm

    # --- tokens ---

    def refusal(self, token: Token, vm: Vm, certificate: bytes | None) -> Code | None:
        granted = token.granted
        if token.void or self.now >= granted.now + 600:
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
        volumes=st.lists(st.sampled_from(VOLUMES), min_size=1, max_size=2, unique=True),
        rekey=st.sets(st.sampled_from(VOLUMES)) | st.just(NOTHING),
        formatted=st.none() | st.frozensets(st.sampled_from(VOLUMES)),
        caller=st.sampled_from(["own", "own", "own", "bare", "other"]),
        vm=st.none() | st.none() | st.none() | st.sampled_from(VMS),
        pruned=st.sampled_from(["revive", "revive", "new"]),
    )
    def sync(
        self,
        which: int,
        volumes: list[str],
        rekey: set[str],
        formatted: frozenset[str] | None,
        caller: str,
        vm: Vm | None,
        pruned: Literal["revive", "new"],
    ) -> None:
        token = self.tokens[which % len(self.tokens)]
        rekey = rekey & set(volumes)
        unit = evolve(
            sync(token.granted, self.label(), *volumes, rekey=sorted(rekey)),
            now=self.now,
            vm=vm or token.granted.vm,
            certificate={"own": token.granted.certificate, "bare": None, "other": bytes(32)}[caller],
            formatted=formatted,
            pruned=pruned,
        )
        outcome = self.do(unit)
        if refusal := self.refusal(token, unit.vm, unit.certificate):
            assert outcome == refusal
        elif token.spent:
            assert outcome == Code.BOOT_TOKEN_INVALID
        else:
            assert isinstance(outcome, VolumeKeys)
            assert not outcome.replayed
            assert [volume for volume, _ in outcome.passphrases] == volumes
            self._synced(self.vms[unit.vm], unit, outcome)
            token.spent = unit, outcome

    def _synced(self, known: Machine, unit: SyncVolumes, answer: VolumeKeys) -> None:
        reported = set(unit.volumes) - unit.rekey if unit.formatted is None else set(unit.formatted)
        for volume, passphrase in answer.passphrases:
            keys, text = known.keys[volume], passphrase.reveal()
            there = active(keys)
            pruned = [key for key in keys if key.state == "pruned"]
            if there and volume not in unit.rekey:
                assert text == there[0].text
            elif pruned and volume not in unit.rekey and unit.pruned == "revive":
                assert text == pruned[0].text
                pruned[0].state = "active"
            else:
                assert text not in {key.text for keys in known.keys.values() for key in keys}
                for key in keys:
                    key.state = "old"
                keys.append(Key(text, "active"))
            barred = volume in reported or (volume in known.in_use and volume not in known.may_format)
            assert (volume in answer.in_use) == barred
            known.may_format.discard(volume)
            if volume in reported:
                known.in_use.add(volume)
        for volume in known.keys.keys() - set(unit.volumes) - {"root"}:
            for key in active(known.keys[volume]):
                key.state = "pruned"

    @rule(
        vm=st.sampled_from(VMS),
        volumes=st.lists(st.sampled_from(VOLUMES), min_size=1, max_size=2, unique=True),
        rekey=st.sets(st.sampled_from(VOLUMES), max_size=1),
        pruned=st.sampled_from(["revive", "revive", "new"]),
    )
    def honest(self, vm: Vm, volumes: list[str], rekey: set[str], pruned: Literal["revive", "new"]) -> None:
        """A VM boots where it belongs and syncs, as nearly all do."""
        known, before = self.vms.get(vm), len(self.tokens)
        home = known.platform if known else "north"
        self.boot(vm, home, proven=False, binding="pin", needs_certificate=False, again=None)
        if len(self.tokens) > before:
            self.sync(-1, volumes, rekey, None, "own", None, pruned)

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
        outcome = self.do(unit)
        if self.refusal(token, unit.vm, unit.certificate) or certificate is None or other_body:
            assert outcome == Code.BOOT_TOKEN_INVALID
        else:
            assert outcome == evolve(answer, replayed=True)

    @precondition(lambda self: self.tokens)
    @rule(which=st.integers(-3, 50), volume=st.sampled_from(VOLUMES), bare=st.booleans())
    def read(self, which: int, volume: str, bare: bool) -> None:
        token = self.tokens[which % len(self.tokens)]
        unit = evolve(read(token.granted, volume), now=self.now, request_id=self.label())
        unit = evolve(unit, certificate=None) if bare else unit
        outcome = self.do(unit)
        refusal = self.refusal(token, unit.vm, unit.certificate)
        known = self.vms[unit.vm]
        if refusal or token.spent:
            assert outcome == Code.BOOT_TOKEN_INVALID
        elif not (there := active(known.keys[volume])):
            assert outcome == Code.KEY_NOT_FOUND
        else:
            assert not isinstance(outcome, str)
            assert outcome.reveal() == there[0].text
            known.in_use.add(volume)
            known.may_format.discard(volume)

    # --- time and the operator ---

    @rule(seconds=st.sampled_from([1, 30, 599, 600, 86_399, 86_400]))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule(chance=st.integers(0, 9))
    def restore(self, chance: int) -> None:
        if chance:  # else most runs would be of voided tokens
            return
        self.do(StoreRestored(self.now))
        self.restored = max(self.restored, self.now + 60)
        for token in self.tokens:
            token.void = True

    @precondition(lambda self: self.vms)
    @rule(which=st.integers(0, 50), volume=st.sampled_from(VOLUMES))
    def allow_format(self, which: int, volume: str) -> None:
        vm = sorted(self.vms)[which % len(self.vms)]
        self.do(Ask(Put(VolumeRow(vm, volume, in_use=True, format_allowed=True))))
        self.vms[vm].in_use.add(volume)
        self.vms[vm].may_format.add(volume)

    # --- what holds at every instant ---

    @invariant()
    def every_key_ever_given_is_there_and_opens(self) -> None:
        found: dict[tuple[Vm, str], list[tuple[bytes, bool, bool]]] = defaultdict(list)
        for row in self.memory.transact(Ask(Scan(GenerationRow))):
            text = VAULT.open(Address(row.vm, row.volume, row.generation), row).reveal()
            found[row.vm, row.volume].append((text, row.state == "active", row.retirement == "prune"))
        wanted = {
            (vm, volume): [(key.text, key.state == "active", key.state == "pruned") for key in keys]
            for vm, machine in self.vms.items()
            for volume, keys in machine.keys.items()
            if keys
        }
        assert found == wanted

    @invariant()
    def names_belong_to_whom_the_model_says(self) -> None:
        claims = self.memory.transact(Ask(Scan(VmRow)))
        assert {row.vm: (row.pin, row.proven) for row in claims} == {
            vm: (platform(machine.platform).pin, machine.proven) for vm, machine in self.vms.items()
        }


def active(keys: list[Key]) -> list[Key]:
    return [key for key in keys if key.state == "active"]


TestCalls = Calls.TestCase
TestCalls.settings = settings(settings(), stateful_step_count=30)


def test_the_model_is_not_fooled_by_a_store_that_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine fails where a prune is not carried out, as it must."""
    monkeypatch.setattr(generations, "prune", lambda *_: Change())
    quick = settings(
        settings(), max_examples=200, stateful_step_count=30, database=None, derandomize=True, phases=[Phase.generate]
    )
    with pytest.raises(AssertionError):
        run_state_machine_as_test(Calls, settings=quick)
