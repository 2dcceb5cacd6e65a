"""Read a caller's configuration files (TOML, JSON): policies and measurement profiles.

Rules kept here:

* an unknown key is an error, so that a typo never switches a check off;
* nothing is coerced; every error is a `PolicyError` that names the key by its path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING, Any, Final, NewType, ParamSpec, TypeAlias, TypeVar

from chutes_proto._converter import (
    Hook,
    MismatchError,
    ProblemsError,
    StrictConverter,
    file_array,
    list_of,
    load_toml,
    string,
)
from chutes_proto.quote import _strict_json as strict_json
from chutes_proto.quote._arguments import BytesLike, as_utf8
from chutes_proto.quote._errors import PolicyError
from chutes_proto.quote._statements import TcbStatus

T = TypeVar("T")
P = ParamSpec("P")

MAX_SIZE: Final = 4 * 1024 * 1024


def read_toml(data: BytesLike | str) -> dict[str, object]:
    """The content of a TOML file, or of its text. Raises `PolicyError`."""
    data = as_utf8(data, "the bytes or text of a TOML file")
    if len(data) > MAX_SIZE:
        raise PolicyError(f"more than {MAX_SIZE} bytes of TOML")
    return within("", load_toml, data)


def within(where: str, read: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The result of ``read``. Raises `PolicyError`, in whose text the path begins with ``where``."""
    try:
        return read(*args, **kwargs)
    except (ProblemsError, PolicyError) as exc:
        raise PolicyError(": ".join(filter(None, (where, str(exc))))) from None


def _octets(value: object, _: object) -> bytes:
    if (octets := strict_json.digits(string(value))) is None:
        raise MismatchError("value_error", "must be hexadecimal digits")
    return octets


if TYPE_CHECKING:
    UnixTime: TypeAlias = int  # so that a typed program passes its own numbers
else:
    UnixTime = NewType("UnixTime", int)
"""Unix seconds; in a file a date, which begins at midnight UTC, or a time with its offset."""


def _time(value: object, _: object) -> UnixTime:
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise MismatchError("value_error", "must be a date, or a time with its offset from UTC")
        return UnixTime(int(value.timestamp()))
    if isinstance(value, date):
        return UnixTime(int(datetime(value.year, value.month, value.day, tzinfo=UTC).timestamp()))
    raise MismatchError("value_error", "must be a date like 2025-08-13, without quotes")


def file_converter(hooks: Mapping[Any, Hook] | None = None, names: Mapping[str, str] | None = None) -> StrictConverter:
    """A converter for such files: ``hooks`` and ``names`` as `StrictConverter` has them."""
    usual: dict[Any, Hook] = {bytes: _octets, UnixTime: _time, frozenset[TcbStatus]: _strings, frozenset[str]: _strings}
    return StrictConverter({**usual, **(hooks or {})}, own_file=True, refusal=PolicyError, names=names)


_strings: Final = list_of(string, file_array)
CONVERTER: Final = file_converter()
