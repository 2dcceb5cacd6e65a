"""The rows of a store, as values that nobody changes, and the closed list of operations on them.

A unit's script asks for one operation at a time (``row = yield from ReadVm(vm)``) and never sees a connection.

Rules kept here:

* a row class is its table: ``TABLE`` is the name, ``KEY`` the primary key, which comes first, and the fields are the
  columns in their order; a `Vm` is the two columns ``hotkey, vm``, a `Pin` the two ``platform_kind, platform_id``;
* no row has a secret in the clear: passphrases are sealed, tokens and nonces of a boot are digests (SHA-256);
* no operation changes a sealed passphrase or an audit row, and only an operator's `PurgeGeneration` and `PurgeAudit`
  delete them;
* a table may have millions of rows: an operation that reads a table for an operator reads a page, and the next page
  begins after the last row of the one before, in an order of the store's own;
* this is the only file of the pure part, next to ``effects.py``, with a bare ``yield``.

Times are integer unix seconds.
"""

from collections.abc import Generator
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeAlias, TypeVar, cast, get_args

from attrs import field

from chutes_proto.errors import RowNotAuthentic

if TYPE_CHECKING:
    from attrs import frozen
else:
    # The type checkers see to it that nobody changes one, so its hash stays: to make an instance of a class that attrs
    # freezes takes five times as long, and a boot makes some eighty.
    from attrs import define

    frozen = partial(define, unsafe_hash=True)


T_co = TypeVar("T_co", covariant=True)


class StoreOp(Generic[T_co]):
    """One operation on rows; ``yield from`` it for the reply, which has the type ``T_co``.

    One that ``MAY_TAKE_LONG`` is for operators alone, on tables that may have many rows: a store sets it no time limit.
    """

    __slots__ = ()
    MAY_TAKE_LONG: ClassVar[bool] = False

    def __iter__(self) -> Generator["StoreOp[Any]", Any, T_co]:
        reply: T_co = yield self
        return reply


# --- values that several rows hold ---


@frozen(order=True)
class Vm:
    """A VM: its owner's hotkey, as SS58 address, and its name."""

    hotkey: str
    name: str


@frozen(order=True)
class Pin:
    """The platform that a VM's name is bound to, by its best identifier (16 bytes)."""

    kind: Literal["instance", "ppid"]
    value: bytes

    def __str__(self) -> str:
        value = cast(object, self.value)  # anything in an audit row that somebody edited: it is told, not refused
        return f"{self.kind}:{value.hex() if isinstance(value, bytes) else value}"


@frozen
class Platform:
    """The identifiers in a PCK certificate: the platform instance id, if it has one, and the PPID (16 bytes each)."""

    instance_id: bytes | None
    ppid: bytes

    @property
    def pin(self) -> Pin:
        """The instance id, which names a multi-package platform as a whole, or else the PPID."""
        return Pin("ppid", self.ppid) if self.instance_id is None else Pin("instance", self.instance_id)


Exchange: TypeAlias = Literal["base", "two-phase"]
"""The exchange in which a VM gets its volumes' keys: for a boot token, or by attesting again and confirming.

A provisioned boot is a two-phase one in the rows.
"""

State: TypeAlias = Literal["active", "candidate", "retired", "purged"]
"""The state of a key generation; see ``docs/explanation/key-lifecycle.md``."""

Retirement: TypeAlias = Literal["rekey", "prune", "relisted", "takeover", "dropped", "superseded"]
"""The reason why a generation is retired; see ``docs/explanation/key-lifecycle.md``."""


Decision: TypeAlias = Literal["granted", "refused", "replayed", "done"]
"""The outcome that an audit row records; ``done`` is for an operator's commands."""


# --- rows ---


@frozen
class NonceRow:
    """A nonce that was redeemed, kept for a day so that it is not redeemed again."""

    TABLE: ClassVar[str] = "nonce"
    KEY: ClassVar[tuple[str, ...]] = ("value",)

    value: bytes
    purpose: str
    issued_at: int
    redeemed_at: int


