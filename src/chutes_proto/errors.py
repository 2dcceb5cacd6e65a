"""The tree of errors, which a test compares with the classes::

    ChutesError
    ├── LocalProtocolError             the library was called wrongly
    │   └── ConfigurationError         a configuration file or option is wrong
    │       ├── FileUnavailable        … or cannot be read or written
    │       ├── HandoverRejected       … or the key hand-off of `agent run` is not valid now
    │       └── NotInMemory            … or would have a secret written to a disk
    ├── RemoteProtocolError            the peer's bytes are not the protocol
    │   └── UpstreamError              … or a collateral service's answer cannot be used
    ├── Refusal                        an answer of the server that is not a grant
    │   ├── BadRequest                 400, 405, 408, 413, 422, 431: the request itself
    │   ├── Refused                    401, 403, 404, 409: this caller, quote, token or name; final
    │   └── Unavailable                429, 5xx: retry later, after ``retry_after`` seconds
    ├── TransportError                 no answer; ``maybe_delivered`` says whether the request may have arrived
    ├── QuoteUnavailable               this machine cannot make a quote
    │   └── SignatureUnavailable       … or the program that signs gives no signature
    ├── CollateralUnavailable          no collateral for a platform
    ├── DiskError                      a disk cannot be used as it is
    │   └── HeaderRejected             … because of what its LUKS2 header says
    ├── BootInterrupted                a signal ended the boot
    ├── StoreError                     the store cannot do its work
    │   ├── FateUnknown                … and a change may have been committed or not
    │   ├── RowNotAuthentic            … because a row is not as a key server wrote it last
    │   ├── PurgedMeanwhile            … because a purge has deleted what was being exported
    │   └── StoreBusy                  … now; trying again may help
    │       └── StoreAway              … because it does not answer
    ├── KeyUnavailable                 a row is sealed under a KEK that is not available
    ├── SealBroken                     a sealed row does not open: altered, or another row's
    ├── LogError                       an entry, checkpoint or proof of the audit log does not verify
    ├── GpuError                       ``chutes_proto.gpu`` has its branches
    └── QuoteError                     ``chutes_proto.quote`` has its branches

The server raises a `Refusal` and answers with it; the client turns the answer back into an equal one. ``detail`` and
``code`` are for the peer, ``reason`` is for the operator only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self, cast

from chutes_proto._error import ChutesError
from chutes_proto.gpu._errors import GpuError
from chutes_proto.quote._errors import QuoteError, VerificationError
from chutes_proto.wire.codes import Code

__all__ = ["ChutesError", "ConfigurationError", "FileUnavailable", "LocalProtocolError", "NotInMemory"]
__all__ += ["BadRequest", "Refusal", "Refused", "RemoteProtocolError", "TransportError", "Unavailable", "UpstreamError"]
__all__ += ["BootInterrupted", "DiskError", "HandoverRejected", "HeaderRejected"]
__all__ += ["QuoteUnavailable", "SignatureUnavailable", "ValidationProblem", "refusal"]
__all__ += ["CollateralUnavailable", "GpuError", "KeyUnavailable", "QuoteError", "SealBroken"]
__all__ += ["FateUnknown", "PurgedMeanwhile", "RowNotAuthentic", "StoreAway", "StoreBusy", "StoreError"]
__all__ += ["LogError"]

ValidationProblem = dict[str, object]
"""One problem of a 422: ``{"type": str, "loc": list of str and int, "msg": str}``."""


class LocalProtocolError(ChutesError):
    """The library was called wrongly; the text says how to call it."""


class ConfigurationError(LocalProtocolError):
    """A configuration file or option is wrong; the text names the key and its legal values."""


class FileUnavailable(ConfigurationError):
    """A file cannot be read or written; the text names it and says what to do."""


class HandoverRejected(ConfigurationError):
    """The key hand-off from `agent run` to `agent resume` is not valid now: expired, of another boot, or altered."""


class NotInMemory(ConfigurationError):
    """A file for a secret would be on a disk, and the settings do not permit that."""


class RemoteProtocolError(ChutesError):
    """The peer's bytes do not follow the protocol."""


