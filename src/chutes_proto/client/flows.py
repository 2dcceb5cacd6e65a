"""What a VM does, as flows: get a nonce, attest, receive the root passphrase, receive its volumes' passphrases.

Rules kept here:

* the exchange table (``client/exchange.py``) decides what follows what, the retry policy (``client/retry.py``) when;
* each attempt at a grant has a nonce of its own; each attempt at a sync sends the same bytes, which the server answers
  the same way once it has taken them, so a lost answer loses nothing;
* an answer is used only if it is whole: exactly the volumes that were asked for, no passphrase empty;
* nothing secret is logged, and no answer makes a flow send its request anywhere else: a redirect is an error.

The flows send to one server, over connections that present the client certificate which the settings name. That is the
driver's part; ``chutes_proto.blocking``, ``chutes_proto_trio`` and ``chutes_proto_asyncio`` have drivers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import attrs
from attrs import field, frozen

from chutes_proto.auth.binding import report_data
from chutes_proto.auth.hotkey import Hotkey, HotkeyError
from chutes_proto.auth.signing import body_message
from chutes_proto.client.exchange import Exchange, Input, State, failure
from chutes_proto.client.retry import DEFAULT_RETRY, RetryPolicy, begin
from chutes_proto.effects import Flow, Log, MakeQuote, Send
from chutes_proto.errors import (
    LocalProtocolError,
    QuoteUnavailable,
    Refusal,
    RemoteProtocolError,
    TransportError,
)
from chutes_proto.log import Level, Record, Value
from chutes_proto.secret import Secret
from chutes_proto.wire import codec, endpoints, messages
from chutes_proto.wire.endpoints import Endpoint

A = TypeVar("A", bound=messages.Answer)

Signer = Callable[[bytes], bytes]
"""Signs a message with the hotkey (sr25519, Substrate context): message in, 64 bytes of signature out."""

_HEX_32 = re.compile(r"[0-9a-f]{64}")
_PRINTABLE = re.compile(r"[!-~]{1,128}")


# --- values ---


@frozen
class BootSettings:
    """Who boots: the hotkey that owns the VM, the VM's name, and the SHA-256 of its client key.

    ``spki_sha256`` is over the DER SubjectPublicKeyInfo of the client certificate that the driver's connections
    present. With a ``signer`` the attestation also proves the hotkey. Raises `LocalProtocolError` for values that no
    request could carry.
    """

    miner_hotkey: str
    vm_name: str
    spki_sha256: bytes
    signer: Signer | None = field(default=None, repr=False)
    retry: RetryPolicy = DEFAULT_RETRY

    def __attrs_post_init__(self) -> None:
        if not _PRINTABLE.fullmatch(self.miner_hotkey):
            raise LocalProtocolError("a hotkey is an SS58 address")
        if not re.fullmatch(messages.NAME_PATTERN, self.vm_name):
            raise LocalProtocolError(f"a VM's name has the form {messages.NAME_PATTERN}")
        if self.signer is not None:
            try:
                _ = Hotkey.parse(self.miner_hotkey)
            except HotkeyError as exc:
                raise LocalProtocolError(f"a signer needs a hotkey: {exc}") from None
        if len(self.spki_sha256) != hashlib.sha256().digest_size:
            raise LocalProtocolError("the digest of the client key is 32 bytes")


@frozen
class BootGrant:
    """What a verified boot is given. Exactly one of ``boot_token`` and ``luks_quote_nonce`` is there.

    ``boot_token`` opens one sync within 600 s; ``luks_quote_nonce`` is for images with the two-phase exchange.
    """

    miner_hotkey: str
    vm_name: str
    root_passphrase: Secret
    boot_token: Secret | None = None
    luks_quote_nonce: Secret | None = None


@frozen
class VolumeKeys:
    """A passphrase for each volume that was asked for, in that order.

    ``in_use`` are those whose disk is known to hold data: who finds a blank disk there must not format it.
    """

    passphrases: Mapping[str, Secret]
    in_use: frozenset[str]


# --- the whole exchange ---


def boot(settings: BootSettings) -> Flow[BootGrant]:
    """Attest until the server grants: nonce, quote, attestation, and all of it anew after a failure that may pass.

    Raises `Refused` or `BadRequest` at the first final answer, and, when attempts or time are used up, the last of
    `Unavailable`, `TransportError`, `RemoteProtocolError`, `QuoteUnavailable`.
    """
    grant: BootGrant = yield from _reach(Input.GRANT, _boot_steps(settings), settings.retry)
    return grant


def sync_volumes(
    grant: BootGrant,
    volumes: Sequence[str],
    rekey: Sequence[str] = (),
    formatted: Sequence[str] | None = None,
    *,
    retry: RetryPolicy = DEFAULT_RETRY,
) -> Flow[VolumeKeys]:
    """The passphrases of ``volumes``, which is the whole set of the VM's volumes; the server retires all others.

    ``rekey`` names those that must get a new passphrase because they are about to be formatted, ``formatted`` those
    that have a LUKS header. With None for ``formatted`` the server takes all that are not in ``rekey`` for formatted,
    and says of them from then on that they are in use.

    Raises as `boot` does; `Refused` with status 401 when the token is gone: a new boot may then begin.
    """
    sync = _sync_step(volumes, rekey, formatted)
    held: tuple[BootGrant, VolumeKeys] = yield from _reach(Input.KEYS, {State.TOKEN_HELD: sync}, retry, grant)
    return held[1]


def boot_and_sync(
    settings: BootSettings,
    volumes: Sequence[str],
    rekey: Sequence[str] = (),
    formatted: Sequence[str] | None = None,
    *,
    grant: BootGrant | None = None,
) -> Flow[tuple[BootGrant, VolumeKeys]]:
    """`boot` and `sync_volumes` in one, on one budget; begins with the sync where there is a ``grant``.

    When the token has died before a sync was answered, a new boot begins. Raises as `boot` does.
    """
    steps = {**_boot_steps(settings), State.TOKEN_HELD: _sync_step(volumes, rekey, formatted)}
    held: tuple[BootGrant, VolumeKeys] = yield from _reach(Input.KEYS, steps, settings.retry, grant)
    return held


def read_cache_passphrase(grant: BootGrant, *, retry: RetryPolicy = DEFAULT_RETRY) -> Flow[Secret]:
    """The passphrase of the server's first volume, as older images ask for it; the token is not spent.

    Raises as `sync_volumes` does; `Refused` with status 404 where no passphrase is kept.
    """
    passphrase: Secret = yield from _reach(Input.PASSPHRASE, {State.TOKEN_HELD: _read_step()}, retry, grant)
    return passphrase


# --- single steps ---


def fetch_nonce(settings: BootSettings) -> Flow[bytes]:
    """A fresh boot nonce of 32 bytes, bound to the settings' hotkey. Raises `Refusal`, `TransportError`."""
    request = messages.BootNonceRequest(miner_hotkey=settings.miner_hotkey)
    answer = yield from _ask(endpoints.BOOT_NONCE, request, messages.NonceAnswer)
    if not _HEX_32.fullmatch(answer.nonce):
        raise RemoteProtocolError("the server's nonce is not 64 lowercase hex digits")
    return bytes.fromhex(answer.nonce)


