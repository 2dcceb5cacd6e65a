"""The tree of errors that ``chutes_proto.errors`` prints is the tree of classes."""

from __future__ import annotations

import copy
import importlib
import pickle
import pkgutil
import re
from collections.abc import Callable, Iterator
from typing import Final

import pytest

import chutes_proto
from chutes_proto import ChutesError, errors
from chutes_proto.gpu import EvidenceRefusedError, GpuRefusal
from chutes_proto.gpu._steps import GpuAppraisalError, MeasurementMismatchError
from chutes_proto.quote import AppraisalError, EventLogMismatchError, QuoteFormatError, Refusal
from chutes_proto.quote._steps import ReportDataMismatchError
from chutes_proto.quote._strict_json import JsonError

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


def import_all() -> None:
    for module in pkgutil.walk_packages(chutes_proto.__path__, "chutes_proto."):
        if not module.name.endswith("__main__"):
            _ = importlib.import_module(module.name)


def test_printed_tree_is_the_class_tree() -> None:
    import_all()
    assert errors.__doc__ is not None
    assert printed_tree(errors.__doc__) == classes_below(ChutesError)


def test_every_printed_error_can_be_imported_from_there() -> None:
    assert errors.__doc__ is not None
    assert set(printed_tree(errors.__doc__)) <= set(errors.__all__)


def test_the_printed_tree_is_read_right() -> None:
    lines = ["A", "├── B     text", "│   ├── C", "│   │   └── D", "│   └── E", "└── F"]
    docstring = "x::\n\n" + "".join(f"    {line}\n" for line in lines) + "\nA"
    assert printed_tree(docstring) == {"B": "A", "C": "B", "D": "C", "E": "B", "F": "A"}


# --- copies ---

EACH: Final[list[ChutesError]] = [
    errors.UpstreamError("busy", unknown=True, retry_after=3),
    errors.Refused("teapot", "no", status=403, reason="why", request_id="1", headers=[("a", "b")]),
    errors.Unavailable("teapot", "later", status=503, retry_after=7),
    errors.TransportError("no answer", maybe_delivered=True),
    errors.HeaderRejected("keyslots", 9, 8, "/dev/vdb"),
    errors.RowNotAuthentic("boots", "1", "its MAC does not verify"),
    QuoteFormatError("quote_version", "version 3", got=3, expected="4 or 5"),
    ReportDataMismatchError("quote", "differs", got=b"1", expected=b"2"),
    AppraisalError([Refusal("tcb", "tcb_status", "too old")], [1, 2], nearest="image 1", stage="boot"),
    EventLogMismatchError(("RTMR1", "RTMR2"), b"1", b"2"),
    JsonError("a member twice", "tcbInfo"),
    MeasurementMismatchError([]),
    EvidenceRefusedError(GpuAppraisalError([GpuRefusal("mode", "no", "PPCIE", "SPT")]), []),
]
"""An error of each class with arguments of its own, or of a class below it."""


def below(root: type[ChutesError]) -> Iterator[type[ChutesError]]:
    for child in root.__subclasses__():
        yield child
        yield from below(child)


def test_each_class_with_arguments_of_its_own_is_copied_here() -> None:
    import_all()
    with_arguments = {kind for kind in below(ChutesError) if "__init__" in vars(kind)}
    errors_in_errors = {type(value) for error in EACH for value in vars(error).values()}
    assert with_arguments <= {base for kind in {*map(type, EACH), *errors_in_errors} for base in kind.__mro__}


def _pickled(error: ChutesError) -> ChutesError:
    made: ChutesError = pickle.loads(pickle.dumps(error))
    return made


@pytest.mark.parametrize("error", EACH, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("copied", [_pickled, copy.copy, copy.deepcopy])
def test_an_error_comes_whole_out_of_another_process(
    copied: Callable[[ChutesError], ChutesError], error: ChutesError
) -> None:
    """A pool of processes ends when it cannot read the refusal that a worker raises."""
    made = copied(error)
    assert type(made) is type(error)
    assert str(made) == str(error)
    assert made.args == error.args
    assert str(vars(made)) == str(vars(error))
