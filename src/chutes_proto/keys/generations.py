"""The key lifecycle: pure functions over the generations of one volume.

``docs/explanation/key-lifecycle.md`` describes it. Rules kept here:

* a boot call overwrites and deletes nothing: an old generation is retired, a new one gets the next number;
* at most one generation is active and at most one is a candidate, also between the steps of a change;
* at most one retired generation can be revived, the one that was active last, and none once a newer one was made;
* a promotion is provisional until a boot that was given the new key confirms. Until then the key that it superseded is
  *pinned* (retired as ``superseded`` and ``provisional``): it is offered alternately and cannot be purged;
* a next key is handed out only once it has been in the store for `Pace.rotate_after` seconds; until then a boot gets
  its current key as the next one, too. So every backup that is younger than that has every key that a disk has;
* in a store that came back from a backup, each candidate is *provisional*: a disk may have no other key, because of a
  rotation that this store has forgotten. It is offered alternately, too, until a boot confirms.

Every function takes all generations of one volume, in any order, and returns a `Change`; none touches a store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, TypeAlias

from attrs import evolve, field, frozen

from chutes_proto.store._rows import GenerationRow, Retirement

Generations: TypeAlias = Iterable[GenerationRow]

Seal: TypeAlias = Callable[[int], GenerationRow]
"""Makes the active row of a generation, given its number."""

ROOT_VOLUME = "root"
K3S_VOLUME = "k3s"
CALLER_VOLUME = "vm-caller"
RESERVED_VOLUMES = frozenset({ROOT_VOLUME, K3S_VOLUME, CALLER_VOLUME})
"""Keys of the VM itself, which no sync rekeys or prunes; a volume never has such a name.

The caller's is the seed of the hotkey that the VM trusts, made at every provisioned boot. The root passphrase is
rotated by these alone; for other VMs it and the k3s key are made once.
"""


@frozen
class Change:
    """A change to one volume: ``updated`` rows are written first, then ``created`` is added."""

    updated: tuple[GenerationRow, ...] = ()
    created: GenerationRow | None = None


@frozen
class Supply(Change):
    """A change after which ``current`` is the active generation; ``word`` says why."""

    word: Literal["kept", "created", "rekeyed", "revived"] = field(kw_only=True)
    current: GenerationRow = field(kw_only=True)


@frozen
class HandOut(Change):
    """The keys for a two-phase boot: the one that should open the disk (None for a new volume), and the next one.

    They are the same key where no rotation is due. ``second`` is another key that the disk may have instead, and the
    first one of the next boot if this one does not confirm.
    """

    current: GenerationRow | None = field(kw_only=True)
    next: GenerationRow = field(kw_only=True)
    second: GenerationRow | None = field(default=None, kw_only=True)


@frozen
class Pace:
    """The time ``now``, and the least age in seconds of a key that a disk gets in the place of another one."""

    now: int
    rotate_after: int

    def allows(self, row: GenerationRow) -> bool:
        """Whether the store has had this key for long enough."""
        return self.now - row.created_at >= self.rotate_after


def active(rows: Generations) -> GenerationRow | None:
    """Find the active generation."""
    return next((row for row in rows if row.state == "active"), None)


def candidate(rows: Generations) -> GenerationRow | None:
    """Find the generation that was handed out as the next one and is not confirmed."""
    return next((row for row in rows if row.state == "candidate"), None)


def pinned(rows: Generations) -> GenerationRow | None:
    """Find the generation that a provisional promotion superseded: the disk may still need it."""
    return next((row for row in rows if row.provisional and row.retirement == "superseded"), None)


def holds_keys(rows: Generations) -> bool:
    """Whether there is any key that a disk may need, active or retired."""
    return any(row.state != "purged" for row in rows)


def fetch(rows: Generations, seal: Seal) -> Supply:
    """Supply a key to open or format the disk: the active one, else the one that a prune retired, else a new one."""
    rows = tuple(rows)
    if current := active(rows):
        return Supply(word="kept", current=current)
    revivable = next((row for row in rows if row.state == "retired" and row.retirement == "prune"), None)
    if revivable is not None:
        current = evolve(revivable, state="active", retired_at=None, retirement=None)
        return Supply((current,), word="revived", current=current)
    return _renew(rows, seal, at=None, word="created")


def rekey(rows: Generations, seal: Seal, at: int) -> Supply:
    """Make a new key for a disk that is about to be formatted; retire the old one and an open candidate."""
    rows = tuple(rows)
    return _renew(rows, seal, at=at, word="rekeyed" if active(rows) else "created")


def applied(rows: Generations, change: Change) -> tuple[GenerationRow, ...]:
    """The generations after ``change``."""
    changed = {row.generation: row for row in (*change.updated, *((change.created,) if change.created else ()))}
    return (*(row for row in rows if row.generation not in changed), *changed.values())


def hand_out(rows: Generations, seal: Seal, pace: Pace, handed: int | None = None) -> HandOut:
    """Hand out the current and the next key of a two-phase boot.

    Without an active key, and none that `fetch` would revive, the current key is None, and the next one is active at
    once. ``handed`` is the generation that the last boot received as the current one and did not confirm: if a disk may
    have another one instead, that is the current one this time. A candidate is made where there is none; it is the next
    key once ``pace`` allows it, and until then the current key is.
    """
    rows = tuple(rows)
    supply = fetch(rows, seal)
    if supply.word == "created":
        return HandOut(supply.updated, supply.created, current=None, next=supply.current)
    usual, superseded, following = supply.current, pinned(rows), candidate(rows)
    turns = [usual]
    if superseded:
        turns.append(superseded)
    if following and following.provisional:
        turns.append(following)
    last = next((at for at, row in enumerate(turns) if row.generation == handed), -1)
    current, *others = (turns[(last + 1 + at) % len(turns)] for at in range(len(turns)))
    made: GenerationRow | None = None
    after = usual
    if following and current is following:
        after = following
    elif current is usual and following:
        after = following if pace.allows(following) else usual
    elif current is usual:
        made = evolve(seal(_following(rows)), state="candidate")
        if pace.allows(made):
            after = made
        else:
            made = evolve(made, delivered_at=None)
    second = next((row for row in others if row is not after), None)
    return HandOut(supply.updated, made, current=current, next=after, second=second)


def confirm(rows: Generations, current: int | None, following: int, *, rotated: bool, at: int) -> Change | None:
    """Confirm that a boot that received ``current`` and ``following`` opened the disk, or formatted it.

    ``rotated``: the disk has the key ``following`` too, which becomes active, and provisional; ``current`` is pinned.
    Returns None if ``following`` can no longer become active, because of another change since. Not ``rotated``:
    ``current`` becomes active and ``following`` is retired, unless another change since decided otherwise. Where both
    are the same key, that becomes active, or stays so.
    """
    rows = tuple(rows)
    by_number = {row.generation: row for row in rows}
    opened = None if current is None else by_number[current]
    after = by_number[following]
    if opened is None:
        return Change() if after.state == "active" or not rotated else None
    if current == following:
        return _proven(rows, opened, at) or (None if rotated else Change())
    if rotated and after.state == "active":
        return Change()
    if after.state == "candidate" and opened.state == "active":
        unpinned = tuple(evolve(row, provisional=False) for row in (pinned(rows),) if row)
        if not rotated:
            dropped = evolve(after, state="retired", retired_at=at, retirement="dropped", provisional=False)
            return Change((*unpinned, dropped, evolve(opened, provisional=False)))
        superseded = evolve(opened, state="retired", retired_at=at, retirement="superseded", provisional=True)
        return Change((*unpinned, superseded, evolve(after, state="active", provisional=True)))
    if rotated:
        return None
    if after.state == "active" and opened == pinned(rows):
        back = evolve(opened, state="active", provisional=False, retired_at=None, retirement=None)
        return Change((*_retired(rows, at, "dropped"), back))
    return Change()


def _proven(rows: tuple[GenerationRow, ...], opened: GenerationRow, at: int) -> Change | None:
    """The key that opened the disk was the only one handed out: it is the active one, and no other is needed."""
    if opened.state not in ("active", "candidate"):
        return None
    superseded = None if opened.state == "active" else active(rows)
    others = (row for row in rows if row.provisional and row is not superseded)
    settled = [evolve(row, provisional=False) for row in others if row is not opened]
    if superseded:
        settled.append(evolve(superseded, state="retired", retired_at=at, retirement="superseded", provisional=False))
    proven = evolve(opened, state="active", provisional=False)
    return Change((*settled, *(() if proven == opened else (proven,))))


def restore(rows: Generations, generation: int, at: int) -> Change | None:
    """Make ``generation`` active, as an operator's choice. Returns None where it is missing, purged, or active."""
    rows = tuple(rows)
    chosen = next((row for row in rows if row.generation == generation), None)
    if chosen is None or chosen.state in ("purged", "active"):
        return None
    others = tuple(row for row in rows if row is not chosen)
    back = evolve(chosen, state="active", provisional=False, retired_at=None, retirement=None)
    return Change((*_retired(others, at, "superseded"), *_outdated(others, "relisted"), back))


