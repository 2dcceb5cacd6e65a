"""A VM's side of the exchange, as flows: nonce, attestation, root passphrase, keys of the volumes, confirmation.

Rules kept here:

* the exchange table (``boot/_exchange.py``) decides what follows what, the retry policy (``boot/_retry.py``) when;
* each attempt at a grant has a nonce of its own; each attempt at a sync sends the same bytes, which the server answers
  the same way once it has taken them, so a lost answer loses nothing;
* the keys of the two-phase exchange are handed out once for a boot: their attestation is repeated as it was, and so is
  their confirmation;
* an answer is used only if it is whole: exactly the volumes that were asked for, no passphrase empty;
* nothing secret is logged, and no answer makes a flow send its request anywhere else: a redirect is an error.

The flows send to one server, over connections that present the client certificate which the settings name. That is the
driver's part; ``chutes_proto.io``, ``chutes_proto_trio`` and ``chutes_proto_asyncio`` have drivers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, Final, TypeAlias, TypeVar, cast

import attrs
from attrs import Factory, define, field, frozen

from chutes_proto.auth.binding import report_data
from chutes_proto.auth.hotkey import Hotkey, HotkeyError
from chutes_proto.auth.signing import Signer, body_message, sign
from chutes_proto.boot._exchange import Exchange, Input, State, failure
from chutes_proto.boot._retry import begin, conceal
from chutes_proto.boot._retry_policy import DEFAULT_RETRY, RetryPolicy
from chutes_proto.effects import Flow, Log, MakeQuote, Send
from chutes_proto.errors import LocalProtocolError, QuoteUnavailable, Refusal, RemoteProtocolError, TransportError
from chutes_proto.log import Level, Record
from chutes_proto.secret import Secret
from chutes_proto.wire import codec, vms
from chutes_proto.wire.endpoint import Endpoint, Message, NonceAnswer
from chutes_proto.wire.names import NAME_PATTERN, NAME_RULE, ROOT, Name, hex_32

A = TypeVar("A", bound=Message)

_ROOT_ATTEMPTS: Final = 3
_PRINTABLE = re.compile(r"[!-~]{1,128}")
_BASE64_32 = re.compile(r"[A-Za-z0-9+/]{43}=")


# --- values ---


@frozen
class BootSettings:
    """The VM that boots: its owner's hotkey, its name, and the SHA-256 (32 bytes) of its client key.

    ``spki_sha256`` is over the DER SubjectPublicKeyInfo of the client certificate that the driver's connections
    present. With a ``signer`` the VM proves its hotkey, as the provisioned exchange demands, at each step that takes a
    proof. ``first_boot``: the root disk is a fresh copy of the published image, which the build's passphrase alone
    opens. Raises `LocalProtocolError` for values that no request could carry.
    """

    miner_hotkey: str
    vm_name: str
    spki_sha256: bytes
    signer: Signer | None = field(default=None, repr=False)
    retry: RetryPolicy = DEFAULT_RETRY
    first_boot: bool = False

    def __attrs_post_init__(self) -> None:
        hotkey, name = cast("object", self.miner_hotkey), cast("object", self.vm_name)  # an unset variable gives None
        if not isinstance(hotkey, str) or not _PRINTABLE.fullmatch(hotkey):
            raise LocalProtocolError(f"a hotkey is an SS58 address, not {hotkey!r:.130}")
        if not isinstance(name, str) or not re.fullmatch(NAME_PATTERN, name):
            raise LocalProtocolError(f"a VM's name is {NAME_RULE}, not {name!r:.130}")
        if self.signer is not None:
            try:
                _ = Hotkey.parse(self.miner_hotkey)
            except HotkeyError as exc:
                raise LocalProtocolError(f"a signer needs a hotkey: {exc}") from None
        if len(self.spki_sha256) != hashlib.sha256().digest_size:
            raise LocalProtocolError(f"the digest of the client key is 32 bytes, not {len(self.spki_sha256)}")


@frozen
class RootKeys:
    """The keys of the root disk in the provisioned exchange, besides the grant's ``root_passphrase``.

    ``next`` replaces that one, and is confirmed with ``confirm_nonce`` within 300 seconds. ``second`` is there if the
    disk may have yet another key, because the last confirmation, or its answer, was lost.
    """

    next: Secret
    confirm_nonce: Secret
    second: Secret | None = None


@frozen
class BootGrant:
    """The server's grant to a verified boot, with exactly one of ``boot_token`` and ``luks_quote_nonce``.

    ``boot_token`` is valid for one sync within 600 seconds; ``luks_quote_nonce`` is that of the two-phase exchange, and
    of the provisioned one, which alone has ``vm_auth_ss58``: the address of the one caller that the VM shall trust, a
    new one for each boot. There, ``root`` has the other keys of the root disk.
    """

    miner_hotkey: str
    vm_name: str
    root_passphrase: Secret
    boot_token: Secret | None = None
    luks_quote_nonce: Secret | None = None
    vm_auth_ss58: str | None = None
    root: RootKeys | None = None

    @property
    def is_provisioned(self) -> bool:
        """Whether the next steps are those of the provisioned exchange, which prove the hotkey."""
        return self.vm_auth_ss58 is not None

    def wipe(self) -> None:
        """Wipe the keys of the root disk; what the next steps need stays."""
        self.root_passphrase.wipe()
        for key in () if self.root is None else (self.root.next, self.root.second):
            if key is not None:
                key.wipe()


Volumes: TypeAlias = Mapping[str, bool]
"""The whole set of a VM's volumes: the name of each, and whether its disk has a LUKS header now."""


