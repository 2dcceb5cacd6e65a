"""Servers of miners: registered, renamed, removed, attested at runtime; each change one transaction with its audit row.

Rules kept here:

* an id, an address, and a name among one hotkey's servers belong to one server: the tables' own constraints. So does a
  GPU by the serial number that NVIDIA signed, where its evidence is required. A declared uuid belongs to nobody: it is
  recorded, and the audit says who declared it before;
* a name differs from the other ids of the same hotkey, and an id from the other names, so that either names one server;
* a server is removed by its owner, by the operator, or by a registration at its address with better evidence. The
  linked boot of a registration shows one thing, the address that it came from. It does not show ids, and of a time
  long ago not even that, because addresses change hands. A claim to anything else removes nothing;
* removing a server keeps the keys of its VM;
* a hotkey has so many servers at most: no evidence is needed for one, and a list of them is one transaction;
* anyone else than the owner is told that the server does not exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from attrs import evolve, frozen

from chutes_proto.errors import BadRequest, Refused, StoreBusy
from chutes_proto.keys import generations
from chutes_proto.keys.vault import Vault
from chutes_proto.quote._measurements import Profile
from chutes_proto.secret import Secret
from chutes_proto.store import _rows as store
from chutes_proto.store._run import Script, Unit
from chutes_proto.units.boot import DAY, REFUSALS_PER_DAY
from chutes_proto.units.keys import VmKeys, by_volume
from chutes_proto.units.nonces import Nonce, redeem_nonce
from chutes_proto.units.records import NO_QUOTE, AcceptedQuote, Quote, Records, SignedGpus, legible
from chutes_proto.units.revocations import (
    NO_REVOCATIONS,
    Revocations,
    check_allowed,
    current,
    pins_of,
    pins_of_boot,
)
from chutes_proto.wire.codes import Code

EVIDENCE_SECONDS = 86_400
"""How long a boot shows whose the address is that it came from."""

SERVERS_OF_HOTKEY = 1000
"""Servers that are kept of one hotkey."""

_TAKEN = "Conflict with an existing server. Please contact support to resolve."


@frozen
class HostQuote(AcceptedQuote):
    """An accepted runtime quote that a server's host gave when it was asked, and the result about its GPUs.

    ``is_owned``: the host also proved that its owner's hotkey is the one that registers it. ``platform`` has all names
    of the quote's.
    """

    gpus: SignedGpus
    is_owned: bool = False
    platform: store.Platform | None = None


@frozen
class RegisterServer(Unit[store.ServerRow]):
    """Register a server with its GPUs, linked to its newest boot by name, else by address.

    A boot counts while its VM's name is bound to the platform it came from and its profile is one of ``profiles``, by
    name and version. ``gpus`` have ``server_id``. The quote ``shown`` by the host must come from the linked boot's
    platform. Where the host proved its owner, it is evidence like the owner's own runtime attestation: it binds the
    platform, and a server without evidence yields its address. Otherwise it names no hotkey, and does neither.

    Raises `Refused` (``boot_required``, ``platform_mismatch``, ``gpu_taken``, ``host_taken``, ``server_taken``,
    ``name_taken``, ``servers_full``, ``revoked``) and `BadRequest` (``gpu_invalid``) for GPUs that a profile does not
    expect.
    """

    now: int
    request_id: str
    hotkey: str
    server_id: str
    name: str
    host: str
    address: str
    gpus: tuple[store.GpuRow, ...]
    profiles: Mapping[tuple[str, str], Profile]
    peer_address: str
    evidence: Literal["link", "boot", "callback"] = "link"
    shown: HostQuote | None = None
    revocations: Revocations = NO_REVOCATIONS

    def script(self) -> Script[store.ServerRow]:
        """Link, the host's quote, conflicts, rows."""
        link = yield from self._link()
        pins = () if link is None else (yield from pins_of_boot(link))
        if self.shown is not None:
            pins += (self.shown.pin, *(() if self.shown.platform is None else pins_of(self.shown.platform)))
        vms = (store.Vm(self.hotkey, self.name), *(() if link is None else (link.vm,)))
        yield from check_allowed(self.revocations, (yield from store.ReadTimes()), self.now, vms, pins)
        if link is None and self.evidence == "boot":
            raise Refused(Code.BOOT_REQUIRED, "Server registration failed - no verified boot belongs to this server.")
        if link is not None:
            self._check_gpus(self.profiles[link.profile])
        if self.shown is not None:
            self._check_shown(self.shown, link)
        yield from self._check_free(link)
        declared = yield from self._declared_before()
        server = store.ServerRow(
            server_id=self.server_id,
            registration=self.request_id,
            hotkey=self.hotkey,
            name=self.name,
            host=self.host,
            address=self.address,
            boot_id=None if link is None else link.boot_id,
            pin=self.shown.pin if self._is_owned and link is None and self.shown is not None else None,
            created_at=self.now,
            attested=self.request_id if self._is_owned else None,
        )
        rows: tuple[store.ServerRow | store.GpuRow, ...] = (server, *self.gpus)
        for row in rows:
            if not (yield from store.Claim(row)):  # another transaction came in between
                raise StoreBusy(f"a {row.TABLE} row was claimed meanwhile")
        reason = "no link" if link is None else f"linked to boot {link.boot_id} of {link.vm.name}"
        reason = f"at {server.address}: {reason}; {len(self.gpus)} GPUs{declared}"
        if self.shown is not None:
            gpus = yield from keep_gpus(self.shown.gpus, server, self.now)
            records = Records(self.now, self.request_id, server.vm, self.shown, self.address)
            yield from records.verdict("runtime", "", registration=server.registration)
            proven = ", and proved its owner" if self._is_owned else ""
            reason += f"; its host gave a quote of {self.shown.pin}{proven}; {gpus}"
        yield from _audit(self, server, "register server", reason, server.boot_id, self.shown or NO_QUOTE)
        return server

    @property
    def _is_owned(self) -> bool:
        return self.shown is not None and self.shown.is_owned

    def _link(self) -> Script[store.BootRow | None]:
        for question in (
            store.FindLastBoot(store.Vm(self.hotkey, self.name)),
            store.FindLastBootFrom(self.hotkey, self.address),
        ):
            boot = yield from question
            if boot is None or boot.profile not in self.profiles:
                continue
            claim = yield from store.Read(store.VmRow, boot.vm)
            if claim is not None and claim.pin == boot.pin:
                return boot
        return None

    def _check_gpus(self, profile: Profile) -> None:
        got = {gpu.identifier for gpu in self.gpus}
        expected = set(profile.expected_gpus)
        about = f"for measurement config '{profile.name}'"
        if expected and not got <= expected:
            difference = f"Expected GPUs {sorted(expected)}, but got {sorted(got)}"
            raise BadRequest(Code.GPU_INVALID, f"Server registration failed - GPU mismatch {about}: {difference}")
        if profile.gpu_count is not None and len(self.gpus) != profile.gpu_count:
            difference = f"Expected {profile.gpu_count} GPUs, but got {len(self.gpus)}"
            raise BadRequest(Code.GPU_INVALID, f"Server registration failed - GPU count mismatch {about}: {difference}")

    def _check_shown(self, shown: HostQuote, link: store.BootRow | None) -> None:
        self._check_gpus(self.profiles[shown.profile])
        if link is not None and link.pin != shown.pin:
            raise Refused(
                Code.PLATFORM_MISMATCH,
                "Server registration failed - the host's quote comes from another platform than the server's boot.",
                reason=f"boot {link.boot_id} came from {link.pin}, and the host's quote from {shown.pin}",
            )

    def _check_free(self, link: store.BootRow | None) -> Script[None]:
        """Raise `Refused` for a claim of another server, once one that yields the address is removed with its GPUs."""
        neighbour = yield from store.Read(store.ServerRow, self.address, "address")
        better = None if neighbour is None else (yield from self._better_evidence(link, neighbour))
        if neighbour is not None and (better is not None or self._has_owned(neighbour)):
            yield from store.DeleteServer(neighbour.server_id)
            reason = (
                f"at {neighbour.address}: had no evidence;"
                f" server {self.server_id} of {self.hotkey} at {self.address} has"
                f" {'a boot from there' if better else 'the proof of the host there'}"
            )
            yield from _audit(self, neighbour, "server yields", reason, better.boot_id if better else None)
            neighbour = None
        if neighbour is not None:
            text = _TAKEN
            if neighbour.hotkey == self.hotkey:
                text = (
                    f"IP {self.host} is already registered to your server {neighbour.server_id} ({neighbour.name})."
                    " IPs must be unique across all servers."
                )
            yields = self._may_yield(neighbour)
            more = "; if the address is the claimant's now: boot the VM again" if yields else ""
            raise _taken(Code.HOST_TAKEN, text, neighbour, more)
        holder = yield from store.Read(store.ServerRow, self.server_id)
        if holder is not None:
            text = "The server id is registered to you already." if holder.hotkey == self.hotkey else _TAKEN
            raise _taken(Code.SERVER_TAKEN, text, holder)
        servers = yield from store.ReadAll(store.ServerRow, self.hotkey)
        _check_name(servers, self.server_id, self.name)
        if len(servers) >= SERVERS_OF_HOTKEY:
            text = f"This miner has {len(servers)} servers, and may have no more. Please remove one."
            raise Refused(Code.SERVERS_FULL, text)

    def _declared_before(self) -> Script[str]:
        """The first of the GPUs that another server has declared too, for the audit; nobody has signed a uuid."""
        for gpu in self.gpus:
            holder = yield from store.FindDeclaration(gpu.uuid)
            if holder is not None:
                return f", of which server {holder} declared {gpu.uuid} before"
        return ""

    def _has_owned(self, neighbour: store.ServerRow) -> bool:
        """Whether the host itself says that it is not ``neighbour``'s, a server without evidence."""
        return self._is_owned and self._may_yield(neighbour)

    def _may_yield(self, neighbour: store.ServerRow) -> bool:
        """Whether it is another miner's server without evidence, which gives way to better evidence."""
        return neighbour.hotkey != self.hotkey and neighbour.boot_id is None and neighbour.pin is None

    def _better_evidence(self, link: store.BootRow | None, neighbour: store.ServerRow) -> Script[store.BootRow | None]:
        """The linked boot, if it shows that the address is no longer ``neighbour``'s, a server without evidence."""
        if link is None or link.peer_address != self.address or self.now - link.created_at > EVIDENCE_SECONDS:
            return None
        if not self._may_yield(neighbour):
            return None
        # The holder may have booted there after it registered; an address changes hands, so the newest boot counts.
        latest = yield from store.FindLastBootFrom(neighbour.hotkey, self.address)
        return link if latest is None or latest.created_at < link.created_at else None


