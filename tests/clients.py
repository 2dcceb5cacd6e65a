"""Clients of three kinds under one text: without an event loop, on trio, on asyncio."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from types import ModuleType
from typing import Any

from attrs import frozen

import chutes_proto.sync
import chutes_proto_asyncio
import chutes_proto_trio
from tests.loops import on_loop

KINDS: dict[str, ModuleType] = {
    "sync": chutes_proto.sync,
    "trio": chutes_proto_trio,
    "asyncio": chutes_proto_asyncio,
}


@frozen
class Awaited:
    """A synchronous client whose methods are awaited, as those of the asynchronous ones."""

    client: Any

    async def __aenter__(self) -> Awaited:
        self.client.__enter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        self.client.__exit__(*error)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def call(*arguments: Any, **named: Any) -> Any:
            return getattr(self.client, name)(*arguments, **named)

        return call

    @asynccontextmanager
    async def rotate(self, *arguments: Any) -> AsyncIterator[Any]:
        with self.client.rotate(*arguments) as rotation:
            yield rotation


def make_client(kind: str, name: str, *arguments: Any, **options: Any) -> Any:
    """Make the client with this name, ``BootAgent`` or ``MinerClient``."""
    client = getattr(KINDS[kind], name)(*arguments, **options)
    return Awaited(client) if kind == "sync" else client


def run(kind: str, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Run ``work`` on the loop of that kind; what a synchronous client does needs none."""
    return without_loop(work()) if kind == "sync" else on_loop(kind, work)


def without_loop(work: Coroutine[Any, Any, Any]) -> Any:
    try:
        work.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it waits for an event loop")
