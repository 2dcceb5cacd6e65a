"""The client's TLS context: it verifies servers, and leaves the client's key on no disk."""

from __future__ import annotations

import gc
import os
import socket
import ssl
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest

from chutes_proto.auth.client_identity import make_client_identity
from chutes_proto.errors import ConfigurationError, LocalProtocolError
from chutes_proto.io.http import tls
from chutes_proto.io.http.tls import client_context
from tests.io.peers import Credentials, peer


def test_the_context_verifies_chain_and_name() -> None:
    context = client_context()
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2


def test_a_ca_bundle_replaces_the_systems(credentials: Credentials) -> None:
    context = client_context(ca_pem=credentials.ca_pem * 2)
    assert len(context.get_ca_certs()) == 1


@pytest.mark.parametrize("wrong", [b"", b"not PEM", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_a_ca_bundle_without_certificates(wrong: bytes) -> None:
    with pytest.raises(ConfigurationError, match="PEM"):
        _ = client_context(ca_pem=wrong)
    with pytest.raises(ConfigurationError):
        _ = client_context(ca_pem=wrong + b"\xff")


@pytest.mark.parametrize("wrong", ["ca.pem", Path("ca.pem")], ids=str)
def test_a_path_is_no_ca_bundle(wrong: Any) -> None:
    with pytest.raises(LocalProtocolError, match=r"^ca_pem: give the bytes of a CA bundle in PEM, not "):
        _ = client_context(ca_pem=wrong)


def no_memory(name: str) -> NoReturn:
    raise OSError(38, "Function not implemented")


@pytest.mark.parametrize("without", ["nothing", "memfd", "proc"])
def test_the_identity_leaves_nothing_behind(
    without: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, credentials: Credentials
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made: list[int] = []
    mkstemp = tempfile.mkstemp

    def watched() -> tuple[int, str]:
        descriptor, path = mkstemp()
        made.append(Path(path).stat().st_mode & 0o777)
        return descriptor, path

    monkeypatch.setattr(tempfile, "mkstemp", watched)
    if without == "memfd":
        monkeypatch.setattr(os, "memfd_create", no_memory)
    if without == "proc":
        monkeypatch.setattr(tls, "_MEMORY", str(tmp_path / "no" / "{}"))
    _ = gc.collect()  # what other tests left must not be closed meanwhile
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    identity = make_client_identity(int(time.time()), bytes(32))
    context = client_context(identity, credentials.ca_pem)
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
    assert list(tmp_path.iterdir()) == []
    assert made == ([] if without == "nothing" else [0o600])
    with peer(credentials, lambda stream: stream.sendall(b"well"), client_ca=identity.certificate_pem) as (url, ended):
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        with socket.create_connection(address) as raw, context.wrap_socket(raw, server_hostname="localhost") as stream:
            assert stream.recv(4) == b"well"
    assert ended == [None]
