"""The mark of a store: what a server last saw of it, kept outside, so that a store that went back is noticed.

Rules kept here:

* audit rows are only ever added, in every transaction that grants something, so they tell how far a store has come. The
  mark has the newest of them, each with a digest: one that is missing, or another one, shows a restored backup, a
  fail-over to a standby that was behind, or an old primary that goes on by itself;
* rows may go: `PurgeAudit` deletes those of before a time. So an old row is not missed where no older one is left;
* PostgreSQL's timeline grows at each promotion: a lower one than before is an old primary, whatever its rows are;
* so does the version of the store's head with each change of revocations, facts and keys of the store: a lower one
  shows that these went back, though all audit rows are there;
* only an operator's decision, in the store and later than what is missing, lets servers go on with such a store.

The file form is one JSON object with a digest of its own, so that a part of a file is not taken for a mark.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple

from attrs import evolve, field, frozen

from chutes_proto.errors import ConfigurationError
from chutes_proto.quote._terms import rfc3339
from chutes_proto.store._rows import AuditRow, PurgeAudit

FORM: Final = "chutes-proto mark 1"
KEPT: Final = 64
"""The most rows that a mark has."""
LARGEST: Final = 16 * 1024
"""The most bytes of a mark's file."""

COLUMNS: Final = "id, at, actor, event, decision, reason, hotkey, vm, boot_id, request_id, keys"
"""The columns of an audit row of which its entry is made."""

_MEMBERS: Final = {"form", "store", "timeline", "entries", "epoch", "head", "head_mac", "decided"}
_DAY: Final = 86_400


class Entry(NamedTuple):
    """An audit row as a mark has it: its number, its time in unix seconds, and 32 hex digits of its digest.

    A tuple, because a comparison hashes and compares a hundred of them.
    """

    number: int
    at: int
    digest: str

    @classmethod
    def of(cls, number: int, row: AuditRow) -> Entry:
        """The entry of an audit row."""
        vm = (None, None) if row.vm is None else (row.vm.hotkey, row.vm.name)
        names = (row.actor, row.event, row.decision, row.reason, *vm, row.boot_id, row.request_id, row.keys)
        return cls.of_columns(number, row.at, *names)

    @classmethod
    @lru_cache(4 * KEPT, typed=True)
    def of_columns(cls, number: int, at: int, *names: str | None) -> Entry:
        """The entry of a row with these values of `COLUMNS`: most rows are read again at the next comparison."""
        *before, hotkey, vm, boot_id, request_id, keys = names
        of_vm = ("", "") if hotkey is None else (hotkey, vm)
        text = json.dumps([number, at, *before, *of_vm, boot_id, request_id, keys])
        return cls(number, at, hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32])


