"""The address of a database in PostgreSQL: a URL of libpq's, with our defaults, and a name without a password."""

from __future__ import annotations

import re
from typing import Any, Final

import psycopg
from psycopg import conninfo

from chutes_proto.errors import ConfigurationError

DEFAULTS: Final[dict[str, str]] = {
    "connect_timeout": "2",  # for each host: those that do not answer must leave time for the one that does
    "target_session_attrs": "read-write",  # of several hosts, the one that can write
    # A dead host is noticed, both while data is sent and while an answer is awaited.
    "tcp_user_timeout": "10000",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "application_name": "chutes-proto",
}
"""Settings of a connection, unless the URL has others."""

_URL: Final = re.compile(r"postgres(ql)?://([^/@]*+@)?+[^/@?]*(/[^@?]*)?(\?.*)?", re.DOTALL)
"""No ``@`` but the one before the host: with any other, a password was not percent-encoded, and libpq would show parts
of it as names and port."""

_FILES: Final = frozenset({"passfile", "sslcert", "sslkey", "sslrootcert", "sslcrl", "sslcrldir"})
"""Options with paths, which libpq resolves from the working directory."""


def name_of(url: str) -> str:
    """Return the name of the database at ``url``, without a password. Raises `ConfigurationError`."""
    return parse(url)[1]


def has_secret(url: str) -> bool:
    """Return whether ``url`` has a secret to log in with, in any spelling. Raises `ConfigurationError`."""
    _ = parse(url)
    given = (option for option in psycopg.pq.Conninfo.parse(url.encode()) if option.val)
    # libpq marks with * what is a password, but not the SCRAM keys, which are as good as one.
    return any(option.dispchar == b"*" or option.keyword.startswith(b"scram_") for option in given)


def parse(url: str) -> tuple[str, str]:
    """Return libpq's form of ``url``, and its name: user, host, port and database, without a password."""
    try:
        if not _URL.fullmatch(url):
            raise ValueError(url)
        given: dict[str, Any] = conninfo.conninfo_to_dict(url)
        if not re.fullmatch(r"[0-9,]*", str(given.get("port", ""))):
            raise ValueError(url)
        full = conninfo.make_conninfo("", **{**DEFAULTS, **given, "client_encoding": "UTF8"})
    except (psycopg.Error, ValueError):  # their text may quote the password
        raise ConfigurationError(
            'not a PostgreSQL URL; say "postgresql://user@host/database", and percent-encode a password:'
            " %40 for @, %2F for /, %3F for ?, %25 for %"
        ) from None
    named = {name: str(given[name]) for name in _FILES & given.keys()}
    if relative := sorted(name for name, path in named.items() if path not in ("", "system") and path[0] != "/"):
        raise ConfigurationError(f"{', '.join(relative)}: say the whole path, from / on")
    user = f"{given['user']}@" if "user" in given else ""
    place, port = str(given.get("host", "")), str(given.get("port", ""))
    hosts, ports = place.split(","), port.split(",")
    if len(hosts) == len(ports):  # libpq gives the ports of several hosts in a list of their own
        place = ",".join(f"{host}:{number}" if number else host for host, number in zip(hosts, ports, strict=True))
    elif port:
        place += f":{port}"
    return full, f"postgresql://{user}{place}/{given.get('dbname', '')}"
