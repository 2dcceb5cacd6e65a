"""The ASGI application: messages in, messages out; then under real ASGI servers, and mounted into FastAPI."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

import anyio
import httpx
import pytest
from attrs import define, field
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from chutes_proto.effects import Flow, Log
from chutes_proto.errors import LocalProtocolError
from chutes_proto.io.drivers.aio import Performer
from chutes_proto.io.server.development import write_server
from chutes_proto.log import Level, Record
from chutes_proto.transport.asgi import AsgiApp
from chutes_proto.transport.h1 import DEFAULT_LIMITS, Limits
from chutes_proto.wire.codec import error_response
from chutes_proto.wire.http import HttpRequest, HttpResponse, MalformedRequest
from tests.server.world import PLATFORM
from tests.waiting import wait_until
from tools.docs.pages import DOCS, fences

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@define
class Recorder:
    """Answers with the target, and keeps what it was asked."""

    asked: list[HttpRequest | MalformedRequest] = field(factory=list)
    headers: tuple[tuple[str, str], ...] = (("x", "y"), ("connection", "close"))
    told: list[HttpResponse] = field(factory=list)

    def complain(self, event: str, error: Exception) -> Flow[None]:
        yield from Log(Record(Level.ERROR, event, {"error": f"{type(error).__name__}: {error}"}))

    def stop(self, now: float, *, handed_over: bool = False) -> float:
        return now

    def ends_at(self, now: float) -> float:
        return now

    def sent(self, response: HttpResponse) -> None:
        self.told.append(response)

    def handle(self, request: HttpRequest | MalformedRequest) -> Flow[HttpResponse]:
        yield from ()
        self.asked.append(request)
        if isinstance(request, MalformedRequest):
            return error_response(request.refusal, "r")
        return HttpResponse(200, self.headers, request.target.encode("latin-1"))


@asynccontextmanager
async def performer() -> AsyncIterator[Performer]:
    yield Performer()


SCOPE = {
    "type": "http",
    "http_version": "1.1",
    "method": "POST",
    "path": "/a b",
    "raw_path": b"/a%20b",
    "query_string": b"c=%20",
    "headers": [(b"host", b"h"), (b"x-a", b"\xe9"), (b"x-a", b"2")],
    "client": ("192.0.2.1", 1),
}


async def ask(
    *pieces: bytes,
    limits: Limits = Limits(),
    events: list[dict[str, Any]] | None = None,
    pause: float = 0,
    **scope: Any,
) -> tuple[HttpRequest | MalformedRequest | None, list[dict[str, Any]]]:
    """The application's requests, and the messages sent."""
    recorder, sent = Recorder(), list[dict[str, Any]]()
    chunks = [*pieces[:-1], *pieces[-1:]] or [b""]
    queue = events or [
        {"type": "http.request", "body": piece, "more_body": index < len(chunks) - 1}
        for index, piece in enumerate(chunks)
    ]

    async def receive() -> dict[str, Any]:
        await anyio.sleep(pause)
        return queue.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    async with AsgiApp(recorder, performer, limits=limits) as app:
        await app(dict(SCOPE) | scope, receive, send)
    assert [response.status for response in recorder.told] == [start["status"] for start in sent[::2]]
    return (recorder.asked[0] if recorder.asked else None), sent


@pytest.mark.anyio
async def test_a_request_and_its_answer() -> None:
    request, sent = await ask(b"a", b"", b"bc")
    assert isinstance(request, HttpRequest)
    assert (request.method, request.target, request.body) == ("POST", "/a%20b?c=%20", b"abc")
    assert request.headers == (("host", "h"), ("x-a", "é"), ("x-a", "2"))
    assert (request.peer_address, request.peer_certificate) == ("192.0.2.1", None)
    assert request.arrived > 0
    start, body = sent
    assert start["status"] == 200
    assert start["headers"] == [(b"x", b"y"), (b"connection", b"close"), (b"content-length", b"12")]
    assert body["body"] == b"/a%20b?c=%20"


@pytest.mark.anyio
async def test_http_2_knows_no_connection_header() -> None:
    _, (start, _) = await ask(http_version="2")
    assert start["headers"] == [(b"x", b"y"), (b"content-length", b"12")]


