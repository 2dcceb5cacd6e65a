"""TLS as bytes in, bytes out: the server's side of RFC 8446 and RFC 5246 over OpenSSL's memory buffers.

Rules kept here:

* TLS 1.2 or 1.3; no renegotiation, no session is kept or resumed, so every connection proves its key;
* a client certificate is requested and any is accepted, and so is none: the handshake proves possession of its key, and
  the quote says whose it is. A certificate that RFC 5280 does not allow counts as not presented;
* a stranger's handshake has a bound: of its bytes, and of what its signatures cost. A key of more than 4096 bits and an
  RSA exponent of 2**32 or more are refused before a signature is checked with them;
* every fault of the peer is a `RemoteProtocolError`; OpenSSL's alert for it is among the bytes to send.

pyOpenSSL does this because Python's own ``ssl`` refuses every client certificate that it cannot chain to a CA.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from chutes_proto.errors import ConfigurationError, LocalProtocolError, RemoteProtocolError
from chutes_proto.secret import Secret

try:
    from OpenSSL import SSL, crypto
except ImportError:
    raise LocalProtocolError("TLS needs pyOpenSSL: pip install 'chutes-proto[tls]'") from None

ServerContext = SSL.Context
"""The certificate and key of a server, and the rules above, for all its connections."""

HANDSHAKE_SIZE: Final = 32 * 1024
"""The most bytes that a peer may send before its handshake is complete; with a certificate it sends 2 or 3 KiB."""

_CURVE_BITS: Final = 1023  # more than the key of any curve has, and less than a usable RSA key
_KEY_BITS: Final = 4096
_EXPONENT_BITS: Final = 32
_CHUNK: Final = 64 * 1024
_BLOCK: Final = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----.*?-----END \1-----", re.DOTALL)
_NO_RENEGOTIATION: Final = 1 << 30  # SSL_OP_NO_RENEGOTIATION of openssl/ssl.h, which pyOpenSSL does not name


def server_context(chain_pem: bytes, key_pem: Secret, *, client_ca_pem: bytes | None = None) -> ServerContext:
    """A context for the certificate chain (the server's own first) and its key, in PEM.

    With ``client_ca_pem`` the handshake fails unless the client has a certificate that is valid now, for TLS clients,
    and issued under one of these CAs (RFC 5280).

    Raises `ConfigurationError` for a chain, key or CA that is not PEM or is cut off, an encrypted key, or a key of
    another certificate.
    """
    certificates = _read_certificates(chain_pem, "the TLS certificate chain")
    try:
        key = load_pem_private_key(key_pem.reveal(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # without its text, which may repeat parts of the key
        raise ConfigurationError("the TLS key is not a private key in PEM without a password; convert it") from None
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.set_min_proto_version(SSL.TLS1_2_VERSION)
    _ = context.set_options(SSL.OP_NO_TICKET | SSL.OP_CIPHER_SERVER_PREFERENCE | _NO_RENEGOTIATION)
    _ = context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    _ = context.set_mode(SSL.MODE_RELEASE_BUFFERS)
    if client_ca_pem is None:
        context.set_verify(SSL.VERIFY_PEER, _accept)
        # Nothing above the peer's own certificate is verified: a long chain would cost much time and prove nothing.
        context.set_verify_depth(0)
    else:
        _require_clients_of(context, client_ca_pem)
    try:
        context.use_certificate(certificates[0])
        for certificate in certificates[1:]:
            context.add_extra_chain_cert(certificate)
        context.use_privatekey(key)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType] - else a TypeError
        context.check_privatekey()
    except (SSL.Error, TypeError):
        raise ConfigurationError(
            "the TLS key does not match the certificate, the first one of its chain, or cannot be used for TLS"
        ) from None
    return context


class TlsSession:
    """The server's end of one TLS connection.

    Give bytes of the peer to `receive_data` and plaintext to `send_data`, and after each send the peer the bytes of
    `data_to_send`. Nothing is kept from one call to the next but a record or a handshake message that is not yet whole,
    which OpenSSL bounds.
    """

    def __init__(self, context: ServerContext) -> None:
        self.established: bool = False
        """The handshake is complete."""
        self.peer_closed: bool = False
        """The peer will send no more: it said so, or its bytes ended."""
        self.peer_certificate: x509.Certificate | None = None
        """The certificate whose key the peer proved to hold; None before the handshake is complete."""
        self._connection = SSL.Connection(context, None)
        self._connection.set_accept_state()
        self._handshake_left = HANDSHAKE_SIZE
        self._ended = False

    def receive_data(self, data: bytes) -> bytes:
        """Take ciphertext, ``b""`` when there will be no more; returns plaintext, which may be empty.

        Raises `RemoteProtocolError` once the peer breaks the protocol; the session is then at its end.
        """
        if self._ended or self.peer_closed:
            return b""
        if not data:
            self.peer_closed = True
            if not self.established:
                self._ended = True
                raise RemoteProtocolError("the peer's bytes ended within the TLS handshake")
            return b""
        try:
            return self._take(data)
        except SSL.Error as exc:
            self._ended = True
            raise RemoteProtocolError(f"TLS: {_text(exc)}") from None

    def send_data(self, data: bytes) -> None:
        """Encrypt plaintext for the peer.

        Raises `LocalProtocolError` before the handshake and after the end, and `RemoteProtocolError` if the peer has
        begun another handshake and takes no data; the session is then at its end.
        """
        if not self.established or self._ended:
            raise LocalProtocolError("a TLS session carries data after its handshake and before its end")
        try:
            _ = self._connection.sendall(data)
        except SSL.Error as exc:
            self._ended = True
            raise RemoteProtocolError(f"TLS: {_text(exc)}") from None

    def close(self) -> None:
        """Tell the peer that there will be no more (a close_notify alert). No more can be sent."""
        if self.established and not self._ended:
            with suppress(SSL.Error):  # within another handshake of the peer's no alert can be sent
                _ = self._connection.shutdown()
        self._ended = True

    def data_to_send(self) -> bytes:
        """Ciphertext for the peer since the last call, with handshake messages and alerts."""
        ciphertext = b""
        try:
            while len(ciphertext) % _CHUNK == 0:  # OpenSSL's buffer gives all that it has, or as much as was asked for
                ciphertext += self._connection.bio_read(_CHUNK)
        except SSL.WantReadError:
            pass
        return ciphertext

    def _take(self, data: bytes) -> bytes:
        if self.established:
            return self._read(data)
        within, beyond = data[: self._handshake_left], data[self._handshake_left :]
        self._handshake_left -= len(within)
        plaintext = self._read(within) if within else b""
        if not beyond:
            return plaintext
        if not self.established:
            self._ended = True
            raise RemoteProtocolError(f"TLS: a handshake of more than {HANDSHAKE_SIZE} bytes")
        return plaintext + self._read(beyond)

    def _read(self, data: bytes) -> bytes:
        _ = self._connection.bio_write(data)
        plaintext = bytearray()
        try:
            if not self.established:
                self._connection.do_handshake()
                self.peer_certificate = self._presented()
                self.established = True
            while True:
                plaintext += self._connection.recv(_CHUNK)
        except SSL.WantReadError:
            pass
        except SSL.ZeroReturnError:
            self.peer_closed = True
        return bytes(plaintext)

    def _presented(self) -> x509.Certificate | None:
        try:
            return self._connection.get_peer_certificate(as_cryptography=True)
        except (ValueError, x509.InvalidVersion, UnsupportedAlgorithm):  # OpenSSL reads more than RFC 5280 allows
            return None


def _read_certificates(pem: bytes, what: str) -> list[x509.Certificate]:
    """Return the certificates of a file, at least one. cryptography leaves out one that is cut off at the end."""
    if b"-----B" in _BLOCK.sub(b"", pem):
        raise ConfigurationError(f"{what} is cut off; copy the whole file")
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise ConfigurationError(f"{what} is not PEM, or has no certificate") from None


def _require_clients_of(context: ServerContext, client_ca_pem: bytes) -> None:
    authorities = _read_certificates(client_ca_pem, "the CA of clients")
    trusted = context.get_cert_store()
    assert trusted is not None  # noqa: S101 - a context always has one
    for authority in authorities:
        trusted.add_cert(crypto.X509.from_cryptography(authority))
    context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, _accept_issued)
    context.set_verify_depth(2)


def _accept_issued(
    connection: object,
    certificate: crypto.X509,
    error: int,
    depth: int,
    is_issued: int,  # OpenSSL's signature
) -> bool:
    return bool(is_issued) and _accept(connection, certificate)


def _accept(_connection: object, certificate: crypto.X509, *_: object) -> bool:
    """Whether the handshake goes on; OpenSSL asks before it checks a signature with the key of this certificate.

    That is also the issuer's certificate, whose key checks the signature on the peer's own.
    """
    try:
        key = certificate.get_pubkey()
        if key.bits() <= _CURVE_BITS:
            return True
        public = key.to_cryptography_key()
    except (crypto.Error, ValueError, UnsupportedAlgorithm):
        return False  # possession of an unreadable key cannot be proved
    cheap = not isinstance(public, RSAPublicKey) or public.public_numbers().e.bit_length() <= _EXPONENT_BITS
    return cheap and key.bits() <= _KEY_BITS


def _text(exc: SSL.Error) -> str:
    """OpenSSL's text of an error, without its file names and codes."""
    match exc.args:
        case ([*errors],):
            return "; ".join(str(error[-1]) for error in errors)
        case args:
            return " ".join(map(str, args)) or type(exc).__name__