@frozen
class VmRow:
    """A claim: this name of this hotkey belongs to this platform.

    It is ``proven`` once a granted boot carried the hotkey's signature, and stays so where an operator moves it to
    another platform with its keys. ``exchange`` is ``two-phase`` once a boot was served so. ``attested`` is the boot
    that attested its volumes last, whose confirmation counts, and ``booted`` the last one that was handed a next root
    key, likewise. ``nonce_at`` is when the newest nonce of a provisioned boot was issued.
    """

    TABLE: ClassVar[str] = "vm"
    KEY: ClassVar[tuple[str, ...]] = ("hotkey", "vm")

    vm: Vm
    pin: Pin
    instance_id: bytes | None
    ppid: bytes
    proven: bool
    exchange: Exchange
    created_at: int
    last_boot_at: int
    attested: str | None = None
    booted: str | None = None
    nonce_at: int | None = None

    @classmethod
    def of(cls, vm: Vm, platform: Platform, at: int) -> "VmRow":
        """A new claim of ``platform`` on a name, not proven and without a boot."""
        return cls(vm, platform.pin, platform.instance_id, platform.ppid, False, "base", at, 0)


@frozen
class BootRow:
    """A granted boot and the one token that was issued to it: a boot token, or with ``two-phase`` a quote nonce.

    ``certificate`` is the SHA-256 of the attested key's SubjectPublicKeyInfo. A token is valid while ``spent_at`` and
    ``voided_at`` are None and the time is before ``token_expires_at``; ``body_digest`` is the SHA-256 of the request
    body that consumed it. A two-phase boot that attested its volumes has a confirm nonce too, valid until
    ``confirm_expires_at``; ``confirm_body_digest`` is of the request that confirmed. A boot that was handed a next root
    key, a *provisioned* one, has a confirm nonce for that (``root_confirm_…``), valid for 300 seconds from
    ``created_at``; ``root_ca`` is the certificate, as PEM, that its VM provisioned with. ``given`` is the number of
    its `BootVolumeRow`.
    """

    TABLE: ClassVar[str] = "boot"
    KEY: ClassVar[tuple[str, ...]] = ("boot_id",)

    boot_id: str
    vm: Vm
    pin: Pin
    certificate: bytes
    profile_name: str
    profile_version: str
    exchange: Exchange
    quote_digest: bytes
    token_digest: bytes
    token_expires_at: int
    token_needs_certificate: bool
    peer_address: str
    created_at: int
    spent_at: int | None = None
    body_digest: bytes | None = None
    voided_at: int | None = None
    confirm_digest: bytes | None = None
    confirm_expires_at: int | None = None
    confirm_body_digest: bytes | None = None
    root_confirm_digest: bytes | None = None
    root_confirm_body_digest: bytes | None = None
    root_ca: str | None = None
    given: int = 0

    @property
    def is_provisioned(self) -> bool:
        """Whether the boot was handed a next root key."""
        return self.root_confirm_digest is not None

    @property
    def profile(self) -> tuple[str, str]:
        """Name and version of the profile."""
        return self.profile_name, self.profile_version


@frozen
class BootVolumeRow:
    """The generations that a boot was given for one volume, so that the same answer can be given again.

    ``position`` is the volume's index in the answer; ``in_use`` whether the answer listed it as in use.
    """

    TABLE: ClassVar[str] = "boot_volume"
    KEY: ClassVar[tuple[str, ...]] = ("boot_id", "volume")

    boot_id: str
    volume: str
    position: int
    current_generation: int | None
    next_generation: int | None
    in_use: bool


@frozen
class GenerationRow:
    """One generation of one volume's key; see ``docs/explanation/key-lifecycle.md`` for its states.

    ``sealed`` is never overwritten, because a disk may have that key: only a purge removes it. ``kek_id`` and
    ``wrapped_key`` change when the row is rewrapped. ``origin`` is the boot id of the request that made it, or the
    operator's command.
    """

    TABLE: ClassVar[str] = "generation"
    KEY: ClassVar[tuple[str, ...]] = ("hotkey", "vm", "volume", "generation")

    vm: Vm
    volume: str
    generation: int
    state: State
    sealed: bytes | None
    kek_id: str | None
    wrapped_key: bytes | None
    provisional: bool
    created_at: int
    origin: str
    delivered_at: int | None = None
    retired_at: int | None = None
    retirement: Retirement | None = None


