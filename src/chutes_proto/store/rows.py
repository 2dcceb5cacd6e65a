"""What the store keeps, as frozen rows, and the closed list of operations on them.

A unit's script asks for one operation at a time (``row = yield from ReadVm(vm)``) and never sees a connection.

Rules kept here:

* a row class is its table: ``TABLE`` is the name, ``KEY`` the primary key, which comes first, and the fields are the
  columns in their order; a `Vm` is the two columns ``hotkey, vm``, a `Pin` the two ``platform_kind, platform_id``;
* nothing secret is in a row in the clear: passphrases are sealed, tokens and nonces of a boot are digests;
* no operation changes a sealed passphrase or an audit row, and only an operator's `PurgeGeneration` and `PurgeAudit`
  delete them;
* this is the only file of the pure part, next to ``effects.py``, with a bare ``yield``.

Times are integer unix seconds.
"""

from collections.abc import Generator
from typing import Any, ClassVar, Generic, Literal, TypeAlias, TypeVar

from attrs import field, frozen

T_co = TypeVar("T_co", covariant=True)


class StoreOp(Generic[T_co]):
    """One operation on rows; ``yield from`` it for the reply, which has the type ``T_co``."""

    __slots__ = ()

    def __iter__(self) -> Generator["StoreOp[Any]", Any, T_co]:
        reply: T_co = yield self
        return reply


# --- values that several rows hold ---


@frozen(order=True)
class Vm:
    """Whose VM, and which: the hotkey's SS58 address and the VM's name."""

    hotkey: str
    name: str


@frozen(order=True)
class Pin:
    """What a VM's name is bound to: a platform, by the one identifier that names it best."""

    kind: Literal["instance", "ppid"]
    value: bytes

    def __str__(self) -> str:
        return f"{self.kind}:{self.value.hex()}"


@frozen
class Platform:
    """What a PCK certificate says of its platform: the instance id where there is one, and the PPID (16 bytes each)."""

    instance_id: bytes | None
    ppid: bytes

    @property
    def pin(self) -> Pin:
        """The instance id, which names a multi-package platform whole; else the PPID."""
        return Pin("ppid", self.ppid) if self.instance_id is None else Pin("instance", self.instance_id)


Exchange: TypeAlias = Literal["base", "two-phase"]
"""How a VM gets its volumes' keys: for a boot token, or by attesting again and confirming."""

State: TypeAlias = Literal["active", "candidate", "retired", "purged"]
"""Of a key generation; see ``docs/explanation/key-lifecycle.md``."""

Retirement: TypeAlias = Literal["rekey", "prune", "relisted", "takeover", "dropped", "superseded"]
"""Why a generation is retired; see ``docs/explanation/key-lifecycle.md``."""


Decision: TypeAlias = Literal["granted", "refused", "replayed", "done"]
"""What came of what an audit row tells of; ``done`` is for an operator's commands."""


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

    ``proven``: a boot that was granted on this platform carried the hotkey's signature. ``exchange`` is ``two-phase``
    once a boot was served so. ``attested`` is the boot that attested its volumes last, whose confirmation counts.
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


@frozen
class BootRow:
    """A granted boot and the one token that was issued to it: a boot token, or with ``two-phase`` a quote nonce.

    ``certificate`` is the SHA-256 of the attested key's SubjectPublicKeyInfo. A token is worth something while
    ``spent_at`` and ``voided_at`` are None and the time is before ``token_expires_at``; ``body_digest`` is the SHA-256
    of the request body that spent it. A two-phase boot that attested its volumes has a confirm nonce too, good until
    ``confirm_expires_at``; ``confirm_body_digest`` is of the request that confirmed.
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


@frozen
class BootVolumeRow:
    """What a boot was given for one volume: generations, so that the same answer can be given again.

    ``position`` is the volume's place in the answer; ``in_use`` what the answer said of it.
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

    ``sealed`` never changes while the row has it (only a purge removes it); ``kek_id`` and ``wrapped_key`` change when
    the row is wrapped anew. ``origin`` is the boot id of the request that made it, or the operator's command.
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
    """What is known of a volume's disk: whether it holds data, and whether one format of it is permitted even so.

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
    quote's row names the server's ``registration``, and its ``vm`` is the server's owner and name.
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


@frozen
class ServerRow:
    """A registered server. ``registration`` names this registration of the id, once for all time.

    ``address`` is what ``host`` resolved to. ``boot_id`` is the boot that it was linked to at registration; ``pin`` the
    platform that its first accepted runtime quote came from, where there is no link. ``attested`` is the newest verdict
    on a runtime quote of it.
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

    @property
    def vm(self) -> Vm:
        """The VM of its owner's that has its name."""
        return Vm(self.hotkey, self.name)


