"""The messages and endpoints around a fleet: maintenance windows, a miner's inventory, host profiles (20 to 29)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from attrs import frozen

from chutes_proto.wire.codes import Code
from chutes_proto.wire.endpoint import Endpoint, body, path, query
from chutes_proto.wire.miners import SIGNATURE_CODES, SignedRequest
from chutes_proto.wire.names import Name

HOST_PROFILE_KEYS = ("gpus", "nvswitches", "ib_devices", "cpu", "memory", "numa", "qemu")
"""The members of a host profile, of which a tool may leave out what its host does not have."""

# --- messages: maintenance ---


@frozen
class MaintenanceRequest(SignedRequest):
    """Operations 21 and 22: of one server."""

    server_name_or_id: Name = path("Server name or ID")


@frozen
class MaintenanceWindow:
    """A window; times are ``YYYY-MM-DD HH:MM:SS+00:00``."""

    id: str = body("names the window")
    target_measurement_version: str = body("the version of the image that servers move to")
    upgrade_window_start: str = body("from when on")
    upgrade_window_end: str = body("until when")
    max_concurrent_per_miner: int = body("how many servers of one miner may be in maintenance at once")


@frozen
class MaintainedServer:
    """One of the caller's servers."""

    server_id: str = body("the server's id")
    name: str = body("the server's name")
    version: str | None = body("of the image that the VM of this name booted last")
    needs_upgrade: bool = body("whether that is older than the window's target")
    in_maintenance: bool = body("whether its maintenance has begun, and it did not boot the target since")


@frozen
class MaintenancePolicyAnswer:
    """The latest window, also when it is closed, and the caller's servers."""

    active_window: MaintenanceWindow | None = body("the latest window")
    window_open: bool = body("whether it is open now")
    current_slots: int = body("how many servers of the caller's are in maintenance")
    servers: tuple[MaintainedServer, ...] = body("the caller's servers, newest first")


@frozen
class DenialReason:
    """Why a server may not begin its maintenance, with what belongs to the reason."""

    reason: str = body("not_tee, no_active_window, already_at_target, maintenance_pending or concurrency_cap")
    current_version: str | None = body("the server's version")
    target_version: str | None = body("the window's target")
    window_id: str | None = body("the window")
    current_slots: int | None = body("servers in maintenance")
    limit: int | None = body("how many may be")
    blocking: tuple[str, ...] | None = body("the servers in maintenance")


@frozen
class BlockingChute:
    """A workload that must go on: none is known here."""

    chute_id: str = body("the workload")
    instance_id: str = body("its instance")


@frozen
class PreflightAnswer:
    """Whether a server may begin its maintenance now."""

    eligible: bool = body("whether nothing is against it")
    denial_reasons: tuple[DenialReason, ...] = body("the reasons against it")
    blocking_chute_ids: tuple[BlockingChute, ...] = body("always empty")
    current_slots: int = body("how many servers of the caller's are in maintenance")
    limit: int | None = body("how many may be; null without a window")


@frozen
class MaintenanceAnswer:
    """The maintenance of a server has begun; a boot of the target version ends it."""

    server_id: str = body("the server's id")
    purged_instance_ids: tuple[str, ...] = body("always empty")
    window: MaintenanceWindow = body("the window")


# --- messages: inventory ---


@frozen
class InventoryGpu:
    """A GPU of a server, as its owner declared it."""

    uuid: str = body("GPU uuid")
    gpu_identifier: str = body("key of the GPU table")
    device_index: int = body("0 to 9")
    verified_at: str | None = body("null: evidence names no declared GPU")
    verification_error: str | None = body("null")


@frozen
class InventoryServer:
    """One of the caller's servers with its GPUs; times are RFC 3339 in UTC."""

    server_id: str = body("the server's id")
    name: str = body("the server's name")
    ip: str = body("the host that it was registered with")
    is_tee: bool = body("whether the VM of its name has booted here")
    version: str | None = body("of the image that it booted last")
    maintenance_pending: bool = body("whether it is in maintenance")
    created_at: str = body("when it was registered")
    updated_at: str | None = body("when it was renamed last")
    gpus: tuple[InventoryGpu, ...] = body("its GPUs, by uuid")


@frozen
class InventoryAnswer:
    """The caller's servers, newest first."""

    servers: tuple[InventoryServer, ...] = body("the servers")


@frozen
class RunningGpu:
    """A GPU that runs a workload: none is known here."""

    gpu_id: str = body("GPU uuid")
    last_verified_at: str | None = body("RFC 3339 in UTC")
    verification_error: str | None = body("why not")
    active: bool = body("whether it is in use")
    chute_id: str | None = body("the workload")
    chute_name: str | None = body("its name")


@frozen
class RunningGpusAnswer:
    """Always an empty list: this server knows of no workloads."""

    gpus: tuple[RunningGpu, ...] = body("the GPUs")

    LIST = "gpus"


# --- messages: host profiles ---


@frozen
class HostProfileRequest(SignedRequest):
    """Operations 25 to 27: the body is a host profile, an object with some of `HOST_PROFILE_KEYS`."""

    profile: Mapping[str, object] = body("the hardware of the host")

    OBJECT = "profile"


@frozen
class HostPreflightRequest(SignedRequest):
    """Operation 29, of older tools: the body is what they discovered, any object."""

    version: str | None = query("the image's version")
    rc: str | None = query("whether it is a release candidate: true or false")
    profile: Mapping[str, object] = body("the hardware of the host")

    OBJECT = "profile"