@frozen
class VolumeRow:
    """The state of a volume's disk: whether it is in use, and whether one format of it is permitted even so.

    ``handed`` is the generation that the last attestation handed out as the current one, until a boot confirms.
    """

    TABLE: ClassVar[str] = "volume"
    KEY: ClassVar[tuple[str, ...]] = ("hotkey", "vm", "volume")

    vm: Vm
    volume: str
    in_use: bool
    format_allowed: bool
    handed: int | None = None


@frozen
class AttestationRow:
    """A verdict on a quote: granted (``code`` is None), or refused and why.

    A refusal at a boot is here only if DCAP verification held, so that a boot's row always has a platform. A runtime
    quote's row names the server's ``registration``, and its ``vm`` is the server's owner and name. ``tcb_status`` is
    the status of the platform's TCB, if the quote was accepted, in Intel's words, and ``advisories`` are the ids of
    Intel's that apply to it, with a space between; ``finding`` is the verifier's refusal
    as JSON (``server/_why.py``).
    """

    TABLE: ClassVar[str] = "attestation"
    KEY: ClassVar[tuple[str, ...]] = ("attestation_id",)

    attestation_id: str
    stage: Literal["boot", "runtime"]
    vm: Vm
    pin: Pin | None
    code: str | None
    reason: str
    profile_name: str | None
    profile_version: str | None
    quote_digest: bytes
    peer_address: str
    created_at: int
    registration: str | None = None
    tcb_status: str | None = None
    finding: str | None = None
    advisories: str | None = None


@frozen
class ServerRow:
    """A registered server. ``registration`` is unique for all time, also after a new registration of the same id.

    ``address`` is the address that ``host`` resolved to. ``boot_id`` is the boot that it was linked to at registration;
    ``pin``, without a link, the platform of its first accepted runtime quote. ``attested`` is the newest verdict on a
    runtime quote of it. ``window_id`` names the maintenance that was begun last, which ends with a boot of ``target``.
    """

    TABLE: ClassVar[str] = "server"
    KEY: ClassVar[tuple[str, ...]] = ("server_id",)

    server_id: str
    registration: str
    hotkey: str
    name: str
    host: str
    address: str
    boot_id: str | None
    pin: Pin | None
    created_at: int
    updated_at: int | None = None
    attested: str | None = None
    window_id: str | None = None
    target: str | None = None

    @property
    def vm(self) -> Vm:
        """The owner's VM of the same name."""
        return Vm(self.hotkey, self.name)


@frozen
class GpuRow:
    """A GPU that a server's owner declared, as JSON in ``declared``.

    Nobody has signed a uuid, so that several servers may declare the same. `GpuDeviceRow` says whose a GPU is.
    """

    TABLE: ClassVar[str] = "gpu"
    KEY: ClassVar[tuple[str, ...]] = ("uuid", "server_id")

    uuid: str
    server_id: str
    identifier: str
    declared: str


@frozen
class GpuDeviceRow:
    """A GPU whose evidence a server showed, identified by what NVIDIA signed.

    ``device_id`` is the serial number of the certificate of the key in the chip, ``serial_number`` that of the device
    certificate, which changes with the firmware. No declared UUID is in either.
    """

    TABLE: ClassVar[str] = "gpu_device"
    KEY: ClassVar[tuple[str, ...]] = ("device_id",)

    device_id: str
    server_id: str
    serial_number: str
    verified_at: int


@frozen
class HostProfileRow:
    """The hardware of a class of hosts, as a host tool described it: JSON with sorted members, and its SHA-256 in hex.

    ``name`` and ``published`` are the operator's: the measurement profiles of this name, and with this fingerprint if
    one is published, are accepted on such hosts.
    """

    TABLE: ClassVar[str] = "host_profile"
    KEY: ClassVar[tuple[str, ...]] = ("fingerprint",)

    fingerprint: str
    hotkey: str
    profile: str
    created_at: int
    name: str | None = None
    published: str | None = None


