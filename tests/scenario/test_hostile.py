"""Requests that nobody should send, as bytes on real sockets: each is answered with a 4xx of the documented shape, and
nothing changes."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.streams.tls import TLSStream

from chutes_proto.auth.signing import body_message, purpose_message
from chutes_proto.io.http.tls import client_context
from chutes_proto.io.stores.address import StorePlace
from chutes_proto.testing.store_suite._parts import VAULT
from chutes_proto.wire import json
from tests.scenario.operations import LOOPS, SERVER, Site, open_store, rows
from tests.server.test_servers import server
from tests.server.world import HOTKEY, MINER

pytestmark = pytest.mark.anyio

JSON = {"Content-Type": "application/json"}
LONG = "x" * 10_000


def signed(body: bytes | None = None, nonce: str | None = None) -> dict[str, str]:
    nonce = nonce or str(int(time.time()))
    message = purpose_message(MINER.hotkey, nonce, "tee") if body is None else body_message(MINER.hotkey, nonce, body)
    named = {"Hotkey": MINER.hotkey.address, "Nonce": nonce, "Signature": MINER.sign(message).hex()}
    return {f"X-Chutes-{name}": value for name, value in named.items()}


def request(line: str, headers: dict[str, str], body: bytes = b"", more: str = "") -> bytes:
    named = {"Host": "localhost", "Connection": "close", "Content-Length": str(len(body))} | headers
    head = "".join(f"{name}: {value}\r\n" for name, value in named.items())
    return f"{line} HTTP/1.1\r\n{head}{more}\r\n".encode("latin-1") + body


def registration(body: bytes, **headers: str) -> bytes:
    return request("POST /servers/", JSON | signed(body) | headers, body)


def requests() -> dict[str, tuple[bytes, int]]:
    """Requests, and the status of each answer. Made again at each call: signatures expire."""
    again = f"X-Chutes-Hotkey: {MINER.hotkey.address}\r\n"
    token = {"X-Boot-Token": "0" * 64, "X-Chutes-Hotkey": HOTKEY} | JSON
    bare = {"X-Boot-Token": "0" * 64} | JSON
    volumes = b'{"volumes":["storage"]}'
    good = json.encode(server())
    return {
        "two hotkeys": (request("GET /servers/", signed(), more=again), 400),
        "two hotkeys of a body": (request("POST /servers/", JSON | signed(good), good, again), 400),
        "two nonces": (request("GET /servers/", signed(), more="X-Chutes-Nonce: 1\r\n"), 400),
        "two signatures": (request("GET /servers/", signed(), more="x-chutes-signature: 00\r\n"), 400),
        "two tokens": (request("POST /servers/vm/luks", token, volumes, f"X-Boot-Token: {'1' * 64}\r\n"), 400),
        "two hosts": (request("GET /servers/nonce", {}, more="Host: other\r\n"), 400),
        "two lengths": (request("POST /servers/", JSON, b"{}", "Transfer-Encoding: chunked\r\n"), 400),
        "a header folded": (request("GET /servers/", signed(), more=" folded: yes\r\n"), 400),
        "a line without CR": (request("GET /servers/", signed(), more="A: b\n"), 400),
        "a length twice": (request("POST /servers/", JSON, b"{}", "Content-Length: 2\r\n"), 400),
        "a header with NUL": (request("GET /servers/nonce", {"X": "a\0b"}), 400),
        "a line feed in a target": (request("GET /servers/a\nX:1", signed()), 400),
        "another nonce's digits": (request("GET /servers/", signed(nonce="17\xb2")), 401),
        "a huge nonce": (request("GET /servers/", signed(nonce="9" * 5000)), 401),
        "a nonce of words": (request("GET /servers/", signed(nonce="1e9")), 401),
        "an escaped slash": (request("GET /servers/a%2Fb", signed()), 404),
        "dots": (request("GET /servers/..", signed()), 404),
        "escaped dots": (request("DELETE /servers/%2e%2e", signed()), 404),
        "dots within": (request("GET /servers/../openapi.json", {}), 404),
        "a long id": (request(f"GET /servers/{LONG}", signed()), 422),
        "a long name": (request(f"PATCH /servers/n1?server_name={LONG}", signed()), 422),
        "a long VM": (request(f"POST /servers/{LONG}/luks", token, volumes), 422),
        "NUL in an id": (request("GET /servers/a%00b", signed()), 422),
        "NUL in a hotkey": (request("GET /servers/vm/luks?hotkey=a%00b", bare), 422),
        "NUL in a sync's hotkey": (request("POST /servers/vm/luks?hotkey=%00", bare, volumes), 422),
        "a long path": (request(f"GET /{LONG}{LONG}", {}), 431),
        "a long id in a body": (registration(json.encode(server(id=LONG))), 422),
        "NUL in a body": (registration(json.encode(server(id="a\0"))), 422),
        "a lone surrogate": (registration(b'{"host":"1.2.3.4","id":"\\ud800","gpus":[]}'), 422),
        "deep JSON": (registration(b"[" * 50_000), 422),
        "deep JSON, closed": (registration(b'{"a":' * 20 + b"1" + b"}" * 20), 422),
        "a member twice": (registration(b'{"id":"a","id":"b","host":"1.2.3.4","gpus":[]}'), 422),
        "a huge number": (registration(b'{"id":"a","host":"1.2.3.4","gpus":[{"memory":1e999}]}'), 422),
        "a number of many digits": (registration(b'{"id":"a","gpus":[{"memory":' + b"1" * 9999 + b"}]}"), 422),
        "not UTF-8": (registration(b'{"id":"\xff"}'), 422),
        "a form": (registration(good, **{"Content-Type": "application/x-www-form-urlencoded"}), 422),
        "a wrong type": (registration(good, **{"Content-Type": "text/plain"}), 422),
        "a large body": (request("POST /servers/", JSON, b"x" * 70_000), 413),
        "another verb": (request("PUT /servers/n1", signed()), 405),
        "a forged certificate": (request("GET /servers/nonce", {"X-Client-Cert": "x"}), 400),
        "a forged address": (request("GET /servers/nonce", {"X-Forwarded-For": "127.0.0.1"}), 400),
        "no HTTP": (b"\x00" * 100 + b"\r\n\r\n", 400),
    }


async def ask(site: Site, data: bytes) -> tuple[int, dict[str, str], Any]:
    port = int(site.url.rpartition(":")[2])
    context = client_context(None, SERVER.ca_pem)
    raw = await anyio.connect_tcp("127.0.0.1", port)
    stream = await TLSStream.wrap(raw, hostname="localhost", ssl_context=context, standard_compatible=False)
    answer = bytearray()
    try:
        await stream.send(data)
        while True:
            answer += await stream.receive()
    except (anyio.EndOfStream, anyio.BrokenResourceError):
        pass
    finally:
        await anyio.aclose_forcefully(stream)
    head, _, body = bytes(answer).partition(b"\r\n\r\n")
    line, *fields = head.decode("latin-1").split("\r\n")
    return int(line.split()[1]), dict(field.lower().split(": ", 1) for field in fields), json.decode(body)


async def test_each_is_refused_and_changes_nothing(loop: str, tmp_path: Path) -> None:
    site = Site(LOOPS[loop], open_store(tmp_path))
    wrong: list[tuple[str, int, Any]] = []
    async with site.serving():
        before = rows(site.store)
        for name, (data, expected) in requests().items():
            status, headers, content = await ask(site, data)
            if status != expected:
                wrong.append((name, status, content))
            assert list(content) == ["detail", "code", "request_id"], name
            assert headers["content-type"] == "application/json", name
            assert "set-cookie" not in headers, name
            assert LONG not in str(content), name
        assert rows(site.store) == before
        body = json.encode(server())  # and then the good one
        assert (await ask(site, registration(body)))[0] == 201
    assert wrong == []
    assert not [record for record in site.log if record.fields.get("code") == "server_fault"]


@pytest.mark.parametrize("name", ["X-Chutes-Hotkey", "X-Chutes-Nonce", "X-Chutes-Signature"])
async def test_a_header_with_a_line_of_its_own(name: str, loop: str, tmp_path: Path) -> None:
    """A carriage return within a value begins no other header."""
    site = Site(LOOPS[loop], open_store(tmp_path))
    async with site.serving():
        headers = signed() | {name: "a\rX-Chutes-Nonce: 1"}
        status, _, content = await ask(site, request("GET /servers/", headers))
        assert (status, content["code"]) == (400, "bad_request")


async def test_a_text_that_postgresql_does_not_take_is_no_fault_of_the_store(
    loop: str, tmp_path: Path, empty_schema: str
) -> None:
    with closing(StorePlace(empty_schema, tmp_path, vault=VAULT).open(make=True)) as store:
        site = Site(LOOPS[loop], store)
        async with site.serving():
            for name, (data, expected) in requests().items():
                if name.startswith("NUL"):
                    assert (await ask(site, data))[0] == expected, name
    assert not [record for record in site.log if record.fields.get("code") == "store_unavailable"]
