"""Operations 5 to 9 and 15: the miners' servers, and the published reference values.

The caller was checked before (``_callers.py``). A registration's GPUs are checked first, then its host, then the host's
quote, if it is asked for one (``_callbacks.py``), then its claims against the rows (``units/servers.py``). A host may
be slow to resolve and to answer, so one hotkey has one at a time.
"""

from __future__ import annotations

from typing import Any, Final

from chutes_proto.effects import Flow, Now, Transact
from chutes_proto.errors import BadRequest, Unavailable, ValidationProblem
from chutes_proto.server._call import Call, SignedCall
from chutes_proto.server._callbacks import ask_host
from chutes_proto.server._gpus import check_nodes
from chutes_proto.server._hosts import locate
from chutes_proto.server._service import Service
from chutes_proto.store._rows import ReadAll, ServerRow
from chutes_proto.store._run import Ask
from chutes_proto.units.fleet import FleetServer
from chutes_proto.units.servers import ReadServerAndBoot, RegisterServer, RemoveServer, RenameServer
from chutes_proto.wire import miners
from chutes_proto.wire.codes import Code
from chutes_proto.wire.names import timestamp
from chutes_proto.wire.public import EncodedMeasurements, PublicRequest, SigningKeysAnswer

_SHADOWED: Final = frozenset({"nonce", "boot", "signing-keys"})
"""Ids whose paths are other operations'."""


def register_server(service: Service, call: SignedCall[miners.RegisterServerRequest]) -> Flow[miners.MessageAnswer]:
    """Operation 5: register a server."""
    message, hotkey = call.message, call.caller.address
    if message.id in _SHADOWED:
        problem: ValidationProblem = {"type": "value_error", "loc": ["body", "id"], "msg": "The id is reserved"}
        raise BadRequest(Code.VALIDATION_ERROR, [problem])
    service.check_welcome(call.caller)
    gpus = check_nodes(message.id, message.gpus, service.gpus)
    shown = None
    with service.hosts.of(hotkey):
        address = yield from locate(message.host, service.unsafe_networks)
        if service.callback is not None:
            shown = yield from ask_host(service, service.callback, call, address)
    now = yield from Now()  # the host may have been slow to resolve and to answer
    server = yield from Transact(
        RegisterServer(
            now=now,
            request_id=call.request_id,
            hotkey=hotkey,
            server_id=message.id,
            name=message.id if message.name is None else message.name,
            host=message.host,
            address=address,
            gpus=gpus,
            profiles={
                identity: profile.measurements
                for identity, profile in service.profiles.items()
                # That of the host's quote counted when the quote came, and may have ended since.
                if profile.measurements.schedule.accepts(now) or (shown is not None and identity == shown.profile)
            },
            peer_address=call.request.peer_address,
            evidence=service.registration_evidence,
            shown=shown,
            revocations=service.revoked.now,
        )
    )
    yield from _log("server_registered", call, server)
    return miners.MessageAnswer(message="Server registered successfully.")


def list_servers(service: Service, call: SignedCall[miners.SignedRequest]) -> Flow[miners.ServerListAnswer]:
    """Operation 6: list the caller's servers, newest first."""
    rows = yield from Transact(Ask(ReadAll(ServerRow, call.caller.address)))
    newest_first = sorted(rows, key=lambda row: row.created_at, reverse=True)
    return miners.ServerListAnswer(servers=tuple(map(_described, newest_first)))


def rename_server(service: Service, call: SignedCall[miners.RenameServerRequest]) -> Flow[miners.RenamedServerAnswer]:
    """Operation 7: rename the caller's server."""
    message = call.message
    if message.server_name is None:
        problem: ValidationProblem = {"type": "missing", "loc": ["query", "server_name"], "msg": "Field required"}
        raise BadRequest(Code.VALIDATION_ERROR, [problem])
    hotkey, address = call.caller.address, call.request.peer_address
    unit = RenameServer(call.now, call.request_id, hotkey, message.server_id, message.server_name, address)
    server = yield from Transact(unit)
    yield from _log("server_renamed", call, server)
    return miners.RenamedServerAnswer(
        name=server.name,
        ip=server.host,
        created_at=timestamp(server.created_at),
        updated_at=None if server.updated_at is None else timestamp(server.updated_at),
    )


def read_server(service: Service, call: SignedCall[miners.ServerRequest]) -> Flow[miners.ServerDetailsAnswer]:
    """Operation 8: describe the caller's server."""
    server, boot = yield from Transact(ReadServerAndBoot(call.caller.address, call.message.server_id))
    version = None if boot is None else boot.profile_version
    in_maintenance = FleetServer(server, version).in_maintenance
    return miners.ServerDetailsAnswer(
        server_id=server.server_id,
        name=server.name,
        ip=server.host,
        version=version,
        maintenance_pending_window_id=server.window_id if in_maintenance else None,
        created_at=timestamp(server.created_at),
        updated_at=None if server.updated_at is None else timestamp(server.updated_at),
        target_version=server.target if in_maintenance else None,
    )


def remove_server(service: Service, call: SignedCall[miners.RemoveServerRequest]) -> Flow[miners.RemovedServerAnswer]:
    """Operation 9: remove the caller's server."""
    hotkey, address = call.caller.address, call.request.peer_address
    unit = RemoveServer(call.now, call.request_id, hotkey, call.message.server_name_or_id, address)
    server = yield from Transact(unit)
    yield from _log("server_removed", call, server)
    return miners.RemovedServerAnswer(name=server.name, message="Server removed successfully")


def publish_measurements(service: Service, call: Call[PublicRequest]) -> Flow[EncodedMeasurements]:
    """Operation 15: publish the reference values."""
    yield from ()
    return service.published(call.now)


def publish_signing_keys(service: Service, call: Call[PublicRequest]) -> Flow[SigningKeysAnswer]:
    """Operation 19: publish the operator's signing keys."""
    yield from ()
    if service.signing_keys is None:
        text = "Signing keys bundle not available"
        raise Unavailable(Code.SIGNING_KEYS_UNAVAILABLE, text, reason="signing_keys_file is not set", retry_after=60)
    return SigningKeysAnswer(bundle=service.signing_keys)


def _described(server: ServerRow) -> miners.ServerAnswer:
    return miners.ServerAnswer(
        server_id=server.server_id,
        name=server.name,
        ip=server.host,
        created_at=timestamp(server.created_at),
        updated_at=None if server.updated_at is None else timestamp(server.updated_at),
    )


def _log(event: str, call: SignedCall[Any], server: ServerRow) -> Flow[None]:
    yield from call.log(event, server=server.server_id, name=server.name, hotkey=server.hotkey)