@frozen
class AuditRow:
    """A decision, for whom and why, written in the transaction of the change that it records; never changed.

    ``keys`` names the generations that it concerns, one ``volume/generation change`` each, with a comma and a space
    between. ``evidence`` is a JSON object with digests of what the decision rested on. Audit rows have no key of their
    own; the store keeps them in the order in which they were written.

    Once it is sequenced, a row has its index ``idx`` in the log, and a random ``salt``, without which a deleted entry
    could be guessed from its hash. ``vm_version`` is the version of the VM's head (``store/_heads.py``) that the same
    transaction wrote; None where it wrote none. A negative index means that the row was not authentic when
    its turn came, or when it was read, or that a value was of another type, in whose place an empty one was read. It
    tells nothing more.
    """

    TABLE: ClassVar[str] = "audit"
    KEY: ClassVar[tuple[str, ...]] = ()

    at: int
    actor: Literal["vm", "miner", "operator"]
    event: str
    decision: Decision
    reason: str = ""
    vm: Vm | None = None
    boot_id: str | None = None
    request_id: str | None = None
    pin: Pin | None = None
    profile: str | None = None
    quote_digest: bytes | None = None
    keys: str = ""
    peer_address: str = ""
    evidence: str | None = None
    idx: int | None = None
    salt: bytes | None = None
    vm_version: int | None = None

    @property
    def is_forged(self) -> bool:
        """Whether it never becomes an entry of the log: no unit wrote it, or it was changed since."""
        return self.idx is not None and self.idx < 0


@frozen
class LogStateRow:
    """The state of the audit log: its origin, which names it for all time, the number of its entries, the root hash."""

    TABLE: ClassVar[str] = "log_state"
    KEY: ClassVar[tuple[str, ...]] = ("log",)

    log: str
    origin: str
    size: int
    root: bytes


@frozen
class LogTileRow:
    """A tile of the audit log's tree (c2sp.org/tlog-tiles): its hashes, one after the other, 256 if it is full."""

    TABLE: ClassVar[str] = "log_tile"
    KEY: ClassVar[tuple[str, ...]] = ("level", "tile")

    level: int
    tile: int
    hashes: bytes


@frozen
class KeyringRow:
    """A key of the store's own, wrapped by the KEK ``kek_id``; of one ``kind`` the highest ``epoch`` is in use."""

    TABLE: ClassVar[str] = "keyring"
    KEY: ClassVar[tuple[str, ...]] = ("kind", "epoch")

    kind: str
    epoch: int
    kek_id: str
    wrapped: bytes
    created_at: int


Revocable: TypeAlias = Literal["vm", "hotkey", "platform"]
"""The kinds of parties that an operator can revoke."""


@frozen
class RevocationRow:
    """An operator's revocation of a party, until ``ends_at`` or, if that is None, for good.

    ``subject`` is ``HOTKEY/NAME`` of a VM, a hotkey, or a platform as a `Pin` prints itself. The row stays when the
    party is allowed again, at ``allowed_at``: so a store that lacks the change can be told from one that never had it.
    """

    TABLE: ClassVar[str] = "revocation"
    KEY: ClassVar[tuple[str, ...]] = ("kind", "subject")

    kind: Revocable
    subject: str
    reason: str
    created_at: int
    ends_at: int | None
    allowed_at: int | None = None

    @property
    def changed_at(self) -> int:
        """The time of the last change: of two rows about one party, the later one holds."""
        return self.created_at if self.allowed_at is None else self.allowed_at


@frozen
class EvidenceRow:
    """A genuine quote, kept to be appraised again under another policy: of each VM the newest that was granted.

    Of quotes that were refused, each platform has a few places, which are used again: ``evidence_id`` names the VM, or
    platform and place. ``code`` is None for a grant. ``collateral`` is a JSON object with the numbers and dates of the
    collateral that it was appraised with, and in ``sha256`` the digest of each document. A row takes about 5 kB.
    """

    TABLE: ClassVar[str] = "evidence"
    KEY: ClassVar[tuple[str, ...]] = ("evidence_id",)

    evidence_id: str
    vm: Vm
    attestation_id: str
    code: str | None
    quote: bytes
    collateral: str
    received_at: int


@frozen
class ErasureRow:
    """The erasure of a VM: every key of it, up to the generations of ``through``, was destroyed.

    ``through`` is a JSON object: by volume, the number of the newest generation that there was.
    """

    TABLE: ClassVar[str] = "erasure"
    KEY: ClassVar[tuple[str, ...]] = ("erasure_id",)

    erasure_id: str
    vm: Vm
    erased_at: int
    through: str


