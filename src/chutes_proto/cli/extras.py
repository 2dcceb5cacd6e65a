"""Extras: which of them brings a package that is not installed, said in one line."""

from __future__ import annotations

from importlib.util import find_spec

from chutes_proto._extras import EXTRAS
from chutes_proto.errors import ConfigurationError


def advice(extra: str) -> str:
    return f"this command needs the extra {extra}: pip install 'chutes-proto[{extra}]'"


def extra_of(module: str) -> str | None:
    """The smallest extra that brings a module, or None."""
    top = module.partition(".")[0]
    return next((extra for extra, modules in EXTRAS.items() if top in modules), None)


def need(extra: str) -> None:
    """Raise `ConfigurationError` unless everything of an extra is installed; for a command that uses all of it."""
    if any(find_spec(module) is None for module in EXTRAS[extra]):
        raise ConfigurationError(advice(extra))