def make_quote(settings: BootSettings, nonce: bytes) -> Flow[bytes]:
    """A quote that binds the nonce and the client key. Raises `QuoteUnavailable`."""
    return (yield from MakeQuote(report_data(nonce, settings.spki_sha256)))


def attest_boot(settings: BootSettings, nonce: bytes, quote: bytes) -> Flow[BootGrant]:
    """Hand the quote in and receive the grant; the nonce is spent if, and only if, the server grants.

    Raises `Refusal`, `TransportError`, and `RemoteProtocolError` for an answer that is no whole grant.
    """
    message = messages.BootAttestationRequest(
        quote=codec.encode_quote(quote),
        vm_name=messages.Name(settings.vm_name),
        miner_hotkey=settings.miner_hotkey,
        nonce=nonce.hex(),
    )
    if settings.signer is not None:
        message = _signed(message, nonce, settings.signer)
    answer = yield from _ask(endpoints.BOOT_ATTESTATION, message, messages.BootAttestationAnswer)
    if (answer.boot_token is None) == (answer.luks_quote_nonce is None):
        raise RemoteProtocolError("the server's grant has both a boot token and a quote nonce, or neither")
    for opener in (answer.boot_token, answer.luks_quote_nonce):
        if opener is not None and not _HEX_32.fullmatch(opener.reveal().decode("ascii")):
            raise RemoteProtocolError("the server's boot token or quote nonce is not 64 lowercase hex digits")
    grant = BootGrant(settings.miner_hotkey, settings.vm_name, answer.key, answer.boot_token, answer.luks_quote_nonce)
    fields: dict[str, Value] = {"hotkey": grant.miner_hotkey, "vm_name": grant.vm_name}
    yield from Log(Record(Level.INFO, "grant_received", fields))
    return grant