@pytest.mark.parametrize(
    ("client", "address"),
    [
        (None, ""),
        (("::ffff:192.0.2.1", 1), "192.0.2.1"),
        (("fe80::1%eth0", 1), "fe80::1"),
        (("testclient", 1), "0.0.0.0"),
        (("", 0), "0.0.0.0"),
    ],
)
@pytest.mark.anyio
async def test_only_a_peer_without_an_address_is_one_of_a_unix_socket(client: Any, address: str) -> None:
    request, _ = await ask(client=client)
    assert request is not None
    assert request.peer_address == address


@pytest.mark.parametrize(
    ("root", "raw", "target"),
    [
        ("", b"/servers/a%2Fb/luks", "/servers/a%2Fb/luks?c=%20"),
        ("/keys", b"/keys/servers/nonce", "/servers/nonce?c=%20"),
        ("/my keys/x", b"/my%20keys/x/servers/nonce", "/servers/nonce?c=%20"),
        ("/keys", b"/servers/nonce", "/servers/nonce?c=%20"),
        ("/keys/", b"/keys/", "/?c=%20"),
        ("/keys", b"/keysight", "/keysight?c=%20"),
        ("", None, "/a%20b?c=%20"),
    ],
)
@pytest.mark.anyio
async def test_the_target_is_as_it_was_sent_without_the_mount(root: str, raw: bytes | None, target: str) -> None:
    request, _ = await ask(root_path=root, raw_path=raw)
    assert isinstance(request, HttpRequest)
    assert request.target == target


async def refused(*pieces: bytes, **options: Any) -> tuple[int, int]:
    request, sent = await ask(*pieces, **options)
    assert isinstance(request, MalformedRequest)
    return request.refusal.status, sent[0]["status"]


@pytest.mark.anyio
async def test_limits() -> None:
    assert await refused(b"x" * 40_000, b"x" * 40_000, b"") == (413, 413)
    attestation: dict[str, Any] = {"raw_path": b"/servers/n1/attestation", "method": "POST"}
    request, _ = await ask(b"x" * 262_144, **attestation)
    assert isinstance(request, HttpRequest)  # this operation's body may be larger than others'
    assert await refused(b"x" * 262_145, **attestation) == (413, 413)
    assert await refused(headers=[(b"x", b"y" * 20_000)]) == (431, 431)
    assert await refused(raw_path=b"/" + b"x" * 20_000) == (431, 431)
    assert await refused(raw_path=b"/\xff") == (400, 400)
    assert await refused(raw_path=b"*") == (400, 400)


@pytest.mark.trio
async def test_a_body_has_its_time(autojump_clock: MockClock) -> None:
    seconds = DEFAULT_LIMITS.request_seconds
    assert await refused(b"a", b"b", b"c", pause=seconds / 2 + 1) == (408, 408)
    assert (await ask(b"a", b"b", pause=seconds / 2 - 1))[1][0]["status"] == 200


@pytest.mark.anyio
async def test_a_peer_that_went_away_is_not_answered() -> None:
    events: list[dict[str, Any]] = [
        {"type": "http.request", "body": b"a", "more_body": True},
        {"type": "http.disconnect"},
    ]
    assert await ask(events=events) == (None, [])


@pytest.mark.anyio
async def test_other_protocols_and_an_application_that_was_not_started() -> None:
    with pytest.raises(LocalProtocolError, match="websocket"):
        _ = await ask(type="websocket")
    with pytest.raises(LocalProtocolError, match="lifespan"):
        await cast("Any", AsgiApp(Recorder(), performer))(dict(SCOPE), None, None)


@given(raw=st.binary(max_size=30), root=st.text(max_size=6), query=st.binary(max_size=6))
@pytest.mark.trio
async def test_whatever_the_target_there_is_an_answer(raw: bytes, root: str, query: bytes) -> None:
    request, sent = await ask(raw_path=raw, root_path=root, query_string=query)
    assert sent[0]["status"] in (200, 400)
    assert not isinstance(request, HttpRequest) or request.target.startswith("/")