Row: TypeAlias = (
    NonceRow
    | VmRow
    | BootRow
    | BootVolumeRow
    | GenerationRow
    | VolumeRow
    | AttestationRow
    | ServerRow
    | GpuRow
    | GpuDeviceRow
    | RevocationRow
    | ErasureRow
    | HostProfileRow
    | EvidenceRow
    | AuditRow
    | LogStateRow
    | LogTileRow
    | KeyringRow
)
"""A row of any kind."""

ROWS: tuple[type[Row], ...] = get_args(Row)
"""All kinds of rows, those that others refer to before these."""

R = TypeVar("R", bound=Row)

# --- operations ---


@frozen
class Insert(StoreOp[None]):
    """Add a row. One with the same key, or a second active generation or candidate of a volume, is a `StoreError`."""

    row: Row


@frozen
class Put(StoreOp[None]):
    """Add a row, or replace the one with the same key.

    Of a boot, what it is known by (hotkey, VM, token, address, time) stays as it was added.
    """

    row: (
        VmRow
        | BootRow
        | VolumeRow
        | ServerRow
        | GpuDeviceRow
        | RevocationRow
        | EvidenceRow
        | LogStateRow
        | LogTileRow
        | KeyringRow
        | HostProfileRow
    )


@frozen
class SweepNonces(StoreOp[tuple[NonceRow, ...]]):
    """Delete up to ``limit`` nonces issued and redeemed at or before ``until``, oldest first, and reply with them."""

    until: int
    limit: int


@frozen
class Times:
    """The horizon, and the start of the transaction by the store's own clock, both in unix seconds.

    Nonces issued at or before the horizon may have been forgotten, and count as redeemed; what was issued to boots
    granted until then is void. ``clock`` is None for a store without a clock of its own. ``version`` is that of the
    revocations and erasures: a number that is another one after each change of them.
    """

    horizon: int
    clock: int | None
    version: int = 0


@frozen
class ReadTimes(StoreOp[Times]):
    """The times that decide whether a nonce may be redeemed."""


@frozen
class SetVersion(StoreOp[None]):
    """Set the version of revocations and erasures; ``to`` is a random number, which no store ever had."""

    to: int


@frozen
class ReadRevoked(StoreOp[tuple[RevocationRow, ...]]):
    """All revocations but of parties that were allowed again, in the order of their keys.

    They are few: a boot reads them within the time of a unit.
    """


@frozen
class ReadRevocation(StoreOp[RevocationRow | None]):
    """The row about one party, also if it was allowed again."""

    kind: Revocable
    subject: str


@frozen
class ReadClaims(StoreOp[tuple[VmRow, ...]]):
    """The VMs that are bound to a platform, which is named by its PPID or its instance id."""

    pin: Pin


@frozen
class EraseGeneration(StoreOp[None]):
    """Delete the sealed passphrase of a generation in any state, for ever; the row stays, in state ``purged``."""

    row: GenerationRow


@frozen
class Forget(StoreOp[None]):
    """Delete the claim on a VM's name, or what is known of its disks."""

    kind: type[VmRow] | type[VolumeRow]
    vm: Vm


@frozen
class DecideLoss(StoreOp[None]):
    """Note that an operator decided at ``at`` to go on with a store that lacks rows; servers compare it with a mark."""

    at: int


@frozen
class ReadLossDecided(StoreOp[int]):
    """The time of the last `DecideLoss`, 0 without one."""


@frozen
class SetHorizon(StoreOp[None]):
    """Move the horizon to ``to``, forward or back."""

    to: int


@frozen
class ReadNames(StoreOp[tuple[Vm, ...]]):
    """The VMs of a name that are claimed or have keys, in order: of any hotkey, or of ``hotkey``."""

    MAY_TAKE_LONG: ClassVar[bool] = True

    name: str
    hotkey: str = ""


@frozen
class ReadUnclaimed(StoreOp[tuple[Vm, ...]]):
    """The next ``limit`` VMs that have keys and are not claimed."""

    MAY_TAKE_LONG: ClassVar[bool] = True

    after: Vm | None
    limit: int