@frozen
class RenameServer(Unit[store.ServerRow]):
    """Give a server of ``hotkey``'s another name. Raises `Refused` (``server_not_found``, ``name_taken``)."""

    now: int
    request_id: str
    hotkey: str
    server_id: str
    name: str
    peer_address: str

    def script(self) -> Script[store.ServerRow]:
        server = yield from read_own(self.hotkey, self.server_id)
        if server.name == self.name:
            return server
        _check_name((yield from store.ReadAll(store.ServerRow, self.hotkey)), self.server_id, self.name)
        renamed = evolve(server, name=self.name, updated_at=self.now)
        yield from store.Put(renamed)
        yield from _audit(self, server, "rename server", f"renamed to {self.name}")
        return renamed


@frozen
class RemoveServer(Unit[store.ServerRow]):
    """Remove the server of ``hotkey``'s that has this name or id. Raises `Refused` (``server_not_found``)."""

    now: int
    request_id: str
    hotkey: str
    name_or_id: str
    peer_address: str

    def script(self) -> Script[store.ServerRow]:
        servers = yield from store.ReadAll(store.ServerRow, self.hotkey)
        server = next((row for row in servers if self.name_or_id in (row.server_id, row.name)), None)
        if server is None:
            raise not_found(self.name_or_id)
        yield from store.DeleteServer(server.server_id)
        yield from _audit(self, server, "remove server", f"at {server.address}; keys are kept", server.boot_id)
        return server