@frozen
class Mark:
    """A state of a store: its number, PostgreSQL's timeline (or 0), and its newest audit rows, in order.

    ``epoch`` is the newest epoch of the MACs of its rows that was seen (0: none yet): nothing of an older one alone
    counts again; ``head`` is the highest version of the store's head that was seen (0: none yet), ``head_mac`` its MAC
    in hex, and ``decided_at`` the time of the last decision of an operator on a loss that was in the store with it.
    """

    store_id: int
    timeline: int
    entries: tuple[Entry, ...] = ()
    epoch: int = field(default=0, kw_only=True)
    head: int = field(default=0, kw_only=True)
    head_mac: str = field(default="", kw_only=True)
    decided_at: int = field(default=0, kw_only=True)

    def with_entries(self, entries: Iterable[Entry]) -> Mark:
        """The mark with more rows, of which the newest are kept."""
        known = {entry.number: entry for entry in (*self.entries, *entries)}
        return evolve(self, entries=tuple(known[number] for number in sorted(known)[-KEPT:]))

    def without(self, purge: PurgeAudit) -> Mark:
        """The mark after a purge of audit rows."""
        return evolve(self, entries=tuple(entry for entry in self.entries if entry.at >= purge.before))

    def missing(self, entries: Iterable[Entry]) -> list[Entry]:
        """The rows of the mark that are not among ``entries``, in order."""
        there = set(entries)
        return [entry for entry in self.entries if entry not in there]

    def to_bytes(self) -> bytes:
        """The mark as a file has it."""
        body: dict[str, Any] = {
            "form": FORM,
            "store": self.store_id,
            "timeline": self.timeline,
            "entries": self.entries,
            "epoch": self.epoch,
            "head": self.head,
            "head_mac": self.head_mac,
            "decided": self.decided_at,
        }
        return json.dumps(body | {"sha256": _digest(body)}).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> Mark:
        """Read a file. Raises `ConfigurationError` for one that is not a whole mark."""
        try:
            body: dict[str, Any] = json.loads(data)
            given = body.pop("sha256")
            if given != _digest(body) or body["form"] != FORM:
                raise ValueError(given)
            if body.keys() != _MEMBERS or type(body["head_mac"]) is not str:
                raise ValueError(given)
            made = cls(
                body["store"],
                body["timeline"],
                tuple(Entry(*entry) for entry in body["entries"]),
                epoch=body["epoch"],
                head=body["head"],
                head_mac=body["head_mac"],
                decided_at=body["decided"],
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise _not_whole() from None
        numbers = [made.store_id, made.timeline, made.epoch, made.head, made.decided_at]
        numbers += [each for entry in made.entries for each in (entry.number, entry.at)]
        if not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
            raise _not_whole()
        if not all(type(entry.digest) is str for entry in made.entries) or len(made.entries) > KEPT:
            raise _not_whole()
        return made


def _not_whole() -> ConfigurationError:
    return ConfigurationError("not a mark of a store, or not all of it")


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()


@frozen
class View:
    """The present state of a store, as far as a comparison needs it.

    ``entries`` are those of its audit rows that have the numbers of a mark's, and its newest ones. ``has_older`` says
    whether it has a row that is older than the newest that is missing, in number and time. ``decided_at`` is the time
    of the last decision of an operator on a loss, 0 without one; so is ``head``, the version of the store's head, and
    ``head_mac`` is its MAC in hex.
    """

    store_id: int
    timeline: int
    decided_at: int
    entries: tuple[Entry, ...]
    has_older: bool
    head: int = 0
    head_mac: str = ""
    epoch: int = 0

    @property
    def mark(self) -> Mark:
        """The mark of a server that begins one now."""
        begun = Mark(self.store_id, self.timeline)
        return self.adopted(begun, begun)

    def is_decided_since(self, at: int, mark: Mark | None, now: int) -> bool:
        """Whether an operator has decided on a loss of what was written at ``at``, and seen with ``mark``.

        A time that is still to come is of a clock that was ahead. Then a decision counts that the mark has not seen.
        """
        is_unseen = mark is not None and self.decided_at > mark.decided_at
        return self.decided_at >= at or (at > now and is_unseen)

    def adopted(self, compared: Mark, mark: Mark) -> Mark:
        """The mark after a comparison with ``compared`` that found no loss; it is ``mark`` meanwhile."""
        purged = set(compared.missing(self.entries))
        newer = self if self.head > mark.head else mark
        return Mark(
            self.store_id,
            max(mark.timeline, self.timeline),
            epoch=max(mark.epoch, newer.epoch),
            head=newer.head,
            head_mac=newer.head_mac,
            decided_at=newer.decided_at,
        ).with_entries((*self.entries, *(entry for entry in mark.entries if entry not in purged)))


@frozen
class Loss:
    """The rows of a mark that a store lacks, in words, and whether an operator has decided to go on without it."""

    why: str
    is_accepted: bool


def find_loss(mark: Mark, view: View, now: int) -> Loss | None:
    """Compare a store with a mark of the same store; None if nothing is missing."""
    missing = mark.missing(view.entries)
    if missing and _may_be_purged(missing, view, now):
        missing = []
    whys: list[str] = []
    if view.timeline < mark.timeline:
        whys.append(f"it is on timeline {view.timeline}, and timeline {mark.timeline} was seen: an old primary")
    if missing:
        whys.append(f"it lacks {_named(missing)}{_unknown(missing, mark, view)}")
    is_decided = view.decided_at > 0
    if whys:
        at = max((entry.at for entry in missing or mark.entries), default=0)
        is_decided &= view.is_decided_since(at, mark, now)
    if view.head < mark.head or (view.head == mark.head and view.head_mac != mark.head_mac):
        # Version and decision were seen together: one that is not later came back with the rest.
        is_decided &= view.decided_at > mark.decided_at
        seen = f"version {mark.head} was seen" if view.head < mark.head else "another one of that version was seen"
        whys.append(f"its head has version {view.head}, and {seen}: its revocations, facts and keys are older ones")
    return Loss(" and ".join(whys), is_decided) if whys else None


def _may_be_purged(missing: Sequence[Entry], view: View, now: int) -> bool:
    """Return whether a purge explains that rows are missing: nothing older than these is left, and newer rows are.

    It does not explain that another row has the number of one.
    """
    newest, numbers = missing[-1], {entry.number for entry in view.entries}
    has_newer = max(numbers, default=0) > newest.number
    is_replaced = any(entry.number in numbers for entry in missing)
    return newest.at < now - _DAY and has_newer and not view.has_older and not is_replaced


def _named(missing: Sequence[Entry]) -> str:
    first, last = missing[0], missing[-1]
    if len(missing) == 1:
        return f"audit row {first.number} of {rfc3339(first.at)}"
    runs: list[list[int]] = []
    for entry in missing:
        if not runs or entry.number != runs[-1][-1] + 1:
            runs.append([])
        runs[-1].append(entry.number)
    ids = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
    return f"{len(missing)} audit rows from {rfc3339(first.at)} to {rfc3339(last.at)} (ids {ids})"


def _unknown(missing: Sequence[Entry], mark: Mark, view: View) -> str:
    """The rows before these that may be missing, too: the mark has only the newest that were seen."""
    first = missing[0]
    if first != mark.entries[0] or first.number == 1:
        return ""
    older = max((entry for entry in view.entries if entry.number < first.number and entry.at <= first.at), default=None)
    since = "" if older is None else f"; the newest before them that it has is {older.number} of {rfc3339(older.at)}"
    return f", the oldest of this mark, so it may lack others before them, too{since}"
