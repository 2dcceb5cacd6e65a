"""The servers of one store, and whether they are configured alike where they must be (see "Several servers").

Rules kept here:

* each server writes digests of these settings into the store, one for each, and looks at those of the others: a
  difference is named by its setting, and no value of it is in the store;
* no secret goes into a digest, because a weak one could be guessed from it;
* a server that was not seen for `LIVE_SECONDS` has ended. Its own older row is replaced, so that a server may come back
  with another configuration;
* servers of another release are not compared: an upgrade replaces one after the other;
* nothing is written while the store refuses us: a damaged file stays as it is for the operator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Final, NoReturn, cast

import attrs
from attrs import define, frozen

from chutes_proto import __version__
from chutes_proto.effects import Flow, Log, Now, Sleep, Transact
from chutes_proto.errors import StoreError
from chutes_proto.log import Level, Record
from chutes_proto.secret import Secret
from chutes_proto.server._config import ServerConfig
from chutes_proto.server._readiness import WATCH_SECONDS, Readiness
from chutes_proto.store._rows import ForgetKeyServers, KeyServer, NoteKeyServer, ReadKeyServers
from chutes_proto.store._run import Ask
from chutes_proto.wire import json

if TYPE_CHECKING:
    from chutes_proto.server._service import Service

NOTE_SECONDS: Final = 20
LIVE_SECONDS: Final = 60
_DAY: Final = 86_400
_DIGITS: Final = 16


def shared_settings(config: ServerConfig, service: Service) -> dict[str, str]:
    """A digest of each setting that all servers of a store must share, by its key."""
    collateral = config.collateral
    parts: dict[str, object] = {
        "store": (config.store.require_synchronous, config.store.clock_difference_seconds),
        "roots": service.root.digest,
        "measurements": service.profiles,
        "policy": service.policies,
        "volumes": config.volumes,
        "hotkeys": service.hotkeys,
        "blacklist": config.blacklist,
        "minimum_version": config.minimum_version,
        "maintenance": config.maintenance,
        "netuid": config.netuid,
        "signatures": config.signatures,
        "exchange_downgrade": config.exchange_downgrade,
        "nonce": config.nonce.bind_address,
        "signing_keys_file": service.signing_keys,
        "collateral": (collateral.upstreams, collateral.update, collateral.grace_seconds),
        "gpus": config.gpus,
        "gpu_evidence": None if service.gpu_appraisal is None else service.gpu_appraisal.policy,
        "registration": attrs.evolve(config.registration, hotkey_file=None),
        "runtime": config.runtime,
        "rotate_after_hours": config.rotate_after_hours,
    }
    return {key: hashlib.sha256(repr(_plain(part)).encode()).hexdigest()[:_DIGITS] for key, part in parts.items()}


def _plain(value: object) -> object:
    """A value whose text is the same in every process: sets and mappings in order, no secret and no address."""
    match value:
        case Secret():
            return "a secret"
        case Mapping():
            items = cast("Mapping[object, object]", value).items()
            return sorted((repr(_plain(key)), repr(_plain(each))) for key, each in items)
        case frozenset() | set():
            return sorted(repr(_plain(each)) for each in cast("Iterable[object]", value))
        case tuple() | list():
            return [_plain(each) for each in cast("Iterable[object]", value)]
        case str() | bytes() | int() | float() | None:
            return value
        case _ if attrs.has(type(value)):
            fields = attrs.fields(cast("type[attrs.AttrsInstance]", type(value)))
            return [(field.name, _plain(getattr(value, field.name))) for field in fields if field.eq and field.repr]
        case _:
            return str(type(value)) if "0x" in (text := repr(value)) else text


@frozen
class Difference:
    """Another server of the store, and the settings in which it differs; a setting that one lacks counts."""

    server: KeyServer
    keys: tuple[str, ...]

    def __str__(self) -> str:
        return f"the server {self.server.name} on this store has another value of {', '.join(self.keys)}"


@define
class Alike:
    """This server among those of its store: its ``name``, and the digests of its settings."""

    name: str
    settings: Mapping[str, str]
    others: tuple[KeyServer, ...] = ()
    """The other servers that were seen at the last look."""

    def row(self, now: int) -> KeyServer:
        """This server, as the others read it."""
        return KeyServer(self.name, __version__, json.encode(dict(self.settings)).decode(), now)

    def differences(self) -> list[Difference]:
        """The others that differ."""
        found = (Difference(each, self.different_keys(each)) for each in self.others)
        return [each for each in found if each.keys]

    def different_keys(self, other: KeyServer) -> tuple[str, ...]:
        """The settings in which ``other`` differs; none of a server of another release."""
        if other.version != __version__:
            return ()
        try:
            theirs = json.decode(other.configuration.encode())
        except json.JsonError:
            theirs = None
        if not isinstance(theirs, dict):
            return ("an unreadable row",)
        members = cast("dict[str, object]", theirs)
        return tuple(key for key in sorted({*self.settings, *members}) if self.settings.get(key) != members.get(key))

    def note(self, seen: Iterable[KeyServer]) -> None:
        """Note the servers that were ``seen``."""
        self.others = tuple(each for each in seen if each.name != self.name)


def watch_servers(alike: Alike, readiness: Readiness) -> Flow[NoReturn]:
    """Write this server's row again and again, and look at the others; log each difference once, at its second look.

    Servers that reload one after the other differ meanwhile.
    """
    before: set[tuple[str, tuple[str, ...]]] = set()
    told = before
    while True:
        now = yield from Now()
        try:
            if readiness.fault in (None, readiness.unwritten):
                yield from readiness.attempt_writing(NoteKeyServer(alike.row(now)))
                alike.note((yield from Transact(Ask(ReadKeyServers(now - LIVE_SECONDS)))))
                yield from Transact(Ask(ForgetKeyServers(now - _DAY)))
        except StoreError:
            pass  # the checks of the store tell it
        found = {(each.server.name, each.keys) for each in alike.differences()}
        lasting = found & before
        for name, keys in sorted(lasting - told):
            yield from Log(Record(Level.ERROR, "configuration_differs", {"server": name, "settings": list(keys)}))
        before, told = found, lasting
        yield from Sleep(NOTE_SECONDS if readiness.unwritten is None else WATCH_SECONDS)
