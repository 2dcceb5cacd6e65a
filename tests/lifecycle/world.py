"""VM, server, disk and network, small enough to try all that can befall them.

The server is the real units on a store in memory. The rest is a model: a network that loses, doubles and delays, a disk
that is the set of passphrases in its LUKS header, agents that are written down from what they do. Whatever may happen
in more than one way is a `Choices.pick`, and `explore` tries all ways.

Rules kept here:

* a server that is killed before a commit is a request that is lost, and after it an answer that is lost; there is
  nothing of a unit in between;
* a world is a value: each way that is tried begins from the same one;
* two worlds with one `World.key` behave alike from then on, so what follows is tried once for both. The key leaves out
  only what no step can see: entropy, times (nothing lives long enough here to expire; that a message comes too late is
  that it is lost), and retired keys that nothing can bring back and no disk has.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import Any, TypeVar

from attrs import define, evolve, field, frozen

from chutes_proto.errors import Refused, Unavailable
from chutes_proto.keys.generations import ROOT_VOLUME
from chutes_proto.keys.vault import Address, FreshKey
from chutes_proto.secret import Secret
from chutes_proto.server._profiles import ServedExchange
from chutes_proto.store._rows import (
    BootRow,
    Exchange,
    GenerationRow,
    Read,
    ReadAll,
    ReadBootVolumes,
    StoreOp,
    VmRow,
    VolumeRow,
)
from chutes_proto.store._run import Ask, Unit
from chutes_proto.testing.store_suite._parts import NOW, VAULT, VM, attest, boot, entropy, fresh
from chutes_proto.units.boot import GrantBoot, RootRotation
from chutes_proto.units.nonces import SKEW
from chutes_proto.units.operator import StoreRestored
from chutes_proto.units.rotation import AttestVolumes, ConfirmRoot, ConfirmVolumes
from chutes_proto.units.volumes import SyncVolumes
from tests.store.memory import MemoryStore

T = TypeVar("T")
VOLUME = "storage"
BUILD = b"the passphrase of the build"
OTHER = "tdx-cache"
"""A volume that is always there, so that a VM whose disk is missing has something to ask for."""


ROTATE_AFTER = 100
"""Seconds: so few that no nonce expires."""
PASSES = 60
"""Seconds that may pass between two boots: twice, and a rotation is due."""


class Choices:
    """One way through all that may happen: what is given, then always the first option, which is what usually happens.

    At most ``mishaps`` times it is another one; None: any number of times.
    """

    def __init__(self, given: Sequence[int] = (), mishaps: int | None = None) -> None:
        self.given = [*given]
        self.mishaps = mishaps
        self.taken: list[int] = []
        self.widths: list[int] = []
        self.told: list[str] = []

    def pick(self, what: str, options: Sequence[T]) -> T:
        """One of ``options``."""
        place = len(self.taken)
        index = self.given[place] if place < len(self.given) else 0
        exhausted = self.mishaps is not None and sum(map(bool, self.taken)) >= self.mishaps
        self.taken.append(index)
        self.widths.append(1 if exhausted else len(options))
        if index:
            self.told.append(f"{what}: {options[index]}")
        return options[index]


def explore(run: Callable[[Choices], T], mishaps: int | None = None) -> Iterator[tuple[T, Choices]]:
    """The results of ``run``, for all choices with so many mishaps."""
    given: list[int] = []
    while True:
        choices = Choices(given, mishaps)
        yield run(choices), choices
        while choices.taken and choices.taken[-1] + 1 == choices.widths[-1]:
            _ = choices.taken.pop(), choices.widths.pop()
        if not choices.taken:
            return
        given = [*choices.taken[:-1], choices.taken[-1] + 1]


class Fate(Enum):
    """The fate of a request and its answer. The first is the usual one."""

    ANSWERED = "answered"
    REQUEST_LOST = "request lost"
    ANSWER_LOST = "answer lost"
    DOUBLED = "doubled"
    DOUBLED_FIRST = "doubled, the first answer counts"
    DELAYED = "delayed"
    DOUBLED_LATE = "doubled, once later"


_LATE = (Fate.DELAYED, Fate.DOUBLED_LATE)


class Mishap(Enum):
    """The fate of a write to the disk, or of the VM beside it."""

    NONE = "none"
    FAILED = "failed"
    KILLED_BEFORE = "killed before"
    KILLED_AFTER = "killed after"


class NoAnswer(Exception):
    """The client waited for nothing."""


class Killed(Exception):
    """The VM is off."""


@frozen
class Policy:
    """The constants of a whole run. With ``backups`` the store may come back from one that is young enough."""

    exchange: ServedExchange
    ours: bool
    backups: bool = False

    @property
    def volume(self) -> str:
        """The volume whose disk is the world's."""
        return ROOT_VOLUME if self.exchange == "provisioned" else VOLUME

    def __str__(self) -> str:
        agent = "our agent" if self.ours else "deployed client"
        return f"{self.exchange}, {agent}{', backups' if self.backups else ''}"

    @property
    def rotate_after(self) -> int:
        return ROTATE_AFTER if self.backups else 0


