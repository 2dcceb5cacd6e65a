"""A server's origin, from the one form of URL that a client accepts; and the paths of unix sockets."""

from __future__ import annotations

import re
from typing import Final, cast

from attrs import frozen

from chutes_proto.errors import ConfigurationError, LocalProtocolError

_NAME: Final = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?"
_ORIGIN: Final = re.compile(rf"https://(?:({_NAME})|\[([0-9A-Fa-f:.]+)\])(?::([0-9]{{1,5}}))?/?", re.IGNORECASE)
_PORT: Final = 443
_LONGEST_PATH: Final = 107  # unix(7): sun_path has 108 bytes, of which the last is a NUL


@frozen
class Origin:
    """A server: a host name or IP address, and a port."""

    host: str
    port: int

    @classmethod
    def parse(cls, url: str) -> Origin:
        """Parse ``https://host`` or ``https://host:port``. Raises `LocalProtocolError` for anything else."""
        match = _ORIGIN.fullmatch(url) if isinstance(cast("object", url), str) else None
        port = int(match[3] or _PORT) if match else 0
        if match is None or not 0 < port < 1 << 16:
            raise LocalProtocolError("a server's URL has the form https://host:port")
        return cls((match[1] or match[2]).lower(), port)

    @property
    def name(self) -> bytes:
        """The host in ASCII bytes: a text would be encoded with tables that no ASCII name needs."""
        return self.host.encode("ascii")

    @property
    def authority(self) -> str:
        """The value of the header ``Host``."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORT else f"{host}:{self.port}"


def check_socket_path(path: str) -> str:
    """Check that a unix socket in the file system can have this path. Raises `ConfigurationError`."""
    try:
        size = len(path.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        size = 0
    if not 0 < size <= _LONGEST_PATH or "\0" in path:
        raise ConfigurationError(f"the path of a unix socket has 1 to {_LONGEST_PATH} bytes, none of them NUL")
    return path
