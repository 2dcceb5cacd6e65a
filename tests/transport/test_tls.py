"""TLS over memory buffers: the standard library's client on the other side."""

from __future__ import annotations

import math
import ssl
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from hypothesis import example, given
from hypothesis import strategies as st
from OpenSSL import SSL

from chutes_proto.auth.certificates import spki_sha256
from chutes_proto.auth.server_identity import make_server_identity
from chutes_proto.errors import ConfigurationError, LocalProtocolError, RemoteProtocolError
from chutes_proto.secret import Secret
from chutes_proto.transport import tls
from chutes_proto.transport.h1 import ServerConnection, _Phase
from chutes_proto.transport.tls import TlsSession, server_context
from chutes_proto.wire.http import HttpRequest, HttpResponse
from tests.certificates import NEW_KEY, PrivateKey, certificate_pem, chained, key_pem, self_signed
from tests.transport.tls_client import NOW, TlsClient, client_context, context, session

IDENTITY = make_server_identity(NOW, bytes(32))


def shake(client: TlsClient, server: TlsSession) -> bytes:
    """Carry bytes to and fro until neither has more to say; what the server read."""
    plaintext = b""
    while data := client.data_to_send():
        plaintext += server.receive_data(data)
        client.receive_data(server.data_to_send())
    return plaintext


VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", ["rsa1024", "rsa2048", "p256", "p384", "p521", "ed25519", None])
def test_any_client_certificate_is_accepted_and_seen(kind: str | None, version: ssl.TLSVersion, tmp_path: Path) -> None:
    settings = client_context(version)
    certificate = None
    if kind is not None:
        key = NEW_KEY[kind]()
        certificate = self_signed(key, valid=False)
        (tmp_path / "client.pem").write_bytes(certificate_pem(certificate) + key_pem(key))
        settings.set_ciphers("DEFAULT@SECLEVEL=0")
        settings.load_cert_chain(tmp_path / "client.pem")
    client, server = TlsClient(settings), session()
    client.send(b"hello")
    assert shake(client, server) == b"hello"
    assert server.established
    assert client.tls.version() == version.name.replace("v1_", "v1.")
    assert server.peer_certificate == certificate
    server.send_data(b"answer")
    client.receive_data(server.data_to_send())
    assert client.received == b"answer"


def rsa_key(size: int, exponent_bits: int) -> rsa.RSAPrivateKey:
    """A key whose public exponent has so many bits."""
    made = rsa.generate_private_key(65537, size).private_numbers()
    p, q = made.p, made.q
    exponent = (1 << exponent_bits) - 1
    while math.gcd(exponent, (p - 1) * (q - 1)) != 1:
        exponent -= 2
    d = pow(exponent, -1, (p - 1) * (q - 1))
    public = rsa.RSAPublicNumbers(exponent, p * q)
    numbers = rsa.RSAPrivateNumbers(p, q, d, d % (p - 1), d % (q - 1), rsa.rsa_crt_iqmp(p, q), public)
    return numbers.private_key(unsafe_skip_rsa_key_validation=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("make", "is_accepted"),
    [
        (lambda: rsa_key(2048, 32), True),
        (lambda: rsa_key(2048, 33), False),
        (lambda: rsa_key(3072, 3071), False),
        (NEW_KEY["rsa4096"], True),
        (NEW_KEY["rsa4104"], False),
    ],
    ids=["exponent 32", "exponent 33", "exponent 3071", "4096", "4104"],
)
def test_a_key_whose_signature_is_dear_to_check_is_refused(
    make: Callable[[], PrivateKey], is_accepted: bool, version: ssl.TLSVersion, tmp_path: Path
) -> None:
    key = make()
    (tmp_path / "client.pem").write_bytes(certificate_pem(self_signed(key)) + key_pem(key))
    settings = client_context(version)
    settings.load_cert_chain(tmp_path / "client.pem")
    settle(settings, is_accepted=is_accepted)


