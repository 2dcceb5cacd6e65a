"""Servers of miners: registered, renamed, removed, attested at runtime; each change one transaction with its audit row.

Rules kept here:

* an id, an address, a GPU, and a name among one hotkey's servers belong to one server: the tables' own constraints;
* a name is no other id of the same hotkey's, and an id no other name, so that either names one server;
* a server is removed by its owner, by the operator, or by a registration at its address with better evidence. The
  evidence of a registration shows one thing, the address that its linked boot came from. It does not show GPUs or ids,
  and of a time long ago not even that, because addresses change hands. A claim to anything else removes nothing;
* removing a server keeps the keys of its VM;
* who is not the owner hears that there is no such server.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from attrs import evolve, frozen

from chutes_proto.errors import BadRequest, Refused, StoreBusy
from chutes_proto.store._run import Unit
from chutes_proto.store.rows import (
    AttestationRow,
    BootRow,
    Claim,
    CountServerRefusals,
    DeleteServer,
    FindLastBoot,
    FindLastBootFrom,
    FindServer,
    GpuRow,
    IsRedeemed,
    Pin,
    Put,
    Read,
    ReadServers,
    ReadVm,
    ServerRow,
    Vm,
)
from chutes_proto.units.boot import DAY, REFUSALS_PER_DAY
from chutes_proto.units.nonces import redeem_nonce
from chutes_proto.units.records import NO_QUOTE, Quote, Records, legible
from chutes_proto.wire.codes import Code

if TYPE_CHECKING:
    from chutes_proto.quote._measurements import Profile
    from chutes_proto.store._run import Script
    from chutes_proto.store.rows import Decision, Insert

EVIDENCE_SECONDS = 86_400
"""How long a boot shows whose the address is that it came from."""

_TAKEN = "Conflict with an existing server. Please contact support to resolve."


@frozen
class HostQuote:
    """A runtime quote that the host of a server gave when it was asked, verified; ``gpus`` is a text for the audit."""

    pin: Pin
    profile_name: str
    profile_version: str
    quote_digest: bytes
    gpus: str


@frozen
class RegisterServer(Unit[ServerRow]):
    """Register a server with its GPUs, linked to its newest boot by name, else by address.

    A boot counts while its VM's name is bound to the platform it came from and its profile is one of ``profiles``, by
    name. ``gpus`` bear ``server_id``. The quote that the host has ``shown`` must come from the linked boot's platform;
    it names no hotkey, so it is not better evidence and binds no platform.

    Raises `Refused` (``boot_required``, ``platform_mismatch``, ``gpu_taken``, ``host_taken``, ``server_taken``,
    ``name_taken``) and `BadRequest` (``gpu_invalid``) for GPUs that a profile does not expect.
    """

    now: int
    request_id: str
    hotkey: str
    server_id: str
    name: str
    host: str
    address: str
    gpus: tuple[GpuRow, ...]
    profiles: Mapping[str, Profile]
    peer_address: str
    evidence: Literal["link", "boot", "callback"] = "link"
    shown: HostQuote | None = None

    def script(self) -> Script[ServerRow]:
        """Link, what was shown, conflicts, rows."""
        link = yield from self._link()
        if link is None and self.evidence == "boot":
            raise Refused(Code.BOOT_REQUIRED, "Server registration failed - no verified boot belongs to this server.")
        if link is not None:
            self._check_gpus(self.profiles[link.profile_name])
        if self.shown is not None:
            self._check_shown(self.shown, link)
        yield from self._check_free(link)
        server = ServerRow(
            server_id=self.server_id,
            registration=self.request_id,
            hotkey=self.hotkey,
            name=self.name,
            host=self.host,
            address=self.address,
            boot_id=None if link is None else link.boot_id,
            pin=None,
            created_at=self.now,
        )
        rows: tuple[ServerRow | GpuRow, ...] = (server, *self.gpus)
        for row in rows:
            if not (yield from Claim(row)):  # somebody else's transaction came in between
                raise StoreBusy(f"a {row.TABLE} row was claimed meanwhile")
        quote = NO_QUOTE if self.shown is None else Quote.of(self.shown)
        told = "no link" if link is None else f"linked to boot {link.boot_id} of {link.vm.name}"
        told += f"; {len(self.gpus)} GPUs"
        if self.shown is not None:
            records = Records(self.now, self.request_id, server.vm, quote, self.address)
            yield from records.verdict("runtime", "", registration=server.registration)
            told += f"; its host gave a quote of {self.shown.pin}; {self.shown.gpus}"
        yield from _audit(self, server, "register server", f"at {server.address}: {told}", server.boot_id, quote)
        return server

    def _link(self) -> Script[BootRow | None]:
        for question in (FindLastBoot(Vm(self.hotkey, self.name)), FindLastBootFrom(self.hotkey, self.address)):
            boot = yield from question
            if boot is None or boot.profile_name not in self.profiles:
                continue
            claim = yield from ReadVm(boot.vm)
            if claim is not None and claim.pin == boot.pin:
                return boot
        return None

    def _check_gpus(self, profile: Profile) -> None:
        got = {gpu.identifier for gpu in self.gpus}
        expected = set(profile.expected_gpus)
        about = f"for measurement config '{profile.name}'"
        if expected and not got <= expected:
            told = f"Expected GPUs {sorted(expected)}, but got {sorted(got)}"
            raise BadRequest(Code.GPU_INVALID, f"Server registration failed - GPU mismatch {about}: {told}")
        if profile.gpu_count is not None and len(self.gpus) != profile.gpu_count:
            told = f"Expected {profile.gpu_count} GPUs, but got {len(self.gpus)}"
            raise BadRequest(Code.GPU_INVALID, f"Server registration failed - GPU count mismatch {about}: {told}")

    def _check_shown(self, shown: HostQuote, link: BootRow | None) -> None:
        self._check_gpus(self.profiles[shown.profile_name])
        if link is not None and link.pin != shown.pin:
            raise Refused(
                Code.PLATFORM_MISMATCH,
                "Server registration failed - the host's quote comes from another platform than the server's boot.",
                reason=f"boot {link.boot_id} came from {link.pin}, and the host's quote from {shown.pin}",
            )

    def _check_free(self, link: BootRow | None) -> Script[None]:
        """Refuse what another server holds, once a server that yields the address is removed with all that it held."""
        neighbour = yield from FindServer(self.address)
        better = None if neighbour is None else (yield from self._better_evidence(link, neighbour))
        if neighbour is not None and better is not None:
            yield from DeleteServer(neighbour.server_id)
            reason = (
                f"at {neighbour.address}: had no evidence;"
                f" server {self.server_id} of {self.hotkey} at {self.address} has a boot from there"
            )
            yield from _audit(self, neighbour, "server yields", reason, better.boot_id)
            neighbour = None
        for gpu in self.gpus:
            held = yield from Read(GpuRow, gpu.uuid)
            if held is not None:
                text = "Nodes already exist in inventory, please contact chutes team to resolve: " + str([gpu.uuid])
                raise _taken(Code.GPU_TAKEN, text, (yield from Read(ServerRow, held.server_id)))
        if neighbour is not None:
            text = _TAKEN
            if neighbour.hotkey == self.hotkey:
                text = (
                    f"IP {self.host} is already registered to your server {neighbour.server_id} ({neighbour.name})."
                    " IPs must be unique across all servers."
                )
            raise _taken(Code.HOST_TAKEN, text, neighbour, "; if the address is the claimant's now: boot the VM again")
        holder = yield from Read(ServerRow, self.server_id)
        if holder is not None:
            text = "The server id is registered to you already." if holder.hotkey == self.hotkey else _TAKEN
            raise _taken(Code.SERVER_TAKEN, text, holder)
        yield from _check_name(self.hotkey, self.server_id, self.name)

    def _better_evidence(self, link: BootRow | None, neighbour: ServerRow) -> Script[BootRow | None]:
        """The linked boot, if it shows that the address is no longer ``neighbour``'s, a server without evidence."""
        if link is None or link.peer_address != self.address or self.now - link.created_at > EVIDENCE_SECONDS:
            return None
        if neighbour.hotkey == self.hotkey or neighbour.boot_id is not None or neighbour.pin is not None:
            return None
        # The holder may have booted there after it registered; an address changes hands, so the newest boot counts.
        latest = yield from FindLastBootFrom(neighbour.hotkey, self.address)
        return link if latest is None or latest.created_at < link.created_at else None


