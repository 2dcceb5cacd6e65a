"""No test sleeps in the hope that something has happened by then, and none starts a loop that its runner could start.

Every call of a ``sleep`` and of a loop's ``run`` is listed here, with its reason. Before you add one, wait for an event
with `tests.waiting`, and mark an ``async def`` test ``trio`` or, for both loops, ``anyio``. A program that a test
writes may sleep: it is a slow peer. Such programs are texts and are not looked at.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parent

SLEEPS = {
    "cluster/load.py:Fleet.deployed_boot": "the schedule of a deployed client",
    "cluster/load.py:Fleet.live": "how often a VM boots",
    "cluster/load.py:Probe._commit_on": "how often each node is asked",
    "cluster/test_patroni.py:Siege._behind": "for how long the standbys are cut off",
    "cluster/test_patroni.py:Siege.befall": "for how long a fault lasts",
    "collateral/network.py:slow": "a service that is slow on purpose",
    "slow_peer.py:drip": "a peer that is slow on purpose",
    "store/test_suite.py:LastWriterWins.transact": "a store whose transactions overlap: that is its fault",
    "transport/test_asgi.py:ask.receive": "a server that brings a body slowly; the clock jumps",
    "transport/test_servers.py:test_deadlines_of_silent_and_slow_peers": "a peer that is slow on purpose",
    "waiting.py:async_wait_until": "the pause between two looks at what is waited for",
    "waiting.py:wait_until": "the pause between two looks at what is waited for",
}
RUNS = {
    "cluster/load.py:": "a program in a network namespace",
    "loops.py:on_loop": "for what is on a loop or without any, under one text",
    "server/test_embedding.py:_served": "`serve` as a program runs it",
    "server/test_embedding.py:_served_on_asyncio": "`serve` as a program runs it",
}


def calls(node: ast.AST, where: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Every call: in which function, and of what."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        where = (*where, node.name)
    if isinstance(node, ast.Call):
        yield ".".join(where), ast.unparse(node.func)
    for child in ast.iter_child_nodes(node):
        yield from calls(child, where)


def found(*names: str) -> set[str]:
    """The functions of all tests that call one of these."""
    return {
        f"{path.relative_to(TESTS)}:{where}"
        for path in TESTS.rglob("*.py")
        for where, called in calls(ast.parse(path.read_bytes()))
        if called in names
    }


def test_each_sleep_is_reviewed() -> None:
    assert found("sleep", "time.sleep", "anyio.sleep", "trio.sleep", "asyncio.sleep") == set(SLEEPS)


def test_each_loop_is_started_by_the_runner() -> None:
    assert found("anyio.run", "trio.run", "asyncio.run") == set(RUNS)