@frozen
class ReadOwnServer(Unit[tuple[store.ServerRow, store.AttestationRow | None]]):
    """A server of ``hotkey``'s with its newest runtime verdict. Raises `Refused` (``server_not_found``)."""

    hotkey: str
    server_id: str

    def script(self) -> Script[tuple[store.ServerRow, store.AttestationRow | None]]:
        server = yield from read_own(self.hotkey, self.server_id)
        return server, None if server.attested is None else (
            yield from store.Read(store.AttestationRow, server.attested)
        )


@frozen
class ReadDeclared(Unit[tuple[store.ServerRow, tuple[store.GpuRow, ...]]]):
    """A server of ``hotkey``'s with the GPUs that it declared. Raises `Refused` (``server_not_found``)."""

    hotkey: str
    server_id: str

    def script(self) -> Script[tuple[store.ServerRow, tuple[store.GpuRow, ...]]]:
        server = yield from read_own(self.hotkey, self.server_id)
        return server, (yield from store.ReadGpus((server.server_id,)))


@frozen
class ReadStatus(Unit[tuple[store.ServerRow, store.AttestationRow | None, store.RevocationRow | None]]):
    """A server as `ReadOwnServer` reads it, and a revocation of its names, its linked VM or its platform.

    Of the platform of a server without a linked boot the one name counts that it is bound to.
    """

    now: int
    hotkey: str
    server_id: str
    revocations: Revocations = NO_REVOCATIONS

    def script(self) -> Script[tuple[store.ServerRow, store.AttestationRow | None, store.RevocationRow | None]]:
        server, last = yield from ReadOwnServer(self.hotkey, self.server_id).script()
        known = yield from current(self.revocations, (yield from store.ReadTimes()))
        boot = None if server.boot_id is None else (yield from store.Read(store.BootRow, server.boot_id))
        vms = [server.vm]
        pins = [pin for pin in (server.pin, None if last is None else last.pin) if pin is not None]
        if boot is not None:
            vms.append(boot.vm)
            pins += yield from pins_of_boot(boot)
        return server, last, known.find(self.now, vms, pins)


