"""Validity of each piece, from its begin to its end in unix seconds, both inclusive (RFC 5280, 4.1.2.5).

Times are integers: a NaN is before no begin and past no end. `check_seconds` refuses what is not one, wherever a caller
gives a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Final, TypeAlias, cast

from msgspec import Struct

from chutes_proto.quote import _steps as steps
from chutes_proto.quote._errors import VerificationError

Window: TypeAlias = tuple[int, int]

NOT_YET_VALID: Final = "not yet valid; is the time right?"
"""The problem of a piece that begins in the future: what was just fetched does so where the clock is behind."""

_LAST: Final = 253_402_300_799  # 9999-12-31T23:59:59Z, the last time that a certificate can say


class Term(Struct, frozen=True):
    """The validity of one piece: a certificate, or a CRL or statement, which Intel renews every few weeks.

    ``begin`` and ``end`` are unix seconds, both inclusive.
    """

    subject: str
    begin: int
    end: int
    is_certificate: bool = False


def check_terms(terms: Iterable[Term], now: int, grace: int = 0) -> None:
    """Check validity (steps 9, 10, 19 and 20); ``grace`` seconds are added to every end but a certificate's.

    Raises `VerificationError`; `TypeError` unless ``now`` and ``grace`` are integers; `ValueError` for a negative
    grace.
    """
    check_seconds("now", now)
    check_duration("grace", grace)
    step: type[VerificationError]
    for term in terms:
        if now < term.begin:  # 9, 19
            step = steps.CertificateNotYetValidError if term.is_certificate else steps.CollateralNotYetValidError
            raise step(term.subject, NOT_YET_VALID, got=rfc3339(now), expected=f"at least {rfc3339(term.begin)}")
        end = term.end if term.is_certificate else term.end + grace
        if now > end:  # 10, 20
            step = steps.CertificateExpiredError if term.is_certificate else steps.CollateralExpiredError
            raise step(term.subject, "expired", got=rfc3339(now), expected=f"at most {rfc3339(end)}")


def check_seconds(name: str, value: object) -> None:
    """Check that a time is an integer, which a bool is not. Raises `TypeError`."""
    if type(value) is not int:
        raise TypeError(f"{name}: must be an int, in whole seconds, not {value!r}")


def check_duration(name: str, value: object) -> None:
    """Check that it is so many seconds. Raises `TypeError`, and `ValueError` for fewer than none."""
    check_seconds(name, value)
    if cast("int", value) < 0:
        raise ValueError(f"{name}: must not be negative, not {value}")


def rfc3339(time: int) -> str:
    """Format a time for people (RFC 3339, section 5.6); one that no date has, such as one in milliseconds, as it is."""
    if not 0 <= time <= _LAST:
        return f"{time} s after 1970"
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def window(terms: Iterable[Term], grace: int = 0) -> Window:
    """The time in which all the pieces are valid."""
    terms = tuple(terms)
    ends = [term.end if term.is_certificate else term.end + grace for term in terms]
    return max([term.begin for term in terms]), min(ends)
