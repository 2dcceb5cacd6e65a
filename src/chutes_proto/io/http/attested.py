"""Attested TLS: a client's context that accepts a peer by the quote in its certificate, and an identity for a server.

Rules kept here:

* the check comes right after the handshake, which has shown that the peer has the key, and before anything else: no
  byte of the application is sent to a peer that was not accepted;
* it is made in every handshake, also in one that resumes a session;
* OpenSSL makes a handshake by itself where a stream is read or written before it had one, and `ssl` does without TLS
  after a `connect` that failed, an `unwrap` or a `shutdown`: such a stream, and one whose peer was refused, neither
  reads nor writes;
* CAs and host names count for nothing: the quote decides.
"""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import wraps
from typing import Any, Final

from attrs import frozen
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from chutes_proto.errors import CollateralUnavailable, LocalProtocolError
from chutes_proto.io.quoters.choose import Quoter, take_quote
from chutes_proto.quote._attested import DICE_TAGGED_EVIDENCE, check_source, evidence_for, verify_certificate
from chutes_proto.quote._collateral import Collateral, VerifiedCollateral
from chutes_proto.quote._errors import VerificationError
from chutes_proto.quote._measurements import Stage
from chutes_proto.quote._policy import AcceptedVerdict, AnyPolicy, check_options
from chutes_proto.quote._roots import INTEL_ROOT, TrustedRoot
from chutes_proto.secret import Secret

_EARLY: Final = timedelta(minutes=5)
"""How much earlier than now a certificate begins, for peers whose clocks are late."""

_APPLICATION_VERIFICATION: Final = 50  # X509_V_ERR_APPLICATION_VERIFICATION of openssl/x509_vfy.h


def _system_time() -> int:
    return int(time.time())


def _check_function(name: str, value: object) -> None:
    if not callable(value):
        raise TypeError(f"{name}: must be a function, not {type(value).__name__}")


class AttestationFailedError(ssl.SSLCertVerificationError):
    """The peer's certificate has no quote that is accepted; the cause is the `VerificationError`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        # OpenSSL gives its own errors these, and clients read them.
        self.strerror: str | None = reason
        self.verify_message = reason
        self.verify_code = _APPLICATION_VERIFICATION

    def __str__(self) -> str:
        """The reason; an `ssl.SSLError` that OpenSSL did not make shows it as a tuple."""
        return str(self.args[0])


def attested_context(
    policy: AnyPolicy,
    collateral: Collateral | VerifiedCollateral | Callable[[bytes], Collateral | VerifiedCollateral],
    *,
    root: TrustedRoot = INTEL_ROOT,
    grace: int = 0,
    sgx: bool = False,
    stage: Stage = "boot",
    max_collateral_age: int | None = None,
    now: Callable[[], int] = _system_time,
    accepted: Callable[[AcceptedVerdict], object] = lambda _: None,
) -> ssl.SSLContext:
    """Return a client's TLS context (1.3) that accepts just the peers whose certificate `verify_certificate` accepts.

    For ``ssl``, asyncio, and httpx (``verify=context``). ``collateral`` may be a function of the quote, such as
    `fetch_collateral`; it runs in the thread of the handshake, in asyncio and trio that of the event loop, which waits
    for it: give those a `Collateral`, or a function that fetches nothing. A `VerifiedCollateral` is not verified again
    in each handshake but for its times, and its own grace counts. A context lives long and its collateral with it:
    ``max_collateral_age`` is how many seconds ago Intel may have issued it, as for `verify_certificate`, and ``now``
    returns the time of each handshake, in whole unix seconds. ``accepted`` gets each verdict. A handshake
    with any other peer raises `AttestationFailedError`, which httpx turns into a ``ConnectError``; so does a use of the
    connection without a handshake. A connection that stays open is not verified again.
    """
    check_options(policy=policy, root=root, grace=grace, sgx=sgx, stage=stage, max_collateral_age=max_collateral_age)
    check_source(collateral)
    _check_function("now", now)
    _check_function("accepted", accepted)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the certificate is self-signed; `_check` decides, in every handshake

    def check(certificate: bytes | None) -> None:
        try:
            if certificate is None:
                raise AttestationFailedError("the peer has no certificate")
            verdict = verify_certificate(
                certificate,
                collateral,
                now=now(),
                policy=policy,
                root=root,
                grace=grace,
                sgx=sgx,
                stage=stage,
                max_collateral_age=max_collateral_age,
            )
        except (VerificationError, CollateralUnavailable) as exc:
            raise AttestationFailedError(str(exc)) from exc
        _ = accepted(verdict)

    class Socket(ssl.SSLSocket):
        _is_attested = False

        def do_handshake(self, block: bool = False) -> None:
            self._is_attested = False
            super().do_handshake(block)
            check(self.getpeercert(binary_form=True))
            self._is_attested = True

        read = _attested(ssl.SSLSocket.read)  # pyright: ignore[reportDeprecated]
        write = _attested(ssl.SSLSocket.write)  # pyright: ignore[reportDeprecated]
        recv = _attested(ssl.SSLSocket.recv)
        recv_into = _attested(ssl.SSLSocket.recv_into)
        recvfrom = _attested(ssl.SSLSocket.recvfrom)
        recvfrom_into = _attested(ssl.SSLSocket.recvfrom_into)
        send = _attested(ssl.SSLSocket.send)
        sendall = _attested(ssl.SSLSocket.sendall)
        sendto = _attested(ssl.SSLSocket.sendto)
        sendfile = _attested(ssl.SSLSocket.sendfile)

    class Object(ssl.SSLObject):
        _is_attested = False

        def do_handshake(self) -> None:
            self._is_attested = False
            super().do_handshake()
            check(self.getpeercert(binary_form=True))
            self._is_attested = True

        read = _attested(ssl.SSLObject.read)
        write = _attested(ssl.SSLObject.write)

    context.sslsocket_class = Socket
    context.sslobject_class = Object
    return context


def _attested(use: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of a stream that only does ``use`` once the peer is accepted."""

    @wraps(use)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self._is_attested or self._sslobj is None:  # without that, `ssl` sends in the clear
            if isinstance(self, ssl.SSLSocket):
                _ = self.getpeername()  # raises if it is not connected; `ssl` tries to read such a socket first
            raise AttestationFailedError(
                "the peer is not attested: call do_handshake; use no connection that was refused, or that was shut down"
            )
        return use(self, *args, **kwargs)

    return method


