"""The boot agents and the examples over real TLS, with the client certificate demanded, against the model server."""

from __future__ import annotations

import importlib.util
import os
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from chutes_proto.auth.client_identity import ClientIdentity, make_client_identity
from chutes_proto.boot._retry_policy import RetryPolicy
from chutes_proto.errors import LocalProtocolError, Refused
from chutes_proto.io.clients.boot_agent import BootAgent
from chutes_proto.io.http.tls import client_context
from chutes_proto.log import Record
from chutes_proto.wire.http import HttpRequest
from tests.boot import talk
from tests.boot.model import CANARY, VOLUMES, ModelServer
from tests.io.peers import Credentials, make_credentials, peer, read_request

QUICK = RetryPolicy(attempts=5, base=0.01, cap=0.02, deadline=20.0)
LOOPS = ("trio", "asyncio")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> Credentials:
    return make_credentials(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def identity() -> ClientIdentity:
    return make_client_identity(int(time.time()) - 60, bytes(32))


def over_http(model: ModelServer) -> Callable[[ssl.SSLSocket], None]:
    """The model server as a peer that keeps its connection open."""

    def behave(stream: ssl.SSLSocket) -> None:
        while True:
            try:
                head, _, body = read_request(stream).partition(b"\r\n\r\n")
            except ValueError:
                return
            (method, target, _), *fields = [line.split(" ", 2) for line in head.decode().split("\r\n")]
            headers = tuple((name.rstrip(":").lower(), value) for name, value in fields)
            response = model(HttpRequest(method, target, headers, body))
            lines = [f"HTTP/1.1 {response.status} -", *(f"{name}: {value}" for name, value in response.headers)]
            lines += [f"content-length: {len(response.body)}", "", ""]
            stream.sendall("\r\n".join(lines).encode() + response.body)

    return behave


def on_loop(loop: str, work: Callable[[Any], Any], *arguments: Any, **options: Any) -> Any:
    async def main() -> Any:
        async with BootAgent(*arguments, **options) as agent:
            return await work(agent)

    return anyio.run(main, backend=loop)


Runner = Callable[..., Any]
both_loops = pytest.mark.parametrize("runner", [partial(on_loop, "trio"), partial(on_loop, "asyncio")], ids=LOOPS)


def run_agent(
    runner: Runner,
    work: Callable[[Any], Any],
    model: ModelServer,
    credentials: Credentials,
    identity: ClientIdentity,
    **options: Any,
) -> Any:
    with peer(credentials, over_http(model), client_ca=identity.certificate_pem) as (url, ended):
        result = runner(
            work,
            url,
            hotkey=talk.HOTKEY,
            vm_name=talk.VM,
            quoter=lambda report_data: b"quote over " + report_data,
            ca_pem=credentials.ca_pem,
            identity=identity,
            retry=QUICK,
            **options,
        )
    assert ended
    return result


@both_loops
def test_a_boot_with_its_volumes(runner: Runner, credentials: Credentials, identity: ClientIdentity) -> None:
    async def work(agent: Any) -> Any:
        return await agent.boot(), await agent.sync(VOLUMES, formatted=[]), await agent.sync(VOLUMES, formatted=[])

    grant, keys, again = run_agent(runner, work, ModelServer(iter(())), credentials, identity)
    assert grant.root_passphrase.reveal() == f"{CANARY}-root".encode()
    assert [keys.passphrases[name].reveal() for name in VOLUMES] == [f"{CANARY}-{name}".encode() for name in VOLUMES]
    assert again == keys


@both_loops
def test_an_agent_boots_by_itself_when_it_must(
    runner: Runner, credentials: Credentials, identity: ClientIdentity
) -> None:
    async def work(agent: Any) -> Any:
        first = await agent.sync(VOLUMES, formatted=[])
        other = await agent.sync(["storage"], formatted=[])  # the token is spent: a new boot
        return first, other

    records: list[Record] = []
    options = {"log": records.append}
    first, other = run_agent(runner, work, ModelServer(iter(())), credentials, identity, **options)
    assert [*first.passphrases] == [*VOLUMES]
    assert [*other.passphrases] == ["storage"]
    assert [r.event for r in records].count("grant_received") == 2
    assert CANARY not in str(records)


@both_loops
def test_bad_moods_are_survived(runner: Runner, credentials: Credentials, identity: ClientIdentity) -> None:
    async def work(agent: Any) -> Any:
        return await agent.boot(), await agent.sync(VOLUMES, formatted=[])

    model = ModelServer(iter([503, "well", "garbage", "well", "well", 500, "redirect"]))
    grant, keys = run_agent(runner, work, model, credentials, identity)
    assert grant.boot_token is not None
    assert [*keys.passphrases] == [*VOLUMES]


@both_loops
def test_a_refusal_ends_it(runner: Runner, credentials: Credentials, identity: ClientIdentity) -> None:
    async def work(agent: Any) -> Any:
        with pytest.raises(Refused, match="403"):
            await agent.boot()
        return "refused"

    model = ModelServer(iter(["well", 403]))
    assert run_agent(runner, work, model, credentials, identity) == "refused"


@both_loops
def test_a_rotation(runner: Runner, credentials: Credentials, identity: ClientIdentity) -> None:
    async def work(agent: Any) -> Any:
        async with agent.rotate(VOLUMES, formatted=["storage"]) as rotation:
            for name, pair in rotation.keys.items():
                assert pair.current.reveal() == f"{CANARY}-{name}".encode()
                assert pair.next.reveal() == f"{CANARY}-{name}-next".encode()
            rotation.added("storage")
        return rotation

    model = ModelServer(iter(["well", "well", 503, "well", 503, "garbage"]), in_use=["storage"], two_phase=True)
    records: list[Record] = []
    rotation = run_agent(runner, work, model, credentials, identity, log=records.append)
    assert model.confirmed == {"storage": {"rotated": True}, "tdx-cache": {"rotated": False}}
    assert rotation.in_use == {"storage"}
    assert rotation.k3s_encryption_key.reveal() == f"{CANARY}-k3s".encode()
    assert CANARY not in str(records)
    assert not [token for token in model.tokens() if token in str(records)]


@both_loops
def test_a_rotation_that_fails_confirms_nothing(
    runner: Runner, credentials: Credentials, identity: ClientIdentity
) -> None:
    async def work(agent: Any) -> Any:
        with pytest.raises(OSError, match="disk"):
            async with agent.rotate(VOLUMES, formatted=[]) as rotation:
                rotation.added("storage")
                raise OSError("the disk does not open")
        return "raised"

    model = ModelServer(iter(()), two_phase=True)
    assert run_agent(runner, work, model, credentials, identity) == "raised"
    assert model.confirmed is None


@both_loops
def test_a_confirmation_that_is_refused_comes_out(
    runner: Runner, credentials: Credentials, identity: ClientIdentity
) -> None:
    async def work(agent: Any) -> Any:
        with pytest.raises(Refused, match="409"):
            async with agent.rotate(VOLUMES, formatted=[]) as rotation:
                rotation.added("storage")
        return "refused"

    model = ModelServer(iter(["well", "well", "well", 409]), two_phase=True)
    assert run_agent(runner, work, model, credentials, identity) == "refused"


@both_loops
def test_the_other_exchange_than_the_granted_one(
    runner: Runner, credentials: Credentials, identity: ClientIdentity
) -> None:
    async def work(agent: Any) -> Any:
        with pytest.raises(LocalProtocolError, match="rotate"):
            await agent.sync(VOLUMES, formatted=[])
        return "other"

    assert run_agent(runner, work, ModelServer(iter(()), two_phase=True), credentials, identity) == "other"

    async def rotate(agent: Any) -> Any:
        with pytest.raises(LocalProtocolError, match="sync"):
            async with agent.rotate(VOLUMES, formatted=[]):
                pass
        return "other"

    assert run_agent(runner, rotate, ModelServer(iter(())), credentials, identity) == "other"


@both_loops
def test_the_older_read(runner: Runner, credentials: Credentials, identity: ClientIdentity) -> None:
    async def work(agent: Any) -> Any:
        return await agent.cache_passphrase(), await agent.cache_passphrase()

    one, again = run_agent(runner, work, ModelServer(iter(())), credentials, identity)
    assert one == again
    assert one.reveal() == f"{CANARY}-storage".encode()


@pytest.mark.parametrize("loop", LOOPS)
def test_an_own_client_stays_open(loop: str, credentials: Credentials, identity: ClientIdentity) -> None:
    async def main(url: str) -> bool:
        async with httpx.AsyncClient(verify=client_context(identity, credentials.ca_pem), trust_env=False) as client:
            who: dict[str, Any] = {"hotkey": talk.HOTKEY, "vm_name": talk.VM, "identity": identity}
            async with BootAgent(url, **who, quoter=lambda _: b"quote", client=client) as agent:
                _ = await agent.boot()
            return client.is_closed

    with peer(credentials, over_http(ModelServer(iter(()))), client_ca=identity.certificate_pem) as (url, _):
        assert anyio.run(main, url, backend=loop) is False


def test_an_own_client_without_its_identity() -> None:
    with pytest.raises(LocalProtocolError, match="identity"):
        _ = BootAgent(
            "https://localhost",
            hotkey=talk.HOTKEY,
            vm_name=talk.VM,
            quoter=lambda _: b"",
            client=httpx.AsyncClient(),
        )


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def disks(tmp_path: Path) -> dict[str, Path]:
    """A LUKS header on one, nothing on the other."""
    found = {name: tmp_path / name for name in VOLUMES}
    for disk, content in zip(found.values(), (b"LUKS\xba\xbe\0\2", bytes(100)), strict=True):
        _ = disk.write_bytes(content)
    return found


def run_example(name: str, credentials: Credentials, model: ModelServer, *arguments: Any) -> None:
    unlock = example(name).unlock
    with peer(credentials, over_http(model)) as (url, _):
        everything = (url, talk.HOTKEY, talk.VM, lambda _: b"quote", credentials.ca_pem, *arguments)
        _ = anyio.run(unlock, *everything, backend="trio") if name.endswith("trio") else unlock(*everything)


examples = pytest.mark.parametrize("name", ["boot_agent_sync", "boot_agent_trio"])


@examples
def test_the_examples(name: str, credentials: Credentials, disks: dict[str, Path]) -> None:
    opened: list[tuple[str, bytes, bool]] = []

    def open_disk(volume: str, passphrase: bytes, *, is_blank: bool) -> None:
        opened.append((volume, passphrase, is_blank))

    run_example(name, credentials, ModelServer(iter(())), disks, open_disk)
    blank = {"root": False, "storage": False, "tdx-cache": True}
    assert opened == [(volume, f"{CANARY}-{volume}".encode(), is_blank) for volume, is_blank in blank.items()]


@examples
def test_the_examples_do_not_format_what_is_in_use(name: str, credentials: Credentials, disks: dict[str, Path]) -> None:
    opened: list[str] = []

    def open_disk(volume: str, passphrase: bytes, *, is_blank: bool) -> None:
        assert not is_blank
        opened.append(volume)

    with pytest.raises(SystemExit, match="tdx-cache: the disk is blank"):
        run_example(name, credentials, ModelServer(iter(()), in_use=VOLUMES), disks, open_disk)
    assert opened == ["root", "storage"]


@pytest.mark.parametrize("quoter", ["quote-command", None, b"quote"])
def test_a_quoter_that_cannot_be_called_is_refused_at_once(quoter: Any) -> None:
    with pytest.raises(LocalProtocolError, match="cannot be called; say make_quoter"):
        _ = BootAgent("https://localhost", hotkey=talk.HOTKEY, vm_name="vm-1", quoter=quoter)


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_without_arguments_says_how_it_is_used(example: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "CHUTES_CONFIG"}
    ended = subprocess.run([sys.executable, example], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stderr.startswith("usage: ")
