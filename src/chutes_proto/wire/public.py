"""The messages and endpoints without authentication: operations 15, 16 and 19."""

from __future__ import annotations

from attrs import frozen

from chutes_proto.wire.codes import Code
from chutes_proto.wire.endpoint import Endpoint, body

# --- messages ---


@frozen
class PublicRequest:
    """Operations 15, 16 and 19."""


@frozen
class Registers:
    """RTMR0 to RTMR3 in hex, upper case in name and value, as the reference system publishes them."""

    RTMR0: str = body("48 bytes in hex")
    RTMR1: str = body("48 bytes in hex")
    RTMR2: str = body("48 bytes in hex")
    RTMR3: str = body("48 bytes in hex")


@frozen
class Measurements:
    """One accepted image on accepted hardware."""

    version: str = body("of the image")
    name: str = body("of the profile")
    mrtd: str = body("48 bytes in hex")
    boot_rtmrs: Registers = body("when the VM asks for its keys")
    runtime_rtmrs: Registers = body("later")
    expected_gpus: tuple[str, ...] = body("keys of the GPU table")
    gpu_count: int | None = body("how many; null is any number")
    fingerprint: str | None = body("32 bytes in hex", default=None)


@frozen
class MeasurementsAnswer:
    """All accepted profiles: on the wire just the list."""

    profiles: tuple[Measurements, ...] = body("the profiles")

    LIST = "profiles"


@frozen
class EncodedMeasurements:
    """All accepted profiles, already encoded."""

    profiles: bytes = body("the list")

    BYTES = "profiles"


@frozen
class ApiDescriptionAnswer:
    """The OpenAPI document, already encoded."""

    document: bytes = body("An OpenAPI 3.1 document")

    BYTES = "document"


@frozen
class SigningKeysAnswer:
    """The keys by which a VM checks what it installs: the operator's file, as it is."""

    bundle: bytes = body("version (an integer), keys and signatures (objects by name, base64)")

    BYTES = "bundle"


# --- endpoints ---

MEASUREMENTS = Endpoint(
    15,
    "get_measurements",
    "GET /servers/tee/measurements",
    PublicRequest,
    MeasurementsAnswer,
    "The accepted measurement profiles",
)

API_DESCRIPTION = Endpoint(
    16,
    "get_api_description",
    "GET /openapi.json",
    PublicRequest,
    ApiDescriptionAnswer,
    "This API as an OpenAPI 3.1 document",
)

SIGNING_KEYS = Endpoint(
    19,
    "get_signing_keys",
    "GET /servers/signing-keys",
    PublicRequest,
    SigningKeysAnswer,
    "The keys by which VMs check images and charts, signed by a root key that is in their image",
    (Code.SIGNING_KEYS_UNAVAILABLE,),
)
