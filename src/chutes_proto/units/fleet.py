"""A fleet's transactions: the maintenance of a miner's servers, and the profiles of its hosts.

Rules kept here:

* the version of a server is that of the image which the VM of its name booted last; so a boot of the target version
  ends a maintenance, without a write of its own;
* the limit of servers in maintenance is checked in the transaction that begins one: two requests at once count each
  other;
* a host profile is the hash of its content; only an operator says what is accepted on such hosts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias, TypeVar

from attrs import evolve, frozen

from chutes_proto.errors import Refused, Unavailable
from chutes_proto.store import _rows as store
from chutes_proto.store._run import Script, Unit
from chutes_proto.units.records import NO_QUOTE, Records
from chutes_proto.units.revocations import NO_REVOCATIONS, Revocations, check_allowed
from chutes_proto.units.servers import SERVERS_OF_HOTKEY, not_found
from chutes_proto.wire.codes import Code

T = TypeVar("T")

HOSTS = 256
"""Host profiles that are kept, and of one hotkey."""
HOSTS_OF_HOTKEY = 16
HOSTS_BYTES = 1024 * 1024
"""Bytes of all that are kept, because anyone may ask for the list of them. A host of eight GPUs has some 5 KiB."""

Reason: TypeAlias = Literal[
    "not_tee", "no_active_window", "already_at_target", "maintenance_pending", "concurrency_cap"
]
"""Why a server may not begin its maintenance."""


def parse_version(text: str) -> tuple[int, ...]:
    """The numbers of a version, as in ``1.4.0``, for comparison. Raises `ValueError` for any other form."""
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9}){0,7}", text):
        raise ValueError(f"version {text!r} has not the form 1.4.0")
    return tuple(map(int, text.split(".")))


def is_older(version: str | None, target: str) -> bool:
    """Whether ``version`` does not meet ``target``; one of another form does only if it is the same."""
    if version is None or version == target:
        return version is None
    try:
        return parse_version(version) < parse_version(target)
    except ValueError:
        return True


@frozen
class Window:
    """A maintenance window, from ``start`` until before ``end`` (unix seconds)."""

    id: str
    target_version: str
    start: int
    end: int
    limit: int

    def is_open(self, now: int) -> bool:
        """Whether a maintenance may begin now."""
        return self.start <= now < self.end


@frozen
class FleetServer:
    """A server, and the version that its VM booted last."""

    row: store.ServerRow
    version: str | None

    @property
    def in_maintenance(self) -> bool:
        """Whether its maintenance has begun, and it did not boot the target since."""
        return self.row.target is not None and is_older(self.version, self.row.target)


@frozen
class Preflight:
    """The servers in maintenance of a miner, and the reasons why one more may not begin."""

    server: FleetServer
    pending: tuple[FleetServer, ...]
    reasons: tuple[Reason, ...]


def judge(server: FleetServer, fleet: Sequence[FleetServer], window: Window | None, now: int) -> Preflight:
    """Find the reasons against the maintenance of ``server``, one of ``fleet``."""
    pending = tuple(one for one in fleet if one.in_maintenance)
    is_open = window is not None and window.is_open(now)
    found: dict[Reason, bool] = {
        "not_tee": server.version is None,
        "no_active_window": not is_open,
        "already_at_target": window is not None and not is_older(server.version, window.target_version),
        "maintenance_pending": server.in_maintenance,
        "concurrency_cap": window is not None and not server.in_maintenance and len(pending) >= window.limit,
    }
    return Preflight(server, pending, tuple(reason for reason, holds in found.items() if holds))


@frozen
class ReadServers(Unit[tuple[FleetServer, ...]]):
    """The servers of ``hotkey``, newest first."""

    hotkey: str

    def script(self) -> Script[tuple[FleetServer, ...]]:
        return (yield from _servers(self.hotkey))


@frozen
class ReadServersAndGpus(Unit[tuple[tuple[FleetServer, tuple[store.GpuRow, ...]], ...]]):
    """The servers of ``hotkey`` with their GPUs, newest first."""

    hotkey: str

    def script(self) -> Script[tuple[tuple[FleetServer, tuple[store.GpuRow, ...]], ...]]:
        servers = yield from _servers(self.hotkey)
        gpus: dict[str, list[store.GpuRow]] = {server.row.server_id: [] for server in servers}
        for part in _parts([*gpus]):
            for gpu in (yield from store.ReadGpus(part)):
                gpus[gpu.server_id].append(gpu)
        return tuple((server, tuple(gpus[server.row.server_id])) for server in servers)


@frozen
class PreflightMaintenance(Unit[Preflight]):
    """Whether the server of ``hotkey``'s with this name or id may begin its maintenance.

    Raises `Refused` (``server_not_found``).
    """

    now: int
    hotkey: str
    name_or_id: str
    window: Window | None

    def script(self) -> Script[Preflight]:
        fleet = yield from _servers(self.hotkey)
        server = next((one for one in fleet if self.name_or_id in (one.row.server_id, one.row.name)), None)
        if server is None:
            raise not_found(self.name_or_id)
        return judge(server, fleet, self.window, self.now)


@frozen
class BeginMaintenance(Unit[Preflight]):
    """Begin the maintenance of a server, unless there is a reason against it; returns what was judged.

    Raises `Refused` (``server_not_found``).
    """

    now: int
    request_id: str
    hotkey: str
    name_or_id: str
    window: Window | None
    peer_address: str

    def script(self) -> Script[Preflight]:
        found = yield from PreflightMaintenance(self.now, self.hotkey, self.name_or_id, self.window).script()
        if self.window is not None and not found.reasons:
            row, window = found.server.row, self.window
            yield from store.Put(evolve(row, window_id=window.id, target=window.target_version))
            records = Records(self.now, self.request_id, row.vm, NO_QUOTE, self.peer_address, actor="miner")
            versions = f"from {found.server.version} to {window.target_version}"
            reason = f"server {row.server_id}: window {window.id}, {versions}"
            yield from records.audit("begin maintenance", "granted", reason)
        return found


@frozen
class RegisterHost(Unit[tuple[store.HostProfileRow, bool]]):
    """Keep a host profile; returns its row, and whether this added it.

    Where as many are kept as may be, those give way that no operator has named, of the hotkey that has most bytes of
    these: a few hotkeys cannot fill all places. Raises `Unavailable` (``host_profiles_full``) if there are none to give
    way, and for more than are kept of one hotkey; and `Refused` if the hotkey is revoked.
    """

    row: store.HostProfileRow
    revocations: Revocations = NO_REVOCATIONS

    def script(self) -> Script[tuple[store.HostProfileRow, bool]]:
        vms = (store.Vm(self.row.hotkey, ""),)  # of its hotkey, and no VM has this name
        yield from check_allowed(self.revocations, (yield from store.ReadTimes()), self.row.created_at, vms, ())
        known = yield from store.Read(store.HostProfileRow, self.row.fingerprint)
        if known is not None:
            return known, False
        kept = yield from store.ReadHostProfiles(HOSTS)
        of_hotkey = sum(one.hotkey == self.row.hotkey for one in kept)
        going = _going(kept, self.row)
        if of_hotkey >= HOSTS_OF_HOTKEY or going is None:
            text = "As many host profiles are kept as this server keeps. Ask its operator."
            size = f"{len(kept)} of {HOSTS} host profiles with {_size(kept)} of {HOSTS_BYTES} bytes"
            reason = f"{size}, {of_hotkey} of {HOSTS_OF_HOTKEY} of {self.row.hotkey}"
            raise Unavailable(Code.HOST_PROFILES_FULL, text, reason=reason, retry_after=3600)
        for row in going:
            yield from store.Delete(store.HostProfileRow, (row.fingerprint,))
        yield from store.Insert(self.row)
        return self.row, True


def _going(kept: Sequence[store.HostProfileRow], new: store.HostProfileRow) -> list[store.HostProfileRow] | None:
    """The profiles that give way to ``new``, the oldest first; None if its hotkey would then have most."""
    going: list[store.HostProfileRow] = []
    left = [*kept]
    own = _size([new, *(row for row in kept if row.hotkey == new.hotkey)])
    while len(left) >= HOSTS or _size([new, *left]) > HOSTS_BYTES:
        sizes: Counter[str] = Counter()
        for row in (pending := [row for row in left if row.name is None]):
            sizes[row.hotkey] += len(row.profile)
        most = max(sizes.values(), default=0)
        if most < own:
            return None
        going.append(next(row for row in pending if sizes[row.hotkey] == most))
        left.remove(going[-1])
    return going


def _size(rows: Iterable[store.HostProfileRow]) -> int:
    return sum(len(row.profile) for row in rows)


@frozen
class NameHost(Unit[store.HostProfileRow]):
    """An operator says which published profiles such hosts are; None for the name takes that back. Raises `Refused`."""

    now: int
    fingerprint: str
    name: str | None
    published: str | None
    reason: str

    def script(self) -> Script[store.HostProfileRow]:
        row = yield from _host(self.fingerprint)
        named = evolve(row, name=self.name, published=self.published)
        yield from store.Put(named)
        told = "is not named" if self.name is None else f"is {self.name}"
        yield from _audit_host(self.now, "host named", f"{self.reason}; {row.fingerprint} {told}")
        return named


@frozen
class RemoveHost(Unit[store.HostProfileRow]):
    """An operator removes a host profile. Raises `Refused`."""

    now: int
    fingerprint: str
    reason: str

    def script(self) -> Script[store.HostProfileRow]:
        row = yield from _host(self.fingerprint)
        yield from store.Delete(store.HostProfileRow, (row.fingerprint,))
        yield from _audit_host(self.now, "host removed", f"{self.reason}; {row.fingerprint} of {row.hotkey}")
        return row


def _servers(hotkey: str) -> Script[tuple[FleetServer, ...]]:
    rows = yield from store.ReadAll(store.ServerRow, hotkey)
    versions: dict[store.Vm, str] = {}
    for part in _parts([row.vm for row in rows]):
        versions |= {boot.vm: boot.profile_version for boot in (yield from store.FindLastBoots(part))}
    newest_first = sorted(rows, key=lambda row: row.created_at, reverse=True)
    return tuple(FleetServer(row, versions.get(row.vm)) for row in newest_first)


def _parts(of: Sequence[T]) -> list[tuple[T, ...]]:
    """Parts that one question may name."""
    return [tuple(of[at : at + SERVERS_OF_HOTKEY]) for at in range(0, len(of), SERVERS_OF_HOTKEY)]


def _host(prefix: str) -> Script[store.HostProfileRow]:
    found = [row for row in (yield from store.ReadHostProfiles(HOSTS)) if row.fingerprint.startswith(prefix)]
    if len(found) != 1:
        what = "several host profiles begin" if found else "no host profile begins"
        text = f"{what} with {prefix!r}; `chutes-proto hosts list` shows all"
        raise Refused(Code.NOT_FOUND, text)
    return found[0]


def _audit_host(now: int, event: str, reason: str) -> store.Insert:
    return store.Insert(store.AuditRow(now, "operator", event, "done", reason))
