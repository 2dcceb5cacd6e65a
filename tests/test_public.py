"""The public packages: what they export exists, is importable alone, and says its types."""

from __future__ import annotations

import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import attrs
import pytest

import chutes_proto.sync
import chutes_proto_asyncio
import chutes_proto_trio

PUBLIC = (
    "chutes_proto",
    *(f"chutes_proto.{name}" for name in "boot effects errors gpu log miner quote secret server".split()),
    *(f"chutes_proto.{name}" for name in "store sync testing testing.store_suite".split()),
    "chutes_proto_asyncio",
    "chutes_proto_trio",
)
SURFACE = Path(__file__).with_name("public_surface.txt")
EXPORTED = [(package, name) for package in PUBLIC for name in sorted(getattr(import_module(package), "__all__", ()))]


def callables(value: Any) -> Iterator[Any]:
    """The value, if it is ours and can be called, and for a class the public functions that are written in it."""
    if not getattr(value, "__module__", "").startswith("chutes_proto") or not callable(value):
        return
    yield value
    if inspect.isclass(value):
        if attrs.has(value):
            yield value.__init__
        for name, member in inspect.getmembers_static(value):
            if name.startswith("_") and not name.endswith("__"):
                continue
            function = inspect.unwrap(getattr(member, "fget", None) or getattr(member, "__func__", member))
            if inspect.isfunction(function) and "/chutes_proto" in function.__code__.co_filename:  # others are of attrs
                yield function


@pytest.mark.parametrize(("package", "name"), EXPORTED)
def test_each_public_callable_says_its_types(package: str, name: str) -> None:
    for each in callables(getattr(import_module(package), name)):
        _ = get_type_hints(each)


@pytest.mark.parametrize(("package", "name"), EXPORTED)
def test_the_signature_of_each_public_callable_can_be_read(package: str, name: str) -> None:
    """As `help` shows it: the bytes of a root certificate for a default would hide the parameters."""
    for each in callables(getattr(import_module(package), name)):
        if inspect.isfunction(each):
            assert "\\x" not in str(inspect.signature(each))


def test_other_modules_of_public_packages_begin_with_an_underscore() -> None:
    found: set[str] = set()
    for package in {*PUBLIC} - {"chutes_proto"}:
        paths = getattr(import_module(package), "__path__", ())
        found |= {module.name for module in pkgutil.walk_packages(paths, f"{package}.")}
    assert {name for name in found if "._" not in name} <= {*PUBLIC}


@pytest.mark.parametrize("package", PUBLIC)
def test_a_package_has_the_names_that_it_says_and_no_others(package: str) -> None:
    module = import_module(package)
    names = getattr(module, "__all__", ())
    assert {*names} <= {*dir(module)}
    assert len(dir(module)) == len({*dir(module)})
    assert all(getattr(module, name) is not None for name in names)
    with pytest.raises(AttributeError, match=f"'{package}' has no attribute 'nothing'"):
        _ = module.nothing


def test_the_public_surface_is_the_reviewed_one() -> None:
    """A new public name is a promise: it is added to the list by hand, where a reviewer sees it."""
    surface = [
        f"{package}: {name}" for package in PUBLIC for name in sorted(getattr(import_module(package), "__all__", ()))
    ]
    assert surface == SURFACE.read_text("utf-8").splitlines()


UNWANTED = {"BootAgent": "anyio httpx trio chutes_proto.miner", "MinerClient": "anyio httpx trio chutes_proto.luks"}


@pytest.mark.parametrize("name", list(UNWANTED))
def test_a_client_without_an_event_loop_loads_its_own_part_only(name: str) -> None:
    program = f"from chutes_proto.sync import {name}\nimport sys\nprint(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert {*UNWANTED[name].split()} & {*ended.stdout.split()} == set()


def test_both_loops_have_the_same_objects_under_the_same_names() -> None:
    assert chutes_proto_trio.__all__ == chutes_proto_asyncio.__all__
    for name in chutes_proto_trio.__all__:
        assert getattr(chutes_proto_trio, name) is getattr(chutes_proto_asyncio, name)


@pytest.mark.parametrize("name", ["BootAgent", "MinerClient"])
def test_all_clients_have_the_same_methods_and_arguments(name: str) -> None:
    without, on_a_loop = (arguments(getattr(package, name)) for package in (chutes_proto.sync, chutes_proto_trio))
    assert on_a_loop["__init__"].pop("client") == "httpx.AsyncClient | None"
    assert without == on_a_loop


def arguments(client: type) -> dict[str, dict[str, Any]]:
    """Each method's parameters with their types, as they are written."""
    return {
        name: {word: parameter.annotation for word, parameter in inspect.signature(method).parameters.items()}
        for name, method in inspect.getmembers(client, inspect.isfunction)
        if name == "__init__" or not name.startswith("_")
    }