def purgeable(rows: Generations, now: int, retention: int, keep: int) -> tuple[GenerationRow, ...]:
    """List the generations to purge: retired for ``retention`` seconds, not pinned, not among the last ``keep``."""
    ordered = sorted(rows, key=lambda row: row.generation)
    return tuple(
        row
        for row in (ordered[:-keep] if keep else ordered)
        if row.state == "retired"
        and not row.provisional
        and row.retired_at is not None
        and now - row.retired_at >= retention
    )


def prune(rows: Generations, at: int) -> Change:
    """Retire the active key of a volume that a boot left out; it can be revived."""
    return Change(_retired(rows, at, "prune"))


def disown(rows: Generations, at: int) -> Change:
    """Retire all keys of a name that goes to another owner; none can be revived."""
    rows = tuple(rows)
    return Change((*_retired(rows, at, "takeover"), *_outdated(rows, "takeover")))


def _renew(rows: tuple[GenerationRow, ...], seal: Seal, at: int | None, word: Literal["created", "rekeyed"]) -> Supply:
    retired = () if at is None else _retired(rows, at, "rekey")
    created = seal(_following(rows))
    return Supply((*retired, *_outdated(rows, "relisted")), created, word=word, current=created)


def _following(rows: tuple[GenerationRow, ...]) -> int:
    return 1 + max((row.generation for row in rows), default=0)


def _outdated(rows: tuple[GenerationRow, ...], why: Retirement) -> tuple[GenerationRow, ...]:
    """The retired rows that could still be revived, changed so that none can."""
    return tuple(
        evolve(row, provisional=False, retirement=why if row.retirement == "prune" else row.retirement)
        for row in rows
        if row.retirement == "prune" or (row.state == "retired" and row.provisional)
    )


def _retired(rows: Generations, at: int, why: Retirement) -> tuple[GenerationRow, ...]:
    """The active row retired for this reason, and a candidate that is dropped with it.

    Only a prune, whose key can be revived, leaves a provisional key provisional.
    """
    reasons: dict[str, Retirement] = {"active": why, "candidate": "dropped"}
    keep = why == "prune"
    return tuple(
        evolve(row, state="retired", retired_at=at, retirement=reasons[row.state], provisional=keep and row.provisional)
        for row in rows
        if row.state in reasons
    )
