"""TLS as a client: the ephemeral client certificate from memory, the server's name and chain always verified."""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import cast

from chutes_proto.auth.client_identity import ENTROPY_SIZE, ClientIdentity, make_client_identity
from chutes_proto.errors import ConfigurationError, LocalProtocolError
from chutes_proto.io.files import read_file

_MEMORY = "/proc/self/fd/{}"


def presented(identity: ClientIdentity | None, client: object | None = None) -> ClientIdentity:
    """Return ``identity``, or an ephemeral one where there is none.

    Raises `LocalProtocolError` for a ``client`` of the caller without the identity that it presents.
    """
    if client is not None and identity is None:
        raise LocalProtocolError("client: give identity too, the one whose certificate your client presents")
    return identity or make_client_identity(int(time.time()), os.urandom(ENTROPY_SIZE))


def client_context(
    identity: ClientIdentity | None = None, ca_pem: bytes | None = None, *, kind: type[ssl.SSLContext] = ssl.SSLContext
) -> ssl.SSLContext:
    """Return a context for TLS 1.2 or newer that presents ``identity`` and trusts ``ca_pem`` (None: the system's CAs).

    Chain and name of the server are verified. Raises `ConfigurationError` for a CA bundle that holds no certificate.
    """
    if ca_pem is not None and not isinstance(cast("object", ca_pem), bytes):
        raise LocalProtocolError(f"ca_pem: give the bytes of a CA bundle in PEM, not {type(ca_pem).__name__}")
    context = kind(ssl.PROTOCOL_TLS_CLIENT)  # checks chain and host name
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca_pem is None:
        context.load_default_certs()
    else:
        try:
            context.load_verify_locations(cadata=ca_pem.decode("ascii"))
        except (ssl.SSLError, ValueError) as exc:
            raise ConfigurationError("not one or more PEM certificates of CAs; give a CA bundle in PEM") from exc
    if identity is not None:
        with _as_file(identity.certificate_pem + identity.key_pem.reveal()) as path:
            context.load_cert_chain(path)
    return context


def context_trusting(
    ca_file: str | Path | None,
    identity: ClientIdentity | None = None,
    *,
    read: Callable[[str | Path], bytes] = read_file,
    kind: type[ssl.SSLContext] = ssl.SSLContext,
) -> ssl.SSLContext:
    """Return the `client_context` for the CAs in a file (None: the system's), which a `ConfigurationError` names."""
    data = None if ca_file is None else read(ca_file)
    try:
        return client_context(identity, data, kind=kind)
    except ConfigurationError as exc:
        raise ConfigurationError(f"{ca_file}: {exc}") from None


@contextmanager
def _as_file(content: bytes) -> Generator[str]:
    """A path at which OpenSSL reads ``content``: in memory where possible, otherwise a private file, then removed."""
    descriptor, path, is_on_disk = _open()
    try:
        with os.fdopen(descriptor, "wb") as file:
            _ = file.write(content)
            file.flush()
            yield path
    finally:
        if is_on_disk:
            Path(path).unlink()


def _open() -> tuple[int, str, bool]:
    with suppress(AttributeError, OSError):  # not Linux, or not allowed
        descriptor = os.memfd_create("client-identity")
        path = _MEMORY.format(descriptor)
        if Path(path).exists():
            return descriptor, path, False
        os.close(descriptor)  # no /proc here
    import tempfile

    return *tempfile.mkstemp(), True
