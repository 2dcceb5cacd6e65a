"""Operations as values, the places of a message's fields in a request, and shared codes.

The messages of the operations are values of attrs. Each field says where it travels (`path`, `query`, `header`,
`body`); the codec, the endpoint table, and the OpenAPI document read it from there and nowhere else. The order of an
answer's fields is the order of its JSON members.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from attrs import Attribute, Factory, field, frozen

from chutes_proto.wire.codes import Code

if TYPE_CHECKING:
    from attrs import AttrsInstance

Message: TypeAlias = "AttrsInstance"
"""A request, an answer, or a part of one."""

Coverage: TypeAlias = Literal["body", "purpose", "nonce"]
"""The least that an operation's signature covers: the body; only the purpose; the server's nonce with either."""

PARAMETER = re.compile(r"\{([a-z_]+)\}")

# --- fields of messages ---

PLACE = "place"
WIRE_NAME = "wire_name"
DESCRIPTION = "description"
DOCUMENTED_AS_REQUIRED = "documented_as_required"
AT_LEAST = "at_least"


def path(description: str) -> Any:
    """A segment of the path, always there."""
    return field(kw_only=True, metadata={PLACE: "path", DESCRIPTION: description})


def query(description: str, *, wire_name: str | None = None, required: bool = False) -> Any:
    """A query parameter. Its absence never fails the decoding: the operation decides whether it is an error.

    ``required`` is for the API's description only.
    """
    return _optional("query", description, wire_name, required)


def header(name: str, description: str, *, required: bool = False) -> Any:
    """A header field, like a `query` parameter. A ``repr`` shows none of them: some are secrets."""
    return _optional("header", description, name, required)


def body(description: str, *, at_least: int = 0, **options: Any) -> Any:
    """A member of the JSON body, mandatory unless it has a ``default``.

    ``at_least``, the fewest items, is for the API's description only.
    """
    return field(kw_only=True, metadata={PLACE: "body", DESCRIPTION: description, AT_LEAST: at_least}, **options)


def _optional(place: str, description: str, wire_name: str | None, required: bool) -> Any:
    metadata = {PLACE: place, DESCRIPTION: description, WIRE_NAME: wire_name, DOCUMENTED_AS_REQUIRED: required}
    return field(kw_only=True, default=None, repr=place != "header", metadata=metadata)


def wire_name(attribute: Attribute[Any]) -> str:
    """The name of a field on the wire."""
    name: str | None = attribute.metadata.get(WIRE_NAME)
    return name or attribute.name


def sole_field(kind: type[Any], form: Literal["LIST", "BYTES", "OBJECT"]) -> str | None:
    """The name of the one field that is a whole body on the wire; None for other messages.

    An answer may be a bare list, or bytes; a request an object whose members are not fields.
    """
    name: str | None = getattr(kind, form, None)
    return name


# --- operations ---


@frozen(eq=False)
class Endpoint:
    """One operation: its method and path (``target``), request, answer, and the codes of its refusals.

    Each operation is one object, so endpoints are compared by identity.

    ``purpose`` is the word that a signature covers which covers no more; ``refusal`` is the ``detail`` of refusals 403
    and 409 where it is not a text.
    """

    number: int
    operation: str
    target: str
    request: type[Message]
    answer: type[Message]
    summary: str
    codes: tuple[Code, ...] = ()
    authentication: str = "none"
    status: int = 200
    signed: Coverage | None = None
    body_bytes: int = 0
    """So large may a request's body be, whatever the server's usual limit is."""
    purpose: str = "tee"
    refusal: type[Message] | None = None
    method: str = field(init=False, default=Factory(lambda self: self.target.partition(" ")[0], takes_self=True))
    path: str = field(init=False, default=Factory(lambda self: self.target.partition(" ")[2], takes_self=True))
    parameters: tuple[str, ...] = field(
        init=False, default=Factory(lambda self: tuple(PARAMETER.findall(self.path)), takes_self=True)
    )
    """The names in braces in the path, in order."""


@frozen
class NonceAnswer:
    """A nonce, 64 lowercase hex digits, and when it expires (RFC 3339, UTC, whole seconds)."""

    nonce: str = body("32 bytes in lowercase hex")
    expires_at: str = body("when the nonce expires, RFC 3339 in UTC")


QUOTE_REFUSALS = (
    Code.NONCE_MISMATCH,
    Code.QUOTE_MALFORMED,
    Code.CERTIFICATE_MISMATCH,
    Code.QUOTE_REJECTED,
    Code.TCB_REJECTED,
    Code.ATTRIBUTES_REJECTED,
    Code.MEASUREMENT_MISMATCH,
    Code.PLATFORM_MISMATCH,
    Code.REVOKED,
    Code.COLLATERAL_UNAVAILABLE,
    Code.BUSY,
)
QUOTE_CODES = (*QUOTE_REFUSALS, Code.NONCE_INVALID, Code.CLIENT_CERTIFICATE_REQUIRED)
STORE_CODES = (Code.STORE_UNAVAILABLE, Code.KEY_UNAVAILABLE)
