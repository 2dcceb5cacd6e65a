"""The tree of errors that ``chutes_proto.errors`` prints is the tree of classes."""

from __future__ import annotations

import importlib
import pkgutil
import re

import chutes_proto
from chutes_proto import ChutesError, errors

_NAME = re.compile(r"[│├└─ ]*(\w+)")


def printed_tree(docstring: str) -> dict[str, str]:
    """Name → name of the parent, of each line of the tree; a level is four columns."""
    block = docstring.partition("::\n\n")[2].partition("\n\n")[0]
    names = [match for line in block.splitlines() if (match := _NAME.match(line))]
    parents: dict[str, str] = {}
    path: list[str] = []
    for name in names:
        del path[(name.start(1) - names[0].start(1)) // 4 :]
        if path:
            parents[name[1]] = path[-1]
        path.append(name[1])
    return parents


def classes_below(root: type[ChutesError]) -> dict[str, str]:
    """Name → name of the parent, of each public class below ``root``, but not of those below the verifiers' roots."""
    found: dict[str, str] = {}
    for child in root.__subclasses__():
        if child.__module__.startswith("chutes_proto") and not child.__name__.startswith("_"):
            found[child.__name__] = root.__name__
            if child not in (errors.QuoteError, errors.GpuError):
                found |= classes_below(child)
    return found


def test_printed_tree_is_the_class_tree() -> None:
    for module in pkgutil.walk_packages(chutes_proto.__path__, "chutes_proto."):
        if not module.name.endswith("__main__"):
            _ = importlib.import_module(module.name)
    assert errors.__doc__ is not None
    assert printed_tree(errors.__doc__) == classes_below(ChutesError)


def test_every_printed_error_can_be_imported_from_there() -> None:
    assert errors.__doc__ is not None
    assert set(printed_tree(errors.__doc__)) <= set(errors.__all__)


def test_the_printed_tree_is_read_right() -> None:
    lines = ["A", "├── B     text", "│   ├── C", "│   │   └── D", "│   └── E", "└── F"]
    docstring = "x::\n\n" + "".join(f"    {line}\n" for line in lines) + "\nA"
    assert printed_tree(docstring) == {"B": "A", "C": "B", "D": "C", "E": "B", "F": "A"}