@frozen(kw_only=True)
class _VolumeState:
    """The state of a volume.

    ``is_formatted`` is the caller's word: the disk has a LUKS header. ``is_in_use`` is the server's: the disk is known
    to hold data.
    """

    is_formatted: bool
    is_in_use: bool

    @property
    def may_format(self) -> bool:
        """Whether the disk may be formatted: it has no LUKS header, and the server does not know it to hold data.

        A blank disk that is in use was exchanged or wiped; to format it would make the loss final.
        """
        return not self.is_formatted and not self.is_in_use


@frozen(kw_only=True)
class VolumeKey(_VolumeState):
    """The passphrase of one volume, and whether its disk may be formatted.

    ``may_format``: the disk has no LUKS header (``is_formatted``, the caller's word), and the server does not know it
    to hold data (``is_in_use``).
    """

    volume: str
    passphrase: Secret


@frozen
class VolumeKeys(Iterable[VolumeKey]):
    """The keys of the volumes that were asked for: iterates over them in that order, and has each under its name."""

    _keys: tuple[VolumeKey, ...]

    def __iter__(self) -> Iterator[VolumeKey]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, volume: object) -> bool:
        """Whether the key of the volume with this name is there."""
        return any(key.volume == volume for key in self)

    def __getitem__(self, volume: str) -> VolumeKey:
        """Return the key of a volume. Raises `KeyError` for one that was not asked for."""
        return {key.volume: key for key in self}[volume]


@frozen(kw_only=True)
class KeyPair(_VolumeState):
    """A volume's keys of the two-phase exchange, and whether its disk may be formatted (`may_format`).

    ``current`` opens the disk; it is None where the volume never had a key, and then ``next`` formats it. Else ``next``
    is added to the disk, unless it is the same key: then no rotation is due.
    """

    current: Secret | None
    next: Secret


@define
class Rotation:
    """The keys of a two-phase boot, and the caller's report on each volume.

    The caller opens each volume's disk with ``current``, or formats it where ``may_format`` is true, adds
    ``next`` and calls `added`. A volume whose disk does not open is `left_out`, and its old keys stay as they are. Once
    the confirmation is through, a promoted key and the one that it replaced are needed; where it is not, none may be
    taken off the disk. ``k3s_encryption_key`` is 32 bytes in base64, the same at every boot.
    """

    keys: Mapping[str, KeyPair]
    k3s_encryption_key: Secret
    grant: BootGrant
    confirm_nonce: Secret
    signer: Signer | None = field(default=None, repr=False)
    report: dict[str, bool] = field(
        init=False, default=Factory(lambda self: dict.fromkeys(self.keys, False), takes_self=True)
    )

    def added(self, volume: str) -> None:
        """The disk of ``volume`` was opened, or formatted, and has the next key."""
        self._check(volume)
        self.report[volume] = True

    def left_out(self, volume: str) -> None:
        """The disk of ``volume`` was not opened: nothing is confirmed of it."""
        self._check(volume)
        del self.report[volume]

    def _check(self, volume: str) -> None:
        if volume not in self.report:
            raise LocalProtocolError(f"{volume!r} is not among the volumes to confirm: {', '.join(self.report)}")