@frozen
class GpuRow:
    """A GPU of a server; ``declared`` is the JSON of all that its owner says of it."""

    TABLE: ClassVar[str] = "gpu"
    KEY: ClassVar[tuple[str, ...]] = ("uuid",)

    uuid: str
    server_id: str
    identifier: str
    declared: str


@frozen
class AuditRow:
    """What was decided, for whom and why, written in the same transaction as what it tells of; never changed.

    ``keys`` names the generations that it concerns, one ``volume/generation change`` each, with a comma and a space
    between. Audit rows have no key of their own; the store keeps them in the order in which they were written.
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
    | AuditRow
)

ROWS: tuple[type[Row], ...] = (
    NonceRow,
    VmRow,
    BootRow,
    BootVolumeRow,
    GenerationRow,
    VolumeRow,
    AttestationRow,
    ServerRow,
    GpuRow,
    AuditRow,
)

R = TypeVar("R", bound=Row)

# --- operations ---


@frozen
class Insert(StoreOp[None]):
    """Add a row. One with the same key, or a second active generation or candidate of a volume, is a `StoreError`."""

    row: BootRow | BootVolumeRow | GenerationRow | AttestationRow | AuditRow


@frozen
class Put(StoreOp[None]):
    """Add a row, or replace the one with the same key."""

    row: VmRow | BootRow | VolumeRow | ServerRow


@frozen
class RedeemNonce(StoreOp[bool]):
    """Add a redeemed nonce; False if it is there already, and then nothing changes."""

    row: NonceRow


@frozen
class IsRedeemed(StoreOp[bool]):
    """Whether a nonce was redeemed, as far as that is remembered."""

    value: bytes


@frozen
class SweepNonces(StoreOp[tuple[NonceRow, ...]]):
    """Delete up to ``limit`` nonces issued and redeemed at or before ``until``, oldest first, and reply with them."""

    until: int
    limit: int


@frozen
class Times:
    """The horizon, and the start of the transaction by the store's own clock, both in unix seconds.

    Nonces issued at or before the horizon may have been forgotten, and count as redeemed. ``clock`` is None where the
    store has only this machine's.
    """

    horizon: int
    clock: int | None


@frozen
class ReadTimes(StoreOp[Times]):
    """The times that decide whether a nonce may be redeemed."""


@frozen
class RaiseHorizon(StoreOp[None]):
    """Move the horizon to ``to``, unless it is there or beyond."""

    to: int


@frozen
class SetHorizon(StoreOp[None]):
    """Move the horizon to ``to``, also back."""

    to: int


@frozen
class ReadVm(StoreOp[VmRow | None]):
    """The claim on a name."""

    vm: Vm


@frozen
class ReadNames(StoreOp[tuple[Vm, ...]]):
    """All names that are claimed or have keys, in order; with ``name``, those of any hotkey that are called so."""

    name: str | None = None


@frozen
class CountClaims(StoreOp[int]):
    """How many names are bound to a platform."""

    pin: Pin


@frozen
class FindBoot(StoreOp[BootRow | None]):
    """The boot that a token was issued to, whatever became of the token."""

    token_digest: bytes


@frozen
class FindConfirm(StoreOp[BootRow | None]):
    """The boot that a confirm nonce was issued to, whatever became of it."""

    confirm_digest: bytes


@frozen
class SpendToken(StoreOp[bool]):
    """Mark a boot's token as spent by a request body; False if it was spent before, and then nothing changes."""

    boot_id: str
    at: int
    body_digest: bytes


