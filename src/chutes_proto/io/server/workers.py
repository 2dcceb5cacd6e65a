"""Several server processes on the same listening sockets, and the supervisor that starts, stops and replaces them.

Rules kept here:

* the supervisor opens the sockets, serves nothing itself, and needs no event loop; a worker is a `serve` of its own
  that was given the sockets;
* a worker that ends by itself is replaced, after a pause if it did not live long;
* what the supervisor is told, it tells the workers: to stop, to stop at once;
* a reload is read once, by the supervisor: all workers check it, then all carry it out, or none does;
* workers end when their supervisor does, however that ended: each holds the end of a pipe whose other end it has;
* the directory of the workers' counts ends with its supervisor: the next one removes those that killed ones left.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Generator, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import count
from pathlib import Path
from queue import Empty, SimpleQueue
from select import select
from socket import recv_fds, send_fds, socket, socketpair
from typing import Any, Final, ParamSpec

from attrs import define, field, frozen

from chutes_proto.errors import ConfigurationError, StoreError
from chutes_proto.io.files import Files
from chutes_proto.io.server.log_writer import LogWriter
from chutes_proto.io.server.reload import Prepared, Running, prepare, record, reported, why_refused
from chutes_proto.io.server.setup import ServerSetup
from chutes_proto.io.stop_signals import SignalsToStop, ignore
from chutes_proto.log import Level, Record, Value

STOP_AT_ONCE: Final = signal.SIGUSR2
"""Tells a worker that stops to end. Another signal to stop does not: the first may have reached it by two ways."""

METRICS_DIRECTORY: Final = "PROMETHEUS_MULTIPROC_DIR"
"""The variable by which prometheus-client keeps the values of several processes in files, and sums them."""

_VARIABLE: Final = "CHUTES_PROTO_WORKER"
_COUNTS: Final = "chutes-proto-counts-"
_PREPARE: Final = "prepare"
_SHORT_LIFE: Final = 5.0
_PAUSE: Final = 1.0
_LOOK_SECONDS: Final = 1.0
"""How long a signal may wait that did not end the wait for events, as one just before it, or in another thread."""
_PREPARE_SECONDS: Final = 60.0
"""How long all workers together may check the files of a reload."""
_COMMIT_SECONDS: Final = 10.0
"""How long all workers together may take to replace their set-ups, which is one assignment."""

P = ParamSpec("P")


@frozen
class Given:
    """The means of a worker: its number, its sockets, each with its setting, and its share of the limits.

    ``life`` becomes readable when the supervisor has ended. ``handed_over``: others hold the sockets when it stops.
    """

    number: int
    sockets: tuple[tuple[str, socket], ...]
    life: int
    workers: int
    handed_over: bool
    channel: socket
    files: Files
    """The files of the set-up by which all workers run, as the supervisor read them."""


def given_by_supervisor(environ: MutableMapping[str, str]) -> Given | None:
    """Take what the supervisor gave from ``environ``; None if this process is not a worker."""
    text = environ.pop(_VARIABLE, "")
    if not text:
        return None
    said = json.loads(text)
    sockets: list[tuple[str, socket]] = []
    for key, descriptor in said["sockets"]:
        os.set_inheritable(descriptor, False)
        sockets.append((key, socket(fileno=descriptor)))
    os.set_inheritable(said["life"], False)
    channel = socket(fileno=said["channel"])
    os.set_inheritable(said["channel"], False)
    files = Files(_unpacked(said["files"]))
    return Given(said["number"], tuple(sockets), said["life"], said["workers"], said["handed_over"], channel, files)


def obey(channel: socket, prepare: Callable[[Files], Prepared], commit: Callable[[ServerSetup], None]) -> None:
    """Do what the supervisor says over ``channel``, in the worker: prepare a reload, and carry it out."""
    prepared: Prepared | None = None
    while True:
        try:
            said, descriptors, _, _ = recv_fds(channel, 64, 1)
        except OSError:
            return
        if not said:
            return
        answer: dict[str, object] = {"to": said.decode("ascii"), "ok": True}
        if said.startswith(_PREPARE.encode()):
            prepared = None
            try:
                if not descriptors:  # this process may open no further file, and so got none
                    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
                prepared = prepare(Files(_unpacked(descriptors[0])))
                answer["after"] = prepared.after
            except Exception as exc:  # noqa: BLE001 - without this thread no worker could reload any more
                answer |= {"ok": False, "error": why_refused(exc)}
        elif prepared is None:
            answer |= {"ok": False, "error": "nothing is prepared"}
        else:
            commit(prepared.setup)
        with suppress(OSError):
            channel.sendall(json.dumps(answer).encode() + b"\n")


def _packed(content: Mapping[str, bytes]) -> int:
    """A descriptor of a file in memory that holds the files, secrets too; nobody else can open it."""
    descriptor = os.memfd_create("files", os.MFD_CLOEXEC)
    with os.fdopen(os.dup(descriptor), "wb") as file:
        _ = file.write(json.dumps({path: b64encode(data).decode() for path, data in content.items()}).encode())
    return descriptor


def _unpacked(descriptor: int) -> dict[str, bytes]:
    """Return the files that `_packed` holds, and close the descriptor; another process may read it at the same time."""
    with os.fdopen(descriptor, "rb") as file:
        data = os.pread(descriptor, os.fstat(file.fileno()).st_size, 0)
    return {path: b64decode(text) for path, text in json.loads(data).items()}


@contextmanager
def _counts_directory() -> Generator[Path]:
    """A directory that is this process's as long as it holds its lock; those without a lock are removed."""
    try:
        place = Path(tempfile.gettempdir())
    except FileNotFoundError as exc:  # as in a container whose root is read-only
        need = "the metrics of several workers need a directory for temporary files; make one, and name it in TMPDIR"
        raise ConfigurationError(f"admin: {need} ({exc.strerror})") from None
    for left in place.glob(f"{_COUNTS}*"):
        with suppress(OSError), _locked(left):  # another user's, or in use
            shutil.rmtree(left)
    with ExitStack() as opened:
        while True:
            made = Path(tempfile.mkdtemp(prefix=_COUNTS))
            with suppress(BlockingIOError, FileNotFoundError):  # another process took it for one that was left
                opened.enter_context(_locked(made))
                break
        try:
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)


