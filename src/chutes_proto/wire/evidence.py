"""The exchange with the host of a server that registers, whose evidence is a quote and GPU evidence.

::

    GET https://{host}:30443/server/attest?nonce={64 hex}

The server signs ``{hotkey}:{unix seconds}:attest`` with a hotkey of its own, in the three headers of a signed request.
The answer may have the same three headers, of the hotkey that owns the host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from attrs import frozen

from chutes_proto.errors import RemoteProtocolError
from chutes_proto.wire import json

if TYPE_CHECKING:
    from chutes_proto.wire.http import HttpResponse

PORT: Final = 30443
PURPOSE: Final = "attest"
OWNER_PURPOSES: Final = ("attest", "tee")
"""The words of an owner's signature that are accepted: which one hosts send is not established.

A miner's tool signs requests to a key server with ``tee``, too. One that an attacker captured lets him show that
miner's hotkey from a host of his own, for as long as the nonce is fresh; and only that miner, whom the answer must
name, can register the host. So it gains the attacker nothing.
"""

_PROOF: Final = ("x-chutes-hotkey", "x-chutes-nonce", "x-chutes-signature")


@frozen
class HostEvidence:
    """``quote`` in base64; ``gpus``: the GPUs' evidence, JSON as the host's tool made it.

    ``owner`` are the texts of the headers that prove who owns the host: hotkey, nonce and signature, empty where one is
    missing; None without any.
    """

    quote: str
    gpus: str
    owner: tuple[str, str, str] | None = None


def evidence_target(nonce: bytes) -> str:
    """Make the target of the request."""
    return f"/server/attest?nonce={nonce.hex()}"


def decode_evidence(response: HttpResponse) -> HostEvidence:
    """Decode the evidence in an answer. Raises `RemoteProtocolError`, whose text repeats none of it."""
    if response.status != 200:
        raise RemoteProtocolError(f"the host answers {response.status}")
    try:
        match json.decode(response.body):
            case {"tdx_quote": str(quote), "nvtrust_evidence": str(gpus)}:
                _ = json.decode(gpus.encode())
            case _:
                raise RemoteProtocolError("the host's answer lacks the strings tdx_quote and nvtrust_evidence")
    except json.JsonError as exc:
        raise RemoteProtocolError(f"the host's answer is {exc}") from None
    hotkey, nonce, signature = (response.header(name) or "" for name in _PROOF)
    return HostEvidence(quote, gpus, (hotkey, nonce, signature) if hotkey or nonce or signature else None)
