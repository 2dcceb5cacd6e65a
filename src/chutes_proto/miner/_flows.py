"""A miner's flows: register, list, rename and remove servers; attest at runtime, read the attestation status.

Rules kept here:

* each request is signed by the hotkey, over the bytes that are sent, when they are sent;
* no answer, 429 and 5xx are tried again, by the retry policy; a refusal is final. A refusal that the lost first attempt
  may have caused is not one: a registration that is found with the same content and of that time, and a removal of a
  server that is gone, are done. An attestation begins again, with a new nonce;
* no answer makes a flow send its request anywhere else: a redirect is an error.

All raise `Refusal`, `TransportError`, and `RemoteProtocolError` for an answer that is not the protocol;
`LocalProtocolError`, before anything is sent, for values that no request could carry.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Final, TypeAlias, TypeVar, cast

from attrs import evolve, field, frozen

from chutes_proto.auth.binding import report_data
from chutes_proto.auth.hotkey import Hotkey, HotkeyError
from chutes_proto.auth.signing import WINDOW, Signer, SigningPolicy, messages_to_sign, signature_headers
from chutes_proto.boot._retry import begin
from chutes_proto.boot._retry_policy import RetryPolicy
from chutes_proto.effects import CollectGpuEvidence, Flow, MakeQuote, Now, Send
from chutes_proto.errors import (
    LocalProtocolError,
    QuoteUnavailable,
    Refused,
    RemoteProtocolError,
    TransportError,
    Unavailable,
)
from chutes_proto.wire import codec, fleet, miners
from chutes_proto.wire.codes import Code
from chutes_proto.wire.endpoint import Endpoint, Message, NonceAnswer
from chutes_proto.wire.names import NAME_PATTERN, NAME_RULE, Name, hex_32

T = TypeVar("T")
A = TypeVar("A", bound=Message)

MINER_RETRY: Final = RetryPolicy(attempts=4, cap=10.0, deadline=60.0)
"""Retries for a person at a terminal, or a script: a minute at most."""

_WITHOUT_EFFECT: Final = frozenset(
    {Code.RATE_LIMITED, Code.BUSY, Code.DRAINING, Code.COLLATERAL_UNAVAILABLE, Code.KEY_UNAVAILABLE}
)
"""The codes of a server that has not begun the operation."""


Gpu: TypeAlias = miners.NodeArgs
"""One GPU of a server, as its owner declares it."""


def _parsed(address: str) -> Hotkey:
    try:
        return Hotkey.parse(address)
    except HotkeyError as exc:
        raise LocalProtocolError(f"a miner needs a hotkey: {exc}") from None


@frozen
class Miner:
    """A miner: its hotkey, from the SS58 address, and the signer that signs with it.

    The ``signer`` may be `HotkeyPair.sign`, or call any program that holds the key. With ``signatures="request"`` each
    signature is valid for one request only. ``retry`` applies to each flow by itself.
    """

    hotkey: Hotkey = field(converter=_parsed)
    signer: Signer = field(repr=False)
    signatures: SigningPolicy = "compatible"
    retry: RetryPolicy = MINER_RETRY


@frozen
class Server:
    """A registered server.

    ``host`` is the address or name that it was registered with. ``updated_at`` is None until the server is renamed.
    Times are aware.
    """

    server_id: str
    name: str
    host: str
    created_at: datetime
    updated_at: datetime | None


@frozen
class RuntimeAttestation:
    """An accepted runtime quote: an approved TD on the server's platform holds the client key.

    It does not say that the TD is the one that booted. ``attestation_id`` names the record in the key server's audit.
    """

    attestation_id: str
    verified_at: datetime


@frozen
class RuntimeVerdict:
    """The verdict on one runtime quote: ``error`` says why it was not accepted, and is None where it was."""

    attestation_id: str
    created_at: datetime
    error: str | None


@frozen
class AttestationStatus:
    """The ``last`` verdict on a server's runtime quotes, and whether it still counts; None before the first.

    ``is_fresh``: the last quote was accepted, so recently that the key server still counts it. ``age_seconds`` is by
    the key server's clock.
    """

    server_id: str
    name: str
    last: RuntimeVerdict | None
    is_fresh: bool
    age_seconds: int | None


def register_server(
    miner: Miner, *, server_id: str, host: str, gpus: Sequence[Gpu], name: str | None = None
) -> Flow[None]:
    """Register a server; without ``name`` its id is its name."""
    message = miners.RegisterServerRequest(
        host=host, id=_name(server_id), name=None if name is None else _name(name), gpus=tuple(gpus)
    )
    began = yield from Now()

    def attempt(lost: bool) -> Flow[None]:
        try:
            _ = yield from _ask(miner, miners.REGISTER_SERVER, message, miners.MessageAnswer)
        except Refused as exc:
            # It may be there already, since an answer was lost.
            if not lost or exc.code != Code.HOST_TAKEN or not (yield from _is_registered(miner, message, began)):
                raise

    yield from _persist(miner, miners.REGISTER_SERVER, attempt)


def list_servers(miner: Miner) -> Flow[tuple[Server, ...]]:
    """List the miner's servers, newest first."""
    request = miners.SignedRequest()
    answer = yield from _repeat(miner, miners.LIST_SERVERS, request, miners.ServerListAnswer)
    return tuple(_server(server, server.server_id) for server in answer.servers)


