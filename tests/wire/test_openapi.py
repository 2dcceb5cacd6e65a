"""The OpenAPI document says what the endpoint table says."""

import json
import re

import pytest

from chutes_proto.wire import openapi
from chutes_proto.wire.codes import Code
from chutes_proto.wire.endpoints import ENDPOINTS

DOCUMENT = json.loads(openapi.document())


def shape(path):
    """A path without the names of its parameters."""
    return re.sub(r"{\w+}", "{}", path)


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda e: e.operation)
def test_every_operation_is_described(endpoint):
    (path,) = [path for path in DOCUMENT["paths"] if shape(path) == shape(endpoint.path)]
    operation = DOCUMENT["paths"][path][endpoint.method.lower()]
    assert operation["operationId"] == endpoint.operation
    assert {str(code.status) for code in endpoint.codes} | {str(endpoint.status)} <= set(operation["responses"])
    assert [p["name"] for p in operation["parameters"] if p["in"] == "path"] == re.findall(r"{(\w+)}", path)


SIGNED = dict.fromkeys(("X-Chutes-Hotkey", "X-Chutes-Signature", "X-Chutes-Nonce", "Authorization"), False)

# The published reference of the API: operation, parameter, required.
REFERENCE = {
    "get_boot_nonce": {},
    "verify_boot_attestation": {
        "X-Chutes-Nonce": False,
        "body.quote": True,
        "body.miner_hotkey": True,
        "body.vm_name": True,
    },
    "get_cache_passphrase": {"vm_name": True, "hotkey": False, "X-Boot-Token": True},  # a header serves, too
    "sync_volumes": {
        "vm_name": True,
        "X-Chutes-Hotkey": False,
        "X-Boot-Token": True,
        "body.volumes": True,
        "body.rekey": False,
    },
    "register_server": SIGNED | {"body.host": True, "body.id": True, "body.name": False, "body.gpus": True},
    "list_servers": SIGNED,
    "rename_server": SIGNED | {"server_id": True, "server_name": True},
    "get_server": SIGNED | {"server_id": True},
    "remove_server": SIGNED | {"server_id": True},  # the reference's server_name_or_id: a path has one name for it
    "get_runtime_nonce": SIGNED | {"server_id": True},
    "verify_runtime_attestation": SIGNED | {"server_id": True, "body.quote": True},
    "get_attestation_status": SIGNED | {"server_id": True},
    "get_measurements": {},
}


@pytest.mark.parametrize("operation_id", REFERENCE)
def test_parameters_are_those_of_the_published_reference(operation_id):
    operation = next(
        o for path in DOCUMENT["paths"].values() for o in path.values() if o["operationId"] == operation_id
    )
    said = {p["name"]: p["required"] for p in operation["parameters"]}
    if "requestBody" in operation:
        name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        schema = DOCUMENT["components"]["schemas"][name]
        said |= {f"body.{field}": field in schema["required"] for field in schema["properties"]}
    assert REFERENCE[operation_id].items() <= said.items()
    assert ("201" if operation_id == "register_server" else "200") in operation["responses"]
    if REFERENCE[operation_id]:
        assert "422" in operation["responses"]


def test_volumes_are_never_none():
    """An empty list is refused, so the document promises nothing else."""
    least = {
        (name, *(word for word in ("minItems", "minProperties") if schema["properties"]["volumes"].get(word) == 1))
        for name, schema in DOCUMENT["components"]["schemas"].items()
        if name.endswith("Request") and "volumes" in schema.get("properties", ())
    }
    assert least == {
        ("VolumeSyncRequest", "minItems"),
        ("VolumeAttestationRequest", "minItems"),
        ("VolumeConfirmationRequest", "minProperties"),
        ("ProvisionRequest", "minItems"),
        ("ProvisionConfirmationRequest", "minProperties"),
    }


def test_every_reference_resolves():
    names = set(re.findall(r'"#/components/schemas/(\w+)"', openapi.document().decode()))
    assert names == set(DOCUMENT["components"]["schemas"])


def test_the_codes_are_the_closed_list():
    assert DOCUMENT["components"]["schemas"]["Error"]["properties"]["code"]["enum"] == [str(code) for code in Code]


def test_a_type_without_a_schema_is_refused():
    with pytest.raises(TypeError, match="no JSON schema for"):
        openapi._schema(complex)
