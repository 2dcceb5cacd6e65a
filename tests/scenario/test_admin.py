"""The admin listener of a real server: who may ask, what it says of faults, and what it counts."""

from __future__ import annotations

import datetime
import os
import re
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from prometheus_client.parser import text_string_to_metric_families

from chutes_proto.auth.server_identity import make_server_identity
from chutes_proto.io.files import write_file
from chutes_proto.io.server.metrics import Metrics
from tests.cli.conftest import HOTKEY
from tests.scenario.premises import Premises
from tests.waiting import wait_until
from tools.docs.pages import DOCS

here_only = pytest.mark.parametrize("premises", ["sqlite"], indirect=True)


def listen(premises: Premises, admin: str) -> None:
    with premises.configuration.open("a") as file:
        _ = file.write(f"\n[admin]\n{admin}\n")


def over(path: Path) -> httpx.Client:
    return httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost", timeout=60)


def checks(admin: httpx.Client) -> dict[str, Any]:
    answer = admin.get("/readyz")
    members = answer.json()
    assert answer.status_code == (200 if members["ready"] else 503)
    return {each["check"]: each for each in members["checks"]}


def series(admin: httpx.Client) -> dict[tuple[str, ...], float]:
    """The value of each series, by its name and the values of its labels in order of their names."""
    text = admin.get("/metrics").text
    return {
        (
            sample.name.removeprefix("chutes_proto_"),
            *(value for _, value in sorted(sample.labels.items())),
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_it_tells_what_happened_and_names_no_vm(premises: Premises) -> None:
    listen(premises, 'unix = "admin.sock"')
    premises.start()
    vm = premises.vm("vm-with-a-name")
    passphrases = vm.sync(vm.boot()["boot_token"])
    _ = premises.vm("another").boot(status=401, nonce="0" * 64)
    with pytest.raises(httpx.ConnectError):  # it trusts other CAs
        _ = httpx.get(premises.url, trust_env=False, timeout=60)
    with over(premises.directory / "admin.sock") as admin:
        assert admin.get("/livez").text == "ok\n"
        found = checks(admin)
        assert {check: each["state"] for check, each in found.items()} == dict.fromkeys(
            ["store", "clock", "certificate", "collateral", "profile", "kek"], "ok"
        )
        counted = series(admin)
        assert counted["requests_total", "", "verify_boot_attestation", "200"] == 1
        assert counted["requests_total", "nonce_invalid", "verify_boot_attestation", "401"] == 1
        assert counted["request_seconds_count", "sync_volumes"] == 1
        assert counted["transactions_total", "committed", "GrantBoot"] == 1
        assert counted["transactions_total", "committed", "SyncVolumes"] == 1
        assert counted["collateral_lookups_total", "found"] == 1
        assert counted["step_seconds_count", "store"] >= 2
        assert counted["tls_handshakes_total", "done"] >= 4
        assert counted["tls_handshakes_total", "failed"] == 1
        assert counted["step_seconds_count", "compute"] >= 4
        assert counted["open_boots",] == 0
        assert counted["verifications_limit",] == 256
        begins = [value for key, value in counted.items() if key[0].startswith("collateral_issued")]
        assert 0 < max(begins) <= time.time()
        assert counted["check", "store"] == 0
        assert counted["certificate_expires_timestamp_seconds",] > time.time()
        assert min(value for key, value in counted.items() if key[0].startswith("collateral_expires")) > time.time()
        text = admin.get("/metrics").text
        assert "# HELP chutes_proto_requests_total" in text
        for name in ("vm-with-a-name", "another", HOTKEY, "127.0.0.1", *map(str, passphrases.values())):
            assert name not in text
    with httpx.Client(verify=ssl.create_default_context(cafile=premises.ca), base_url=premises.url) as public:
        assert public.get("/metrics").status_code == public.get("/readyz").status_code == 404
    premises.stop()
    assert not (premises.directory / "admin.sock").exists()


@here_only
def test_it_tells_of_a_row_that_was_changed_and_of_audit_rows_that_cannot_leave(premises: Premises) -> None:
    """The request gets 503, as a refusal would power a deployed VM off; only this VM is concerned, or the sink."""
    listen(premises, 'unix = "admin.sock"\n[audit]\nfile = "copies/audit.jsonl"\nrequired = true')
    copies = premises.directory / "copies"
    copies.mkdir()
    premises.start()
    assert premises.vm().boot()
    premises.sql("UPDATE vm SET proven = NOT proven")
    assert premises.vm().boot(status=503)["code"] == "store_unavailable"
    premises.wait_for_log("is not authentic", "table vm")
    assert premises.vm("vm-2").boot()
    vm = premises.vm("vm-2")
    nonce = vm.nonce()  # the server gives none for a second if its look at the store shares a commit that fails
    copies.rename(premises.directory / "away")
    assert vm.boot(nonce, status=503)["code"] == "store_unavailable"
    premises.wait_for_log("audit.required is set, so the answer does not leave")
    with over(premises.directory / "admin.sock") as admin:
        wait_until(lambda: "rows are not authentic: vm" in checks(admin)["store"]["reason"])
        assert checks(admin)["store"]["state"] == "note"
        wait_until(lambda: series(admin).get(("rows_not_authentic_total", "vm"), 0) >= 1)
        wait_until(lambda: series(admin).get(("audit_not_copied_total", "audit.file"), 0) >= 1)
    (premises.directory / "away").rename(copies)
    wait_until(vm.is_served)
    assert vm.boot()
    assert '"decision":"granted"' in (copies / "audit.jsonl").read_text()


@here_only
def test_keys_and_audit_are_counted(premises: Premises) -> None:
    premises.start()
    vm = premises.vm()
    _ = vm.sync(vm.boot()["boot_token"])
    premises.stop()
    listen(premises, 'unix = "admin.sock"')
    premises.start()
    with over(premises.directory / "admin.sock") as admin:
        counted = wait_until(lambda: (found := series(admin)).get(("keys", "active")) and found)
        assert counted["keys", "active"] == 3  # of the root disk, too
        assert counted["audit_position",] >= 2
        assert [value for key, value in counted.items() if key[0] == "sealed_keys"] == [3]


@here_only
def test_it_says_what_is_wrong(premises: Premises) -> None:
    for file in (premises.directory / "collateral").iterdir():
        file.unlink()
    listen(premises, 'unix = "admin.sock"')
    premises.start()
    write_file(premises.directory / "server.pem", b"half a certificate")
    premises.sql("ALTER TABLE fact RENAME TO facts")
    with over(premises.directory / "admin.sock") as admin:
        found = wait_until(lambda: (now := checks(admin)).get("store", {}).get("state") == "problem" and now)
        assert "fact" in found["store"]["reason"]
        assert found["certificate"]["state"] == "note"
        assert "0 platform families" in found["collateral"]["reason"]
        assert series(admin)["check", "store"] == 2
        assert admin.get("/livez").status_code == 200  # a restart would mend nothing


def test_every_metric_is_described() -> None:
    page = (DOCS / "how-to" / "monitor.md").read_text()
    described = set(re.findall(r"`([a-z_]+)`", page.partition("## Metrics")[2].partition("## Alerts")[0]))
    for metric in Metrics().registry.collect():
        name = metric.name.removeprefix("chutes_proto_")
        assert {name, f"{name}_total"} & described, name


# --- an address that is not loopback ---


class Authority:
    """A CA that issues certificates for clients."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "operators")])
        self.certificate = self.builder(self.name, self.key, -1, 1).add_extension(
            x509.BasicConstraints(ca=True, path_length=0), critical=True
        )
        self.pem = self.certificate.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM)

    def builder(
        self, name: x509.Name, key: ec.EllipticCurvePrivateKey, begin: int, end: int
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + datetime.timedelta(days=begin))
            .not_valid_after(now + datetime.timedelta(days=end))
        )

    def issue(self, path: Path, begin: int = -1, end: int = 1, usage: x509.ObjectIdentifier | None = None) -> Path:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "prometheus")])
        built = self.builder(name, key, begin, end).add_extension(
            x509.ExtendedKeyUsage([usage or ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        key_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        write_file(path, built.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM) + key_pem)
        return path


@here_only
def test_only_clients_with_a_certificate_of_its_ca_are_served(premises: Premises, tmp_path: Path) -> None:
    ours, others = Authority(), Authority()
    identity = make_server_identity(int(time.time()), os.urandom(32), ["127.0.0.1"])
    for name, data in {
        "admin.pem": identity.chain_pem,
        "admin.key": identity.key_pem.reveal(),
        "admin-ca.pem": ours.pem,
    }.items():
        write_file(premises.directory / name, data, mode=0o600)
    files = 'certificate = "admin.pem"\nkey = "admin.key"\nclient_ca = "admin-ca.pem"'
    listen(premises, f'listen = "0.0.0.0:0"\n{files}')
    premises.start()
    log = premises.directory.with_name("log")
    premises.wait_for_log('"serving"')
    port = int(log.read_text().partition("https://0.0.0.0:")[2].partition('"')[0])

    def livez(certificate: Path | None) -> int:
        context = ssl.create_default_context(cadata=identity.ca_pem.decode())
        if certificate is not None:
            context.load_cert_chain(certificate)
        with httpx.Client(verify=context, trust_env=False, timeout=60) as client:
            return client.get(f"https://127.0.0.1:{port}/livez").status_code

    assert livez(ours.issue(tmp_path / "good.pem")) == 200
    refused: dict[str, Callable[[], Path | None]] = {
        "none": lambda: None,
        "another CA's, of the same name": lambda: others.issue(tmp_path / "other.pem"),
        "expired": lambda: ours.issue(tmp_path / "expired.pem", -2, -1),
        "not yet valid": lambda: ours.issue(tmp_path / "early.pem", 1, 2),
        "a server's": lambda: ours.issue(tmp_path / "server.pem", usage=ExtendedKeyUsageOID.SERVER_AUTH),
    }
    for what, make in refused.items():
        with pytest.raises(httpx.TransportError):
            pytest.fail(f"{what}: {livez(make())}")