# --- how a step is taken ---


@frozen
class _Step:
    """What is done in a state: ``take`` makes of what this state holds what the next one holds."""

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


def _sync_step(volumes: Sequence[str], rekey: Sequence[str], formatted: Sequence[str] | None) -> _Step:
    """Raises `LocalProtocolError`, before anything was sent, for what no server could answer."""
    asked = tuple(dict.fromkeys(volumes))
    if not asked or not {*rekey, *(formatted or ())} <= {*asked}:
        raise LocalProtocolError("volumes must not be empty, and rekey and formatted must be among them")

    def sync(grant: BootGrant) -> Flow[tuple[BootGrant, VolumeKeys]]:
        request = messages.VolumeSyncRequest(
            vm_name=messages.Name(grant.vm_name),
            hotkey=grant.miner_hotkey,
            boot_token=_token(grant),
            volumes=asked,
            rekey=tuple(rekey) or None,
            formatted=None if formatted is None else tuple(formatted),
        )
        answer = yield from _ask(endpoints.VOLUME_SYNC, request, messages.VolumeSyncAnswer)
        passphrases = dict(answer.passphrases)
        if {*passphrases} != {*asked} or not {*answer.in_use} <= {*asked}:
            raise RemoteProtocolError(f"the server's answer is not about exactly the volumes {', '.join(asked)}")
        keys = VolumeKeys({name: passphrases[name] for name in asked}, frozenset(answer.in_use))
        fields: dict[str, Value] = {"volumes": list(asked), "in_use": sorted(keys.in_use)}
        yield from Log(Record(Level.INFO, "volumes_received", fields))
        return grant, keys

    return _Step("sync", Input.KEYS, sync)


def _read_step() -> _Step:
    def read(grant: BootGrant) -> Flow[Secret]:
        request = messages.CachePassphraseRequest(
            vm_name=messages.Name(grant.vm_name), hotkey=grant.miner_hotkey, boot_token=_token(grant)
        )
        answer = yield from _ask(endpoints.CACHE_PASSPHRASE, request, messages.CachePassphraseAnswer)
        return answer.passphrase

    return _Step("passphrase", Input.PASSPHRASE, read)


def _reach(goal: Input, steps: Mapping[State, _Step], policy: RetryPolicy, grant: BootGrant | None = None) -> Flow[Any]:
    """Take step after step, as the exchange table says, until ``goal`` has happened; the reply is what it brought."""
    exchange = Exchange(State.START if grant is None else State.TOKEN_HELD)
    budget = yield from begin(policy)
    held: Any = grant
    while True:
        before = exchange.state
        step = steps[before]
        yield from budget.announce(step.name)
        try:
            brought = yield from step.take(held)
        except (Refusal, RemoteProtocolError, TransportError, QuoteUnavailable) as exc:
            error = exc
        else:
            _ = exchange.take(step.done)
            if step.done is goal:
                return brought
            held = brought
            continue
        hidden = held.boot_token if isinstance(held, BootGrant) else None
        if exchange.take(failure(before, error)) not in steps:
            yield from budget.give_up(step.name, error, hidden)
        yield from budget.pause(step.name, error, hidden)
        if exchange.state is not before:
            held = None  # a new attempt owes nothing to the one that failed


def _ask(endpoint: Endpoint, message: messages.Request, kind: type[A]) -> Flow[A]:
    """One request and its answer, which the endpoint table says is a ``kind``."""
    response = yield from Send(codec.encode_request(endpoint, message))
    return cast("A", codec.decode_answer(endpoint, response))


def _signed(message: messages.BootAttestationRequest, nonce: bytes, signer: Signer) -> messages.BootAttestationRequest:
    """The same message with the proof of its hotkey; the headers are not part of the body that is signed."""
    body = codec.encode_request(endpoints.BOOT_ATTESTATION, message).body
    signature = signer(body_message(Hotkey.parse(message.miner_hotkey), nonce.hex(), body))
    return attrs.evolve(message, hotkey=message.miner_hotkey, signature=signature.hex())


def _token(grant: BootGrant) -> str:
    if grant.boot_token is None:
        raise LocalProtocolError("this boot was granted the two-phase exchange, which has no boot token")
    return grant.boot_token.reveal().decode("ascii")