# --- the whole exchange ---


def boot(settings: BootSettings) -> Flow[BootGrant]:
    """Attest until the server grants: nonce, quote, attestation, and again from the start after a temporary failure.

    Raises `Refused` or `BadRequest` at the first final answer, and, when attempts or time are used up, the last of
    `Unavailable`, `BadRequest` with status 408, `TransportError`, `RemoteProtocolError`, `QuoteUnavailable`.
    """
    grant: BootGrant = yield from _reach(_GRANTED, _boot_steps(settings), settings.retry)
    return grant


def sync_volumes(grant: BootGrant, volumes: Volumes, *, retry: RetryPolicy = DEFAULT_RETRY) -> Flow[VolumeKeys]:
    """Return the keys of ``volumes``, the whole set of the VM's volumes; the server retires the keys of all others.

    Raises as `boot` does; `Refused` with status 401 when the token has expired or was redeemed: a new boot may then
    begin. Raises `LocalProtocolError`, before anything is sent, for ``volumes`` that are not as `Volumes` says.
    """
    sync = _sync_step(volumes)
    held: tuple[BootGrant, VolumeKeys] = yield from _reach({Input.KEYS}, {State.TOKEN_HELD: sync}, retry, grant)
    return held[1]


def boot_and_sync(
    settings: BootSettings, volumes: Volumes, *, grant: BootGrant | None = None
) -> Flow[tuple[BootGrant, VolumeKeys]]:
    """`boot` and `sync_volumes` in one, on one budget; begins with the sync where there is a ``grant``.

    When the token expires before a sync is answered, a new boot begins. Raises as `boot` does.
    """
    steps = {**_boot_steps(settings), State.TOKEN_HELD: _sync_step(volumes)}
    held: tuple[BootGrant, VolumeKeys] = yield from _reach({Input.KEYS}, steps, settings.retry, grant)
    return held


def read_cache_passphrase(grant: BootGrant, *, retry: RetryPolicy = DEFAULT_RETRY) -> Flow[Secret]:
    """Read the passphrase of the server's first volume, as older images do; the token is not redeemed.

    Raises as `sync_volumes` does; `Refused` with status 404 where no passphrase is kept.
    """

    def read(grant: BootGrant) -> Flow[Secret]:
        request = vms.CachePassphraseRequest(
            vm_name=Name(grant.vm_name), hotkey=grant.miner_hotkey, boot_token=_carried(grant, grant.boot_token)
        )
        return (yield from _ask(vms.CACHE_PASSPHRASE, request, vms.CachePassphraseAnswer)).passphrase

    step = _Step("passphrase", Input.PASSPHRASE, read)
    passphrase: Secret = yield from _reach({Input.PASSPHRASE}, {State.TOKEN_HELD: step}, retry, grant)
    return passphrase


def attest_volumes(settings: BootSettings, volumes: Volumes, *, grant: BootGrant | None = None) -> Flow[Rotation]:
    """Get the current and the next key of each of ``volumes`` for a second quote; boots first without a ``grant``.

    A lost answer is asked for again with the same bytes; when the quote nonce has expired before that, a new boot
    begins. The keys must be confirmed with `confirm_volumes` once the disks are open.

    Raises as `boot` does, and `LocalProtocolError` where the server granted the base exchange.
    """
    steps = {**_boot_steps(settings), **_attest_steps(settings, volumes)}
    rotation: Rotation = yield from _reach({Input.PAIRS}, steps, settings.retry, grant)
    return rotation