@frozen
class ReadRetired(StoreOp[tuple[Vm, ...]]):
    """The next ``limit`` VMs that have a passphrase which was retired at or before ``until``."""

    MAY_TAKE_LONG: ClassVar[bool] = True

    until: int
    after: Vm | None
    limit: int


@frozen
class FleetVm:
    """A VM, and what its last granted boot ran on: None without a boot, or where its row does not say."""

    vm: Vm
    last_boot_at: int
    profile_name: str | None = None
    profile_version: str | None = None
    tcb_status: str | None = None
    advisories: str | None = None


@frozen
class ReadFleet(StoreOp[tuple[FleetVm, ...]]):
    """The next ``limit`` VMs that are claimed, each with what its last boot ran on."""

    after: Vm | None
    limit: int


@frozen
class KeyServer:
    """A key server that used the store at ``seen_at``; ``configuration`` has digests of what servers must share.

    A copy of the store does not take it along: each server writes it again and again.
    """

    name: str
    version: str
    configuration: str
    seen_at: int


@frozen
class NoteKeyServer(StoreOp[None]):
    """Write that a key server uses the store."""

    server: KeyServer


@frozen
class ReadKeyServers(StoreOp[tuple[KeyServer, ...]]):
    """The key servers, by name, that were seen after a time: 100 at most."""

    after: int


@frozen
class ForgetKeyServers(StoreOp[None]):
    """Delete the key servers that were not seen after a time."""

    until: int


@frozen
class WhatIf:
    """The last what-if over the fleet: when an operator asked, and the answer as a JSON object of bounded size.

    A copy of the store does not take it along.
    """

    tried_at: int
    found: str


@frozen
class NoteWhatIf(StoreOp[None]):
    """Write the answer of a what-if, in place of the last one."""

    what_if: WhatIf


@frozen
class ReadWhatIf(StoreOp[WhatIf | None]):
    """The last what-if, if there was one."""


@frozen
class CountClaims(StoreOp[int]):
    """The number of names that are bound to a platform; 0, and not counted, if the name ``unless`` is bound to any.

    Each boot asks, and only that of a new name has to know: to count conflicts with all who add one.
    """

    pin: Pin
    unless: Vm | None = None


@frozen
class VoidTokens(StoreOp[None]):
    """Void all tokens issued to a VM so far. The horizon voids those of every VM."""

    vm: Vm
    at: int


@frozen
class InsertBootVolumes(StoreOp[None]):
    """Add the volumes that a boot was given, at least one, as `Insert` does (`InsertAll` is for copies)."""

    rows: tuple[BootVolumeRow, ...]


@frozen
class ReadBootVolumes(StoreOp[tuple[BootVolumeRow, ...]]):
    """The volumes and generations that a boot was given, by position."""

    boot_id: str


@frozen
class ReadLiveGenerations(StoreOp[tuple[GenerationRow, ...]]):
    """The generations of a VM on which a request may depend, by volume and generation: few, however many there are.

    They are the active ones, the candidates, those that a prune retired, the provisional ones, the newest of each
    volume, which no purge takes, and those that the boot ``boot_id`` was given. Without the newest, the next generation
    would get a number that exists.
    """

    vm: Vm
    boot_id: str | None = None


@frozen
class UpdateGeneration(StoreOp[None]):
    """Write state, ``provisional``, ``delivered_at``, ``retired_at`` and ``retirement`` of a row; nothing else."""

    row: GenerationRow


@frozen
class CountRetired(StoreOp[int]):
    """The number of the VMs that `ReadRetired` finds."""

    MAY_TAKE_LONG: ClassVar[bool] = True

    until: int


@frozen
class DoubtCandidates(StoreOp[tuple[RowNotAuthentic, ...]]):
    """Make every candidate of every VM provisional; rows that are so already are not written.

    Replies the rows that are not authentic; these are left as they are.
    """

    MAY_TAKE_LONG: ClassVar[bool] = True


@frozen
class RewrapGenerations(StoreOp[None]):
    """Write ``kek_id`` and ``wrapped_key`` of rows, at least one, that have a sealed passphrase; nothing else."""

    MAY_TAKE_LONG: ClassVar[bool] = True

    rows: tuple[GenerationRow, ...]