@frozen
class HostProfilesRequest:
    """Operation 28."""

    include_pending: str | None = query("true: also hosts that the operator has not named")


@frozen
class HostMeasurement:
    """An image that is accepted on such a host."""

    version: str = body("of the image")
    rc: bool = body("whether it is a release candidate")


@frozen
class HostStatusAnswer:
    """Whether a host of this hardware can boot, and what."""

    fingerprint: str = body("64 hex digits: what is published for this class, or this server's own of the profile")
    status: str = body("unknown, pending or accepted")
    measurements: tuple[HostMeasurement, ...] = body("the images that are accepted on it")
    detail: str = body("for people")


@frozen
class HostRegistrationAnswer:
    """The profile is kept, now or before."""

    fingerprint: str = body("64 hex digits")
    status: str = body("pending or accepted")
    stored: bool = body("whether this request added it")
    detail: str = body("for people")


@frozen
class HostProfile:
    """One host profile."""

    fingerprint: str = body("64 hex digits")
    measured: bool = body("whether an image is accepted on it")
    measurements: tuple[HostMeasurement, ...] = body("these images")
    profile: Mapping[str, object] = body("the hardware of the host")


@frozen
class HostProfilesAnswer:
    """The host profiles, oldest first."""

    profiles: tuple[HostProfile, ...] = body("the profiles")

    LIST = "profiles"


@frozen
class EncodedHostProfiles:
    """The host profiles, already encoded."""

    profiles: bytes = body("the list")

    BYTES = "profiles"


@frozen
class HostPreflightAnswer:
    """Whether an image may be launched on such a host."""

    fingerprint: str = body("64 hex digits")
    launchable: bool = body("whether this version is accepted on it")
    detail: str = body("for people")


# --- endpoints ---

_CODES = (*SIGNATURE_CODES, Code.STORE_UNAVAILABLE)
_of_tee = partial(Endpoint, authentication="hotkey signature, purpose tee", signed="purpose")
_of_miner = partial(
    Endpoint, codes=_CODES, authentication="hotkey signature, purpose miner", signed="purpose", purpose="miner"
)
_of_host = partial(
    Endpoint,
    codes=_CODES,
    authentication="hotkey signature over the body",
    signed="body",
    body_bytes=256 * 1024,
)

MAINTENANCE_POLICY = _of_tee(
    20,
    "get_maintenance_policy",
    "GET /servers/maintenance/policy",
    SignedRequest,
    MaintenancePolicyAnswer,
    "The latest maintenance window, and the caller's servers",
    codes=_CODES,
)

MAINTENANCE_PREFLIGHT = _of_tee(
    21,
    "preflight_maintenance",
    "GET /servers/{server_name_or_id}/maintenance/preflight",
    MaintenanceRequest,
    PreflightAnswer,
    "Whether one of the caller's servers may begin its maintenance",
    codes=(*_CODES, Code.SERVER_NOT_FOUND),
)

BEGIN_MAINTENANCE = _of_tee(
    22,
    "begin_maintenance",
    "PUT /servers/{server_name_or_id}/maintenance",
    MaintenanceRequest,
    MaintenanceAnswer,
    "Begin the maintenance of one of the caller's servers; a boot of the target version ends it",
    codes=(*_CODES, Code.SERVER_NOT_FOUND, Code.MAINTENANCE_DENIED, Code.MAINTENANCE_CONFLICT),
    refusal=PreflightAnswer,
)

INVENTORY = _of_miner(
    23, "list_inventory", "GET /miner/servers/", SignedRequest, InventoryAnswer, "The caller's servers with their GPUs"
)

RUNNING_GPUS = _of_miner(
    24,
    "list_running_gpus",
    "GET /miner/inventory",
    SignedRequest,
    RunningGpusAnswer,
    "The caller's GPUs that run a workload: always none",
)

TDX_HOST_STATUS = _of_host(
    25,
    "get_tdx_host_status",
    "POST /servers/tdx/host_profiles/status",
    HostProfileRequest,
    HostStatusAnswer,
    "Which images are accepted on a host of this hardware",
)

SNP_HOST_STATUS = _of_host(
    26,
    "get_snp_host_status",
    "POST /servers/snp/host_profiles/status",
    HostProfileRequest,
    HostStatusAnswer,
    "The same for SEV-SNP: no image is accepted here",
)

REGISTER_HOST_PROFILE = _of_host(
    27,
    "register_host_profile",
    "POST /servers/tdx/host_profiles",
    HostProfileRequest,
    HostRegistrationAnswer,
    "Keep the profile of a host, for the operator to name",
    codes=(*_CODES, Code.HOTKEY_BLACKLISTED, Code.HOST_PROFILES_FULL),
)

HOST_PROFILES = Endpoint(
    28,
    "list_host_profiles",
    "GET /servers/tdx/host_profiles",
    HostProfilesRequest,
    HostProfilesAnswer,
    "The host profiles that the operator has named",
    (Code.STORE_UNAVAILABLE,),
)

HOST_PREFLIGHT = _of_host(
    29,
    "preflight_host",
    "POST /servers/tdx/preflight",
    HostPreflightRequest,
    HostPreflightAnswer,
    "Whether an image may be launched on a host of this hardware (older tools)",
)