@frozen
class VoidTokens(StoreOp[None]):
    """Void all tokens issued to a VM so far, or to every VM."""

    vm: Vm | None
    at: int


@frozen
class ReadBootVolumes(StoreOp[tuple[BootVolumeRow, ...]]):
    """What a boot was given, by position."""

    boot_id: str


@frozen
class ReadGenerations(StoreOp[tuple[GenerationRow, ...]]):
    """All key generations of a VM, by volume and generation."""

    vm: Vm


@frozen
class ReadLiveGenerations(StoreOp[tuple[GenerationRow, ...]]):
    """Of a VM's generations those on which a request may depend, by volume and generation: few, however many there are.

    They are the active ones, the candidates, what a prune retired, what is provisional, the newest of each volume,
    which no purge takes, and what the boot ``boot_id`` was given.
    """

    vm: Vm
    boot_id: str | None = None


@frozen
class UpdateGeneration(StoreOp[None]):
    """Write state, ``provisional``, ``delivered_at``, ``retired_at`` and ``retirement`` of a row; nothing else."""

    row: GenerationRow


@frozen
class RewrapGeneration(StoreOp[None]):
    """Write ``kek_id`` and ``wrapped_key`` of a row that has a sealed passphrase; nothing else."""

    row: GenerationRow


@frozen
class PurgeGeneration(StoreOp[None]):
    """Delete the sealed passphrase of a retired generation for ever; the row stays, in state ``purged``."""

    row: GenerationRow


@frozen
class CountSealed(StoreOp[tuple[tuple[str, int], ...]]):
    """How many passphrases are sealed under each key-encryption key, by ``kek_id``."""


@frozen
class ReadOtherwiseSealed(StoreOp[tuple[GenerationRow, ...]]):
    """Up to ``limit`` generations whose passphrase is sealed under another key-encryption key than ``kek_id``."""

    kek_id: str
    limit: int


@frozen
class ReadVolumes(StoreOp[tuple[VolumeRow, ...]]):
    """What is known of a VM's disks, by volume."""

    vm: Vm


@frozen
class CountRefusals(StoreOp[int]):
    """How many refusals of a platform's quotes are recorded since a time, inclusive."""

    pin: Pin
    since: int


@frozen
class Claim(StoreOp[bool]):
    """Add a row, unless that would break one of its table's unique constraints: then False, and nothing changes."""

    row: ServerRow | GpuRow


@frozen
class FindServer(StoreOp[ServerRow | None]):
    """The server at an address."""

    address: str


@frozen
class ReadServers(StoreOp[tuple[ServerRow, ...]]):
    """All servers of a hotkey, by id."""

    hotkey: str


@frozen
class DeleteServer(StoreOp[None]):
    """Delete a server and its GPUs; its attestations and audit rows stay."""

    server_id: str


@frozen
class FindLastBoot(StoreOp[BootRow | None]):
    """The newest granted boot of a VM."""

    vm: Vm


@frozen
class FindLastBootFrom(StoreOp[BootRow | None]):
    """The newest granted boot that names a hotkey and came from an address."""

    hotkey: str
    address: str


@frozen
class CountServerRefusals(StoreOp[int]):
    """How many refusals of a registration's runtime quotes are recorded since a time, inclusive."""

    registration: str
    since: int


@frozen
class ReadAudit(StoreOp[tuple[tuple[int, AuditRow], ...]]):
    """Up to ``limit`` audit rows, each with its number, which grows in the order in which they were written.

    They begin after the number ``beyond``; ``backwards``, before it, and then the newest comes first.
    """

    beyond: int
    limit: int
    backwards: bool = False


@frozen
class PurgeAudit(StoreOp[None]):
    """Delete the audit rows after the number ``beyond``, up to ``through``, that tell of a time before ``before``."""

    beyond: int
    through: int
    before: int


@frozen
class Read(StoreOp[R | None], Generic[R]):
    """The row of a kind whose key is one text: a boot, a verdict, a server or a GPU, whosever it is."""

    kind: type[R]
    key: str


@frozen
class Scan(StoreOp[tuple[R, ...]], Generic[R]):
    """All rows of one kind, by key; audit rows in the order in which they were written."""

    kind: type[R] = field()