@frozen
class PurgeGeneration(StoreOp[None]):
    """Delete the sealed passphrase of a retired generation for ever; the row stays, in state ``purged``."""

    row: GenerationRow


@frozen
class CountSealed(StoreOp[tuple[tuple[str, int], ...]]):
    """The number of passphrases sealed under each KEK, by ``kek_id``."""

    MAY_TAKE_LONG: ClassVar[bool] = True


@frozen
class CountStates(StoreOp[tuple[tuple[str, int], ...]]):
    """The number of generations in each state, by state; states without one are left out."""

    MAY_TAKE_LONG: ClassVar[bool] = True


@frozen
class ReadOtherwiseSealed(StoreOp[tuple[GenerationRow, ...]]):
    """The next ``limit`` generations whose passphrase is sealed under another KEK than ``kek_id``."""

    MAY_TAKE_LONG: ClassVar[bool] = True

    kek_id: str
    limit: int
    after: GenerationRow | None = None


@frozen
class CountRefusals(StoreOp[int]):
    """The number of recorded refusals since a time, inclusive, of a platform's or a registration's quotes."""

    of: Pin | str
    since: int


@frozen
class Claim(StoreOp[bool]):
    """Add a row, unless that would break one of its table's unique constraints: then False, and nothing changes."""

    row: NonceRow | ServerRow | GpuRow | GpuDeviceRow


@frozen
class DeleteServer(StoreOp[None]):
    """Delete a server and its GPUs; its attestations and audit rows stay."""

    server_id: str


@frozen
class FindLastBoot(StoreOp[BootRow | None]):
    """The newest granted boot of a VM."""

    vm: Vm


@frozen
class FindLastBoots(StoreOp[tuple[BootRow, ...]]):
    """The newest granted boot of each of ``vms``, of which there is one at least, that has any."""

    vms: tuple[Vm, ...]


@frozen
class FindLastBootFrom(StoreOp[BootRow | None]):
    """The newest granted boot that names a hotkey and came from an address."""

    hotkey: str
    address: str


@frozen
class AuditWanted:
    """The audit rows to read: by time (``until`` not included), VM, event and request; an empty text is any.

    With ``refused`` only refusals are read.
    """

    since: int = 0
    until: int = 1 << 62
    hotkey: str = ""
    name: str = ""
    event: str = ""
    request_id: str = ""
    refused: bool = False


@frozen
class ReadAudit(StoreOp[tuple[tuple[int, AuditRow], ...]]):
    """Up to ``limit`` audit rows, each with its number, which grows in the order in which they were written.

    They begin after the number ``beyond`` and end with ``through``; ``backwards``, they begin before ``beyond``, go
    down to ``through``, and the newest comes first.
    """

    MAY_TAKE_LONG: ClassVar[bool] = True

    beyond: int
    limit: int
    backwards: bool = False
    through: int | None = None
    wanted: AuditWanted = AuditWanted()


@frozen
class FindRecent(StoreOp[int | None]):
    """The index of the log's first audit row, from the index ``first`` on, that records the time ``since`` or later."""

    MAY_TAKE_LONG: ClassVar[bool] = True

    first: int
    since: int


@frozen
class PurgeAudit(StoreOp[None]):
    """Delete the audit rows with an index below ``below``; all of them record a time before ``before``.

    Forged ones go with them, if they record such a time, too.
    """

    MAY_TAKE_LONG: ClassVar[bool] = True

    below: int
    before: int


@frozen
class PurgeTiles(StoreOp[None]):
    """Delete the tiles of level 0 with a number below ``below``."""

    below: int


@frozen
class LockLog(StoreOp[LogStateRow | None]):
    """Lock the log until the transaction ends, and read its state; None if another transaction has locked it."""


@frozen
class ReadUnsequenced(StoreOp[tuple[tuple[int, AuditRow], ...]]):
    """The first ``limit`` audit rows after the number ``beyond`` that have no index yet, each with its number.

    One that is not authentic has a negative index here; it is not the one that it has in the store.
    """

    limit: int
    beyond: int = 0