class UpstreamError(RemoteProtocolError):
    """A collateral service's answer cannot be used.

    ``unknown``: the service has nothing for this platform. ``retry_after``: the service asks for a pause of this many
    seconds, or None.
    """

    def __init__(self, message: str, *, unknown: bool = False, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.unknown = unknown
        self.retry_after = retry_after


class Refusal(ChutesError):
    """An answer of the server that is not a grant.

    ``status`` and ``code`` go on the wire with ``detail`` (a text, or the list of problems of a 422); ``reason`` is for
    the operator's log alone, and so is ``fault``, the verifier's own refusal. ``recorded``: the server's store keeps
    it, which bounds how many there can be. On the client's side ``reason`` repeats the text, and ``code`` is a plain
    string if the server is of another make or version.
    """

    def __init__(
        self,
        code: Code | str,
        detail: str | Sequence[ValidationProblem] | Mapping[str, object],
        *,
        reason: str = "",
        status: int | None = None,
        request_id: str | None = None,
        headers: Sequence[tuple[str, str]] = (),
    ) -> None:
        super().__init__(code, detail)
        if status is None:
            if not isinstance(code, Code):
                raise LocalProtocolError("a refusal with a code of another server needs a status; pass status=")
            status = code.status
        self.code = code
        self.detail = detail
        self.reason: str = reason or (detail if isinstance(detail, str) else str(list(detail)))
        self.status = status
        self.request_id = request_id
        self.headers: tuple[tuple[str, str], ...] = tuple(headers)
        self.recorded = False
        self.fault: VerificationError | None = None

    def because(self, fault: VerificationError) -> Self:
        """Note the refusal of the verifier that this one answers with."""
        self.fault = fault
        return self

    def __str__(self) -> str:
        match self.detail:
            case str(text):
                pass
            case Mapping():
                text = self.reason
            case problems:
                text = "; ".join(map(_problem_text, problems))
        suffix = f", request {self.request_id}" if self.request_id else ""
        return f"{text} ({self.status} {self.code}{suffix})"


class BadRequest(Refusal):
    """The request itself is wrong; sending it again will not help, unless it only arrived too slowly (408)."""


class Refused(Refusal):
    """The caller is refused; final for this request, quote, token or name."""


class Unavailable(Refusal):
    """A fault or a limit of the server: retry later, after ``retry_after`` seconds."""

    def __init__(
        self,
        code: Code | str,
        detail: str | Sequence[ValidationProblem],
        *,
        retry_after: int = 2,
        reason: str = "",
        status: int | None = None,
        request_id: str | None = None,
        headers: Sequence[tuple[str, str]] = (),
    ) -> None:
        super().__init__(code, detail, reason=reason, status=status, request_id=request_id, headers=headers)
        self.retry_after = retry_after


def refusal(
    status: int,
    code: Code | str,
    detail: str | Sequence[ValidationProblem],
    *,
    retry_after: int = 2,
    request_id: str | None = None,
) -> Refusal:
    """Make the refusal of an answer: the one rule of which status is which class."""
    if status >= 500 or status == 429:
        return Unavailable(code, detail, retry_after=retry_after, status=status, request_id=request_id)
    kind = Refused if status in (401, 403, 404, 409) else BadRequest
    return kind(code, detail, status=status, request_id=request_id)


class TransportError(ChutesError):
    """The request got no answer. ``maybe_delivered``: it may have reached the server and taken effect."""

    def __init__(self, message: str, *, maybe_delivered: bool) -> None:
        super().__init__(message)
        self.maybe_delivered = maybe_delivered


class QuoteUnavailable(ChutesError):
    """This machine cannot make a quote; the text says what was tried."""


class SignatureUnavailable(QuoteUnavailable):
    """The program that signs with the hotkey gives no signature; the text has its last output."""


class CollateralUnavailable(ChutesError):
    """No collateral for a platform is available, or none that verifies."""


class DiskError(ChutesError):
    """A disk cannot be used as it is, or a program failed on it; nothing on it was lost.

    ``reason`` is a stable word, ``device`` the disk's path; the text names it and says what to do.
    """

    def __init__(self, reason: str, text: str, device: str) -> None:
        super().__init__(f"{device}: {text}" if device else text)
        self.reason = reason
        self.device = device


class HeaderRejected(DiskError):
    """A LUKS2 header has content that is not allowed: ``found`` instead of ``expected``."""

    def __init__(self, reason: str, found: object, expected: object, device: str) -> None:
        super().__init__(reason, f"its LUKS2 header is refused ({reason}): found {found}, expected {expected}", device)
        self.found: str = str(found)
        self.expected: str = str(expected)


class BootInterrupted(ChutesError):
    """A signal ended the boot before it was done; the text names it."""


class StoreError(ChutesError):
    """The store cannot do its work."""


class RowNotAuthentic(StoreError):
    """A row of the store is not as a key server wrote it last: it was forged, changed, moved, deleted or rolled back.

    ``table`` and ``key`` name it; ``why`` says how that shows.
    """

    def __init__(self, table: str, key: str, why: str) -> None:
        super().__init__(table, key, why)
        self.table = table
        self.key = key
        self.why = why

    @property
    def finding(self) -> str:
        """The row and the fault, without advice."""
        return f"the row {self.key} of table {self.table} is not authentic: {self.why}"

    def __str__(self) -> str:
        return f"{self.finding}; run `chutes-proto store check`"


class FateUnknown(StoreError):
    """A commit was not answered: the change may have been committed or not."""


class PurgedMeanwhile(StoreError):
    """A purge deleted entries of the audit log that an export needs; a new export begins after them."""


class StoreBusy(StoreError):
    """The store cannot do its work now; a retry may succeed, and nothing was changed."""


class StoreAway(StoreBusy):
    """The store does not answer, and would not answer another caller now either; nothing was changed."""


class KeyUnavailable(ChutesError):
    """A row is sealed under a key-encryption key (KEK) that this process does not have."""


class SealBroken(ChutesError):
    """A sealed row does not open under its own key: its bytes were altered, or it is another row's."""


class LogError(ChutesError):
    """An entry, a checkpoint or a proof of the audit log does not verify, or is not one; the text says why."""


def _problem_text(problem: ValidationProblem) -> str:
    loc = problem.get("loc")
    where = ".".join(str(part) for part in cast("list[object]", loc)) if isinstance(loc, list) else str(loc)
    return f"{where}: {problem.get('msg')}"


def where_raised(exc: BaseException) -> str:
    """The type and the source lines of a defect, without its text: it could repeat a secret or a peer's input."""
    import traceback  # an agent, which starts in an initramfs, does without

    frames = traceback.extract_tb(exc.__traceback__)
    places = [f"{frame.filename.rpartition('chutes_proto')[2].lstrip('/')}:{frame.lineno}" for frame in frames[-4:]]
    return f"{type(exc).__name__} at {' < '.join(reversed(places))}"
