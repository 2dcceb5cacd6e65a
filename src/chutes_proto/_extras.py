"""Extras: the packages that each brings, and one line for one that is not installed."""

from __future__ import annotations

from typing import Final

_TLS: Final = ("h11", "OpenSSL")
_ASYNC: Final = ("anyio", "httpx", *_TLS)
EXTRAS: Final = {
    "cli": ("click", "yaml", "rich"),
    "tls": _TLS,
    "hotkey": ("sr25519",),
    "postgres": ("psycopg",),
    "metrics": ("prometheus_client",),
    "asyncio": _ASYNC,
    "trio": ("trio", *_ASYNC),
}
"""By extra: the modules that it brings. Of two with the same one, the smaller stands first."""


def missing(extra: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    """``error``, with the extra that brings the module."""
    return ModuleNotFoundError(f"{error.name} is not installed: pip install 'chutes-proto[{extra}]'", name=error.name)
