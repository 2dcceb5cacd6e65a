"""The example configuration of nginx, with a real nginx and a real server behind it."""

from __future__ import annotations

import re
import socket
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from attrs import frozen

from chutes_proto.auth.binding import report_data
from chutes_proto.auth.client_identity import ClientIdentity, make_client_identity
from chutes_proto.io.files import write_file
from chutes_proto.io.http.tls import client_context
from chutes_proto.io.server.development import write_server
from chutes_proto.testing._platform import SimulatedPlatform
from chutes_proto.transport.h1 import DEFAULT_LIMITS
from chutes_proto.wire.codec import encode_quote
from chutes_proto.wire.endpoints import ENDPOINTS
from tests.cli.conftest import HOTKEY, start_server
from tests.waiting import wait_until
from tools.docs.pages import DOCS, fences
from tools.ports import free_port

CONFIGURATION = Path(__file__).resolve().parents[2] / "examples" / "behind_nginx" / "nginx.conf"
GUIDE = [fence for fence in fences(DOCS / "how-to" / "nginx.md") if fence.language in ("toml", "sh")]
PLATFORM = SimulatedPlatform(bytes(32))


@frozen
class Site:
    """nginx's URL, the folder of nginx and server, and the server's own URL."""

    url: str
    folder: Path
    direct: str


@pytest.fixture(scope="module", params=["trio", "asyncio"])
def site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, require_program: Callable[[str], str]
) -> Iterator[Site]:
    _ = require_program("nginx")
    folder = tmp_path_factory.mktemp("site")
    write_server(folder, PLATFORM, int(time.time()))
    with (folder / "server.toml").open("a") as file:
        _ = file.write("\n" + GUIDE[0].text)
    server = start_server("--config", folder / "server.toml", "--transport", request.param, ca=folder / "ca.pem")
    try:
        assert (folder / "keys.sock").is_socket()
        with nginx(folder, CONFIGURATION.read_text()) as url:
            yield Site(url, folder, server.url)
    finally:
        server.process.terminate()
        _ = server.process.communicate(timeout=60)
    assert not (folder / "keys.sock").exists()