@frozen
class VmCaller:
    """The hotkey that a provisioned VM trusts, by its seed in base64, and its root CA as PEM if it has provisioned."""

    seed: Secret
    root_ca: str | None


@frozen
class ReadCaller(Unit[VmCaller | None]):
    """The caller that the VM of a server trusts, None for one whose boot was not provisioned.

    The boot is the one that a registration is linked to: by name, else by address. Raises `Refused`
    (``platform_mismatch``) where the key of a provisioned boot is retired, since the VM trusts no other; and
    `KeyUnavailable`, `SealBroken`.
    """

    now: int
    hotkey: str
    name: str
    address: str
    vault: Vault

    def script(self) -> Script[VmCaller | None]:
        boot = yield from store.FindLastBoot(store.Vm(self.hotkey, self.name))
        if boot is None:
            boot = yield from store.FindLastBootFrom(self.hotkey, self.address)
        if boot is None or not boot.is_provisioned:
            return None
        rows = by_volume((yield from store.ReadLiveGenerations(boot.vm)))[generations.CALLER_VOLUME]
        row = generations.active(rows)
        if row is None:
            text = "Server registration failed - the VM has not booted since its name was bound to this platform."
            raise Refused(
                Code.PLATFORM_MISMATCH, text, reason=f"the key that {boot.vm} trusts is retired: boot it again"
            )
        return VmCaller(VmKeys(boot.vm, self.vault, self.now, boot.boot_id).open(row), boot.root_ca)