# --- under real servers ---


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    write_server(directory, PLATFORM, int(time.time()))
    with (directory / "server.toml").open("a") as file:
        _ = file.write('[[proxy]]\nname = "front"\nunix = "unused.sock"\n')
    path = directory / "server.toml"
    _ = path.write_text(path.read_text().replace("drain_seconds = 0", "drain_seconds = 0\nlimits.body_bytes = 20000"))
    return directory


@pytest.mark.parametrize(
    ("command", "prefix"),
    [
        (["uvicorn", "--no-proxy-headers", "--log-level", "error", "--uds", "SOCKET", "asgi_app:app"], ""),
        (["uvicorn", "--no-proxy-headers", "--log-level", "error", "--uds", "SOCKET", "fastapi_app:app"], "/keys"),
        (["hypercorn", "--bind", "unix:SOCKET", "asgi_app:app"], ""),
        (["hypercorn", "--worker-class", "trio", "--bind", "unix:SOCKET", "asgi_app:app"], ""),
    ],
    ids=["uvicorn", "uvicorn-fastapi", "hypercorn", "hypercorn-trio"],
)
def test_the_example_under_a_server(command: list[str], prefix: str, site: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    program, *arguments = [part.replace("SOCKET", str(path)) for part in command]
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(EXAMPLES),
        "CHUTES_CONFIG": str(site / "server.toml"),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", program, *arguments], env=environment, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    try:
        until_served(path, process)
        with httpx.Client(
            transport=httpx.HTTPTransport(uds=str(path)), base_url=f"http://keys{prefix}", timeout=60
        ) as client:
            proxied = {"x-forwarded-for": "192.0.2.7"}
            nonce = client.get("/servers/nonce", headers=proxied)
            assert (nonce.status_code, list(nonce.json())) == (200, ["nonce", "expires_at"])
            assert client.get("/servers/nonce").json()["code"] == "bad_request"  # the proxy names no address
            assert client.get("/servers/a%2Fb/luks", headers=proxied).status_code == 404
            large = client.post("/servers/vm-1/luks", content=b"x" * 20_001, headers=proxied)
            assert (large.status_code, large.json()["code"]) == (413, "body_too_large")
            wrong = client.put("/servers/nonce", headers=proxied)
            assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET, HEAD")
            assert len(nonce.headers.get_list("date")) == 1
            head = client.head("/openapi.json", headers=proxied)
            assert (head.status_code, head.content) == (200, b"")
    finally:
        process.terminate()
        _, said = process.communicate(timeout=60)
    assert "Traceback" not in said


COMMANDS = re.findall(r"^    CHUTES_CONFIG=server.toml (.*)$", (EXAMPLES / "asgi_app.py").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_group_and_no_other_user_may_open_the_socket_of_the_guide(command: str, site: Path) -> None:
    """A user who can open it can name any client certificate.

    uvicorn gives its socket mode 0666, whatever the umask; hypercorn obeys its own ``--umask``, which is the process's
    if none is given.
    """
    guide = [each.text for each in fences(DOCS / "how-to" / "embed.md") if each.language == "sh"]
    directory, *commands = "".join(guide).splitlines()
    assert set(commands) < set(COMMANDS)
    _ = (site / "asgi_app.py").write_bytes((EXAMPLES / "asgi_app.py").read_bytes())
    programs = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    process = subprocess.Popen(
        ["bash", "-c", f"umask 022\n{directory}\nexec {command}"],
        env={"PATH": programs},
        stderr=subprocess.PIPE,
        text=True,
        cwd=site,
    )
    try:
        path = site / "proxied" / "keys.sock"
        until_served(path, process)
        _ = wait_until(lambda: path.stat().st_mode & 0o020)  # uvicorn sets the mode once it listens
        assert path.parent.stat().st_mode & 0o010
        assert not (path.stat().st_mode & 0o002 and path.parent.stat().st_mode & 0o001)
    finally:
        process.terminate()
        _ = process.communicate(timeout=60)


def until_served(path: Path, process: subprocess.Popen[str]) -> None:
    def is_served() -> bool:
        assert process.poll() is None, process.communicate()[1]
        with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
            probe.connect(str(path))
            return True
        return False

    _ = wait_until(is_served)