def settle(settings: ssl.SSLContext, *, is_accepted: bool) -> None:
    """A handshake; where the certificate is not accepted, both ends hear it, and the client as an alert."""
    client, server = TlsClient(settings), session()
    client.send(b"hello")
    if is_accepted:
        assert shake(client, server) == b"hello"
        return
    server.receive_data(client.data_to_send())
    client.receive_data(server.data_to_send())
    with pytest.raises(RemoteProtocolError, match="certificate verify failed"):
        server.receive_data(client.data_to_send())
    assert not server.established
    with pytest.raises(ssl.SSLError, match="UNKNOWN_CA"):
        client.receive_data(server.data_to_send())


@pytest.mark.parametrize("exponent_bits", [32, 3071])
def test_the_key_of_the_issuer_is_not_dear_either(exponent_bits: int, tmp_path: Path) -> None:
    issuing, key = rsa_key(3072, exponent_bits), ec.generate_private_key(ec.SECP256R1())
    issuer = self_signed(issuing, "issuer")
    builder = x509.CertificateBuilder().subject_name(self_signed(key).subject).issuer_name(issuer.subject)
    builder = builder.public_key(key.public_key()).serial_number(8)
    builder = builder.not_valid_before(issuer.not_valid_before_utc).not_valid_after(issuer.not_valid_after_utc)
    issued = builder.sign(issuing, hashes.SHA256())
    (tmp_path / "client.pem").write_bytes(certificate_pem(issued) + certificate_pem(issuer) + key_pem(key))
    settings = client_context()
    settings.load_cert_chain(tmp_path / "client.pem")
    settle(settings, is_accepted=exponent_bits == 32)


