"""What becomes of a volume's keys: pure functions over the generations of one volume.

The text is in ``README.md`` beside this file. Rules kept here:

* a boot call overwrites and deletes nothing: an old generation is retired, a new one gets the next number;
* at most one generation is active and at most one is a candidate, also between the steps of a change;
* at most one retired generation can be revived, the one that was active last, and none once a newer one was made.

Every function takes all generations of one volume, in any order, and returns a `Change`; none touches a store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, TypeAlias

from attrs import evolve, field, frozen

from chutes_proto.store.rows import GenerationRow, Retirement

Generations: TypeAlias = Iterable[GenerationRow]

Seal: TypeAlias = Callable[[int], GenerationRow]
"""Makes the active row of a generation, given its number."""

ROOT_VOLUME = "root"
RESERVED_VOLUMES = frozenset({ROOT_VOLUME, "k3s"})
"""Keys of the VM itself: made once, never rekeyed, pruned or rotated; a volume never has such a name."""

Pruned: TypeAlias = Literal["revive", "new"]
"""Policy: what a volume gets that was left out once and is listed again."""


@frozen
class Change:
    """What happens to one volume: ``updated`` rows are written first, then ``created`` is added."""

    updated: tuple[GenerationRow, ...] = ()
    created: GenerationRow | None = None


@frozen
class Supply(Change):
    """A change after which ``current`` is the active generation; ``word`` says how that came."""

    word: Literal["kept", "created", "rekeyed", "revived"] = field(kw_only=True)
    current: GenerationRow = field(kw_only=True)


def active(rows: Generations) -> GenerationRow | None:
    """The active generation."""
    return next((row for row in rows if row.state == "active"), None)


def holds_keys(rows: Generations) -> bool:
    """Whether there is any key that a disk may need, be it retired."""
    return any(row.state != "purged" for row in rows)


def fetch(rows: Generations, seal: Seal, pruned: Pruned = "revive") -> Supply:
    """A key to open or format the disk with: the active one, else the one that a prune retired, else a new one.

    With ``pruned="new"`` a pruned key stays retired and a new one is made.
    """
    rows = tuple(rows)
    if current := active(rows):
        return Supply(word="kept", current=current)
    revivable = next((row for row in rows if row.state == "retired" and row.retirement == "prune"), None)
    if revivable is not None and pruned == "revive":
        current = evolve(revivable, state="active", retired_at=None, retirement=None)
        return Supply((current,), word="revived", current=current)
    return _renew(rows, seal, at=None, word="created")


def rekey(rows: Generations, seal: Seal, at: int) -> Supply:
    """A new key for a disk that is about to be formatted; the old one is retired, and so is an open candidate."""
    rows = tuple(rows)
    return _renew(rows, seal, at=at, word="rekeyed" if active(rows) else "created")


def prune(rows: Generations, at: int) -> Change:
    """No key for a volume that a boot left out: the active one is retired so that it can be revived."""
    return Change(_retired(rows, at, "prune"))


def disown(rows: Generations, at: int) -> Change:
    """All keys of a name that goes to another owner: retired, and none to be revived."""
    rows = tuple(rows)
    pruned = tuple(evolve(row, retirement="takeover") for row in rows if row.retirement == "prune")
    return Change(_retired(rows, at, "takeover") + pruned)


def _renew(rows: tuple[GenerationRow, ...], seal: Seal, at: int | None, word: Literal["created", "rekeyed"]) -> Supply:
    retired = () if at is None else _retired(rows, at, "rekey")
    outdated = tuple(evolve(row, retirement="relisted") for row in rows if row.retirement == "prune")
    created = seal(1 + max((row.generation for row in rows), default=0))
    return Supply(retired + outdated, created, word=word, current=created)


def _retired(rows: Generations, at: int, why: Retirement) -> tuple[GenerationRow, ...]:
    """The rows that are in force, retired: the active one for this reason, a candidate because it fell with it."""
    reasons: dict[str, Retirement] = {"active": why, "candidate": "dropped"}
    return tuple(
        evolve(row, state="retired", retired_at=at, retirement=reasons[row.state])
        for row in rows
        if row.state in reasons
    )
