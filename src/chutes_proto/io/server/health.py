"""The state of a server, read in a thread beside the requests: store, clock, certificate, collateral, counts of rows.

Rules kept here:

* a problem means that boots are not served well from here: somebody must mend the store, which refuses a wrong clock,
  or the certificate;
* collateral that has expired is a note: it may be of one platform only, and every server lacks it alike.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from attrs import field, frozen
from cryptography import x509

from chutes_proto.errors import CollateralUnavailable, FileUnavailable, StoreBusy, StoreError
from chutes_proto.io.collateral.upstream import UpstreamCollateral
from chutes_proto.io.files import read_file
from chutes_proto.io.finding import Finding, State
from chutes_proto.io.server.setup import ServerSetup
from chutes_proto.io.stores.address import DurableStore
from chutes_proto.quote import VerifiedCollateral
from chutes_proto.quote._terms import rfc3339
from chutes_proto.store._run import Ask, Store
from chutes_proto.store.rows import CountSealed, CountStates, ReadAudit, ReadTimes

SKEW_SECONDS: Final = 2
"""A clock that differs more from the database's is worth a note. The store itself refuses one that is wrong."""

_DAY: Final = 86_400
_EARLY: Final = 30 * _DAY
_BEYOND: Final = 2**62


@frozen
class Health:
    """The checks at the time ``at`` (unix seconds): ``collateral`` has begin and end of each family's."""

    at: int
    findings: tuple[Finding, ...]
    certificate: tuple[int, int] | None = None
    """Begin and end of the certificate."""
    clock_skew: int | None = None
    collateral: Mapping[str, tuple[int, int]] = field(factory=dict[str, "tuple[int, int]"])

    @property
    def certificate_end(self) -> int | None:
        """The end of the certificate, None for one that cannot be read."""
        return None if self.certificate is None else self.certificate[1]

    @property
    def is_ready(self) -> bool:
        """Whether no check has a problem."""
        return all(finding.state != "problem" for finding in self.findings)


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
        _ = store.transact(Ask(ReadTimes()))
    except StoreError as exc:
        storing = Finding("problem", "store", str(exc))
        is_compared = store.clock_skew is not None and not isinstance(exc, StoreBusy)
    else:
        took = time.monotonic() - began
        storing, is_compared = Finding("ok", "store", f"answered in {took * 1000:.0f} ms"), True
        if warning := store.replication_warning:
            storing = Finding("note", "store", warning.removeprefix("store: "))
    skew = store.clock_skew
    clock = _clock(skew) if is_compared else Finding("note", "clock", "not compared: no store")
    if setup.service.readiness.fault is not None:
        storing = Finding("problem", "store", setup.service.readiness.fault)
    certificate, window = _certificate(setup, at)
    collateral, windows = _collateral(setup, at)
    return Health(at, (storing, clock, certificate, collateral), window, skew, windows)


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


def _certificate(setup: ServerSetup, now: int) -> tuple[Finding, tuple[int, int] | None]:
    path = Path(setup.base, setup.config.tls.certificate)
    try:
        chain = x509.load_pem_x509_certificates(read_file(path))
    except (FileUnavailable, ValueError) as exc:
        return Finding("note", "certificate", f"{path}: {exc}; the loaded one is used"), None
    end = min(int(each.not_valid_after_utc.timestamp()) for each in chain)
    begin = max(int(each.not_valid_before_utc.timestamp()) for each in chain)
    if now < begin:
        return Finding("problem", "certificate", f"{path} is valid from {rfc3339(begin)}"), (begin, end)
    state: State = "problem" if now >= end else "note" if end - now < _EARLY else "ok"
    verb = "expired" if now >= end else "expires"
    remedy = "" if state == "ok" else f"replace {path}, then run chutes-proto reload, or send SIGHUP"
    return Finding(state, "certificate", f"{verb} at {rfc3339(end)}", remedy), (begin, end)


def _collateral(setup: ServerSetup, now: int) -> tuple[Finding, dict[str, tuple[int, int]]]:
    source = setup.collateral
    useless: list[str] = []
    try:
        if isinstance(source, UpstreamCollateral):
            held = source.cache.held()
        else:
            items = source.items(now)
            held = tuple(item.content for item in items if isinstance(item.content, VerifiedCollateral))
            useless = [str(item) for item in items if isinstance(item.content, str)]
    except CollateralUnavailable as exc:
        return Finding("note", "collateral", str(exc)), {}
    windows = {f"{each.fmspc.hex()}-{each.ca}-{each.tee}": each.window for each in held}
    expired = sorted(family for family, (_, end) in windows.items() if end <= now)
    if expired:
        return Finding("note", "collateral", f"expired: {', '.join(expired)}"), windows
    if useless:
        return Finding("note", "collateral", useless[0]), windows
    return Finding("ok", "collateral", f"of {len(windows)} platform families"), windows
