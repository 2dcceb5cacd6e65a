"""Attested TLS end to end: clients of ssl, httpx and pyOpenSSL against a server whose certificate has a quote."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest
from OpenSSL import SSL

from chutes_proto.errors import LocalProtocolError
from chutes_proto.quote import AcceptedVerdict, Policy, VerificationError, verify_collateral
from chutes_proto.sync import (
    AttestationFailedError,
    AttestedIdentity,
    attested_callback,
    attested_context,
    make_attested_identity,
)
from chutes_proto.testing._platform import PROFILE
from tests.collateral.network import PLATFORM, ROOT
from tests.loops import on_loop

POLICY = Policy(profiles=(PROFILE,))


@pytest.fixture
def identity() -> AttestedIdentity:
    return make_attested_identity(PLATFORM.quote)


def told(error: BaseException | None) -> str:
    """The texts of an error and of its causes: httpx on trio has none of its own."""
    texts: list[str] = []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__ or error.__context__
    return "; ".join(texts)


@pytest.mark.parametrize("make", [attested_context, attested_callback])
def test_what_it_is_made_of_is_checked_before_a_peer_is_there(make: Callable[..., object]) -> None:
    for policy, collateral, named in (
        (None, print, "policy"),
        ("policy.toml", print, "policy"),
        (POLICY, "c.json", "collateral"),
    ):
        with pytest.raises(TypeError, match=f"^{named}: must be a "):
            _ = make(policy, collateral)


@contextmanager
def serving(identity: AttestedIdentity, folder: Path) -> Iterator[tuple[int, list[bytes]]]:
    """A TLS server on loopback that answers each request; its port, and all that it got of the application."""
    path = folder / "server.pem"
    _ = path.write_bytes(identity.certificate_pem + identity.key_pem.reveal())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    got: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            try:
                plain.settimeout(10)
                with context.wrap_socket(plain, server_side=True) as stream:
                    data = stream.recv(4096)
                    if data:
                        got.append(data)
                        stream.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
            except OSError:
                pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1], got
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)


def fresh(_: bytes = b"") -> Any:
    return PLATFORM.collateral(int(time.time()) - 60)


def by_ssl(port: int, context: ssl.SSLContext) -> bytes:
    with socket.create_connection(("127.0.0.1", port)) as plain, context.wrap_socket(plain) as stream:
        stream.sendall(b"GET / HTTP/1.1\r\n\r\n")
        return stream.recv(4096)


def by_httpx(port: int, context: ssl.SSLContext) -> bytes:
    return httpx.get(f"https://127.0.0.1:{port}/", verify=context, trust_env=False).content


async def _asynchronously(port: int, context: ssl.SSLContext) -> bytes:
    async with httpx.AsyncClient(verify=context, trust_env=False) as client:
        return (await client.get(f"https://127.0.0.1:{port}/")).content


CLIENTS: dict[str, Callable[[int, ssl.SSLContext], bytes]] = {
    "ssl": by_ssl,
    "httpx": by_httpx,
    "httpx on trio": lambda port, context: on_loop("trio", lambda: _asynchronously(port, context)),
    "httpx on asyncio": lambda port, context: on_loop("asyncio", lambda: _asynchronously(port, context)),
}


@pytest.mark.parametrize("client", CLIENTS)
def test_an_attested_server_is_talked_to(client: str, identity: AttestedIdentity, tmp_path: Path) -> None:
    verdicts: list[AcceptedVerdict] = []
    context = attested_context(POLICY, fresh, root=ROOT, accepted=verdicts.append)
    with serving(identity, tmp_path) as (port, got):
        assert CLIENTS[client](port, context).endswith(b"ok")
    assert len(got) == 1
    assert [verdict.profile for verdict in verdicts] == [PROFILE]


def test_a_context_has_a_clock_and_a_bound_on_the_age_of_collateral(identity: AttestedIdentity, tmp_path: Path) -> None:
    kept = fresh()
    at = [0]
    context = attested_context(POLICY, kept, root=ROOT, max_collateral_age=3600, now=lambda: at[0])
    begin = verify_collateral(kept, now=int(time.time()), root=ROOT).issue.issued_at
    with serving(identity, tmp_path) as (port, got):
        at[0] = begin + 3600
        assert by_ssl(port, context).endswith(b"ok")
        for later, reason in ((3601, "collateral_age"), (86400 * 2, "attested certificate: expired")):
            at[0] = begin + later
            with pytest.raises(AttestationFailedError, match=reason):
                _ = by_ssl(port, context)
    assert len(got) == 1


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("refused", ["policy", "quote", "key"])
def test_no_byte_leaves_to_another_server(
    client: str, refused: str, identity: AttestedIdentity, tmp_path: Path
) -> None:
    policy = Policy() if refused == "policy" else POLICY
    if refused == "quote":
        identity = make_attested_identity(PLATFORM.having("debug").quote)
    if refused == "key":  # a certificate with the genuine quote of another key
        identity = make_attested_identity(lambda _: PLATFORM.quote(bytes(64)))
    context = attested_context(policy, fresh, root=ROOT)
    with (
        serving(identity, tmp_path) as (port, got),
        pytest.raises((AttestationFailedError, httpx.ConnectError)) as caught,
    ):
        _ = CLIENTS[client](port, context)
    assert got == []
    text = {"policy": "no_profiles", "quote": "debug", "key": "the report data does not match"}[refused]
    assert text in told(caught.value)


@pytest.mark.parametrize("accepted", [True, False])
def test_pyopenssl(accepted: bool, identity: AttestedIdentity, tmp_path: Path) -> None:
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    policy = POLICY if accepted else Policy()
    context.set_verify(SSL.VERIFY_PEER, attested_callback(policy, fresh, root=ROOT))
    with serving(identity, tmp_path) as (port, got), socket.create_connection(("127.0.0.1", port)) as plain:
        stream = SSL.Connection(context, plain)
        stream.set_connect_state()
        if accepted:
            stream.do_handshake()
            _ = stream.send(b"GET / HTTP/1.1\r\n\r\n")
            assert stream.recv(4096).endswith(b"ok")
        else:
            with pytest.raises(VerificationError, match="no_profiles"):
                stream.do_handshake()
    assert len(got) == accepted


@pytest.mark.parametrize("seconds", [0, -1, 10**12])
def test_an_identity_that_no_client_could_accept_is_not_made(seconds: int) -> None:
    with pytest.raises(LocalProtocolError, match="seconds: must be"):
        _ = make_attested_identity(PLATFORM.quote, seconds=seconds)


def test_registers_count_as_in_the_named_stage(tmp_path: Path) -> None:
    runtime = make_attested_identity(partial(PLATFORM.quote, stage="runtime"))
    with serving(runtime, tmp_path) as (port, got):
        assert by_ssl(port, attested_context(POLICY, fresh, root=ROOT, stage="runtime")).endswith(b"ok")
        with pytest.raises(AttestationFailedError, match="boot stage"):
            _ = by_ssl(port, attested_context(POLICY, fresh, root=ROOT))
    assert len(got) == 1


def test_a_resumed_session_is_verified_again(identity: AttestedIdentity, tmp_path: Path) -> None:
    verdicts: list[AcceptedVerdict] = []
    context = attested_context(POLICY, fresh, root=ROOT, accepted=verdicts.append)
    with serving(identity, tmp_path) as (port, _):
        session: Any = None
        for _again in range(2):
            with (
                socket.create_connection(("127.0.0.1", port)) as plain,
                context.wrap_socket(plain, session=session) as stream,
            ):
                stream.sendall(b"GET / HTTP/1.1\r\n\r\n")
                assert stream.recv(4096).endswith(b"ok")
                assert stream.session_reused == (session is not None)
                session = stream.session
        assert len(verdicts) == 2


def test_a_refused_session_is_not_resumed(identity: AttestedIdentity, tmp_path: Path) -> None:
    """The policy may have changed, and time has passed, since the session was made."""
    pieces = [fresh()]
    context = attested_context(POLICY, lambda _: pieces[-1], root=ROOT)
    with serving(identity, tmp_path) as (port, got):
        with socket.create_connection(("127.0.0.1", port)) as plain, context.wrap_socket(plain) as stream:
            stream.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert stream.recv(4096).endswith(b"ok")
            session = stream.session
        pieces.append(PLATFORM.collateral(0))  # expired
        with (
            socket.create_connection(("127.0.0.1", port)) as plain,
            pytest.raises(AttestationFailedError, match="expired"),
        ):
            _ = context.wrap_socket(plain, session=session)
    assert len(got) == 1


@pytest.mark.parametrize("handshake", ["none", "refused"])
def test_no_byte_leaves_without_an_accepted_handshake(
    handshake: str, identity: AttestedIdentity, tmp_path: Path
) -> None:
    """OpenSSL would make the handshake itself, without the check, at the first byte."""
    context = attested_context(Policy(), fresh, root=ROOT)
    with (
        serving(identity, tmp_path) as (port, got),
        socket.create_connection(("127.0.0.1", port)) as plain,
        context.wrap_socket(plain, do_handshake_on_connect=False) as stream,
    ):
        if handshake == "refused":
            with pytest.raises(AttestationFailedError, match=r"^no_profiles: [^']*$"):
                stream.do_handshake()
        uses: list[Callable[[], object]] = [
            lambda: stream.sendall(b"secret"),
            lambda: stream.send(b"secret"),
            lambda: stream.write(b"secret"),
            lambda: stream.recv(10),
            lambda: stream.recv_into(bytearray(10)),
        ]
        for use in uses:
            with pytest.raises(AttestationFailedError, match="not attested"):
                _ = use()
    assert got == []


@pytest.mark.parametrize("peer", ["refused", "without TLS"])
def test_no_byte_leaves_after_a_connect_that_failed(peer: str, identity: AttestedIdentity, tmp_path: Path) -> None:
    """`ssl` then takes the TLS off, and would send and receive what is in the clear."""
    context = attested_context(Policy(), fresh, root=ROOT)
    with serving(identity, tmp_path) as (port, got), socket.create_server(("127.0.0.1", 0)) as plain:
        address = plain.getsockname() if peer == "without TLS" else ("127.0.0.1", port)

        def answer() -> None:
            with plain.accept()[0] as connection, suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\n\r\nin the clear")
                while data := connection.recv(4096):
                    got.append(data)

        worker = threading.Thread(target=answer)
        with context.wrap_socket(socket.socket()) as stream:
            stream.settimeout(10)
            if peer == "without TLS":
                worker.start()
            with pytest.raises(ssl.SSLError):
                stream.connect(address)
            uses: list[Callable[[], object]] = [
                lambda: stream.sendall(b"secret"),
                lambda: stream.sendto(b"secret", address),
                lambda: stream.sendfile(BytesIO(b"secret")),
                lambda: stream.recv(10),
                lambda: stream.recv_into(bytearray(10)),
                lambda: stream.recvfrom(10),
                lambda: stream.recvfrom_into(bytearray(10)),
            ]
            for use in uses:
                with pytest.raises((AttestationFailedError, OSError), match=r"not attested|not connected"):
                    _ = use()
        if peer == "without TLS":
            worker.join(10)
    assert not any(b"secret" in data for data in got)


@pytest.mark.parametrize("end", ["unwrap", "shutdown"])
def test_no_byte_leaves_in_the_clear_once_tls_has_ended(end: str, identity: AttestedIdentity, tmp_path: Path) -> None:
    context = attested_context(POLICY, fresh, root=ROOT)
    with (
        serving(identity, tmp_path) as (port, got),
        socket.create_connection(("127.0.0.1", port)) as plain,
        context.wrap_socket(plain) as stream,
    ):
        stream.settimeout(10)
        stream.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert stream.recv(4096).endswith(b"ok")
        if end == "unwrap":
            with suppress(OSError):
                _ = stream.unwrap()
        else:
            stream.shutdown(socket.SHUT_RD)
        for use in (lambda: stream.sendall(b"secret"), lambda: stream.send(b"secret")):
            with pytest.raises(ssl.SSLError, match=r"shut ?down"):
                _ = use()
    assert len(got) == 1


def test_no_byte_leaves_by_memory_without_a_handshake() -> None:
    stream = attested_context(POLICY, fresh, root=ROOT).wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO())
    for use in (lambda: stream.write(b"secret"), lambda: stream.read(10)):
        with pytest.raises(AttestationFailedError, match="not attested"):
            _ = use()


def test_evidence_of_another_certificate_of_the_chain_counts_for_nothing(
    identity: AttestedIdentity, tmp_path: Path
) -> None:
    """A peer without a TD puts a genuine certificate of another's beside its own."""
    own = make_attested_identity(lambda _: PLATFORM.quote(bytes(64)))
    chain = attrs.evolve(own, certificate_pem=own.certificate_pem + identity.certificate_pem)
    context = attested_context(POLICY, fresh, root=ROOT)
    with serving(chain, tmp_path) as (port, got):
        with pytest.raises(AttestationFailedError, match="report data"):
            _ = by_ssl(port, context)
        pyopenssl = SSL.Context(SSL.TLS_CLIENT_METHOD)
        pyopenssl.set_verify(SSL.VERIFY_PEER, attested_callback(POLICY, fresh, root=ROOT))
        with socket.create_connection(("127.0.0.1", port)) as plain:
            stream = SSL.Connection(pyopenssl, plain)
            stream.set_connect_state()
            with pytest.raises(VerificationError, match="report data"):
                stream.do_handshake()
    assert got == []