@frozen
class ReadServerAndBoot(Unit[tuple[store.ServerRow, store.BootRow | None]]):
    """A server of ``hotkey``'s with the newest boot of the VM of its name. Raises `Refused` (``server_not_found``)."""

    hotkey: str
    server_id: str

    def script(self) -> Script[tuple[store.ServerRow, store.BootRow | None]]:
        server = yield from read_own(self.hotkey, self.server_id)
        return server, (yield from store.FindLastBoot(server.vm))


@frozen
class GrantRuntime(Unit[None]):
    """Record an accepted runtime quote, and redeem its nonce.

    The quote must come from the platform that the linked VM's name is bound to; without a link, from the one that the
    first accepted quote came from; ``platform`` has all its names. Raises `Refused` (``server_not_found``,
    ``platform_mismatch``, ``nonce_invalid``, ``gpu_taken``, ``revoked``).
    """

    now: int
    request_id: str
    server: store.ServerRow
    nonce: Nonce
    quote: AcceptedQuote
    peer_address: str
    gpus: SignedGpus | None = None
    platform: store.Platform | None = None
    revocations: Revocations = NO_REVOCATIONS

    def script(self) -> Script[None]:
        """Platform, nonce, GPUs, records."""
        server = yield from _same(self.server)
        boot = None if server.boot_id is None else (yield from store.Read(store.BootRow, server.boot_id))
        bound, pin = (yield from self._bound_to(server, boot)), self.quote.pin
        if bound not in (None, pin):
            reason = f"server {server.server_id} is bound to {bound}, and this quote comes from {pin}"
            raise Refused(Code.PLATFORM_MISMATCH, "This server is bound to another platform.", reason=reason)
        times = yield from redeem_nonce(self.nonce, self.now)
        vms = (server.vm, *(() if boot is None else (boot.vm,)))
        pins = (pin, *(() if self.platform is None else pins_of(self.platform)))
        yield from check_allowed(self.revocations, times, self.now, vms, pins)
        yield from store.Put(evolve(server, pin=pin if bound is None else server.pin, attested=self.request_id))
        gpus = "" if self.gpus is None else f"; {(yield from keep_gpus(self.gpus, server, self.now))}"
        yield from _record(self, server, why=gpus)

    def _bound_to(self, server: store.ServerRow, boot: store.BootRow | None) -> Script[store.Pin | None]:
        claim = None if boot is None else (yield from store.Read(store.VmRow, boot.vm))
        return server.pin if claim is None else claim.pin


@frozen
class RecordRuntimeRefusal(Unit[bool]):
    """Record the refusal of a runtime quote, at most ``per_day`` of a server; returns whether it was recorded.

    A refusal whose ``nonce`` was redeemed is not: an attacker may have sent the owner's request again. ``detail`` is
    the text for the caller, ``reason`` the operator's.
    """

    now: int
    request_id: str
    server: store.ServerRow
    nonce: bytes
    quote: Quote
    code: str
    detail: str
    reason: str
    peer_address: str
    finding: str | None = None
    per_day: int = REFUSALS_PER_DAY

    def script(self) -> Script[bool]:
        """Count, record."""
        server = yield from _same(self.server)
        if (yield from store.Read(store.NonceRow, self.nonce)):
            return False
        if (yield from store.CountRefusals(server.registration, self.now - self.now % DAY)) >= self.per_day:
            return False
        yield from store.Put(evolve(server, attested=self.request_id))
        detail, reason = legible(self.detail, 2000), legible(self.reason, 2000)
        yield from _record(self, server, self.code, detail, f": {self.code}: {reason}")
        return True


