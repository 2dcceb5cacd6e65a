"""The overview of the admin page: boots and denials of the last day, and the VMs counted by what they run on.

Rules kept here:

* the store is read by pages, by its keys, a few at a time: never a whole table at once, however many VMs there are;
* what is kept is of bounded size: half hours, the newest denials, and groups, of which the largest are shown;
* nothing is read while nobody looks at the page.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Final

from attrs import define, field, frozen

from chutes_proto.quote._terms import rfc3339
from chutes_proto.server._why import Why, explain, recorded
from chutes_proto.store._rows import AuditRow, FleetVm, ReadAudit, ReadFleet, Vm, WhatIf
from chutes_proto.store._run import Ask, Store
from chutes_proto.units.operator import FindVerdict
from chutes_proto.wire import json

DAY: Final = 86_400
HALF_HOUR: Final = 1800
DENIALS: Final = 50
"""The most denials that are shown."""
GROUPS: Final = 50
"""The most groups that are shown; the VMs of the others are one group more."""
PAGE: Final = 500
"""Rows in one transaction: others wait for a short one only."""

_BEYOND: Final = 1 << 62
_OVERLAP: Final = 1000
"""Numbers that are read again: PostgreSQL gives a number before the commit, so a row may come after a later one."""
_MOST: Final = 50_000
"""How many audit rows before the first look are read."""


@frozen
class Denied:
    """An audit row of a refusal, its number in the store, and what it says, once its verdict was looked for."""

    number: int
    row: AuditRow
    code: str = ""
    why: Why | None = None


@define
class Recent:
    """Boots and denials of the last day, from the audit rows."""

    is_complete: bool = False
    """Whether the whole day was read; otherwise since `since`."""
    since: int | None = None
    is_behind: bool = False
    """Whether rows are still to be read that were written since the last look, long ago perhaps."""
    denied: tuple[Denied, ...] = ()
    """The newest denials, oldest first."""
    _halves: dict[int, list[int]] = field(factory=dict[int, "list[int]"])
    _seen: set[int] = field(factory=set[int])
    _newest: int | None = None
    _oldest: int = _BEYOND
    _read: int = 0

    def read(self, store: Store, now: int) -> bool:
        """Read one page; returns whether there is more. Raises `StoreError`."""
        has_more = self._read_page(store, now)
        if not has_more:
            self._explain(store)
        return has_more

    def _read_page(self, store: Store, now: int) -> bool:
        if self._newest is not None:
            beyond = max(self._newest - _OVERLAP, self._oldest - 1)  # older ones are read backwards
            self.is_behind = self._take(store.transact(Ask(ReadAudit(beyond, PAGE + _OVERLAP))), now) >= PAGE
            if self.is_behind:
                return True
        if self.is_complete or self._read >= _MOST:
            return False
        rows = store.transact(Ask(ReadAudit(self._oldest, PAGE, backwards=True)))
        _ = self._take(rows, now)
        self._read += len(rows)
        if rows:
            self._oldest, self.since = rows[-1][0], rows[-1][1].at
        if len(rows) < PAGE:
            self._oldest = 0
        self.is_complete = len(rows) < PAGE or rows[-1][1].at < now - DAY
        return not self.is_complete and self._read < _MOST

    def halves(self, now: int) -> list[dict[str, int]]:
        """Boots and denials of each half hour of the last day, oldest first."""
        last = now - now % HALF_HOUR
        times = range(last - DAY + HALF_HOUR, last + HALF_HOUR, HALF_HOUR)
        for old in self._halves.keys() - set(times):
            del self._halves[old]
        counts = [(at, *self._halves.get(at, (0, 0))) for at in times]
        return [{"at": at, "boots": boots, "denials": denials} for at, boots, denials in counts]

    def _take(self, rows: Sequence[tuple[int, AuditRow]], now: int) -> int:
        """Count the rows that were not counted before; returns how many."""
        fresh = [(number, row) for number, row in rows if number not in self._seen]
        self._newest = newest = max([self._newest or 0, *(number for number, _ in fresh)])
        self._seen = {number for number in self._seen | dict(fresh).keys() if number > newest - _OVERLAP}
        for number, row in fresh:
            if row.is_forged:
                continue
            is_denial = row.decision == "refused"
            if is_denial:
                newest_denials = sorted((*self.denied, Denied(number, row)), key=lambda each: each.number)
                self.denied = tuple(newest_denials[-DENIALS:])
            if row.at > now - DAY and (is_denial or (row.event, row.decision) == ("boot", "granted")):
                self._halves.setdefault(row.at - row.at % HALF_HOUR, [0, 0])[is_denial] += 1
        return len(fresh)

    def _explain(self, store: Store) -> None:
        for each in self.denied:
            if each.why is None:
                denial = recorded(each.row, store.transact(FindVerdict(each.row)))
                known = Denied(each.number, each.row, denial.code, explain(denial))
                self.denied = tuple(known if one is each else one for one in self.denied)


_Group = tuple[str | None, str | None, str | None]


@frozen
class FleetCount:
    """The VMs by profile, version and TCB status of their last boots, counted from ``at`` on."""

    at: int
    vms: int
    groups: tuple[tuple[_Group, int, int], ...]
    """Each group with its VMs, and those of them that booted within the last day; the largest first."""


@define
class Fleet:
    """Counts the VMs by pages, again and again."""

    counted: FleetCount | None = None
    so_far: int | None = None
    """VMs that are counted in the present round; None between two rounds."""
    _after: Vm | None = None
    _began: int = 0
    _vms: Counter[_Group] = field(factory=Counter[_Group])
    _booted: Counter[_Group] = field(factory=Counter[_Group])

    def read(self, store: Store, now: int) -> bool:
        """Count one page; returns whether there is more. Raises `StoreError`."""
        if self.so_far is None:
            self.so_far, self._began, self._after = 0, now, None
            self._vms, self._booted = Counter(), Counter()
        page = store.transact(Ask(ReadFleet(self._after, PAGE)))
        self._take(page)
        self.so_far += len(page)
        if len(page) == PAGE:
            self._after = page[-1].vm
            return True
        groups = tuple((group, number, self._booted[group]) for group, number in self._vms.most_common())
        self.counted = FleetCount(self._began, self.so_far, groups)
        self.so_far = None
        return False

    def _take(self, page: Iterable[FleetVm]) -> None:
        for vm in page:
            group = vm.profile_name, vm.profile_version, vm.tcb_status
            self._vms[group] += 1
            self._booted[group] += vm.last_boot_at > self._began - DAY


def fleet_members(fleet: Fleet) -> dict[str, object]:
    """The count for the page; the VMs of groups that are not shown are one group."""
    counted = fleet.counted
    groups: tuple[tuple[_Group, int, int], ...] = () if counted is None else counted.groups
    shown = [*groups[:GROUPS]]
    if rest := groups[GROUPS:]:
        others = f"{len(rest)} other groups"
        shown.append(((others, None, None), sum(each[1] for each in rest), sum(each[2] for each in rest)))
    return {
        "counted_at": None if counted is None else counted.at,
        "vms": None if counted is None else counted.vms,
        "so_far": fleet.so_far,
        "groups": [
            {"profile": group[0], "version": group[1], "tcb_status": group[2], "vms": vms, "booted": booted}
            for group, vms, booted in shown
        ],
    }


def what_if_lines(what_if: WhatIf | None) -> list[str] | None:
    """The last what-if in lines; None without one, or for one that another release wrote in another form."""
    if what_if is None:
        return None
    try:
        found: Any = json.decode(what_if.found.encode())
        counts = f"{found['refused']} of {found['judged']} VMs refused, {found['warned']} warned"
        counts += f", {found['not_judged']} not judged; {found['refused_later']} refused later"
        lines = [f"{rfc3339(what_if.tried_at)}: {found['policy']}, at {rfc3339(found['at'])}: {counts}"]
        lines += [f"from {rfc3339(each['at'])} on: {each['refused']} refused" for each in found["changes"]]
        lines += [f"{each['vm']} of {each['hotkey']}: {each['code']}: {each['reason']}" for each in found["first"]]
    except (ValueError, LookupError, TypeError, OverflowError):
        return None
    return lines


def recent_members(recent: Recent, now: int) -> dict[str, object]:
    """Boots and denials for the page, newest denial first, each with its reason."""
    halves = recent.halves(now)
    return {
        "complete": recent.is_complete and not recent.is_behind,
        "from": None if recent.is_behind else recent.since,
        "boots": sum(half["boots"] for half in halves),
        "denials": sum(half["denials"] for half in halves),
        "halves": halves,
        "denied": [_denial(each) for each in reversed(recent.denied)],
    }


def _denial(each: Denied) -> dict[str, object]:
    row = each.row
    return {
        "number": each.number,
        "at": row.at,
        "event": row.event,
        "vm": "" if row.vm is None else row.vm.name,
        "hotkey": "" if row.vm is None else row.vm.hotkey,
        "platform": "" if row.pin is None else str(row.pin),
        "peer": row.peer_address,
        "request_id": row.request_id or "",
        "code": each.code,
        "why": [row.reason] if each.why is None else each.why.lines(),
    }
