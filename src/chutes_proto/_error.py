"""The root of all errors, in a module of its own so that the verifier can import it without the rest."""

from __future__ import annotations

from typing import Any


class ChutesError(Exception):
    """Root of every error that this distribution raises on purpose (the tree is in ``chutes_proto.errors``).

    Copies and pickles have all its members.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        # Python's own calls the class with ``args`` again, which fails where the class takes other arguments, and in a
        # pool of processes ends the pool: one refused quote in a worker, and nothing is verified any more.
        return _remade, (type(self), self.args), self.__dict__


def _remade(kind: type[ChutesError], args: tuple[object, ...]) -> ChutesError:
    return kind.__new__(kind, *args)


ChutesError.__module__ = "chutes_proto"