def rename_server(miner: Miner, server_id: str, name: str) -> Flow[Server]:
    """Give a server another name; the keys of its VM stay where they are."""
    request = miners.RenameServerRequest(server_id=_name(server_id), server_name=_name(name))
    answer = yield from _repeat(miner, miners.RENAME_SERVER, request, miners.RenamedServerAnswer)
    return _server(answer, server_id)


def read_server(miner: Miner, server_id: str) -> Flow[Server]:
    """Read one server."""
    request = miners.ServerRequest(server_id=_name(server_id))
    return _server((yield from _repeat(miner, miners.SERVER_DETAILS, request, miners.ServerDetailsAnswer)), server_id)


def remove_server(miner: Miner, name_or_id: str) -> Flow[str]:
    """Remove a server; returns its name, or ``name_or_id`` where an answer was lost and then the server was gone.

    The key server keeps the keys of its VM.
    """
    request = miners.RemoveServerRequest(server_name_or_id=_name(name_or_id))

    def attempt(lost: bool) -> Flow[str]:
        try:
            answer = yield from _ask(miner, miners.REMOVE_SERVER, request, miners.RemovedServerAnswer)
        except Refused as exc:
            if lost and exc.code == Code.SERVER_NOT_FOUND:
                return name_or_id
            raise
        return answer.name

    return (yield from _persist(miner, miners.REMOVE_SERVER, attempt))


def attest_server(
    miner: Miner, server_id: str, spki_sha256: bytes, *, with_gpus: bool = False
) -> Flow[RuntimeAttestation]:
    """Prove that an approved TD holds the client key whose SPKI has this SHA-256: nonce, quote, attestation.

    ``with_gpus`` sends evidence of the machine's GPUs over the same nonce, too. The connections must present that key's
    certificate. Raises `QuoteUnavailable`, too.
    """
    nonce_request = miners.ServerRequest(server_id=_name(server_id))

    def attempt(_: bool) -> Flow[RuntimeAttestation]:
        given = yield from _ask(miner, miners.RUNTIME_NONCE, nonce_request, NonceAnswer)
        nonce = bytes.fromhex(hex_32(given.nonce, "nonce"))
        quote = yield from MakeQuote(report_data(nonce, spki_sha256))
        gpus = _evidence((yield from CollectGpuEvidence(nonce))) if with_gpus else None
        request = miners.RuntimeAttestationRequest(
            server_id=_name(server_id), quote=codec.encode_quote(quote), gpu_evidence=gpus
        )
        kind = miners.RuntimeAttestationAnswer
        answer = yield from _ask(miner, miners.RUNTIME_ATTESTATION, request, kind, given.nonce)
        return RuntimeAttestation(answer.attestation_id, _time(answer.verified_at))

    return (yield from _persist(miner, miners.RUNTIME_ATTESTATION, attempt))


def _evidence(output: bytes) -> str:
    """The evidence in a tool's output: all of it, or its last line where tools report their progress before it."""
    try:
        text = output.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise QuoteUnavailable("the evidence of the GPUs is not text in UTF-8") from None
    last = text.rpartition("\n")[2]
    return last if last[:1] + last[-1:] in ("[]", "{}") else text