class Instant:
    """The content of the store at one instant. Many lives begin alike, so the last few outcomes are remembered: of the
    units that came next, and of all that was read."""

    REMEMBERED = 3
    """The lives that are tried one after the other share the latest, and those of equal disks one or two more."""

    def __init__(self, store: MemoryStore) -> None:
        self._store: MemoryStore | None = store
        self._image = store.image()
        self._next: list[tuple[Unit[Any], Instant, Any]] = []
        self._read: dict[StoreOp[Any], Any] = {}

    def _take(self) -> MemoryStore:
        """The store with this content, which the caller may change."""
        store, self._store = self._store or MemoryStore(self._image), None
        return store

    def transact(self, unit: Unit[Any]) -> tuple[Instant, Any]:
        """The instant after a unit, and its result, or the refusal that it raises."""
        for known, after, outcome in self._next:
            if known == unit:
                return after, outcome
        store = self._take()
        try:
            outcome = store.transact(unit)
            after = Instant(store)
        except Refused as exc:
            outcome, after, self._store = exc, self, store
        self._next = [*self._next, (unit, after, outcome)][-self.REMEMBERED :]
        return after, outcome

    def read(self, op: StoreOp[Any]) -> Any:
        if op not in self._read:
            self._store = self._take()
            self._read[op] = self._store.perform(op)
        return self._read[op]


@frozen
class Backup:
    """A copy of the store, when it was made, and the part of `World.key` that it is."""

    store: Instant
    at: int
    rows: tuple[GenerationRow, ...]
    volume: VolumeRow | None