@contextmanager
def nginx(folder: Path, text: str, port: int | None = None) -> Iterator[str]:
    """Runs as the guide starts it, with ``text`` as its configuration; its URL, at ``port`` if the text has one."""
    port = port or free_port()
    _ = (folder / "nginx.conf").write_text(text.replace("listen 8443 ssl", f"listen 127.0.0.1:{port} ssl"))
    (line,) = [line for line in GUIDE[1].text.splitlines() if line.startswith("nginx ")]
    with subprocess.Popen(
        ["sh", "-c", f"exec {line} -e stderr"], cwd=folder, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            until_served(port, process)
            yield f"https://localhost:{port}"
        finally:
            process.terminate()


def until_served(port: int, process: subprocess.Popen[str]) -> None:
    def is_served() -> bool:
        assert process.poll() is None, process.communicate()[1]
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return True
        return False

    _ = wait_until(is_served)


def client(url: str, folder: Path, identity: ClientIdentity | None) -> httpx.Client:
    context = client_context(identity, (folder / "ca.pem").read_bytes())
    return httpx.Client(base_url=url, verify=context, trust_env=False, timeout=60)


def identity(number: int, clock: int = 0) -> ClientIdentity:
    """The identity of a VM whose clock is ``clock`` seconds ahead."""
    return make_client_identity(int(time.time()) + clock, bytes([number]) * 32)


def attest(http: httpx.Client, bound: ClientIdentity, headers: dict[str, str] | None = None) -> httpx.Response:
    """An attestation whose quote binds the key of ``bound``."""
    nonce = http.get("/servers/nonce").json()["nonce"]
    quote_ = PLATFORM.quote(report_data(bytes.fromhex(nonce), bound.spki_sha256))
    body = {"quote": encode_quote(quote_), "miner_hotkey": HOTKEY, "vm_name": "vm-1"}
    return http.post("/servers/boot/attestation", json=body, headers={"x-chutes-nonce": nonce, **(headers or {})})


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["code"]


def test_the_guide_and_the_example_configure_the_server_alike() -> None:
    lines = [line.lstrip("# ") for line in CONFIGURATION.read_text().splitlines() if line.startswith("#     ")]
    assert tomllib.loads("\n".join(lines)) == tomllib.loads(GUIDE[0].text)


def test_nginx_closes_a_kept_connection_before_the_server_does() -> None:
    """Whoever sends a request just as its connection is closed has lost it."""
    (kept,) = re.findall(r"keepalive_timeout (\d+)s;", CONFIGURATION.read_text())
    assert int(kept) < DEFAULT_LIMITS.idle_seconds


def test_the_guides_probe_finds_the_server_ready(site: Site, require_program: Callable[[str], str]) -> None:
    _ = require_program("curl")
    done = subprocess.run(GUIDE[2].text, shell=True, cwd=site.folder, capture_output=True, text=True, check=True)
    assert '"nonce"' in done.stdout


DAY = 86_400


@pytest.mark.parametrize("clock", [0, DAY, -2 * DAY], ids=["right", "a day ahead", "two days behind"])
def test_a_boot_and_its_sync(site: Site, clock: int) -> None:
    """A VM's clock may be wrong: the dates of its certificate mean nothing, here as without nginx."""
    vm = identity(1, clock)
    with client(site.url, site.folder, vm) as http:
        granted = attest(http, vm)
        assert granted.status_code == 200, granted.text
        headers = {"x-boot-token": granted.json()["boot_token"], "x-chutes-hotkey": HOTKEY}
        synced = http.post("/servers/vm-1/luks", json={"volumes": ["storage"]}, headers=headers)
        assert list(synced.json()) == ["storage"]


def test_a_redirect_stays_at_the_port_of_nginx(site: Site) -> None:
    with client(site.url, site.folder, None) as http:
        redirected = http.get("/servers/nonce/", follow_redirects=True)
    assert (redirected.status_code, str(redirected.url)) == (200, f"{site.url}/servers/nonce")


def test_a_large_body_reaches_the_operations_that_need_one(site: Site) -> None:
    """GPU evidence and host profiles; of any other operation the server itself says that it is too large."""
    with client(site.url, site.folder, None) as http:
        for endpoint in ENDPOINTS:
            if endpoint.body_bytes:
                answered = http.request(
                    endpoint.method, endpoint.path.format(server_id="s"), content=bytes(endpoint.body_bytes)
                )
                assert code(answered) == (401, "signature_invalid")
        assert code(http.post("/servers/boot/attestation", content=bytes(65_537))) == (413, "body_too_large")


def test_nginx_keeps_no_body_for_a_certificate_with_wrong_dates(site: Site) -> None:
    """It does not apply `client_max_body_size` there; the key server refuses the length before the body comes."""
    context = client_context(identity(1, DAY), (site.folder / "ca.pem").read_bytes())
    address = ("localhost", int(site.url.rpartition(":")[2]))
    head = f"POST /servers/boot/attestation HTTP/1.1\r\nhost: localhost\r\ncontent-length: {1 << 30}\r\n\r\n"
    with context.wrap_socket(socket.create_connection(address, 60), server_hostname="localhost") as stream:
        stream.sendall(head.encode() + bytes(1000))
        assert stream.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_a_forged_certificate_is_refused(site: Site) -> None:
    victim, thief = identity(1), identity(2)
    forged = {"x-client-cert": quote(victim.certificate_pem, safe="")}
    with client(site.url, site.folder, None) as http:
        assert code(attest(http, victim, forged)) == (401, "client_certificate_required")
    with client(site.url, site.folder, thief) as http:
        assert code(attest(http, victim, forged)) == (403, "certificate_mismatch")
        assert code(attest(http, thief, {"client-cert": ":AAAA:"})) == (400, "bad_request")


def test_past_nginx_nobody_is_believed(site: Site) -> None:
    victim = identity(1)
    with client(site.direct, site.folder, None) as http:
        forged = {"x-client-cert": quote(victim.certificate_pem, safe="")}
        assert code(attest(http, victim, forged)) == (400, "bad_request")
        assert code(attest(http, victim, {"x-attestation-proxy-auth": "guess"})) == (400, "bad_request")
        assert code(http.get("/servers/nonce", headers={"x-forwarded-for": "192.0.2.7"})) == (400, "bad_request")


def test_over_a_network_nginx_gives_its_secret_to_the_server_alone(
    tmp_path: Path, require_program: Callable[[str], str]
) -> None:
    _ = require_program("nginx")
    write_server(tmp_path, PLATFORM, int(time.time()))
    with (tmp_path / "server.toml").open("a") as file:
        _ = file.write("\n" + GUIDE[3].text.replace("10.0.0.7", "127.0.0.1"))
        _ = file.write('certificate_header = "X-Client-Cert"\naddress_header = "X-Forwarded-For"\n')
    secret = "s" * 32
    write_file(tmp_path / "proxy-secret", secret.encode(), mode=0o600)
    write_file(tmp_path / "secret.conf", f'proxy_set_header X-Attestation-Proxy-Auth "{secret}";'.encode(), mode=0o600)
    (fence,) = (fence for fence in fences(DOCS / "how-to" / "nginx.md") if fence.language == "nginx")
    lines = fence.text.replace("keys.example", "localhost")
    server = start_server("--config", tmp_path / "server.toml", ca=tmp_path / "ca.pem")
    try:
        text = CONFIGURATION.read_text().replace("proxy_pass http:", "proxy_pass https:")
        text = text.replace("unix:keys.sock", server.url.removeprefix("https://"))
        text = re.sub(r"proxy_set_header X-Attestation-Proxy-Auth .*", lambda _: lines, text)
        with nginx(tmp_path, text) as url, client(url, tmp_path, identity(1)) as http:
            assert attest(http, identity(1)).status_code == 200
        text = text.replace("proxy_ssl_name localhost;", "proxy_ssl_name another.example;")
        with nginx(tmp_path, text) as url, client(url, tmp_path, None) as http:
            assert http.get("/servers/nonce").status_code == 502
    finally:
        server.process.terminate()
        _ = server.process.communicate(timeout=60)