@frozen
class RenameServer(Unit[ServerRow]):
    """Give a server of ``hotkey``'s another name. Raises `Refused` (``server_not_found``, ``name_taken``)."""

    now: int
    request_id: str
    hotkey: str
    server_id: str
    name: str
    peer_address: str

    def script(self) -> Script[ServerRow]:
        """Check, write."""
        server = yield from read_own(self.hotkey, self.server_id)
        if server.name == self.name:
            return server
        yield from _check_name(self.hotkey, self.server_id, self.name)
        renamed = evolve(server, name=self.name, updated_at=self.now)
        yield from Put(renamed)
        yield from _audit(self, server, "rename server", f"renamed to {self.name}")
        return renamed


@frozen
class RemoveServer(Unit[ServerRow]):
    """Remove the server of ``hotkey``'s that has this name or id. Raises `Refused` (``server_not_found``)."""

    now: int
    request_id: str
    hotkey: str
    name_or_id: str
    peer_address: str

    def script(self) -> Script[ServerRow]:
        """Find, delete."""
        servers = yield from ReadServers(self.hotkey)
        server = next((row for row in servers if self.name_or_id in (row.server_id, row.name)), None)
        if server is None:
            raise not_found(self.name_or_id)
        yield from DeleteServer(server.server_id)
        yield from _audit(self, server, "remove server", f"at {server.address}; keys are kept", server.boot_id)
        return server


