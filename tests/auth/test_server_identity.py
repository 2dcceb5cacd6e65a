"""The ephemeral identity of a server."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from chutes_proto.auth.certificates import spki_sha256
from chutes_proto.auth.client_identity import make_client_identity
from chutes_proto.auth.server_identity import make_server_identity
from chutes_proto.errors import LocalProtocolError

NOW = 1_800_000_000
ENTROPY = bytes(range(32))


def test_it_follows_from_its_entropy() -> None:
    server = make_server_identity(NOW, ENTROPY)
    assert make_server_identity(NOW, ENTROPY).key_pem == server.key_pem
    digests = {spki_sha256(x509.load_pem_x509_certificate(pem)) for pem in (server.ca_pem, server.chain_pem)}
    assert len(digests | {make_client_identity(NOW, ENTROPY).spki_sha256}) == 3


def test_it_needs_its_entropy_and_a_host() -> None:
    with pytest.raises(LocalProtocolError, match="32 bytes of entropy"):
        make_server_identity(NOW, b"")
    with pytest.raises(LocalProtocolError, match="at least one host"):
        make_server_identity(NOW, ENTROPY, hosts=())


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1", "keys.example"])
def test_it_verifies_under_its_ca(host: str) -> None:
    identity = make_server_identity(NOW, ENTROPY, ("localhost", "127.0.0.1", "::1", "keys.example"))
    ca, leaf = (x509.load_pem_x509_certificate(pem) for pem in (identity.ca_pem, identity.chain_pem))
    assert load_pem_private_key(identity.key_pem.reveal(), None).public_key() == leaf.public_key()
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    subject = next(name for name in names if str(name.value) == host)
    assert isinstance(subject, x509.DNSName | x509.IPAddress)
    moment = leaf.not_valid_before_utc
    verifier = PolicyBuilder().store(Store([ca])).time(moment).build_server_verifier(subject)
    assert verifier.verify(leaf, []) == [leaf, ca]
    other = PolicyBuilder().store(Store([ca])).time(moment).build_server_verifier(x509.DNSName("other.example"))
    with pytest.raises(VerificationError):
        other.verify(leaf, [])


def test_openssl_accepts_it(tmp_path: Path, require_program: Callable[[str], str]) -> None:
    openssl = require_program("openssl")
    identity = make_server_identity(NOW, ENTROPY)
    (tmp_path / "ca.pem").write_bytes(identity.ca_pem)
    (tmp_path / "chain.pem").write_bytes(identity.chain_pem)
    command = [openssl, "verify", "-x509_strict", "-purpose", "sslserver", "-attime", str(NOW)]
    command += ["-verify_ip", "127.0.0.1", "-CAfile", str(tmp_path / "ca.pem"), str(tmp_path / "chain.pem")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
