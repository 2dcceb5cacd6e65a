"""The admin listener's application, what it may listen on, and what is told of each request."""

from __future__ import annotations

import pytest

from chutes_proto.effects import Flow, run
from chutes_proto.errors import BadRequest, ConfigurationError
from chutes_proto.server._admin import LOOPBACK, AdminApp, Page
from chutes_proto.server._app import App
from chutes_proto.server._config import ServerConfig
from chutes_proto.server._observing import Answered, trace_of
from chutes_proto.wire import vms
from chutes_proto.wire.codes import Code
from chutes_proto.wire.http import TRACEPARENT, HttpRequest, HttpResponse, MalformedRequest
from tests.server.test_config_example import EXAMPLE
from tests.server.world import World, service

APP = AdminApp(LOOPBACK | {"metrics.example"}, {"/livez": lambda: Page(b"ok\n")})
PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
TRACE = PARENT[3:35]


def answer(flow: Flow[HttpResponse]) -> HttpResponse:
    return run(flow, lambda effect: pytest.fail(f"the admin listener waits for nothing: {effect}"))


def ask(host: str, target: str = "/livez", method: str = "GET") -> HttpResponse:
    headers = (("host", host),) if host else ()
    return answer(APP.handle(HttpRequest(method, target, headers, b"", peer_address="127.0.0.1", arrived=0.0)))


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:9464", "127.0.0.1:1", "[::1]", "[::1]:9464", "metrics.example"]
)
def test_a_name_of_the_listener_is_served(host: str) -> None:
    assert (ask(host).status, ask(host, method="HEAD").status) == (200, 200)


@pytest.mark.parametrize(
    "host",
    ["", "evil.example", "evil.example:9464", "localhost.evil.example", "127.0.0.1.evil.example", "::1", "[::2]"],
)
def test_a_foreign_host_is_refused(host: str) -> None:
    assert ask(host).status == 421
    assert ask(host, "/nothing").status == 421


def test_nothing_else_is_served() -> None:
    assert ask("localhost", "/servers/nonce").status == 404
    assert ask("localhost", "/livez?a=b").status == 200
    refused = ask("localhost", method="POST")
    assert (refused.status, refused.header("allow")) == (405, "GET, HEAD")
    assert answer(APP.handle(MalformedRequest(BadRequest(Code.BAD_REQUEST, "x"), "127.0.0.1"))).status == 400


# --- where it may listen ---


def problem(admin: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        _ = ServerConfig.from_toml(f"{EXAMPLE}\n[admin]\n{admin}\n".encode())
    return str(caught.value)


@pytest.mark.parametrize(
    ("admin", "text"),
    [
        ('listen = "0.0.0.0:9464"', "0.0.0.0 is not loopback: name certificate, key and client_ca"),
        ('listen = "[::]:9464"', ":: is not loopback"),
        ('listen = "192.0.2.1:9464"\ncertificate = "a"\nkey = "b"', "go together"),
        ('listen = "keys.example:9464"', "'keys.example' is not an IP address"),
        ('listen = "127.0.0.1"', 'admin.listen: say "address:port"'),
        ('listen = "127.0.0.1:8443"', "the admin listener is never the public one"),
        ('unix = "s"\n[[proxy]]\nname = "front"\nunix = "s"', "the admin listener is never a public one"),
        ('hosts = ["a"]', "name listen or a unix socket"),
        ('unix = ""', "admin.unix: name a path"),
        ('unix = "s"\ncertificate = "a"\nkey = "b"\nclient_ca = "c"', "goes with admin.listen"),
    ],
)
def test_it_never_listens_where_everybody_may_ask(admin: str, text: str) -> None:
    assert text in problem(admin)


@pytest.mark.parametrize("other", ["[admin]", '[[proxy]]\nname = "front"'])
def test_no_listener_has_the_path_of_the_control_socket(other: str) -> None:
    with pytest.raises(ConfigurationError, match=r"control: is admin\.unix or proxy\.unix, too"):
        _ = ServerConfig.from_toml(f'control = "s"\n{EXAMPLE}\n{other}\nunix = "s"\n'.encode())


# --- what is told of requests ---


def test_each_request_is_told_with_its_operation_and_code() -> None:
    told: list[Answered] = []
    here = World(App(service(), told.append))
    _ = here.token()
    assert here.ask("GET", "/nothing").status == 404
    assert here.sync("0" * 64, {"volumes": ["storage"]}).status == 401
    assert [(each.operation, each.status, each.code) for each in told] == [
        (vms.BOOT_NONCE.operation, 200, ""),
        (vms.BOOT_ATTESTATION.operation, 200, ""),
        ("none", 404, "not_found"),
        (vms.VOLUME_SYNC.operation, 401, "boot_token_invalid"),
    ]


@pytest.mark.parametrize(
    ("parent", "trace"),
    [
        (PARENT, TRACE),
        (f"cc{PARENT[2:]}-what-the-future-will-be-like", TRACE),
        (f"{PARENT}-more", None),
        (f"ff{PARENT[2:]}", None),
        (PARENT.upper(), None),
        (PARENT.replace(TRACE, "0" * 32), None),
        (PARENT.replace("00f067aa0ba902b7", "0" * 16), None),
        (f"{PARENT}\n", None),
        ("", None),
    ],
)
def test_a_trace_is_taken_as_the_w3c_says(parent: str, trace: str | None) -> None:
    request = HttpRequest("GET", "/", (("traceparent", parent),), b"", peer_address="", arrived=0.0)
    assert trace_of(request) == trace


def test_log_records_of_a_request_have_its_trace() -> None:
    here = World(App(service()))
    assert here.ask("GET", "/nothing", headers={"traceparent": PARENT}).status == 404
    body, headers = here.attestation()
    assert here.ask("POST", "/servers/boot/attestation", body, headers=headers | {"traceparent": PARENT}).status == 200
    assert [record.fields["trace_id"] for record in here.log] == [TRACE] * 2


@pytest.mark.parametrize(
    ("parent", "sent"),
    [
        (PARENT, PARENT),
        (f"cc{PARENT[2:-2]}ff-{'x' * 9000}", PARENT),
        (PARENT[:-2] + "02", PARENT[:-2] + "00"),
        ("", ""),
        (f"{PARENT}\r\nhost: evil", ""),
    ],
)
def test_requests_that_are_sent_for_a_request_belong_to_its_trace(parent: str, sent: str) -> None:
    here = World(App(service()))
    _ = here.ask("GET", "/nothing", headers={"traceparent": parent} if parent else {})
    assert TRACEPARENT.get() == sent
    _ = here.ask("GET", "/nothing")
    assert TRACEPARENT.get() == ""