@frozen
class ListServers(Unit[tuple[ServerRow, ...]]):
    """The servers of a hotkey, newest first."""

    hotkey: str

    def script(self) -> Script[tuple[ServerRow, ...]]:
        """Read."""
        servers = yield from ReadServers(self.hotkey)
        return tuple(sorted(servers, key=lambda row: row.created_at, reverse=True))


@frozen
class ReadOwnServer(Unit[tuple[ServerRow, AttestationRow | None]]):
    """A server of ``hotkey``'s with its newest runtime verdict. Raises `Refused` (``server_not_found``)."""

    hotkey: str
    server_id: str

    def script(self) -> Script[tuple[ServerRow, AttestationRow | None]]:
        """Read."""
        server = yield from read_own(self.hotkey, self.server_id)
        return server, None if server.attested is None else (yield from Read(AttestationRow, server.attested))


@frozen
class GrantRuntime(Unit[None]):
    """Record an accepted runtime quote, and redeem its nonce.

    The quote must come from the platform that the linked VM's name is bound to; without a link, from the one that the
    first accepted quote came from. Raises `Refused` (``server_not_found``, ``platform_mismatch``, ``nonce_invalid``).
    """

    now: int
    request_id: str
    server: ServerRow
    pin: Pin
    nonce: bytes
    nonce_purpose: str
    nonce_issued_at: int
    profile_name: str
    profile_version: str
    quote_digest: bytes
    peer_address: str

    def script(self) -> Script[None]:
        """Platform, nonce, records."""
        server = yield from _same(self.server)
        bound = yield from self._bound_to(server)
        if bound not in (None, self.pin):
            raise Refused(
                Code.PLATFORM_MISMATCH,
                "This server is bound to another platform.",
                reason=f"server {server.server_id} is bound to {bound}, and this quote comes from {self.pin}",
            )
        yield from redeem_nonce(self.nonce, self.nonce_purpose, self.nonce_issued_at, self.now)
        yield from Put(evolve(server, pin=self.pin if bound is None else server.pin, attested=self.request_id))
        yield from _record(self, server, Quote.of(self))

    def _bound_to(self, server: ServerRow) -> Script[Pin | None]:
        if server.boot_id is None:
            return server.pin
        boot = yield from Read(BootRow, server.boot_id)
        claim = None if boot is None else (yield from ReadVm(boot.vm))
        return server.pin if claim is None else claim.pin


