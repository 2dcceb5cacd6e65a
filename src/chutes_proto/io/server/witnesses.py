"""Cosignatures of witnesses under the checkpoints of the audit log (c2sp.org/tlog-witness), over HTTP.

Rules kept here:

* a cosignature is verified with the key that the operator named before it is kept;
* a witness that knows another size is asked again from there, once: it may have seen what this server has not;
* one that has signed a newer checkpoint already, of the same log for another server, is asked again soon, when this
  server has signed that, too. It is told if that does not help, and at once if the log has not so many entries;
* one that does not answer is told to the operator, and holds up nothing;
* the newest checkpoint with cosignatures is a file of its own beside the mark. It replaces none of more entries: of the
  processes of a server one asks at a time, from its look at the file to its end, and the others leave it to that one.
  An operator's command waits for its turn.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

from attrs import frozen

from chutes_proto.errors import ConfigurationError, LocalProtocolError, LogError, StoreError, TransportError
from chutes_proto.io.files import is_there, make_file, read_file, unavailable, write_file
from chutes_proto.io.http.https import HttpGetter, TimeLimits
from chutes_proto.io.http.tls import context_trusting
from chutes_proto.store._run import Ask, Store
from chutes_proto.store.rows import LogStateRow, Read
from chutes_proto.tlog.merkle import consistency_proof
from chutes_proto.tlog.notes import LARGEST_NOTE, Checkpoint, Note, Signature, Verifier
from chutes_proto.tlog.witness import PATH, cosigned_by, read_cosignature, read_size, request_body
from chutes_proto.units.log import LOG, FromTiles
from chutes_proto.wire.http import HttpResponse

SECONDS: Final = 60.0
"""How long a server waits between two rounds of its witnesses."""
SOON_SECONDS: Final = 2.0
"""How long it waits for a newer checkpoint of its own, when another server's has overtaken it."""
OVERTAKEN: Final = 3
"""After so many rounds in a row that others have overtaken, it is told."""
LIMITS: Final = TimeLimits(connect=5.0, read=10.0, total=15.0)


class _OvertakenError(LogError):
    """The witness has signed a newer checkpoint of this log."""


@frozen
class Witness:
    """A witness: the prefix of its URL, and its key."""

    url: str
    key: Verifier


def witnessed_path(checkpoint: Path) -> Path:
    """The file of the newest checkpoint with cosignatures, by that of the newest checkpoint."""
    return checkpoint.with_name(f"{checkpoint.name}.witnessed")


def read_witnessed(path: Path | None) -> Note | None:
    """The note in a file, of which nothing is verified; None if there is none. Raises `LogError`."""
    if path is None or not is_there(path):
        return None
    try:
        return Note.parse(read_file(path, limit=LARGEST_NOTE, plain=True))
    except LogError as exc:
        raise LogError(f"{path}: {exc}") from None


def cosign(store: Store, note: Note, witness: Witness, old: int, get: HttpGetter) -> Signature:
    """Get the cosignature of a witness that is thought to know ``old`` entries. Raises `LogError`, `StoreError`."""
    size = Checkpoint.of(note).size
    url = f"{witness.url.rstrip('/')}/{PATH}"
    try:
        answer = _add(store, note, url, old, get)
        if answer.status == 409:
            old = read_size(answer.body)
            if size < old <= _entries(store):
                raise _OvertakenError(f"witness {witness.url}: it has signed a checkpoint of {old} entries already")
            answer = _add(store, note, url, old, get)
        if answer.status != 200:
            told = " ".join(answer.body[:200].decode("ascii", "replace").split())
            raise LogError(f"status {answer.status}{': ' if told else ''}{told}")
        return read_cosignature(answer.body, note, witness.key, int(time.time()))
    except _OvertakenError:
        raise
    except (LogError, TransportError, LocalProtocolError) as exc:
        raise LogError(f"witness {witness.url}: {exc}") from None


def _add(store: Store, note: Note, url: str, old: int, get: HttpGetter) -> HttpResponse:
    path = store.transact(FromTiles(partial(consistency_proof, old=old, new=Checkpoint.of(note).size)))
    return get(url, (("content-type", "text/plain"),), request_body(old, path, note))


def _entries(store: Store) -> int:
    state = store.transact(Ask(Read(LogStateRow, LOG)))
    return 0 if state is None else state.size