@define
class World:
    """One instant; a boot changes a copy."""

    policy: Policy
    in_flight: int = 1
    """How many messages may be under way and late at once."""
    store: Instant = field(factory=lambda: Instant(MemoryStore()))
    slots: tuple[bytes, ...] = ()
    flight: tuple[Unit[Any], ...] = ()
    boots: int = 0
    data: bool = False
    """Whether the disk was ever formatted: then it must open for ever."""
    fresh: bool = False
    """Whether the root disk is a fresh copy of the image, which the build's passphrase alone opens."""
    past: tuple[tuple[bytes, ...], bool] | None = None
    """The disk before the last boot, to which a host may roll it back: one rotation at most lies between."""
    now: int = NOW
    backup: Backup | None = None

    def copy(self) -> World:
        return evolve(self)

    def transact(self, unit: Unit[T]) -> T:
        self.store, outcome = self.store.transact(unit)
        self.check()
        if isinstance(outcome, Refused):
            raise outcome
        result: T = outcome
        return result

    # --- the network ---

    def granted(self) -> GrantBoot:
        """A boot that is granted: nothing that is lost there says anything of a volume."""
        self.boots += 1
        exchange: Exchange = "base" if self.policy.exchange == "base" else "two-phase"
        unit = evolve(boot(str(self.boots), now=self.now), exchange=exchange, exchange_downgrade="allow")
        _ = self.transact(unit)
        return unit

    def attest(self, granted: GrantBoot, volume: str, formatted: Sequence[str] | None = None) -> AttestVolumes:
        return attest(granted, "body", volume, formatted=formatted, rotate_after=self.policy.rotate_after)

    def provisioned(self, *, second_key: bool) -> GrantBoot:
        """The next boot of an image from 1.4.0 on; its nonce is younger than those of all before."""
        self.boots += 1
        self.now += self.policy.backups
        unit = boot(f"provisioned {self.boots}", now=self.now)
        label = unit.boot_id
        rotation = RootRotation(
            build=FreshKey.of_passphrase(Secret(BUILD), entropy(f"build {label}", FreshKey.SIZE)),
            following=fresh(f"following {label}"),
            caller=FreshKey.encryption_key(entropy(f"caller {label}", FreshKey.SIZE)),
            confirm_digest=entropy(f"root confirm {label}", 32),
            first_boot=self.fresh,
            rotate_after=self.policy.rotate_after,
            second_key=second_key,
        )
        nonce = unit.nonce
        if not self.policy.backups:
            nonce = evolve(nonce, issued_at=unit.now - 100 + self.boots)
        return evolve(unit, exchange="two-phase", hotkey_proven=True, root=None, rotation=rotation, nonce=nonce)

    def copy_image(self) -> None:
        """Put a fresh copy of the image in the place of the root disk."""
        self.slots, self.fresh, self.data = (BUILD,), True, False

    def ask(self, unit: Unit[T], choices: Choices) -> T:
        """Send ``unit`` to the server. Raises `NoAnswer`, and what the unit raises."""
        self.deliver(choices)
        if isinstance(unit, ConfirmVolumes | ConfirmRoot):
            self.back_up(choices)
        if choices.pick("VM", (False, True)):
            raise Killed
        room = len(self.flight) < self.in_flight
        fate = choices.pick(type(unit).__name__, tuple(Fate) if room else tuple(Fate)[: -len(_LATE)])
        match fate:
            case Fate.REQUEST_LOST:
                raise NoAnswer
            case Fate.DELAYED:
                self.flight += (unit,)
                raise NoAnswer
            case Fate.ANSWER_LOST:
                self.unheard(unit)
                raise NoAnswer
            case Fate.DOUBLED:
                self.unheard(unit)
                answer = self.transact(unit)
            case Fate.DOUBLED_FIRST:
                answer = self.transact(unit)
                self.unheard(unit)
            case Fate.DOUBLED_LATE:
                self.flight += (unit,)
                answer = self.transact(unit)
            case Fate.ANSWERED:
                answer = self.transact(unit)
        return answer

    def unheard(self, unit: Unit[Any]) -> None:
        """A request whose answer nobody reads; for a minute after a restore it is 503."""
        with contextlib.suppress(Refused, Unavailable):
            _ = self.transact(unit)

    def deliver(self, choices: Choices) -> None:
        """A message in flight may arrive now."""
        for unit in self.flight:
            if choices.pick(f"late {type(unit).__name__}", (False, True)):
                self.flight = tuple(other for other in self.flight if other is not unit)
                self.unheard(unit)

    # --- the disk ---

    def write(self, slots: tuple[bytes, ...], choices: Choices) -> bool:
        """Make the disk's header hold these; False if that failed. Raises `Killed`."""
        mishap = choices.pick("disk", tuple(Mishap))
        if mishap is Mishap.KILLED_BEFORE:
            raise Killed
        if mishap is not Mishap.FAILED:
            self.data = True
            self.slots = slots
            self.check()
        if mishap is Mishap.KILLED_AFTER:
            raise Killed
        return mishap is not Mishap.FAILED

    # --- time, and the store's fate ---

    def pass_time(self, choices: Choices) -> None:
        """Time may pass, and the store may come back from its backup."""
        if not self.policy.backups:
            return
        self.now += choices.pick("seconds", (3, PASSES))
        if self.backup and self.restorable() and choices.pick("store restored", (False, True)):
            self.store = self.backup.store
            _ = self.transact(StoreRestored(self.now - SKEW))
            self.now += 9  # nonces of before are void
        self.back_up(choices)

    def back_up(self, choices: Choices) -> None:
        """The store may be backed up now."""
        if self.policy.backups and choices.pick("backed up", (False, True)):
            self.backup = Backup(self.store, self.now, self.rows(), self.known())

    def restorable(self) -> bool:
        """Whether the backup is young enough, and from a time when the volume had a key."""
        return self.backup is not None and bool(self.backup.rows) and self.age(self.backup.at) < ROTATE_AFTER

    def age(self, at: int) -> int:
        """Whole steps of time, of which two are as good as any more."""
        return min((self.now - at) // PASSES, 2) * PASSES

    # --- what is there ---

    def rows(self) -> tuple[GenerationRow, ...]:
        return tuple(row for row in self.read(ReadAll(GenerationRow, VM)) if row.volume == self.policy.volume)

    def known(self) -> VolumeRow | None:
        return next((row for row in self.read(ReadAll(VolumeRow, VM)) if row.volume == self.policy.volume), None)

    def read(self, op: Any) -> Any:
        return self.store.read(op)

    def opens(self, row: GenerationRow) -> bool:
        return row.sealed is not None and passphrase(row) in self.slots

    def check(self) -> None:
        """Some key that the server holds opens the disk, and some key of the backup."""
        assert not self.data or any(self.opens(row) for row in self.rows()), "no key that is held opens the disk"
        if self.backup and self.restorable():
            assert not self.data or any(map(self.opens, self.backup.rows)), "no key of the backup opens the disk"

    @property
    def key(self) -> object:
        """The state that decides over all that follows."""
        kept, known = self._kept(self.rows()), self.known()
        numbers = {row.generation: index for index, row in enumerate(kept)}
        claim = self.read(Read(VmRow, VM))
        newest = claim and (claim.booted if self.policy.exchange == "provisioned" else claim.attested)
        flying = [self._flying(unit, numbers, newest) for unit in self.flight]
        backup = self.backup if self.restorable() else None
        return (
            self.policy,
            self._seen(self.rows(), known),
            None if backup is None else (self.age(backup.at), self._seen(backup.rows, backup.volume)),
            len(self.slots),
            len({*self.slots}),
            self.data,
            self.fresh,
            self.past and self._past(kept),
            tuple(flying),
        )

    def _past(self, kept: list[GenerationRow]) -> object:
        assert self.past
        slots, was_fresh = self.past
        return tuple(row.sealed is not None and passphrase(row) in slots for row in kept), len(slots), was_fresh

    def _kept(self, rows: Sequence[GenerationRow]) -> list[GenerationRow]:
        return [
            row
            for row in rows
            if row.state != "retired" or row.provisional or row.retirement == "prune" or self.opens(row)
        ]

    def _seen(self, rows: Sequence[GenerationRow], known: VolumeRow | None) -> object:
        """The part of a store that a step can see."""
        kept = self._kept(rows)
        numbers = {row.generation: index for index, row in enumerate(kept)}
        return (
            tuple((row.state, row.provisional, row.retirement, self.opens(row), self._aged(row)) for row in kept),
            len(rows) > 0,
            (known.in_use, known.format_allowed, numbers.get(known.handed or 0, known.handed)) if known else None,
        )

    def _aged(self, row: GenerationRow) -> int:
        return self.age(row.created_at) if self.policy.backups and row.state == "candidate" else 0

    def _flying(self, unit: Unit[Any], numbers: dict[int, int], attested: str | None) -> object:
        match unit:
            case GrantBoot(rotation=RootRotation(first_boot=first_boot)):
                claim = self.read(Read(VmRow, VM))
                is_late = claim is not None and unit.nonce.issued_at <= (claim.nonce_at or 0)
                return type(unit), first_boot, is_late, self.read(Read(BootRow, unit.boot_id)) is not None
            case ConfirmRoot():
                found: BootRow | None = self.read(Read(BootRow, unit.nonce_digest, "root_confirm_digest"))
                more: object = unit.rotated
            case AttestVolumes() | SyncVolumes():
                digest = unit.nonce_digest if isinstance(unit, AttestVolumes) else unit.token_digest
                found = self.read(Read(BootRow, digest, "token_digest"))
                more = (unit.volumes, unit.formatted, getattr(unit, "rekey", None))
            case ConfirmVolumes():
                found = self.read(Read(BootRow, unit.nonce_digest, "confirm_digest"))
                more = unit.rotated
            case _:
                raise AssertionError(unit)
        if found is None or found.voided_at is not None:
            return None
        given = tuple(
            (numbers.get(item.current_generation), numbers.get(item.next_generation))
            for item in self.read(ReadBootVolumes(found.boot_id))
            if item.volume == self.policy.volume
        )
        is_newest = found.boot_id == attested
        consumed = (found.spent_at, found.confirm_body_digest, found.root_confirm_body_digest)
        return type(unit), more, given, is_newest, tuple(each is None for each in consumed)


_OPENED: dict[bytes, bytes] = {}


def passphrase(row: GenerationRow) -> bytes:
    """The passphrase of a row; opened once, because rows do not change."""
    assert row.sealed is not None
    if row.sealed not in _OPENED:
        address = Address(row.vm, row.volume, row.generation)
        _OPENED[row.sealed] = VAULT.open(address, row).reveal()
    return _OPENED[row.sealed]


__all__ = [
    "BUILD",
    "OTHER",
    "VOLUME",
    "Ask",
    "Choices",
    "Killed",
    "NoAnswer",
    "Policy",
    "World",
    "explore",
    "passphrase",
]
