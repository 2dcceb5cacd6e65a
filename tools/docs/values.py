"""Shows griffe, which reads the API for the site, the fields of values: as the arguments of their class."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from griffe import Attribute, Class, Extension, Function, Module, Parameter, ParameterKind, Parameters

MAKERS = {"frozen", "define", "attrs.frozen", "attrs.define"}
BASES = {"Struct", "msgspec.Struct"}


class ValueFields(Extension):
    """Gives each attrs class and msgspec struct the ``__init__`` that it gets at run time."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Look at every class of a package that was read."""
        for found in _classes(pkg):
            if "__init__" not in found.members and _is_value(found):
                fields = [Parameter("self", kind=ParameterKind.positional_or_keyword), *_fields(found)]
                found.set_member("__init__", Function("__init__", parameters=Parameters(*fields)))


def _classes(module: Module) -> Iterator[Class]:
    for member in list(module.members.values()):
        if isinstance(member, Module):
            yield from _classes(member)
        elif isinstance(member, Class):
            yield member


def _is_value(found: Class) -> bool:
    return any(_makes_value(each) for each in (found, *found.mro()))


def _makes_value(found: Class) -> bool:
    made = {str(decorator.value).partition("(")[0] for decorator in found.decorators}
    return bool(made & MAKERS or {str(base).partition("(")[0] for base in found.bases} & BASES)


def _fields(found: Class) -> Iterator[Parameter]:
    """The fields of its bases first, as attrs and msgspec have them."""
    makers = [each for each in (*reversed(found.mro()), found) if _is_value(each)]
    named = any("kw_only=True" in str(decorator.value) for decorator in found.decorators)
    kind = ParameterKind.keyword_only if named else ParameterKind.positional_or_keyword
    for name, member in {name: member for each in makers for name, member in each.members.items()}.items():
        if not isinstance(member, Attribute) or member.annotation is None or "property" in member.labels:
            continue
        if str(member.annotation).startswith("ClassVar"):
            continue
        default = member.value
        if default is not None and "field(" in str(default):
            default = "..." if any(word in str(default) for word in ("default=", "factory=")) else None
        yield Parameter(name.lstrip("_"), annotation=member.annotation, kind=kind, default=default)
