"""A key server inside a program of one's own: `serve` on both loops, `asgi_app`, and where paths begin."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import trio

import chutes_proto_asyncio
import chutes_proto_trio
from chutes_proto.errors import ConfigurationError, FileUnavailable, StoreError
from chutes_proto.io.server.development import write_server
from chutes_proto.io.server.setup import make_setup
from chutes_proto.log import Record
from chutes_proto.server import AsgiApp, ServerConfig, asgi_app
from chutes_proto.testing.store_suite._parts import boot
from tests.server.world import PLATFORM

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "server_trio.py"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    directory = tmp_path / "site"
    directory.mkdir()
    write_server(directory, PLATFORM, int(time.time()))
    with (directory / "server.toml").open("a") as file:
        _ = file.write('[[proxy]]\nname = "front"\nunix = "keys.sock"\n')
    return directory


def edit(site: Path, old: str, new: str) -> None:
    path = site / "server.toml"
    text = path.read_text()
    assert old in text
    _ = path.write_text(text.replace(old, new))


def trusting(site: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(site / "ca.pem"))


def open_files(directory: Path) -> list[str]:
    found = (os.path.realpath(link) for link in Path("/proc/self/fd").iterdir())
    return [path for path in found if path.startswith(f"{directory}/")]


# --- serve ---


def test_both_bindings_have_the_same_serve() -> None:
    assert chutes_proto_trio.serve is chutes_proto_asyncio.serve
    assert "serve" in chutes_proto_trio.__all__
    assert "serve" in chutes_proto_asyncio.__all__


@pytest.mark.anyio
async def test_it_serves_from_when_it_is_ready_until_it_is_cancelled(site: Path) -> None:
    log: list[Record] = []
    told: list[Sequence[str]] = []
    ready = anyio.Event()

    def note(urls: Sequence[str]) -> None:
        told.append(urls)
        ready.set()

    async def serve() -> None:
        await chutes_proto_trio.serve(ServerConfig.load(site / "server.toml"), ready=note, log=log.append)

    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            _ = group.start_soon(serve)
            await ready.wait()
            async with httpx.AsyncClient(verify=trusting(site), trust_env=False, timeout=60) as client:
                assert (await client.get(f"{told[0][0]}/servers/nonce")).status_code == 200
            assert (site / "keys.sock").exists()
            assert open_files(site)
            group.cancel_scope.cancel()
    async with httpx.AsyncClient(verify=trusting(site), trust_env=False, timeout=60) as client:
        with pytest.raises(httpx.ConnectError):
            _ = await client.get(f"{told[0][0]}/servers/nonce")
    ((https, unix),) = told
    assert https.startswith("https://127.0.0.1:")
    assert unix == f"unix:{site / 'keys.sock'}"
    (serving,) = (record for record in log if record.event == "serving")
    assert serving.fields["urls"] == [https, unix]
    assert not (site / "keys.sock").exists()
    assert open_files(site) == []


RUNS = {
    "trio": "import trio, chutes_proto_trio; trio.run(chutes_proto_trio.serve, config)",
    "asyncio": "import asyncio, chutes_proto_asyncio; asyncio.run(chutes_proto_asyncio.serve(config))",
}


@pytest.mark.parametrize("loop", RUNS)
def test_one_line_runs_a_server_that_an_interrupt_ends_cleanly(loop: str, site: Path) -> None:
    program = f"from chutes_proto.server import ServerConfig; config = ServerConfig.load('server.toml'); {RUNS[loop]}"
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, cwd=site) as process:
        assert process.stderr is not None
        try:
            said = process.stderr.readline()  # the log, by way of logging: a root other than Intel's is a warning
            assert said.startswith("serving urls="), said + process.stderr.read()
            url = said.split('"')[1]
            assert httpx.get(f"{url}/servers/nonce", verify=trusting(site), trust_env=False).status_code == 200
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert "KeyboardInterrupt" in said
    assert not (site / "keys.sock").exists()


def test_the_example_ends_its_server_with_its_own_work(site: Path) -> None:
    command = [sys.executable, str(EXAMPLE), str(site / "server.toml")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().strip()
            assert httpx.get(f"{url}/servers/nonce", verify=trusting(site), trust_env=False).status_code == 200
            _ = process.communicate("\n", timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    assert not (site / "keys.sock").exists()


# --- what is wrong ---


# `serve` as a program runs it, beside `asgi_app`: what is wrong is told by the call.


def _served(config: ServerConfig) -> None:
    trio.run(chutes_proto_trio.serve, config)


def _served_on_asyncio(config: ServerConfig) -> None:
    asyncio.run(chutes_proto_asyncio.serve(config))


each = pytest.mark.parametrize("embed", [_served, _served_on_asyncio, asgi_app])


@each
def test_all_problems_are_listed(embed: Callable[[ServerConfig], object], site: Path) -> None:
    (site / "kek").chmod(0o644)
    (site / "simulated-root.der").unlink()
    with pytest.raises(ConfigurationError) as caught:
        _ = embed(ServerConfig.load(site / "server.toml"))
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == ["roots", "kek_file"]
    assert open_files(site) == []


@each
def test_keys_that_cannot_be_opened_are_told_before_anything_is_served(
    embed: Callable[[ServerConfig], object], site: Path
) -> None:
    config = ServerConfig.load(site / "server.toml")
    with closing(make_setup(config).store.open()) as store:
        _ = store.transact(boot("1"))  # which is not under the site's key
    with pytest.raises(StoreError, match="neither kek_file nor kek_previous_file"):
        _ = embed(config)
    assert not (site / "keys.sock").exists()


def test_an_address_in_use_leaves_nothing_open(site: Path) -> None:
    _ = (site / "keys.sock").write_bytes(b"a file of somebody's")
    with pytest.raises(ConfigurationError, match=r"proxy\.unix"):
        _served(ServerConfig.load(site / "server.toml"))
    assert open_files(site) == []
    assert (site / "keys.sock").exists()


# --- as an ASGI application ---


async def _live(app: AsgiApp, while_up: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
    """Its messages in the lifespan protocol."""
    said: list[dict[str, Any]] = []
    asked = ["startup", "shutdown"]

    async def receive() -> dict[str, Any]:
        if len(asked) == 1:
            while_up()
        return {"type": f"lifespan.{asked.pop(0)}"}

    async def send(message: Any) -> None:
        said.append(message)

    await app({"type": "lifespan"}, receive, send)
    return said


@pytest.mark.anyio
async def test_the_store_is_open_while_the_application_lives(site: Path, caplog: pytest.LogCaptureFixture) -> None:
    app = asgi_app(ServerConfig.load(site / "server.toml"))
    assert open_files(site) == []
    opened: list[bool] = []
    caplog.set_level(logging.INFO, "chutes_proto")
    for _ in range(2):  # a test client may begin and end it often
        said = await _live(app, lambda: opened.append(bool(open_files(site))))
        assert [message["type"] for message in said] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert opened == [True, True]
    assert open_files(site) == []
    assert "NOT Intel's root" in caplog.text


def test_an_application_that_no_proxy_tells_certificates_is_not_made(site: Path) -> None:
    edit(site, '[[proxy]]\nname = "front"\nunix = "keys.sock"\n', "")
    with pytest.raises(ConfigurationError, match=r"^proxy: missing, .*add \[\[proxy\]\]"):
        _ = asgi_app(ServerConfig.load(site / "server.toml"))


@pytest.mark.anyio
async def test_a_store_that_is_gone_when_the_application_starts(site: Path) -> None:
    app = asgi_app(ServerConfig.load(site / "server.toml"))
    _ = (site / "keys.db").write_bytes(b"no database at all" * 100)
    (message,) = await _live(app)
    assert message["type"] == "lifespan.startup.failed"
    assert "keys.db" in message["message"]


# --- the configuration ---


def test_relative_paths_begin_at_the_files_directory(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(site.parent)
    config = ServerConfig.load("site/server.toml")
    monkeypatch.chdir("/")
    setup = make_setup(config)
    assert setup.store.path == site / "keys.db"
    assert setup.proxy_socket == site / "keys.sock"


def test_without_a_file_they_begin_at_the_working_directory(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(site)
    config = ServerConfig.from_toml(Path("server.toml").read_bytes())
    assert make_setup(config).store.path == site / "keys.db"


def test_a_file_does_not_say_where_it_is(site: Path) -> None:
    edit(site, "listen =", 'path = "/etc/server.toml"\nlisten =')
    with pytest.raises(ConfigurationError, match=r"site/server\.toml: path: Unknown key"):
        _ = ServerConfig.load(site / "server.toml")


def test_a_file_that_cannot_be_read(site: Path) -> None:
    with pytest.raises(FileUnavailable, match=r"nothing\.toml: cannot be read"):
        _ = ServerConfig.load(site / "nothing.toml")
