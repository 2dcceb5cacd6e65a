"""Operations 20 to 24: maintenance windows, by which a fleet moves to a new image, and a miner's inventory.

There is one window, the operator's (``[maintenance]`` of the configuration). This server knows of no workloads: no
instance is purged, none is the last survivor, and no GPU runs anything.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from chutes_proto.effects import Flow, Transact
from chutes_proto.errors import LocalProtocolError, Refused
from chutes_proto.server._call import SignedCall
from chutes_proto.server._service import Service
from chutes_proto.store._rows import GpuRow
from chutes_proto.units.fleet import (
    BeginMaintenance,
    Preflight,
    PreflightMaintenance,
    ReadServers,
    ReadServersAndGpus,
    Reason,
    Window,
    is_older,
)
from chutes_proto.wire import fleet, json
from chutes_proto.wire.codec import plain
from chutes_proto.wire.codes import Code
from chutes_proto.wire.miners import SignedRequest
from chutes_proto.wire.names import timestamp

_CONFLICTS: frozenset[Reason] = frozenset({"concurrency_cap", "maintenance_pending"})


def read_policy(service: Service, call: SignedCall[SignedRequest]) -> Flow[fleet.MaintenancePolicyAnswer]:
    """Operation 20: the window, and which of the caller's servers are older than its target."""
    servers = yield from Transact(ReadServers(call.caller.address))
    window = service.maintenance
    return fleet.MaintenancePolicyAnswer(
        active_window=None if window is None else _window(window),
        window_open=window is not None and window.is_open(call.now),
        current_slots=sum(server.in_maintenance for server in servers),
        servers=tuple(
            fleet.MaintainedServer(
                server_id=server.row.server_id,
                name=server.row.name,
                version=server.version,
                needs_upgrade=window is not None and is_older(server.version, window.target_version),
                in_maintenance=server.in_maintenance,
            )
            for server in servers
        ),
    )


def preflight(service: Service, call: SignedCall[fleet.MaintenanceRequest]) -> Flow[fleet.PreflightAnswer]:
    """Operation 21: judge a server, without a write."""
    unit = PreflightMaintenance(call.now, call.caller.address, call.message.server_name_or_id, service.maintenance)
    return _judged((yield from Transact(unit)), service.maintenance)


def begin(service: Service, call: SignedCall[fleet.MaintenanceRequest]) -> Flow[fleet.MaintenanceAnswer]:
    """Operation 22: begin the maintenance of a server."""
    name, window = call.message.server_name_or_id, service.maintenance
    peer = call.request.peer_address
    unit = BeginMaintenance(call.now, call.request_id, call.caller.address, name, window, peer)
    found = yield from Transact(unit)
    if found.reasons:
        code = Code.MAINTENANCE_DENIED if _CONFLICTS.isdisjoint(found.reasons) else Code.MAINTENANCE_CONFLICT
        reason = f"server {found.server.row.server_id}: {', '.join(found.reasons)}"
        raise Refused(code, plain(_judged(found, window)), reason=reason)
    if window is None:
        raise LocalProtocolError("a maintenance has begun without a window")
    server = found.server.row.server_id
    yield from call.log("maintenance_begun", server=server, hotkey=call.caller.address, window=window.id)
    return fleet.MaintenanceAnswer(server_id=server, purged_instance_ids=(), window=_window(window))


def list_inventory(service: Service, call: SignedCall[SignedRequest]) -> Flow[fleet.InventoryAnswer]:
    """Operation 23: the caller's servers with the GPUs that it declared."""
    servers = tuple(
        fleet.InventoryServer(
            server_id=server.row.server_id,
            name=server.row.name,
            ip=server.row.host,
            is_tee=server.version is not None,
            version=server.version,
            maintenance_pending=server.in_maintenance,
            created_at=timestamp(server.row.created_at),
            updated_at=None if server.row.updated_at is None else timestamp(server.row.updated_at),
            gpus=tuple(map(_gpu, gpus)),
        )
        for server, gpus in (yield from Transact(ReadServersAndGpus(call.caller.address)))
    )
    return fleet.InventoryAnswer(servers=servers)


def list_running(service: Service, call: SignedCall[SignedRequest]) -> Flow[fleet.RunningGpusAnswer]:
    """Operation 24: no GPU runs anything that this server knows of."""
    yield from ()
    return fleet.RunningGpusAnswer(gpus=())


def _window(window: Window) -> fleet.MaintenanceWindow:
    return fleet.MaintenanceWindow(
        id=window.id,
        target_measurement_version=window.target_version,
        upgrade_window_start=_time(window.start),
        upgrade_window_end=_time(window.end),
        max_concurrent_per_miner=window.limit,
    )


def _time(at: int) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(sep=" ")


def _judged(found: Preflight, window: Window | None) -> fleet.PreflightAnswer:
    reasons: list[fleet.DenialReason] = []
    for reason in found.reasons:
        is_cap = reason == "concurrency_cap"
        reasons.append(
            fleet.DenialReason(
                reason=reason,
                current_version=found.server.version,
                target_version=None if window is None else window.target_version,
                window_id=found.server.row.window_id if reason == "maintenance_pending" else _id(window),
                current_slots=len(found.pending) if is_cap else None,
                limit=window.limit if is_cap and window is not None else None,
                blocking=tuple(one.row.server_id for one in found.pending) if is_cap else None,
            )
        )
    return fleet.PreflightAnswer(
        eligible=not reasons,
        denial_reasons=tuple(reasons),
        blocking_chute_ids=(),
        current_slots=len(found.pending),
        limit=None if window is None else window.limit,
    )


def _id(window: Window | None) -> str | None:
    return None if window is None else window.id


def _gpu(row: GpuRow) -> fleet.InventoryGpu:
    declared: Any = json.decode(row.declared.encode())
    return fleet.InventoryGpu(
        uuid=declared["uuid"],
        gpu_identifier=row.identifier,
        device_index=declared["device_index"],
        verified_at=None,
        verification_error=None,
    )