@frozen
class FindBeyond(StoreOp[tuple[int, ...]]):
    """The numbers of up to ``limit`` audit rows with an index that a log of ``size`` entries has not given yet."""

    size: int
    limit: int


@frozen
class SetApart(StoreOp[None]):
    """Give the audit rows with these numbers, at least one, negative indexes that no row has."""

    numbers: tuple[int, ...]


@frozen
class FindNumber(StoreOp[int]):
    """The number of the audit row with the index ``idx``, 0 if there is none."""

    idx: int


@frozen
class ReadVmVersions(StoreOp[tuple[tuple[Vm, int | None], ...]]):
    """The highest ``vm_version`` that the log has of each of these VMs, of which there is at least one."""

    vms: tuple[Vm, ...]


@frozen
class Sequence(StoreOp[int]):
    """Give audit rows their index and salt: number, index and salt of each, at least one. None may have them yet.

    The reply is the number of rows that got them.
    """

    rows: tuple[tuple[int, int, bytes], ...]


@frozen
class ReadLog(StoreOp[tuple[AuditRow, ...]]):
    """The next ``limit`` audit rows of the log from the index ``first`` on, by index."""

    MAY_TAKE_LONG: ClassVar[bool] = True

    first: int
    limit: int


@frozen
class ReadTile(StoreOp[LogTileRow | None]):
    """A tile of the log's tree."""

    level: int
    tile: int


@frozen
class Read(StoreOp[R | None], Generic[R]):
    """The row of a kind by its primary key, or by another column that is unique, of any owner and in any state."""

    kind: type[R]
    key: str | bytes | Vm
    by: Literal["", "token_digest", "confirm_digest", "root_confirm_digest", "address"] = ""


@frozen
class ReadAll(StoreOp[tuple[R, ...]], Generic[R]):
    """A VM's key generations, by volume and number, its known disks, by volume, or its evidence; a hotkey's servers."""

    kind: type[R]
    owner: Vm | str


@frozen
class ReadGpus(StoreOp[tuple[GpuRow, ...]]):
    """The GPUs of one or more servers, by uuid."""

    server_ids: tuple[str, ...]


@frozen
class FindDeclaration(StoreOp[str | None]):
    """The id of a server that declared a GPU of this uuid; of several, the first by id."""

    uuid: str


@frozen
class ReadHostProfiles(StoreOp[tuple[HostProfileRow, ...]]):
    """The oldest ``limit`` host profiles, oldest first."""

    limit: int


@frozen
class ReadPage(StoreOp[tuple[R, ...]], Generic[R]):
    """The next ``limit`` rows of a kind that has a key."""

    MAY_TAKE_LONG: ClassVar[bool] = True

    kind: type[R]
    after: R | None
    limit: int


@frozen
class ReadOld(StoreOp[tuple[R, ...]], Generic[R]):
    """The next ``limit`` rows from before the time ``before`` that nothing needs any more.

    Needed are every VM's newest boot, and those that a server or its row names; a verdict whose boot has a row, and the
    newest one of a server.
    """

    MAY_TAKE_LONG: ClassVar[bool] = True

    kind: type[R]
    before: int
    after: R | None
    limit: int


@frozen
class CountRows(StoreOp[int]):
    """The number of rows of a kind."""

    MAY_TAKE_LONG: ClassVar[bool] = True

    kind: type[Row]


@frozen
class InsertAll(StoreOp[None]):
    """Add rows of one kind, at least one, as `Insert` does."""

    MAY_TAKE_LONG: ClassVar[bool] = True

    rows: tuple[Row, ...]


@frozen
class Delete(StoreOp[None]):
    """Delete the rows with these values, at least one, in the first column of their key."""

    MAY_TAKE_LONG: ClassVar[bool] = True

    kind: type[BootRow] | type[BootVolumeRow] | type[AttestationRow] | type[HostProfileRow] | type[EvidenceRow]
    keys: tuple[str, ...]


@frozen
class Scan(StoreOp[tuple[R, ...]], Generic[R]):
    """All rows of one kind, by key; audit rows in the order in which they were written. For tables that are small."""

    MAY_TAKE_LONG: ClassVar[bool] = True

    kind: type[R] = field()