def receive_keys(
    settings: BootSettings, volumes: Volumes, *, grant: BootGrant | None = None
) -> Flow[tuple[BootGrant, VolumeKeys] | Rotation]:
    """Get the keys of ``volumes`` in whichever exchange the server grants: `boot_and_sync` or `attest_volumes`.

    Arguments and errors are theirs.
    """
    sync = {State.TOKEN_HELD: _sync_step(volumes)}
    steps = {**_boot_steps(settings), **sync, **_attest_steps(settings, volumes)}
    goals = {Input.KEYS, Input.PAIRS}
    received: tuple[BootGrant, VolumeKeys] | Rotation = yield from _reach(goals, steps, settings.retry, grant)
    return received


def confirm_root(settings: BootSettings, grant: BootGrant) -> Flow[str]:
    """Confirm that the root disk has the key ``grant.root.next``; return the server's word, ``promoted`` usually.

    Then every other key may be taken off the disk; otherwise all stay on it. Raises as `confirm_volumes` does, and
    `LocalProtocolError` for a grant without such a key.
    """
    keys = grant.root
    if keys is None:
        raise LocalProtocolError("this boot was granted an exchange that does not rotate the root disk's key")

    def confirm(keys: RootKeys) -> Flow[Mapping[str, str]]:
        return (yield from _confirm(grant, keys.confirm_nonce, {ROOT: True}, settings.signer))

    steps = {State.HANDED: _Step("root confirmation", Input.CONFIRMED, confirm)}
    # The deadline is one for all steps, and the volumes need what this one leaves.
    retry = attrs.evolve(settings.retry, attempts=min(settings.retry.attempts, _ROOT_ATTEMPTS))
    results: Mapping[str, str] = yield from _reach({Input.CONFIRMED}, steps, retry, keys, State.HANDED)
    return results[ROOT]


def confirm_volumes(rotation: Rotation, *, retry: RetryPolicy = DEFAULT_RETRY) -> Flow[Mapping[str, str]]:
    """Send the server the caller's report, and return the result of each volume. An empty report is not sent.

    Where the result is ``promoted``, every key but ``next`` and ``current`` may be taken off the disk. Otherwise all
    stay on it: ``discarded`` where the report says that the disk has no ``next``, ``no_pending`` where the server had
    nothing to decide. ``current`` should stay, too: after a restore from a backup the server may know that one only.

    Raises `Refused` where the server decided otherwise meanwhile (401, 409) and `TransportError` where nothing is
    known: in either case every key stays on the disk.
    """
    if not rotation.report:
        return {}

    def confirm(rotation: Rotation) -> Flow[Mapping[str, str]]:
        return (yield from _confirm(rotation.grant, rotation.confirm_nonce, rotation.report, rotation.signer))

    steps = {State.HANDED: _Step("confirmation", Input.CONFIRMED, confirm)}
    results: Mapping[str, str] = yield from _reach({Input.CONFIRMED}, steps, retry, rotation, State.HANDED)
    return results


def _confirm(
    grant: BootGrant, nonce: Secret, report: Mapping[str, bool], signer: Signer | None
) -> Flow[Mapping[str, str]]:
    members: dict[str, Any] = {
        "vm_name": Name(grant.vm_name),
        "hotkey": grant.miner_hotkey,
        "confirm_nonce": _text(nonce),
        "volumes": {name: vms.VolumeConfirmation(rotated=added) for name, added in report.items()},
    }
    endpoint, request = vms.VOLUME_CONFIRMATION, vms.VolumeConfirmationRequest(**members)
    if grant.is_provisioned:
        endpoint = vms.PROVISION_CONFIRMATION
        request = _proven(endpoint, vms.ProvisionConfirmationRequest(**members), nonce, signer)
    answer = yield from _ask(endpoint, request, vms.VolumeConfirmationAnswer)
    _check_answered(report, answer.volumes)
    results = {name: part.result for name, part in answer.volumes.items()}
    lines = [f"{name}: {result}" for name, result in results.items()]
    yield from Log(Record.of(Level.INFO, "rotation_confirmed", volumes=lines))
    return results


# --- single steps ---


def fetch_nonce(settings: BootSettings) -> Flow[bytes]:
    """Fetch a boot nonce of 32 bytes, bound to the settings' hotkey. Raises `Refusal`, `TransportError`."""
    request = vms.BootNonceRequest(miner_hotkey=settings.miner_hotkey)
    answer = yield from _ask(vms.BOOT_NONCE, request, NonceAnswer)
    return bytes.fromhex(hex_32(answer.nonce, "nonce"))