@frozen
class RecordRuntimeRefusal(Unit[bool]):
    """Keep a refusal of a runtime quote, at most ``per_day`` of a server; returns whether it was kept.

    One whose ``nonce`` was redeemed is not: it may be a stranger's who sends again what the owner sent.
    ``detail`` is what the caller was told, ``reason`` the operator's; ``pin`` is None where the quote did not verify.
    """

    now: int
    request_id: str
    server: ServerRow
    nonce: bytes
    pin: Pin | None
    code: str
    detail: str
    reason: str
    quote_digest: bytes
    peer_address: str
    per_day: int = REFUSALS_PER_DAY

    def script(self) -> Script[bool]:
        """Count, record."""
        server = yield from _same(self.server)
        if (yield from IsRedeemed(self.nonce)):
            return False
        if (yield from CountServerRefusals(server.registration, self.now - self.now % DAY)) >= self.per_day:
            return False
        yield from Put(evolve(server, attested=self.request_id))
        quote, told = Quote(self.pin, self.quote_digest), legible(self.detail, 2000)
        yield from _record(self, server, quote, self.code, told, f": {self.code}: {legible(self.reason, 2000)}")
        return True


def read_own(hotkey: str, server_id: str) -> Script[ServerRow]:
    """A server of ``hotkey``'s. Raises `Refused`."""
    server = yield from Read(ServerRow, server_id)
    if server is None or server.hotkey != hotkey:
        raise not_found(server_id)
    return server


def not_found(name_or_id: str) -> Refused:
    """The one answer for a server that is not there and for another's."""
    return Refused(Code.SERVER_NOT_FOUND, f"Server {name_or_id} not found")


def _taken(code: Code, text: str, holder: ServerRow | None, more: str = "") -> Refused:
    """A refusal whose reason names ``holder``, and what to do, to the operator."""
    name, hotkey = ("?", "?") if holder is None else (holder.server_id, holder.hotkey)
    frees = f"its owner frees it, or `chutes-proto registrations remove {name}`"
    return Refused(code, text, reason=f"{text}: held by server {name} of {hotkey}; {frees}{more}")


def _same(before: ServerRow) -> Script[ServerRow]:
    """The row as it is now, of the same registration."""
    server = yield from read_own(before.hotkey, before.server_id)
    if server.registration != before.registration:
        raise not_found(before.server_id)
    return server


def _audit(
    unit: RegisterServer | RenameServer | RemoveServer,
    server: ServerRow,
    event: str,
    reason: str,
    boot_id: str | None = None,
    quote: Quote = NO_QUOTE,
) -> Insert:
    records = Records(unit.now, unit.request_id, server.vm, quote, unit.peer_address, boot_id, "miner")
    return records.audit(event, "granted", f"server {server.server_id} {reason}")


def _record(
    unit: GrantRuntime | RecordRuntimeRefusal,
    server: ServerRow,
    quote: Quote,
    code: str | None = None,
    told: str = "",
    why: str = "",
) -> Script[None]:
    records = Records(unit.now, unit.request_id, server.vm, quote, unit.peer_address, server.boot_id, "miner")
    yield from records.verdict("runtime", told, code, server.registration)
    decision: Decision = "granted" if code is None else "refused"
    yield from records.audit("attest server", decision, f"server {server.server_id}{why}")


def _check_name(hotkey: str, server_id: str, name: str) -> Script[None]:
    for other in (yield from ReadServers(hotkey)):
        if other.server_id == server_id:
            continue
        if name in (other.name, other.server_id) or server_id == other.name:
            raise Refused(Code.NAME_TAKEN, f"name '{name}' already in use by another server for this miner")
