"""The state of a server, read in a thread beside the requests: store, clock, what ends, counts of rows.

A problem means that boots are not served well from here: somebody must mend the store, which refuses a wrong clock, or
the certificate. ``ends.py`` says what ends, and when that is worth a note.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final

from attrs import evolve, frozen

from chutes_proto.errors import CollateralUnavailable, FileUnavailable, StoreBusy, StoreError
from chutes_proto.io.collateral.upstream import UpstreamCollateral
from chutes_proto.io.files import read_file
from chutes_proto.io.finding import Finding, State
from chutes_proto.io.server.ends import KINDS, End, Kind, check_profiles, command_for, ends_of, fetch_command, summary
from chutes_proto.io.server.setup import ServerSetup
from chutes_proto.io.server.store_setup import finding_of_void
from chutes_proto.io.stores.address import DurableStore
from chutes_proto.store._rows import CountSealed, CountStates, ReadAudit, ReadTimes
from chutes_proto.store._run import Ask, Store

SKEW_SECONDS: Final = 2
"""A clock that differs more from the database's is worth a note. The store itself refuses one that is wrong."""

_BEYOND: Final = 2**62


@frozen
class Health:
    """The checks at the time ``at`` (unix seconds), and all that ends."""

    at: int
    findings: tuple[Finding, ...]
    clock_skew: int | None = None
    ends: tuple[End, ...] = ()

    def ends_of(self, *kinds: Kind) -> tuple[End, ...]:
        """The ends of these kinds, the first first."""
        return tuple(each for each in self.ends if each.kind in kinds)


@frozen
class Counts:
    """Numbers of rows in the store: generations by state, sealed passphrases by KEK, and the newest audit row's."""

    states: Mapping[str, int]
    sealed: Mapping[str, int]
    audit_position: int


def read_health(setup: ServerSetup, store: DurableStore, now: int | None = None) -> Health:
    """Look at everything; takes as long as the store needs to answer."""
    at = int(time.time()) if now is None else now
    began = time.monotonic()
    try:
        times = store.transact(Ask(ReadTimes()))
    except StoreError as exc:
        storing = Finding("problem", "store", str(exc), command_for(setup, "store check"))
        is_compared = store.clock_skew is not None and not isinstance(exc, StoreBusy)
    else:
        took = time.monotonic() - began
        storing, is_compared = Finding("ok", "store", f"answered in {took * 1000:.0f} ms"), True
        if (void := finding_of_void(times, at)) is not None:
            storing = void
        elif warning := store.replication_warning:
            storing = Finding("note", "store", warning.removeprefix("store: "))
        elif store.custody.faults:
            tables = ", ".join(f"{table} {count}" for table, count in sorted(store.custody.faults.items()))
            storing = Finding("note", "store", f"rows are not authentic: {tables}", command_for(setup, "store check"))
        elif store.log_warning:
            storing = Finding("note", "store", store.log_warning, command_for(setup, "audit verify"))
        elif failing := sorted(store.copies.failing):
            storing = Finding("note", "store", f"audit rows are not copied: {', '.join(failing)}")
        elif store.mark_warning:
            storing = Finding("note", "store", store.mark_warning)
    skew = store.clock_skew
    clock = _clock(skew) if is_compared else Finding("note", "clock", "not compared: no store")
    if setup.service.readiness.fault is not None:
        storing = Finding("problem", "store", setup.service.readiness.fault, command_for(setup, "store check"))
    ends = ends_of(setup, at)
    found = {kind: summary(kind, ends, at) for kind in _kinds(setup)}
    if (none_counts := check_profiles(setup, at)) is not None:
        found["profile"] = evolve(none_counts, what="profile")
    found["certificate"] = _certificate(setup, found["certificate"])
    found["collateral"] = _collateral(setup, found["collateral"], ends, at)
    return Health(at, (storing, clock, *found.values()), skew, ends)


def read_counts(store: Store) -> Counts:
    """Count rows; reads a whole table. Raises `StoreError`."""
    newest = store.transact(Ask(ReadAudit(_BEYOND, 1, backwards=True)))
    return Counts(
        states=dict(store.transact(Ask(CountStates()))),
        sealed=dict(store.transact(Ask(CountSealed()))),
        audit_position=newest[0][0] if newest else 0,
    )


def _clock(skew: int | None) -> Finding:
    if skew is None:
        return Finding("ok", "clock", "the store has no clock of its own")
    state: State = "note" if abs(skew) > SKEW_SECONDS else "ok"
    remedy = "" if state == "ok" else "chronyc tracking, here and on the database's machine"
    return Finding(state, "clock", f"{skew:+d} s beside the database's", remedy)


def _kinds(setup: ServerSetup) -> tuple[Kind, ...]:
    """The kinds of ends that are looked at until a restart, whether there is one now or not."""
    absent = {"admin_certificate"} if setup.config.admin.certificate is None else set[str]()
    absent |= {"gpu_rim", "gpu_status"} if setup.gpus is None else set()
    return tuple(kind for kind in KINDS if kind not in absent)


def _certificate(setup: ServerSetup, finding: Finding) -> Finding:
    path = setup.base / setup.config.tls.certificate
    try:
        is_loaded = read_file(path, plain=True) == setup.files.read(path)
    except FileUnavailable as exc:
        waits = f"{exc}; the loaded one is used"
    else:
        waits = "" if is_loaded else f"{path} is not the loaded one"
    if not waits:
        return finding
    state: State = "problem" if finding.state == "problem" else "note"
    return Finding(state, "certificate", f"{waits}; {finding.detail}", command_for(setup, "reload"))


def _collateral(setup: ServerSetup, finding: Finding, ends: tuple[End, ...], now: int) -> Finding:
    """Add what cannot be used to the finding about what ends."""
    source = setup.collateral
    if not isinstance(source, UpstreamCollateral):
        try:
            useless = [str(item) for item in source.items(now) if isinstance(item.content, str)]
        except CollateralUnavailable as exc:
            useless = [str(exc)]
        if useless and finding.state == "ok":
            return Finding("note", "collateral", useless[0], fetch_command(source.path))
    count = sum(each.kind == "collateral" for each in ends)
    return finding if finding.state != "ok" else Finding("ok", "collateral", f"of {count} platform families")