def keep_gpus(gpus: SignedGpus, server: store.ServerRow, now: int) -> Script[str]:
    """Keep whose the signed devices are; returns the text for the audit. Raises `Refused` (``gpu_taken``)."""
    text = gpus.text
    for gpu in gpus.devices:
        row = store.GpuDeviceRow(gpu.device_id, server.server_id, gpu.serial_number, now)
        held = yield from store.Read(store.GpuDeviceRow, gpu.device_id)
        if held is None:
            if not (yield from store.Claim(row)):  # another transaction came in between
                raise StoreBusy("a gpu_device row was claimed meanwhile")
        elif held.server_id == server.server_id:
            yield from store.Put(row)
        elif gpus.is_required:
            holder = yield from store.Read(store.ServerRow, held.server_id)
            whose = "another server"
            if holder is not None and holder.hotkey == server.hotkey:
                whose = f"your server {holder.server_id} ({holder.name}) until you remove that"
            raise _taken(Code.GPU_TAKEN, f"A GPU belongs to {whose}: {gpu.serial_number}", holder)
        else:
            text += f"; GPU {gpu.serial_number} was shown by server {held.server_id} before"
    return text


def read_own(hotkey: str, server_id: str) -> Script[store.ServerRow]:
    """A server of ``hotkey``'s. Raises `Refused`."""
    server = yield from store.Read(store.ServerRow, server_id)
    if server is None or server.hotkey != hotkey:
        raise not_found(server_id)
    return server


def not_found(name_or_id: str) -> Refused:
    """The same answer for a server that does not exist and for another hotkey's."""
    return Refused(Code.SERVER_NOT_FOUND, f"Server {name_or_id} not found")


def _taken(code: Code, text: str, holder: store.ServerRow | None, more: str = "") -> Refused:
    """A refusal whose reason tells the operator who the ``holder`` is and what to do."""
    name, hotkey = ("?", "?") if holder is None else (holder.server_id, holder.hotkey)
    frees = f"its owner frees it, or `chutes-proto registrations remove {name}`"
    return Refused(code, text, reason=f"{text.rstrip('.')}: held by server {name} of {hotkey}; {frees}{more}")


def _same(before: store.ServerRow) -> Script[store.ServerRow]:
    """The row as it is now, of the same registration."""
    server = yield from read_own(before.hotkey, before.server_id)
    if server.registration != before.registration:
        raise not_found(before.server_id)
    return server


def _audit(
    unit: RegisterServer | RenameServer | RemoveServer,
    server: store.ServerRow,
    event: str,
    reason: str,
    boot_id: str | None = None,
    quote: Quote = NO_QUOTE,
) -> store.Insert:
    records = Records(unit.now, unit.request_id, server.vm, quote, unit.peer_address, boot_id, "miner")
    return records.audit(event, "granted", f"server {server.server_id} {reason}")


def _record(
    unit: GrantRuntime | RecordRuntimeRefusal,
    server: store.ServerRow,
    code: str | None = None,
    detail: str = "",
    why: str = "",
) -> Script[None]:
    records = Records(unit.now, unit.request_id, server.vm, unit.quote, unit.peer_address, server.boot_id, "miner")
    finding = unit.finding if isinstance(unit, RecordRuntimeRefusal) else None
    yield from records.verdict("runtime", detail, code, server.registration, finding)
    decision: store.Decision = "granted" if code is None else "refused"
    yield from records.audit("attest server", decision, f"server {server.server_id}{why}")


def _check_name(servers: tuple[store.ServerRow, ...], server_id: str, name: str) -> None:
    for other in servers:
        if other.server_id == server_id:
            continue
        if name in (other.name, other.server_id) or server_id == other.name:
            raise Refused(Code.NAME_TAKEN, f"name '{name}' already in use by another server for this miner")
