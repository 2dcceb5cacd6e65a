"""Import a package's names when they are first used (PEP 562), so that importing the package costs nothing."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from importlib import import_module
from typing import Any


def lazily(package: MutableMapping[str, Any], modules: dict[str, str]) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a package, whose ``globals()`` are ``package``.

    ``modules`` has the names that come from each module, separated by spaces. The package imports them once more under
    ``if TYPE_CHECKING``, for type checkers, and lists them in its ``__all__``.
    """
    homes = {name: module for module, names in modules.items() for name in names.split()}

    def resolve(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package['__name__']!r} has no attribute {name!r}")
        package[name] = value = getattr(import_module(homes[name]), name)
        return value

    package["__dir__"] = lambda: [*{*package, *homes}]
    return resolve


class LazyModule:
    """A module that is imported at the first use of its names: for annotations, which only get_type_hints evaluates."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self._name), name)