def make_quote(settings: BootSettings, nonce: bytes) -> Flow[bytes]:
    """Have a quote made that binds the nonce and the client key. Raises `QuoteUnavailable`."""
    return (yield from MakeQuote(report_data(nonce, settings.spki_sha256)))


def attest_boot(settings: BootSettings, nonce: bytes, quote: bytes) -> Flow[BootGrant]:
    """Send the quote and receive the grant; the nonce is consumed if, and only if, the server grants.

    Raises `Refusal`, `TransportError`, and `RemoteProtocolError` for an answer that is not a whole grant.
    """
    message = vms.BootAttestationRequest(
        quote=codec.encode_quote(quote),
        vm_name=Name(settings.vm_name),
        miner_hotkey=settings.miner_hotkey,
        nonce=nonce.hex(),
    )
    if settings.signer is not None:
        # Only a VM that proves its hotkey can be granted the provisioned exchange, which these two are for.
        first_boot = True if settings.first_boot else None
        message = attrs.evolve(message, hotkey=message.miner_hotkey, first_boot=first_boot, second_key=True)
        message = _proven(vms.BOOT_ATTESTATION, message, Secret(nonce.hex().encode("ascii")), settings.signer)
    answer = yield from _ask(vms.BOOT_ATTESTATION, message, vms.BootAttestationAnswer)
    if (answer.boot_token is None) == (answer.luks_quote_nonce is None):
        raise RemoteProtocolError("the server's grant has both a boot token and a quote nonce, or neither")
    for opener in (answer.boot_token, answer.luks_quote_nonce):
        if opener is not None:
            _ = hex_32(opener.reveal().decode("ascii"), "boot token or quote nonce")
    grant = BootGrant(
        settings.miner_hotkey,
        settings.vm_name,
        answer.key,
        answer.boot_token,
        answer.luks_quote_nonce,
        *_root_keys(answer),
    )
    yield from Log(Record.of(Level.INFO, "grant_received", hotkey=grant.miner_hotkey, vm_name=grant.vm_name))
    return grant


def _root_keys(answer: vms.BootAttestationAnswer) -> tuple[str | None, RootKeys | None]:
    """The members of the provisioned exchange, which are all there or none. Raises `RemoteProtocolError`."""
    following, nonce, caller = answer.root_next, answer.root_confirm_nonce, answer.vm_auth_ss58
    if following is None and nonce is None and caller is None:
        return None, None
    if following is None or nonce is None or caller is None or answer.luks_quote_nonce is None:
        raise RemoteProtocolError("the server's grant has some members of the provisioned exchange, and lacks others")
    _ = hex_32(_text(nonce), "confirm nonce")
    try:
        _ = Hotkey.parse(caller)
    except HotkeyError as exc:
        raise RemoteProtocolError(f"the server's vm_auth_ss58 is not an address: {exc}") from None
    return caller, RootKeys(following, nonce, answer.key_second)


P = TypeVar("P", vms.BootAttestationRequest, vms.ProvisionRequest, vms.ProvisionConfirmationRequest)


def _proven(endpoint: Endpoint, message: P, nonce: Secret, signer: Signer | None) -> P:
    """Add the proof of the hotkey over ``nonce`` and the body. Raises `LocalProtocolError` without a ``signer``."""
    if signer is None:
        raise LocalProtocolError("this boot was granted the provisioned exchange, which needs a signer at each step")
    body = codec.encode_request(endpoint, message).body  # without the headers
    signature = sign(signer, body_message(Hotkey.parse(message.hotkey or ""), _text(nonce), body))
    return attrs.evolve(message, nonce=_text(nonce), signature=signature.hex())


def _text(secret: Secret) -> str:
    return secret.reveal().decode("ascii")


# --- how a step is taken ---


@frozen
class _Step:
    """The step taken in a state: ``take`` makes the value of the next state from that of this one."""

    name: str
    done: Input
    take: Callable[[Any], Flow[Any]]


