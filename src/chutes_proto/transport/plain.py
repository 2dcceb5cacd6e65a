"""Plain requests, read at once: a narrow reader before h11, which reads all others.

Almost every request of a boot is plain, and is read here in a small part of the time. This reader decides nothing: what
it takes, h11 and the checks of ``h1.py`` take too, and make the same request of it. Whatever is unusual or not whole it
leaves as it is. Tests hold it against h11 (``tests/transport/test_h1.py``, and the fuzz target ``http``).
"""

from __future__ import annotations

import re
from typing import Final

from chutes_proto.wire.http import Headers

_HEAD: Final = re.compile(  # possessive, so that the time is proportional to the size
    rb"(GET|POST) (/[!-~]*+) HTTP/1\.1\r\n((?:[-!#$%&'*+.^_`|~0-9A-Za-z]++:[ \t]*+[!-~][ \t!-~]*+\r\n)++)\r\n"
)
_FIELD: Final = re.compile(r"([^:]++):([^\r]*+)\r\n")
_LENGTH: Final = re.compile("0|[1-9][0-9]{0,7}")
_UNUSUAL: Final = frozenset({"connection", "expect", "te", "trailer", "transfer-encoding", "upgrade"})
"""Headers that change how a request, its body or its connection ends."""


def take_plain(data: bytearray, head_bytes: int, body_bytes: int) -> tuple[str, str, Headers, bytes] | None:
    """Take a plain request from the front of ``data``: method, target, headers and body. None: h11 has to read it.

    A plain request is whole and within the limits: GET or POST, an origin-form target and HTTP/1.1; headers of
    printable ASCII, one Host, at most one length, in plain decimal, and none that change where the request ends.
    """
    end = data.find(b"\r\n\r\n", 0, head_bytes) + 4
    found = _HEAD.fullmatch(bytes(data[:end])) if end > 4 else None
    if found is None:
        return None
    fields: list[tuple[str, str]] = _FIELD.findall(found[3].decode("ascii"))
    headers = tuple([(name.lower(), value.strip(" \t")) for name, value in fields])
    names = [name for name, _ in headers]
    if names.count("host") != 1 or names.count("content-length") > 1 or not _UNUSUAL.isdisjoint(names):
        return None
    length = dict(headers).get("content-length", "0")
    if not _LENGTH.fullmatch(length):
        return None
    size = int(length)
    if size > body_bytes or len(data) < end + size:
        return None
    body = bytes(data[end : end + size])
    del data[: end + size]
    return found[1].decode("ascii"), found[2].decode("ascii"), headers, body