def attested_callback(
    policy: AnyPolicy,
    collateral: Collateral | VerifiedCollateral | Callable[[bytes], Collateral | VerifiedCollateral],
    *,
    root: TrustedRoot = INTEL_ROOT,
    grace: int = 0,
    sgx: bool = False,
    stage: Stage = "boot",
    max_collateral_age: int | None = None,
    now: Callable[[], int] = _system_time,
) -> Callable[[Any, Any, int, int, int], bool]:
    """Return the callback for ``set_verify(VERIFY_PEER, callback)`` of pyOpenSSL, which accepts as `attested_context`.

    pyOpenSSL raises the `VerificationError` from ``do_handshake``. OpenSSL does not call it for a resumed session: call
    no ``set_session``, else the peer is not verified again.
    """
    check_options(policy=policy, root=root, grace=grace, sgx=sgx, stage=stage, max_collateral_age=max_collateral_age)
    check_source(collateral)
    _check_function("now", now)

    def callback(_: object, certificate: Any, __: int, depth: int, ___: int) -> bool:
        if depth == 0:
            der = certificate.to_cryptography().public_bytes(Encoding.DER)
            _ = verify_certificate(
                der,
                collateral,
                now=now(),
                policy=policy,
                root=root,
                grace=grace,
                sgx=sgx,
                stage=stage,
                max_collateral_age=max_collateral_age,
            )
        return True  # what is refused was raised; who signed the certificate counts for nothing

    return callback


@frozen
class AttestedIdentity:
    """A server's self-signed certificate with a quote for its key, in PEM, and that key."""

    certificate_pem: bytes
    key_pem: Secret


def make_attested_identity(quoter: Quoter, *, name: str = "attested", seconds: int = 86400) -> AttestedIdentity:
    """Make a P-256 key and a certificate for it, valid for ``seconds``, with a quote from ``quoter``.

    The quote does not age: make a new identity at every start. Raises `QuoteUnavailable`, and `LocalProtocolError` for
    a validity that a certificate cannot have.
    """
    now = datetime.now(UTC).replace(microsecond=0)
    if not 0 < seconds < (datetime.max.replace(tzinfo=UTC) - now).total_seconds():
        raise LocalProtocolError(f"seconds: must be above 0, and end before the year 10000, not {seconds}")
    key = ec.generate_private_key(ec.SECP256R1())
    report_data, extension = evidence_for(
        key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    )
    value = extension(take_quote(quoter, report_data))
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(int.from_bytes(os.urandom(16)) | 1)
        .not_valid_before(now - _EARLY)
        .not_valid_after(now + timedelta(seconds=seconds))
        .add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier(DICE_TAGGED_EVIDENCE), value), critical=False)
        .sign(key, SHA256())
    )
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return AttestedIdentity(certificate.public_bytes(Encoding.PEM), Secret(secret))
