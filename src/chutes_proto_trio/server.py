"""The key server on trio: it accepts connections, moves their bytes and runs the flows of their requests.

Nothing is decided here: `ServerConnection` says when to wait and for how long, the application what to answer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import trio

from chutes_proto.effects import Log
from chutes_proto.log import Level, Record
from chutes_proto.transport.h1 import (
    DEFAULT_LIMITS,
    READ_SIZE,
    Application,
    Limits,
    ServerConnection,
    peer_address,
)
from chutes_proto.transport.tls import ServerContext, TlsSession
from chutes_proto.wire.http import HttpRequest, HttpResponse, MalformedRequest
from chutes_proto_trio.perform import Performer


async def serve(
    listeners: Sequence[trio.SocketListener],
    app: Application,
    performer: Performer,
    context: Callable[[], ServerContext],
    *,
    limits: Limits = DEFAULT_LIMITS,
    connections: int = 1024,
) -> None:
    """Serve until cancelled.

    ``context`` is asked at each connection, so that a certificate can be replaced while serving. At most
    ``connections`` are open at once; more wait in the listeners' queues.
    """
    slots = trio.Semaphore(connections)

    async def handle(stream: trio.SocketStream) -> None:
        try:
            await _serve_stream(stream, app, performer, context, limits)
        finally:
            slots.release()

    await trio.serve_listeners(handle, [_Bounded(listener, slots) for listener in listeners])


async def serve_connection(
    stream: trio.abc.Stream,
    connection: ServerConnection,
    answer: Callable[[HttpRequest | MalformedRequest], Awaitable[HttpResponse]],
) -> None:
    """Move the bytes of one connection until it is closed. What the stream raises, and ``answer``, comes out."""
    while not connection.closed:
        request = connection.next_request(trio.current_time())
        if request is not None:
            connection.send_response(await answer(request), trio.current_time())
        with trio.move_on_at(connection.deadline) as waiting:
            if data := connection.data_to_send():
                await stream.send_all(data)
            elif not connection.closed:
                connection.receive_data(bytes(await stream.receive_some(READ_SIZE)), trio.current_time())
        if waiting.cancelled_caught:
            connection.expire(trio.current_time())


async def _serve_stream(
    stream: trio.SocketStream,
    app: Application,
    performer: Performer,
    context: Callable[[], ServerContext],
    limits: Limits,
) -> None:
    """One connection. Its faults end it and nothing else."""

    async def answer(request: HttpRequest | MalformedRequest) -> HttpResponse:
        return await performer.run(app.handle(request))

    try:
        async with stream:
            peer = peer_address(stream.socket.getpeername())
            tls = TlsSession(context())
            connection = ServerConnection(trio.current_time(), tls=tls, limits=limits, peer_address=peer)
            await serve_connection(stream, connection, answer)
    except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
        pass  # the peer went away
    except Exception as exc:  # noqa: BLE001 - a defect met in one connection must not end the others
        fields = {"error": f"{type(exc).__name__}: {exc}"}
        _ = await performer.perform(Log(Record(Level.ERROR, "connection_failed", fields)))


class _Bounded(trio.abc.Listener[trio.SocketStream]):
    """A listener that accepts while there are slots; who serves the stream gives its slot back."""

    def __init__(self, listener: trio.SocketListener, slots: trio.Semaphore) -> None:
        self._listener = listener
        self._slots = slots

    async def accept(self) -> trio.SocketStream:
        await self._slots.acquire()
        try:
            return await self._listener.accept()
        except BaseException:
            self._slots.release()
            raise

    async def aclose(self) -> None:
        await self._listener.aclose()
