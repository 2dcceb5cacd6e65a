"""No test sleeps in the hope that something has happened by then, and none starts a loop that its runner could start.

Every call of a ``sleep``, every wait of less than a second and every call of a loop's ``run`` is listed here, with its
reason. Before you add one, wait for an event with `tests.waiting`, and mark an ``async def`` test ``trio`` or, for both
loops, ``anyio``. A program that a test writes may sleep: it is a slow peer. Such programs are texts and are not looked
at.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.no_cover  # only texts are looked at

TESTS = Path(__file__).resolve().parent

SLEEPS = {
    "cluster/load.py:Fleet.deployed_boot": "the schedule of a deployed client",
    "cluster/load.py:Fleet.live": "how often a VM boots",
    "cluster/load.py:Probe._commit_on": "how often each node is asked",
    "cluster/test_patroni.py:Siege._behind": "for how long the standbys are cut off",
    "cluster/test_patroni.py:Siege.befall": "for how long a fault lasts",
    "collateral/network.py:slow": "a service that is slow on purpose",
    "slow_peer.py:drip": "a peer that is slow on purpose",
    "store/test_postgres_silent.py:Proxy._pump": "a database that is slow on purpose",
    "store/test_suite.py:LastWriterWins.transact": "a store whose transactions overlap: that is its fault",
    "transport/test_asgi.py:ask.receive": "a server that brings a body slowly; the clock jumps",
    "transport/test_servers.py:test_deadlines_of_silent_and_slow_peers": "a peer that is slow on purpose",
    "waiting.py:async_wait_until": "the pause between two looks at what is waited for",
    "waiting.py:wait_until": "the pause between two looks at what is waited for",
}
SHORT_WAITS = {
    "io/test_quoters.py:dripping.serve": "a peer that is slow on purpose, until the test ends",
    "scenario/premises.py:Watch._look": "how often processes are looked at",
    "transport/test_servers.py:test_a_connection_waits_for_its_slot": "a handshake that is too early shows",
}
"""Waits for what must not happen fail only if it does: on a slow machine they may see less, and are never wrong."""
RUNS = {
    "cluster/load.py:": "a program in a network namespace",
    "loops.py:on_loop": "for what is on a loop or without any, under one text",
    "server/test_embedding.py:_served": "`serve` as a program runs it",
    "server/test_embedding.py:_served_on_asyncio": "`serve` as a program runs it",
    "store/test_turns.py:test_work_may_end_after_its_loop": "for what is left when a loop has ended",
}


def calls(node: ast.AST, where: tuple[str, ...] = ()) -> Iterator[tuple[str, ast.Call]]:
    """Every call, and in which function it is."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        where = (*where, node.name)
    if isinstance(node, ast.Call):
        yield ".".join(where), node
    for child in ast.iter_child_nodes(node):
        yield from calls(child, where)


@cache
def all_calls() -> list[tuple[str, ast.Call]]:
    return [
        (f"{path.relative_to(TESTS)}:{where}", call)
        for path in TESTS.rglob("*.py")
        for where, call in calls(ast.parse(path.read_bytes()))
    ]


def found(is_looked_for: Callable[[ast.Call], bool]) -> set[str]:
    """The functions of all tests with such a call."""
    return {where for where, call in all_calls() if is_looked_for(call)}


def called(call: ast.Call) -> str:
    """The name of a function, with that of its module where there is one."""
    match call.func:
        case ast.Name(name):
            return name
        case ast.Attribute(ast.Name(module), name):
            return f"{module}.{name}"
        case ast.Attribute(_, name):
            return f"?.{name}"
        case _:
            return ""


def is_sleep(call: ast.Call) -> bool:
    return called(call) in ("sleep", "time.sleep", "anyio.sleep", "trio.sleep", "asyncio.sleep")


def is_short_wait(call: ast.Call) -> bool:
    name = called(call).rpartition(".")[2]
    given = (*call.args, *(keyword.value for keyword in call.keywords))
    return name in ("wait", "join", "result", "move_on_after", "fail_after") and any(
        isinstance(value, ast.Constant) and isinstance(value.value, int | float) and 0 < value.value < 1
        for value in given
    )


def is_run(call: ast.Call) -> bool:
    return called(call) in ("anyio.run", "trio.run", "asyncio.run")


def test_each_sleep_is_reviewed() -> None:
    assert found(is_sleep) == set(SLEEPS)


def test_each_short_wait_is_reviewed() -> None:
    assert found(is_short_wait) == set(SHORT_WAITS)


def test_each_loop_is_started_by_the_runner() -> None:
    assert found(is_run) == set(RUNS)