def _boot_steps(settings: BootSettings) -> dict[State, _Step]:
    def quote(nonce: bytes) -> Flow[tuple[bytes, bytes]]:
        return nonce, (yield from make_quote(settings, nonce))

    return {
        State.START: _Step("nonce", Input.NONCE, lambda _: fetch_nonce(settings)),
        State.NONCE_HELD: _Step("quote", Input.QUOTE, quote),
        State.QUOTED: _Step("attestation", Input.GRANT, lambda held: attest_boot(settings, *held)),
    }


def _checked(volumes: Volumes) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of all volumes, and of those with a LUKS header. Raises `LocalProtocolError`.

    A caller without a type checker may pass a list of names, or None for a disk that it does not know; either would
    reach the server as a statement about the disk.
    """
    given = cast("object", volumes)
    if not isinstance(given, Mapping) or not given:
        raise LocalProtocolError(
            f"volumes must map at least one name to whether its disk has a LUKS header, as in {{'storage': True}};"
            f" got {given!r}"
        )
    for name, formatted in cast("Mapping[object, object]", given).items():
        if not isinstance(name, str):
            raise LocalProtocolError(f"the name of a volume must be a string; got {name!r}")
        if not isinstance(formatted, bool):
            raise LocalProtocolError(
                f"volume {name!r}: say True or False, whether its disk has a LUKS header; got {formatted!r}"
            )
    return tuple(volumes), tuple(name for name, formatted in volumes.items() if formatted)


def _sync_step(volumes: Volumes) -> _Step:
    """Make the step of a sync. Raises `LocalProtocolError`, before anything is sent, for wrong ``volumes``."""
    asked, formatted = _checked(volumes)

    def sync(grant: BootGrant) -> Flow[tuple[BootGrant, VolumeKeys]]:
        request = vms.VolumeSyncRequest(
            vm_name=Name(grant.vm_name),
            hotkey=grant.miner_hotkey,
            boot_token=_carried(grant, grant.boot_token),
            volumes=asked,
            formatted=formatted,
        )
        answer = yield from _ask(vms.VOLUME_SYNC, request, vms.VolumeSyncAnswer)
        passphrases = dict(answer.passphrases)
        in_use = answer.in_use or ()
        _check_answered(asked, passphrases, in_use)
        keys = tuple(
            VolumeKey(volume=name, passphrase=passphrases[name], is_formatted=volumes[name], is_in_use=name in in_use)
            for name in asked
        )
        yield from Log(Record.of(Level.INFO, "volumes_received", volumes=list(asked), in_use=sorted(in_use)))
        return grant, VolumeKeys(keys)

    return _Step("sync", Input.KEYS, sync)


def _attest_steps(settings: BootSettings, volumes: Volumes) -> dict[State, _Step]:
    """Make the steps of an attestation of ``volumes``. Raises as `_sync_step` does."""
    asked, formatted = _checked(volumes)

    def quote(grant: BootGrant) -> Flow[tuple[BootGrant, bytes]]:
        return grant, (yield from make_quote(settings, bytes.fromhex(_carried(grant, grant.luks_quote_nonce))))

    def attest(held: tuple[BootGrant, bytes]) -> Flow[Rotation]:
        grant, quoted = held
        nonce = _carried(grant, grant.luks_quote_nonce)
        members: dict[str, Any] = {
            "vm_name": Name(grant.vm_name),
            "hotkey": grant.miner_hotkey,
            "quote_nonce": nonce,
            "quote": codec.encode_quote(quoted),
            "volumes": asked,
            "formatted": formatted,
        }
        endpoint, request = vms.VOLUME_ATTESTATION, vms.VolumeAttestationRequest(**members)
        if grant.is_provisioned:
            endpoint = vms.PROVISION
            request = _proven(endpoint, vms.ProvisionRequest(**members), Secret(nonce.encode("ascii")), settings.signer)
        answer = yield from _ask(endpoint, request, vms.VolumeAttestationAnswer)
        _check_answered(asked, answer.volumes, answer.in_use)
        _ = hex_32(answer.confirm_nonce.reveal().decode("ascii"), "confirm nonce")
        if not _BASE64_32.fullmatch(_text(answer.k3s_encryption_key)):  # programs write it into files of their own
            raise RemoteProtocolError("the server's k3s_encryption_key is not 32 bytes in base64")
        given, in_use = answer.volumes, answer.in_use
        pairs = {
            name: KeyPair(current=pair.current, next=pair.next, is_formatted=volumes[name], is_in_use=name in in_use)
            for name, pair in ((name, given[name]) for name in asked)
        }
        yield from Log(Record.of(Level.INFO, "keys_received", volumes=list(asked), in_use=sorted(answer.in_use)))
        return Rotation(pairs, answer.k3s_encryption_key, grant, answer.confirm_nonce, settings.signer)

    return {
        State.QUOTE_NONCE_HELD: _Step("runtime quote", Input.QUOTE, quote),
        State.REQUOTED: _Step("volumes", Input.PAIRS, attest),
    }


def _check_answered(asked: Iterable[str], answered: Iterable[str], in_use: Iterable[str] = ()) -> None:
    """Check that an answer is about exactly the volumes that were asked for. Raises `RemoteProtocolError`."""
    if {*answered} != {*asked} or not {*in_use} <= {*asked}:
        raise RemoteProtocolError(f"the server's answer is not about exactly the volumes {', '.join(asked)}")


_GRANTED = frozenset({Input.GRANT, Input.TWO_PHASE_GRANT})


def _reach(
    goals: AbstractSet[Input],
    steps: Mapping[State, _Step],
    policy: RetryPolicy,
    held: Any = None,
    begun: State | None = None,
) -> Flow[Any]:
    """Take the steps of the exchange table until one of ``goals`` has happened; return its outcome.

    ``held`` is the value to begin with: a grant, or that of the state ``begun``.
    """
    exchange = Exchange(begun or (State.START if held is None else _granted(held)[1]))
    if exchange.state not in steps:
        raise _other_exchange(cast("BootGrant", held))
    budget = yield from begin(policy)
    while True:
        before = exchange.state
        step = steps[before]
        yield from budget.announce(step.name)
        try:
            brought = yield from step.take(held)
        except (Refusal, RemoteProtocolError, TransportError, QuoteUnavailable) as exc:
            error = exc
        else:
            done = _granted(brought)[0] if isinstance(brought, BootGrant) else step.done
            following = exchange.take(done)
            if done in goals:
                return brought
            if following not in steps:
                raise _other_exchange(brought)
            held = brought
            continue
        if (secret := _opener(held)) is not None:
            conceal(error, secret)
        if exchange.take(failure(before, error)) not in steps:
            yield from budget.give_up(step.name, error)
        yield from budget.pause(step.name, error)
        if exchange.state is not before:
            held = None  # a new attempt uses nothing of the one that failed


def _ask(endpoint: Endpoint, message: Message, kind: type[A]) -> Flow[A]:
    """Send one request and decode its answer, which the endpoint table says is a ``kind``."""
    response = yield from Send(codec.encode_request(endpoint, message))
    return cast("A", codec.decode_answer(endpoint, response))


def _granted(grant: BootGrant) -> tuple[Input, State]:
    """The input that a grant is, and the state that it leads to."""
    if grant.boot_token is None:
        return Input.TWO_PHASE_GRANT, State.QUOTE_NONCE_HELD
    return Input.GRANT, State.TOKEN_HELD


def _opener(held: Any) -> Secret | None:
    """The nonce or token that the request of a state carries; no error's text may repeat it."""
    if isinstance(held, Rotation | RootKeys):
        return held.confirm_nonce
    grant = cast("object", held[0] if isinstance(held, tuple) else held)
    return grant.boot_token or grant.luks_quote_nonce if isinstance(grant, BootGrant) else None


def _carried(grant: BootGrant, opener: Secret | None) -> str:
    """The text of the token or nonce, which the grant must have."""
    if opener is None:
        raise _other_exchange(grant)
    return _text(opener)


def _other_exchange(grant: BootGrant) -> LocalProtocolError:
    if grant.boot_token is None:
        return LocalProtocolError(
            "this boot was granted an exchange that has no boot token, two-phase or provisioned: rotate the keys"
        )
    return LocalProtocolError("this boot was granted the base exchange, which has no next keys: sync")