def read_status(miner: Miner, server_id: str) -> Flow[AttestationStatus]:
    """Read the newest verdict on a runtime quote of a server, and whether it still counts."""
    request = miners.ServerRequest(server_id=_name(server_id))
    answer = yield from _repeat(miner, miners.ATTESTATION_STATUS, request, miners.AttestationStatusAnswer)
    verdict: RuntimeVerdict | None = None
    if (last := answer.last_attestation) is not None:
        verdict = RuntimeVerdict(last.attestation_id, _time(last.created_at), last.verification_error)
    return AttestationStatus(answer.server_id, answer.name, verdict, answer.fresh, answer.age_seconds)


def _server(
    answer: miners.ServerAnswer | miners.ServerDetailsAnswer | miners.RenamedServerAnswer, server_id: str
) -> Server:
    updated_at = None if answer.updated_at is None else _time(answer.updated_at)
    return Server(server_id, answer.name, answer.ip, _time(answer.created_at), updated_at)


def _time(text: str) -> datetime:
    """Parse a time with its offset: without one it would count as this machine's local time."""
    try:
        if (time := datetime.fromisoformat(text)).tzinfo is not None:
            return time
    except ValueError:
        pass
    raise RemoteProtocolError(f"the server's answer has a time that is not RFC 3339: {text[:40]!r}")


def _is_registered(miner: Miner, message: miners.RegisterServerRequest, began: int) -> Flow[bool]:
    """Whether the miner has this server, registered since ``began`` as far as the two clocks may differ."""
    try:
        answer = yield from _ask(miner, fleet.INVENTORY, miners.SignedRequest(), fleet.InventoryAnswer)
    except Refused:
        return False
    name = message.id if message.name is None else message.name
    wanted = (message.id, name, message.host, sorted(gpu.uuid for gpu in message.gpus))
    return any(
        (one.server_id, one.name, one.ip, sorted(gpu.uuid for gpu in one.gpus)) == wanted
        and _time(one.created_at).timestamp() > began - WINDOW
        for one in answer.servers
    )


def _repeat(miner: Miner, endpoint: Endpoint, message: Message, kind: type[A]) -> Flow[A]:
    """Send a request that has the same effect when it is repeated."""
    return (yield from _persist(miner, endpoint, lambda _: _ask(miner, endpoint, message, kind)))


def _persist(miner: Miner, endpoint: Endpoint, attempt: Callable[[bool], Flow[T]]) -> Flow[T]:
    """Attempt until there is an answer; each attempt knows whether an earlier one may have had its effect."""
    budget = yield from begin(miner.retry, "request")
    lost = False
    while True:
        try:
            return (yield from attempt(lost))
        except (Unavailable, TransportError, RemoteProtocolError, QuoteUnavailable) as exc:
            lost = lost or _may_have_effect(exc)
            yield from budget.pause(endpoint.operation, exc)


def _may_have_effect(error: Exception) -> bool:
    if isinstance(error, TransportError):
        return error.maybe_delivered
    return not isinstance(error, Unavailable) or error.code not in _WITHOUT_EFFECT


def _ask(miner: Miner, endpoint: Endpoint, message: Message, kind: type[A], nonce: str | None = None) -> Flow[A]:
    """Send one signed request and decode its answer, which the endpoint table says is a ``kind``."""
    request = codec.encode_request(endpoint, message)
    if endpoint.signed is None:
        raise LocalProtocolError(f"{endpoint.operation} is not signed")
    nonce = nonce or str((yield from Now()))
    parts = (request.method, request.target, request.body, endpoint.purpose)
    signed, *_ = messages_to_sign(endpoint.signed, miner.signatures, miner.hotkey, nonce, *parts)
    headers = (*request.headers, *signature_headers(miner.hotkey, nonce, signed, miner.signer))
    response = yield from Send(evolve(request, headers=headers))
    return cast("A", codec.decode_answer(endpoint, response))


def _name(text: str) -> Name:
    if not re.fullmatch(NAME_PATTERN, text, re.ASCII):
        raise LocalProtocolError(f"the id or name of a server is {NAME_RULE}")
    return Name(text)
