"""Check of every test: none of its secrets is in a log record, an audit row, an error's text or its output.

A secret is the value of each `Secret` that looks like a passphrase, a token or a key in hex or base64. A match is 31 or
more of its characters in a row, anywhere and in either case. ``tests/scenario/test_canary.py`` checks the output of
other processes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from functools import wraps
from typing import Any

import pytest

from chutes_proto.errors import ChutesError, Refusal
from chutes_proto.log import Record
from chutes_proto.secret import Secret
from chutes_proto.store._rows import AuditRow

_MANY = 300_000
ON_PURPOSE = "told_on_purpose"
_WORD = re.compile(rb"[0-9A-Za-z+/=_-]{32,}")
_PART = 16
_RUN = re.compile(rb"[0-9a-z+/=_-]{%d,}" % _PART)
_VARIED = 5
"""A part of fewer characters than that, like one of zeros, is in many texts."""
_MADE: set[bytes] = set()
_KNOWN: set[bytes] = set()
"""The values whose parts are in `_MADE`: the same passphrase is opened again and again."""
_TOLD: list[str] = []


def look(where: str, *texts: object) -> None:
    """Remember where a part of a secret was told. This is called for every row and record of every test."""
    if not _MADE:
        return
    for text in texts:
        if text is None or isinstance(text, int) or len(told := str(text)) < _PART:
            continue
        for run in _RUN.findall(told.encode("utf-8", "replace").lower()):
            parts = _MADE.intersection([run[at : at + _PART] for at in range(0, len(run) - _PART + 1, _PART)])
            _TOLD.extend(where for part in parts if len(set(part)) >= _VARIED)


def _before(owner: type[Any], name: str, see: Callable[..., None]) -> None:
    """``see`` looks at what a method is called with."""
    method = getattr(owner, name)

    @wraps(method)
    def seeing(*arguments: Any, **named: Any) -> Any:
        see(*arguments, **named)
        return method(*arguments, **named)

    setattr(owner, name, seeing)


def _made(_: Secret, value: bytes) -> None:
    if value not in _KNOWN and _WORD.fullmatch(value):
        if len(_MADE) >= _MANY:
            _MADE.clear()
            _KNOWN.clear()
        _KNOWN.add(value)
        lower = bytes(value).lower()
        _MADE.update([lower[at : at + _PART] for at in range(len(lower) - _PART + 1)])


_before(Secret, "__init__", _made)
_before(Record, "__init__", lambda _, *told, **named: look("a log record", *told, *named.values()))
_before(AuditRow, "__init__", lambda _, *told, **named: look("an audit row", *told, *named.values()))
for _error in (ChutesError, Refusal):
    _before(_error, "__init__", lambda _, *told, **named: look("an error", *told, *named.values()))


@pytest.fixture
def told_on_purpose() -> None:
    """For a test that shows a secret on purpose."""


def pytest_runtest_logstart() -> None:
    """Each test has secrets of its own."""
    _MADE.clear()
    _KNOWN.clear()
    _TOLD.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that told a secret has failed, also where it is only in what was printed or logged."""
    report = yield
    if report.when == "call" and report.passed and ON_PURPOSE not in getattr(item, "fixturenames", ()):
        look("what was printed or logged", *(text for _, text in report.sections))
        if _TOLD:
            report.outcome = "failed"
            report.longrepr = f"a secret is in {', '.join(sorted(set(_TOLD)))}"
    return report