@pytest.mark.parametrize("size", [1, 1000, 16 * 1024, 10**6])
def test_a_handshake_has_a_bound_however_its_bytes_are_cut(size: int, tmp_path: Path) -> None:
    key = NEW_KEY["p256"]()
    (tmp_path / "client.pem").write_bytes(certificate_pem(self_signed(key)) * 150 + key_pem(key))
    settings = client_context()
    settings.load_cert_chain(tmp_path / "client.pem")
    client, server = TlsClient(settings), session()
    first = client.data_to_send()
    server.receive_data(first)
    client.receive_data(server.data_to_send())
    flight = client.data_to_send()
    room = tls.HANDSHAKE_SIZE - len(first)
    assert len(flight) > room
    for at in range(0, room // size * size, size):
        assert server.receive_data(flight[at : at + size]) == b""
    with pytest.raises(RemoteProtocolError, match="handshake of more than"):
        server.receive_data(flight[room // size * size :])
    assert server.receive_data(b"x") == b""
    assert not server.established


def test_what_follows_the_handshake_in_one_piece_does_not_count_as_its_own() -> None:
    client, server = TlsClient(client_context()), session()
    client.send(b"x" * 100_000)
    assert shake(client, server) == b"x" * 100_000


@pytest.mark.parametrize("version", VERSIONS)
def test_close_in_both_directions(version: ssl.TLSVersion) -> None:
    client, server = TlsClient(client_context(version)), session()
    client.send(b"last")
    shake(client, server)
    client.close()
    assert server.receive_data(client.data_to_send()) == b""
    assert server.peer_closed
    server.send_data(b"late answer")  # the other direction is still open
    server.close()
    client.receive_data(server.data_to_send())
    assert client.ended
    with pytest.raises(LocalProtocolError):
        server.send_data(b"x")
    assert server.receive_data(b"anything") == b""
    server.close()
    assert server.data_to_send() == b""


def test_bytes_that_end_without_a_close() -> None:
    client, server = TlsClient(client_context()), session()
    shake(client, server)
    assert server.receive_data(b"") == b""
    assert server.peer_closed


def test_a_handshake_that_ends_early() -> None:
    client, server = TlsClient(client_context()), session()
    hello = client.data_to_send()
    assert server.receive_data(hello[:50]) == b""
    with pytest.raises(RemoteProtocolError, match="handshake"):
        server.receive_data(b"")
    server.close()
    assert server.data_to_send() == b""


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\nHost: h\r\n\r\n", b"\x16\x03\x01\x00\x02\x01\x00" + b"\xff" * 20])
def test_what_is_no_tls_is_one_error_and_an_alert(data: bytes) -> None:
    server = session()
    with pytest.raises(RemoteProtocolError, match="TLS: "):
        server.receive_data(data)
    alert = server.data_to_send()
    assert alert == b"" or alert[0] == 0x15
    assert server.receive_data(b"more") == b""
    assert not server.established
    assert server.peer_certificate is None


def hello() -> bytes:
    return TlsClient(client_context()).data_to_send()


def feed(server: TlsSession, pieces: list[bytes]) -> bytes:
    """Give the pieces to the session until it refuses; what it sent."""
    try:
        for piece in pieces:
            assert server.receive_data(piece) == b""
    except RemoteProtocolError as exc:
        assert str(exc)
    return server.data_to_send()


@given(st.binary(max_size=600), st.integers(0, 600), st.binary(max_size=8))
@example(b"\x80\x2e\x01\x03\x01", 0, b"")
@example(b"\x16\x03\x01\xff\xff" + b"\0" * 600, 0, b"")
def test_bytes_of_any_kind(data: bytes, keep: int, patch: bytes) -> None:
    feed(session(), [data])
    feed(session(), [data[i : i + 1] for i in range(len(data))] + [b""])
    feed(session(), [hello()[:keep] + patch + hello()[keep + len(patch) :], data])


@given(st.integers(0, 2000), st.integers(1, 255), st.booleans())
def test_a_damaged_record_is_refused(at: int, flip: int, whole: bool) -> None:
    client, server = TlsClient(client_context()), session()
    shake(client, server)
    client.send(b"x" * 1500)
    record = bytearray(client.data_to_send())
    record[at % len(record)] ^= flip
    pieces = [bytes(record)] if whole else [bytes(record[i : i + 1]) for i in range(len(record))]
    with pytest.raises(RemoteProtocolError):
        assert not any(map(server.receive_data, [*pieces, more_than_a_record(client)]))


def more_than_a_record(client: TlsClient) -> bytes:
    """The bytes that a session waits for after a damaged length."""
    client.send(b"y" * 70_000)
    return client.data_to_send()


def test_old_versions_are_refused() -> None:
    settings = client_context()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        settings.minimum_version = settings.maximum_version = ssl.TLSVersion.TLSv1_1
    settings.set_ciphers("ALL@SECLEVEL=0")
    client, server = TlsClient(settings), session()
    with pytest.raises(RemoteProtocolError, match="TLS: "):
        server.receive_data(client.data_to_send())


@pytest.mark.parametrize("version", VERSIONS)
def test_no_session_is_resumed(version: ssl.TLSVersion) -> None:
    shared, settings = context(), client_context(version)
    client, server = TlsClient(settings), TlsSession(shared)
    client.send(b"x")
    shake(client, server)
    server.send_data(b"y")
    client.receive_data(server.data_to_send())
    again = TlsClient(settings, resume=client.tls.session)
    shake(again, TlsSession(shared))
    assert again.tls.session_reused is False


def test_renegotiation_is_refused() -> None:
    settings = SSL.Context(SSL.TLS_CLIENT_METHOD)  # the standard library's client cannot renegotiate
    settings.set_max_proto_version(SSL.TLS1_2_VERSION)
    client, server = SSL.Connection(settings, None), session()
    client.set_connect_state()

    def handshake() -> None:
        with suppress(SSL.WantReadError):
            client.do_handshake()
        assert server.receive_data(client.bio_read(100_000)) == b""
        client.bio_write(server.data_to_send())

    handshake()
    handshake()
    client.do_handshake()
    assert server.established
    assert client.renegotiate()
    handshake()
    with pytest.raises(SSL.Error, match="no renegotiation"):
        client.do_handshake()


class Stuck:
    """OpenSSL's state after a part of another hello, which no client library here can be made to cut in two."""

    def sendall(self, _data: bytes) -> None:
        raise SSL.WantReadError

    def shutdown(self) -> None:
        raise SSL.Error([("SSL routines", "", "shutdown while in init")])

    def bio_read(self, _size: int) -> bytes:
        raise SSL.WantReadError


def in_another_handshake() -> TlsSession:
    """A session whose peer has sent a part of another hello."""
    client, server = TlsClient(client_context()), session()
    client.send(b"hello")
    assert shake(client, server) == b"hello"
    server._connection = Stuck()  # type: ignore[assignment]
    return server


def test_a_connection_within_another_handshake_ends() -> None:
    server = in_another_handshake()
    connection = ServerConnection(0.0, tls=server)
    connection._phase = _Phase.IDLE  # as after the first handshake
    connection._inbox += b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"
    assert isinstance(connection.next_request(0.0), HttpRequest)
    connection.send_response(HttpResponse(200), 0.0)
    assert connection.data_to_send() == b""
    assert connection.closed


def test_nothing_above_the_peers_own_certificate_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    depths: list[int] = []

    def accept(_connection: object, _certificate: object, _error: int, depth: int, _ok: int) -> bool:
        depths.append(depth)
        return True

    monkeypatch.setattr(tls, "_accept", accept)
    (tmp_path / "client.pem").write_bytes(b"".join(chained(10)))
    settings = client_context()
    settings.load_cert_chain(tmp_path / "client.pem")
    identity = make_server_identity(NOW, bytes(32))
    client, server = TlsClient(settings), TlsSession(server_context(identity.chain_pem, identity.key_pem))
    client.send(b"hello")
    assert shake(client, server) == b"hello"
    assert depths
    assert max(depths) <= 1


def test_a_certificate_of_an_unknown_version_counts_as_not_presented(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    der = self_signed(key).public_bytes(Encoding.DER)
    assert der.count(b"\xa0\x03\x02\x01\x02") == 1
    odd = der.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x01")  # X.509 version 2
    with pytest.raises(x509.InvalidVersion):
        x509.load_der_x509_certificate(odd)
    (tmp_path / "client.pem").write_bytes(ssl.DER_cert_to_PEM_cert(odd).encode() + key_pem(key))
    settings = client_context()
    settings.load_cert_chain(tmp_path / "client.pem")
    client, server = TlsClient(settings), session()
    client.send(b"hello")
    assert shake(client, server) == b"hello"
    assert server.peer_certificate is None


def test_a_long_chain_is_accepted(tmp_path: Path) -> None:
    key = NEW_KEY["p256"]()
    certificate = self_signed(key)
    others = b"".join(certificate_pem(self_signed(NEW_KEY["p256"](), f"other {n}")) for n in range(30))
    (tmp_path / "client.pem").write_bytes(certificate_pem(certificate) + others + key_pem(key))
    settings = client_context()
    settings.load_cert_chain(tmp_path / "client.pem")
    client, server = TlsClient(settings), session()
    shake(client, server)
    assert server.peer_certificate is not None
    assert spki_sha256(server.peer_certificate) == spki_sha256(certificate)


@pytest.mark.parametrize(
    ("chain", "key", "why"),
    [
        (b"", IDENTITY.key_pem, "chain is not PEM"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", IDENTITY.key_pem, "chain is not PEM"),
        (IDENTITY.chain_pem + IDENTITY.ca_pem[:-40], IDENTITY.key_pem, "chain is cut off; copy the whole file"),
        (IDENTITY.chain_pem + IDENTITY.ca_pem[:20], IDENTITY.key_pem, "chain is cut off; copy the whole file"),
        (IDENTITY.chain_pem, Secret(b""), "not a private key"),
        (IDENTITY.chain_pem, Secret(IDENTITY.chain_pem), "not a private key"),
        (IDENTITY.ca_pem, IDENTITY.key_pem, "does not match the certificate"),
        (IDENTITY.chain_pem, Secret(key_pem(rsa.generate_private_key(65537, 2048))), "does not match the certificate"),
    ],
)
def test_contexts_that_cannot_be(chain: bytes, key: Secret, why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        server_context(chain, key)


def test_a_ca_of_clients_that_is_cut_off_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="the CA of clients is cut off"):
        server_context(IDENTITY.chain_pem, IDENTITY.key_pem, client_ca_pem=IDENTITY.ca_pem * 2 + IDENTITY.ca_pem[:100])


def test_an_encrypted_key_is_not_asked_for_its_password() -> None:
    key = load_pem_private_key(IDENTITY.key_pem.reveal(), None)
    encrypted = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x"))
    with pytest.raises(ConfigurationError, match="without a password"):
        server_context(IDENTITY.chain_pem, Secret(encrypted))


def test_intermediates_are_sent() -> None:
    shared = server_context(IDENTITY.chain_pem + IDENTITY.ca_pem, IDENTITY.key_pem)
    client = TlsClient(client_context())
    shake(client, TlsSession(shared))
    assert client.tls.version() is not None
