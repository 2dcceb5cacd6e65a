"""Listening sockets: a conflict is reported, and no file of another program is removed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from chutes_proto.errors import ConfigurationError
from chutes_proto.io.server.sockets import (
    SPARE_FILES,
    GivenSockets,
    Listening,
    inherited_sockets,
    listen_tls,
    listen_unix,
    urls,
)
from tests.transport.tls_client import context


def close(*listening: Listening) -> None:
    for place in listening:
        place.socket.close()


def test_tcp_and_unix(tmp_path: Path) -> None:
    places = [*listen_tls(("127.0.0.1", 0), context), listen_unix(tmp_path / "s")]
    port = places[0].socket.getsockname()[1]
    assert urls(places) == [f"https://127.0.0.1:{port}", f"unix:{tmp_path / 's'}"]
    assert places[0].session() is not None
    assert places[1].session() is None
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o660
    close(*places)


def test_every_address_of_the_machine_is_of_both_families() -> None:
    try:
        places = listen_tls(("::", 0), context)
    except ConfigurationError:
        pytest.skip("this machine has no IPv6")
    port = places[0].socket.getsockname()[1]
    for host in ("127.0.0.1", "::1"):
        socket.create_connection((host, port), 60).close()
    close(*places)


@pytest.mark.parametrize("host", ["no such host", "192.0.2.1"])
def test_an_address_of_another_machine(host: str) -> None:
    with pytest.raises(ConfigurationError, match=f"listen: {host}:1"):
        _ = listen_tls((host, 1), context)


def test_the_kernel_holds_little_of_what_a_peer_does_not_take_and_not_for_long() -> None:
    [listening] = listen_tls(("127.0.0.1", 0), lambda: None)
    peer = socket.socket()
    with listening.socket, peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.connect(listening.socket.getsockname())
        accepted, _ = listening.socket.accept()
        with accepted:
            accepted.setblocking(False)
            taken = 0
            with pytest.raises(BlockingIOError):
                while taken < 4 * 1024 * 1024:
                    taken += accepted.send(bytes(64 * 1024))
            assert taken <= 256 * 1024
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000


def test_the_socket_of_a_dead_server_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    close(listen_unix(path))
    assert path.is_socket()
    again = listen_unix(path)
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(str(path))
    close(again)


def test_a_socket_in_use_and_other_files_are_kept(tmp_path: Path) -> None:
    path, other = tmp_path / "s", tmp_path / "file"
    _ = other.write_text("kept")
    place = listen_unix(path)
    with pytest.raises(ConfigurationError, match=r"proxy\.unix: .*/s: Address already in use"):
        _ = listen_unix(path)
    with pytest.raises(ConfigurationError, match=r"proxy\.unix: .*/file: File exists"):
        _ = listen_unix(other)
    with pytest.raises(ConfigurationError, match=r"proxy\.unix: .*/none/s: No such file"):
        _ = listen_unix(tmp_path / "none" / "s")
    with pytest.raises(ConfigurationError, match=r"proxy\.unix: .*/s*: AF_UNIX path too long"):
        _ = listen_unix(tmp_path / ("s" * 108))
    assert other.read_text() == "kept"
    assert path.is_socket()
    close(place)


@pytest.mark.parametrize(
    ("soft", "hard", "connections", "room", "then"),
    [
        (200, 5000, 1024, 1024, 1024 + SPARE_FILES),  # as a service manager starts it: few, and it may have more
        (200, 400, 1024, 400 - SPARE_FILES, 400),
        (5000, 5000, 1024, 1024, 5000),
        (64, 64, 1024, 1, 64),
    ],
)
def test_no_more_connections_than_files(soft: int, hard: int, connections: int, room: int, then: int) -> None:
    code = (
        "import resource as r; from chutes_proto.io.server.sockets import allowed_connections;"
        f"r.setrlimit(r.RLIMIT_NOFILE, ({soft}, {hard}));"
        f"print(allowed_connections({connections}), *r.getrlimit(r.RLIMIT_NOFILE))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == [str(room), str(then), str(hard)]


def test_given_sockets_are_taken_by_the_settings_that_name_them(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "s"))
        unix.listen()
        address = tcp.getsockname()
        given = GivenSockets([("listen", tcp), ("", unix)])
        assert given.take_tcp("admin.listen", address) == []
        assert given.take_tcp("listen", ("127.0.0.2", 0)) == []
        assert given.take_unix("proxy.unix", tmp_path / "other") == []
        assert given.take_tcp("listen", address) == [tcp]
        assert given.take_tcp("listen", address) == []
        assert given.take_unix("proxy.unix", tmp_path / "s") == [unix]
        given.check_all_taken()
        with pytest.raises(ConfigurationError, match=rf"a socket at 127\.0\.0\.1:{address[1]} was given by"):
            GivenSockets([("", tcp)]).check_all_taken()


def test_sockets_for_another_process_are_not_taken() -> None:
    for environ in ({}, {"LISTEN_PID": "1", "LISTEN_FDS": "1"}, {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "x"}):
        assert inherited_sockets(environ) == []
        assert not environ


# --- sockets from a service manager ---


def inherited(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> list[socket.socket]:
    """What is taken of a service manager that passed this one."""
    monkeypatch.setattr("chutes_proto.io.server.sockets._FIRST_INHERITED", descriptor)
    environment = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "any"}
    taken = inherited_sockets(environment)
    assert environment == {}
    return taken


def test_a_listening_socket_is_taken_and_goes_to_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as given:
        descriptor = os.dup(given.fileno())
        os.set_inheritable(descriptor, True)
        (taken,) = inherited(descriptor, monkeypatch)
        assert (taken.fileno(), taken.get_inheritable()) == (descriptor, False)
        taken.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the start of a server ends with it
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_socket_that_does_not_listen_is_not_taken(kind: socket.SocketKind, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_INET, kind) as given, pytest.raises(ConfigurationError, match="say ListenStream="):
        _ = inherited(os.dup(given.fileno()), monkeypatch)
