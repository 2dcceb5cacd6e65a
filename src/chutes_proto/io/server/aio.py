"""The key server on an event loop: accepts connections, moves their bytes and runs the flows of their requests.

No rule is decided here: `Connections` returns the next step, `ServerConnection` its deadline, and the application the
answers and the time to end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from itertools import count
from signal import Signals
from socket import socket
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel

from chutes_proto.io.drivers.aio import Performer
from chutes_proto.io.loops import Receiver, receiver
from chutes_proto.io.server.sockets import ACCEPT_IN_A_ROW, ACCEPT_PAUSE, Listening
from chutes_proto.io.stop_signals import heard
from chutes_proto.transport.connections import Answer, Connections, Receive, Send
from chutes_proto.transport.h1 import DEFAULT_LIMITS, Application, Limits, ServerConnection, peer_address


class Server:
    """Serves the application ``app`` on the running event loop, once.

    ``performer`` performs the effects of ``app``, ``limits`` bound each connection, ``ended`` is told of each that has
    ended. At most ``connections`` are open,
    and one more for each further listener. At the limit, a connection on which the server waits for the peer ends; if
    there is none, new ones wait in the listeners' queues.

    ``is_one_of_several``: other processes accept at the same listeners, and may serve on when this one ends. A
    connection that it has accepted by then is heard, because its peer, whose boot may be another's, cannot choose.
    """

    def __init__(
        self,
        app: Application,
        performer: Performer,
        *,
        limits: Limits = DEFAULT_LIMITS,
        connections: int = 1024,
        ended: Callable[[ServerConnection], None] | None = None,
        is_one_of_several: bool = False,
    ) -> None:
        self._app = app
        self._performer = performer
        self._limits = limits
        self._slots = anyio.Semaphore(connections - 1, fast_acquire=True)
        self._connections = Connections(connections, self._wake, app.sent)
        self._serving = anyio.CancelScope()
        self._accepting = anyio.CancelScope()
        self._waits: dict[ServerConnection, anyio.CancelScope] = {}
        self._handed_over = False
        self._ended = ended
        self._is_one_of_several = is_one_of_several

    async def serve(self, listening: Sequence[Listening]) -> None:
        """Serve until cancelled, or until the end that `stop` began; close the sockets."""
        with self._serving:
            async with anyio.create_task_group() as group:
                with self._accepting:
                    async with anyio.create_task_group() as listeners:
                        for listener in listening:
                            _ = listeners.start_soon(self._accept, listener, group)
                if self._is_one_of_several:
                    self._connections.hand_over(anyio.current_time())
                elif not self._handed_over:
                    self._connections.finish(anyio.current_time())

    def stop(self, *, handed_over: bool = False) -> float:
        """Tell the application to stop; it decides when to end, and connections end with their next answer.

        ``handed_over``: another process serves the same listeners from now on, so this one accepts no more, and ends
        once the connections that it accepted have had their answers.

        Returns the number of seconds after which the server has ended.
        """
        now = anyio.current_time()
        self._serving.deadline = end = self._app.stop(now, handed_over=handed_over)
        self._handed_over = handed_over
        if handed_over:
            self._connections.hand_over(now)
        else:
            self._connections.drain(now)
        self._update_end()
        return end - now

    @property
    def is_stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._serving.deadline < math.inf

    @property
    def open_connections(self) -> int:
        """The number of connections that are open now."""
        return len(self._connections)

    def _update_end(self) -> None:
        self._accepting.deadline = self._app.ends_at(anyio.current_time())

    async def _accept(self, listening: Listening, group: anyio.abc.TaskGroup) -> None:
        with listening.socket as listener:
            listener.setblocking(False)
            self._slots.release()  # for the slot that a listener holds while it waits
            for number in count():
                await self._slots.acquire()
                try:
                    accepted, address = await _accepted(listener, after_others=number % ACCEPT_IN_A_ROW == 0)
                except OSError as exc:  # the peer went away while it waited, or there are no file descriptors left
                    self._slots.release()
                    await self._complain("accept_failed", exc)
                    await anyio.sleep(ACCEPT_PAUSE)
                else:
                    _ = group.start_soon(self._serve_socket, accepted, address, listening)

    async def _serve_socket(self, accepted: socket, address: Any, listening: Listening) -> None:
        """Serve one connection. Its faults end it and nothing else."""
        try:
            with accepted:
                connection = ServerConnection(
                    anyio.current_time(),
                    tls=listening.session(),
                    limits=self._limits,
                    peer_address=peer_address(address),
                )
                try:
                    await self._serve_connection(accepted, connection)
                finally:
                    self._connections.remove(connection)
                    self._update_end()
                    if self._ended is not None:
                        self._ended(connection)
        except OSError:
            pass  # the peer went away
        except Exception as exc:  # noqa: BLE001 - a defect in one connection must not end the others
            await self._complain("connection_failed", exc)
        finally:
            self._slots.release()

    async def _serve_connection(self, accepted: socket, connection: ServerConnection) -> None:
        """Take the steps of one connection to its end. None of its messages is kept while the next one is awaited."""
        receiving = receiver(accepted)
        try:
            while step := self._connections.next_step(connection, anyio.current_time()):
                match step:
                    case Answer():
                        if step.sent_ahead:
                            await anyio.lowlevel.checkpoint()
                        connection.send_response(
                            await self._performer.run(self._app.handle(step.request)), anyio.current_time()
                        )
                    case Send():
                        await self._send(accepted, connection, memoryview(step.data))
                    case Receive():
                        await self._receive(receiving, connection)
        finally:
            receiving.close()
            _ = self._waits.pop(connection, None)

    async def _send(self, accepted: socket, connection: ServerConnection, left: memoryview) -> None:
        with anyio.CancelScope(deadline=connection.deadline) as self._waits[connection]:
            while left:
                try:
                    left = left[accepted.send(left) :]
                except BlockingIOError:
                    await anyio.wait_writable(accepted)
            return
        connection.expire(anyio.current_time())

    async def _receive(self, receiving: Receiver, connection: ServerConnection) -> None:
        with anyio.CancelScope(deadline=connection.deadline) as self._waits[connection]:
            connection.receive_data(await receiving.receive(), anyio.current_time())
            return
        connection.expire(anyio.current_time())

    def _wake(self, connection: ServerConnection) -> None:
        if wait := self._waits.get(connection):
            wait.deadline = connection.deadline

    async def _complain(self, event: str, exc: Exception) -> None:
        await self._performer.run(self._app.complain(event, exc))


async def run_until_stopped(
    server: Server,
    listening: Sequence[Listening],
    signals: Mapping[Signals, Callable[[], None]],
    ready: Callable[[], None],
    background: Callable[[], Coroutine[object, object, None]],
) -> None:
    """Serve until the server is stopped; call the function in ``signals`` at each signal.

    ``ready`` is called once signals are handled. ``background`` runs beside the server, and is cancelled at its end.
    From then on the process ignores the signals, because it is to end. Must run in the main thread.
    """
    with heard(signals) as numbers:
        ready()
        async with anyio.create_task_group() as nursery:
            _ = nursery.start_soon(_call, numbers, signals)
            _ = nursery.start_soon(background)
            await server.serve(listening)
            nursery.cancel_scope.cancel()


async def _call(numbers: socket, signals: Mapping[Signals, Callable[[], None]]) -> None:
    while True:
        await anyio.wait_readable(numbers)
        for number in numbers.recv(4096):
            if call := signals.get(Signals(number)):
                call()


async def _accepted(listener: socket, *, after_others: bool) -> tuple[socket, Any]:
    """Accept a connection, one that waits at once if others of the loop need not come before."""
    if after_others:
        await anyio.wait_readable(listener)
    while True:
        with suppress(BlockingIOError):
            accepted, address = listener.accept()
            accepted.setblocking(False)
            return accepted, address
        await anyio.wait_readable(listener)