class Witnesses:
    """Asks witnesses for checkpoints; what they sign is kept beside ``file``, that of the newest, unless it is None."""

    def __init__(
        self, store: Store, witnesses: Sequence[Witness], file: Path | None, ca_file: Path | None = None
    ) -> None:
        self._store = store
        self._witnesses = witnesses
        self._file = file
        self._kept = None if file is None else witnessed_path(file)
        self._get = HttpGetter(context_trusting(ca_file), LIMITS)
        self._overtaken = 0

    def ask(self, note: Note) -> tuple[Note, list[str]]:
        """Ask each for a checkpoint; return it with the cosignatures, and the faults in words. Raises `StoreError`."""
        with self._turn(waits=True):
            whole, faults = self._ask(note)
        return whole, [*map(str, faults)]

    def round(self) -> list[str]:
        """Ask for the newest checkpoint, unless it is cosigned already, or another process asks; return the faults.

        Raises `StoreError`.
        """
        try:
            with self._turn(waits=False):
                newest, kept = read_witnessed(self._file), self._read_kept()
                if newest is None or not self._witnesses or (kept is not None and self._is_covered(kept, newest)):
                    return []
                _, faults = self._ask(newest)
        except BlockingIOError:
            return []
        serious = [each for each in faults if not isinstance(each, _OvertakenError)]
        self._overtaken = self._overtaken + 1 if len(serious) < len(faults) else 0
        return [*map(str, serious if self._overtaken < OVERTAKEN else faults)]

    @property
    def pause(self) -> float:
        """The seconds until the next round."""
        return SOON_SECONDS if 0 < self._overtaken < OVERTAKEN else SECONDS

    @contextmanager
    def _turn(self, *, waits: bool) -> Generator[None]:
        """Have the turn of this server's processes. Raises `BlockingIOError` if another one has it.

        It ends with the process at the latest.
        """
        if self._kept is None:
            yield
            return
        path = self._kept.with_name(f"{self._kept.name}.lock")  # not the file itself, which is replaced
        with unavailable(path, "cannot be opened"):
            make_file(path, 0o600)  # any user who can open it could have the turn for ever, and nobody would be told
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
            yield
        finally:
            os.close(descriptor)

    def _read_kept(self) -> Note | None:
        kept = read_witnessed(self._kept)
        try:
            _ = () if kept is None else self._signed(kept)
        except LogError as exc:
            raise LogError(f"{self._kept}: {exc}; move the file away") from None
        return kept

    def _ask(self, note: Note) -> tuple[Note, list[LogError]]:
        kept = self._read_kept()
        old = 0 if kept is None else Checkpoint.of(kept).size
        faults: list[LogError] = []
        found: list[Signature] = []
        for witness in self._witnesses:
            known = old if kept is not None and cosigned_by(kept, [witness.key]) else 0
            try:
                found.append(cosign(self._store, note, witness, min(known, Checkpoint.of(note).size), self._get))
            except LogError as exc:
                faults.append(exc)
        before = [] if kept is None or kept.text != note.text else self._signed(kept)
        whole = note.with_signatures([*found, *(each for each in before if _key(each) not in map(_key, found))])
        if self._kept is not None and found and Checkpoint.of(note).size >= old:
            write_file(self._kept, str(whole).encode(), mode=0o644)
        return whole, faults

    def _signed(self, note: Note) -> list[Signature]:
        """The cosignatures under a note. Raises `LogError` for one that does not verify."""
        keys = [_key(each) for each in cosigned_by(note, [each.key for each in self._witnesses])]
        return [each for each in note.signatures if _key(each) in keys]

    def _is_covered(self, kept: Note, newest: Note) -> bool:
        every = len(cosigned_by(kept, [each.key for each in self._witnesses])) == len(self._witnesses)
        return every and kept.text == newest.text


def _key(of: Signature | Verifier) -> tuple[str, bytes]:
    return of.name, of.identifier


@contextmanager
def witnessing(witnesses: Witnesses | None, tell: Callable[[str], object]) -> Generator[None]:
    """Ask the witnesses again and again in a thread while the block runs; ``tell`` gets each fault."""
    if witnesses is None:
        yield
        return
    ending = threading.Event()

    def run() -> None:
        while not ending.wait(witnesses.pause):
            try:
                for fault in witnesses.round():
                    _ = tell(f"audit log: {fault}")
            except StoreError:  # `watch_store` tells the operator
                pass
            except (ConfigurationError, LogError, OSError) as exc:
                _ = tell(f"audit log: witnesses: {exc}")

    thread = threading.Thread(target=run, name="witnesses of the audit log", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ending.set()  # not waited for: a witness that does not answer would keep the store from its end