@contextmanager
def _locked(directory: Path) -> Generator[None]:
    """Hold the lock of a directory of this user. Raises `OSError` if that cannot be."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid() or not found.st_nlink:
            raise FileNotFoundError(directory)
        yield
    finally:
        os.close(descriptor)


def in_background(run: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
    """Run it in a thread that keeps no process from its end."""
    threading.Thread(target=lambda: run(*args, **kwargs), daemon=True).start()


def reload_at_signal(reload: Callable[[str], object], log: Callable[[Record], None]) -> None:
    """Call ``reload`` in the background, for SIGHUP; log it where the system allows no thread."""
    try:
        in_background(reload, "SIGHUP")
    except RuntimeError as exc:
        log(Record(Level.ERROR, "reload_refused", {"caller": "SIGHUP", "error": str(exc)}))


@define(eq=False)
class _Worker:
    number: int
    process: subprocess.Popen[bytes]
    started: float
    channel: socket
    _numbers: Iterator[int] = field(init=False, factory=count)

    _asked: str = field(init=False, default="")

    def ask(self, said: str, *descriptors: int) -> None:
        """Say something to the worker; `answer` has the rest."""
        self._asked = f"{said} {next(self._numbers)}"
        with suppress(OSError):  # it has ended, and its answer says so
            self.channel.settimeout(0)  # a worker that reads nothing holds nobody up
            _ = send_fds(self.channel, [self._asked.encode("ascii")], descriptors)

    def answer(self, until: float) -> dict[str, Any]:
        """Return the answer to what was asked, ``until`` a time of the monotonic clock. Raises `ConfigurationError`.

        An answer to what was asked before, which came too late then, is passed over.
        """
        said = self._asked
        answer: dict[str, Any] = {"ok": False, "error": "it ended meanwhile; reload again"}
        try:
            self.channel.settimeout(max(0.001, until - time.monotonic()))
            with self.channel.makefile("rb") as lines:
                answer = next((each for each in map(json.loads, lines) if each["to"] == said), answer)
        except TimeoutError as exc:
            answer = {"ok": False, "error": str(exc)}
        except (OSError, ValueError):  # its end is closed, or ours is by then
            pass
        if not answer["ok"]:
            raise ConfigurationError(f"worker {self.number}: {answer['error']}")
        return answer


@define
class Supervisor:
    """Runs ``count`` processes of ``command`` by the set-up ``running``, on ``sockets``, each with its setting."""

    running: Running
    count: int
    command: Sequence[str]
    sockets: Sequence[tuple[str, socket]]
    handed_over: bool
    log: LogWriter
    keeps_metrics: bool
    stop_seconds: float
    prepare_seconds: float = _PREPARE_SECONDS
    commit_seconds: float = _COMMIT_SECONDS
    _events: SimpleQueue[tuple[str, object]] = field(init=False, factory=SimpleQueue)
    _due: list[tuple[float, str, object]] = field(init=False, factory=list)
    """Events of the future, each after its time on the monotonic clock."""
    _workers: list[_Worker] = field(init=False, factory=list)
    _is_told_to_stop: bool = field(init=False, default=False)
    """Noted by the handler of a signal; `_stopping`, once the workers are told."""
    _stopping: bool = field(init=False, default=False)
    _to_stop: SignalsToStop = field(init=False, factory=SignalsToStop)
    _reloading: threading.Lock = field(init=False, factory=threading.Lock)
    """Held while workers reload or one is started, so that every worker runs by the same files."""

    def reload(self, caller: str) -> dict[str, object]:
        """Reload all workers for ``caller``, or none; see `Reloader.reload`. May be called in every thread."""
        with self._reloading:
            return reported(caller, self.log, lambda: self._reload(caller))

    def _reload(self, caller: str) -> Prepared:
        files = Files(plain=True)
        with closing(self.running.setup.store.open()) as store:
            prepared = prepare(self.running, store, files)
            workers = tuple(self._workers)
            descriptor = _packed(files.content)
            for worker in workers:  # all at once, and for all of them one time
                worker.ask(_PREPARE, descriptor)
            os.close(descriptor)
            until = time.monotonic() + self.prepare_seconds
            problems: list[str] = []
            for worker in workers:
                try:
                    if worker.answer(until)["after"] != prepared.after:
                        problems.append(f"worker {worker.number}: read something else; ask again")
                except ConfigurationError as exc:
                    problems.append(str(exc))
            if problems:
                raise ConfigurationError("\n".join(problems))
            if prepared.changes:
                record(store, caller, prepared)
        for worker in workers:
            worker.ask("commit")
        until = time.monotonic() + self.commit_seconds
        for worker in workers:
            try:
                _ = worker.answer(until)
            except ConfigurationError:
                worker.process.kill()  # the one in its place gets the new files
        self.running.replace(prepared.setup)
        return prepared

    def run(self, stops: Sequence[signal.Signals], ready: Callable[[], None]) -> None:
        """Serve until stopped; ``ready`` is called once all workers serve.

        At its end the process ignores signals from then on, because it is to end. Raises `StoreError` if the first
        workers do not start, and nobody stops them. Must run in the main thread.
        """

        def hear(number: int, _: object) -> None:
            self._is_told_to_stop |= number in stops
            self._events.put(("signal", signal.Signals(number)))

        with ExitStack() as opened:
            for told in (*stops, signal.SIGHUP):
                _ = signal.signal(told, hear)
            _ = opened.callback(ignore, (*stops, signal.SIGHUP))
            life, ours = os.pipe()
            _ = opened.callback(os.close, life)
            _ = opened.callback(os.close, ours)
            environ = dict(os.environ)
            _ = environ.pop("NOTIFY_SOCKET", None)  # the supervisor speaks to the service manager
            if self.keeps_metrics:
                environ[METRICS_DIRECTORY] = str(opened.enter_context(_counts_directory()))
            _ = opened.callback(self._kill)
            for number in range(self.count):
                self._start(number, life, environ)
            if all(map(self._serves, self._workers)):
                ready()
            self._supervise(life, environ)

    def _serves(self, worker: _Worker) -> bool:
        """Wait until a worker says its first URL; False if all are to stop. Raises `StoreError` if it ended before.

        A service manager may tell it to stop, too, so it may have ended for that.
        """
        out = worker.process.stdout
        while not self._is_told_to_stop and out is not None:
            if select([out], [], [], _LOOK_SECONDS)[0]:
                if out.readline():
                    return True
                if not self._is_told_to_stop:
                    raise StoreError(f"worker {worker.number} did not start; the log says why")
        return False

    def _start(self, number: int, life: int, environ: dict[str, str]) -> None:
        ours, theirs = socketpair()
        files = _packed(self.running.setup.files.content)
        said = {
            "number": number,
            "channel": theirs.fileno(),
            "files": files,
            "sockets": [(key, each.fileno()) for key, each in self.sockets],
            "life": life,
            "workers": self.count,
            "handed_over": self.handed_over,
        }
        try:
            process = subprocess.Popen(
                self.command,
                stdout=subprocess.PIPE,
                pass_fds=[life, files, theirs.fileno(), *(each.fileno() for _, each in self.sockets)],
                env={**environ, _VARIABLE: json.dumps(said)},
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(files)
        worker = _Worker(number, process, time.monotonic(), ours)
        try:
            threading.Thread(target=self._await_end, args=(worker,), daemon=True).start()
        except RuntimeError:  # the system allows no thread, so nobody would see its end
            with process, ours:
                process.kill()
            raise
        self._workers.append(worker)

    def _await_end(self, worker: _Worker) -> None:
        _ = worker.process.wait()
        self._events.put(("ended", worker))

    def _supervise(self, life: int, environ: dict[str, str]) -> None:
        while self._workers or not self._stopping:
            match self._next():
                case "signal", signal.SIGHUP:
                    reload_at_signal(self.reload, self.log)
                case "signal", signal.Signals() as number if self._to_stop.is_another(number):
                    self._stop(number.name, STOP_AT_ONCE if self._stopping else signal.SIGTERM)
                case "ended", _Worker() as worker:
                    self._note_end(worker, environ.get(METRICS_DIRECTORY))
                case "start", int(number) if not self._stopping:
                    self._replace(number, life, environ)
                case "kill", _:
                    self._kill()
                case _:
                    pass

    def _replace(self, number: int, life: int, environ: dict[str, str]) -> None:
        if not self._reloading.acquire(blocking=False):
            self._after(_PAUSE, "start", number)  # a signal to stop must not wait for a slow reload
            return
        try:
            self._start(number, life, environ)
        except (OSError, RuntimeError) as exc:  # no memory for it, or its program is being upgraded: the others go on
            self.log(Record(Level.ERROR, "worker_not_started", {"worker": number, "error": str(exc)}))
            self._after(_PAUSE, "start", number)
        finally:
            self._reloading.release()

    def _note_end(self, worker: _Worker, metrics: str | None) -> None:
        self._workers.remove(worker)
        worker.channel.close()
        if worker.process.stdout is not None:
            worker.process.stdout.close()
        if metrics is not None:
            from prometheus_client import multiprocess

            multiprocess.mark_process_dead(worker.number, metrics)  # type: ignore[no-untyped-call]
        if self._stopping:
            return
        fields: dict[str, Value] = {"worker": worker.number, "code": worker.process.returncode}
        self.log(Record(Level.ERROR, "worker_ended", fields))
        pause = 0.0 if time.monotonic() - worker.started > _SHORT_LIFE else _PAUSE
        self._after(pause, "start", worker.number)

    def _stop(self, why: str, number: signal.Signals) -> None:
        fields: dict[str, Value] = {"signal": why, "workers": len(self._workers)}
        self.log(Record(Level.INFO, "stopping", fields))
        self._tell(number)
        self._stopping = True
        self._after(self.stop_seconds, "kill", None)

    def _tell(self, number: signal.Signals) -> None:
        for worker in self._workers:
            with suppress(ProcessLookupError):
                worker.process.send_signal(number)

    def _kill(self) -> None:
        for worker in self._workers:
            worker.process.kill()

    def _after(self, seconds: float, event: str, about: object) -> None:
        self._due.append((time.monotonic() + seconds, event, about))

    def _next(self) -> tuple[str, object]:
        """Wait for the next event, or until one is due."""
        while True:
            first = min(self._due, key=lambda each: each[0], default=None)
            left = _LOOK_SECONDS if first is None else first[0] - time.monotonic()
            with suppress(Empty):
                return self._events.get(timeout=max(0.0, min(left, _LOOK_SECONDS)))
            if first is not None and left <= 0:
                self._due.remove(first)
                return first[1:]


def worker_command(config: str, transport: str) -> list[str]:
    """The command of a worker."""
    return [sys.executable, "-m", "chutes_proto", "serve", "--config", config, "--transport", transport]
