"""One request as the handler of its operation gets it, and the log lines and records that a handler makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar

from attrs import frozen

from chutes_proto.auth.hotkey import Hotkey
from chutes_proto.effects import Flow, Log, Transact
from chutes_proto.errors import Refusal, Refused, StoreError
from chutes_proto.log import Level, Record, Value
from chutes_proto.server._observing import trace_of
from chutes_proto.server._why import Finding
from chutes_proto.store._rows import Vm
from chutes_proto.store._run import Unit
from chutes_proto.units.records import legible_vm
from chutes_proto.wire.http import HttpRequest, MalformedRequest

M = TypeVar("M")


def ids_of(request: HttpRequest | MalformedRequest, request_id: str) -> dict[str, Value]:
    """The fields that every log record of a request has: its id, and that of its trace if it names one."""
    trace_id = trace_of(request) if isinstance(request, HttpRequest) else None
    return {"request_id": request_id} if trace_id is None else {"request_id": request_id, "trace_id": trace_id}


def found(refusal: Refusal) -> Finding | None:
    """The finding of the verifier, if it is the one that refused."""
    return None if refusal.fault is None else Finding.of(refusal.fault)


def found_json(refusal: Refusal) -> str | None:
    """The same, as rows keep it."""
    finding = found(refusal)
    return None if finding is None else finding.to_json()


def named(request: HttpRequest, parameters: Mapping[str, str], message: object = None) -> Vm:
    """The VM that a request names, or the name of its server, as legible text; empty where it names none.

    Nothing of it is proven. Before the body is decoded, the path and the headers tell.
    """
    hotkeys = (getattr(message, name, None) for name in ("miner_hotkey", "hotkey", "hotkey_header", "hotkey_query"))
    hotkey = next((each for each in (*hotkeys, *request.header_values("x-chutes-hotkey")) if each), "")
    name = getattr(message, "vm_name", None) or next(iter(parameters.values()), "")
    return legible_vm(hotkey, name)


@frozen
class Call(Generic[M]):
    """A decoded request; ``now`` is the time in unix seconds when its handling began."""

    request: HttpRequest
    message: M
    request_id: str
    now: int

    def log(self, event: str, level: Level = Level.INFO, /, **fields: Value) -> Flow[None]:
        """Log ``event`` with the request's id and these fields, in this order."""
        yield from Log(Record(level, event, {**ids_of(self.request, self.request_id), **fields}))

    def record_refusal(self, unit: Unit[bool]) -> Flow[bool | None]:
        """Run ``unit``, which records a refusal; return whether it did, None if the store failed.

        A failure does not change the refusal.
        """
        try:
            return (yield from Transact(unit))
        except (StoreError, Refused) as exc:
            yield from self.log("refusal_not_recorded", Level.WARNING, error=str(exc))
            return None


@frozen
class SignedCall(Call[M]):
    """A request that the hotkey ``caller`` has signed."""

    caller: Hotkey
