"""The boot agents over real TLS, with the client certificate demanded, against the model server."""

from __future__ import annotations

import os
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from chutes_proto.auth.client_identity import ClientIdentity, make_client_identity
from chutes_proto.boot._retry_policy import RetryPolicy
from chutes_proto.errors import DiskError, LocalProtocolError, Refused
from chutes_proto.io.http.tls import client_context
from chutes_proto.log import Record
from chutes_proto.secret import Secret
from chutes_proto.wire.http import HttpRequest
from chutes_proto_trio import BootAgent
from tests.block_devices import Mappings, attached
from tests.boot import talk
from tests.boot.model import CANARY, K3S_KEY, VOLUMES, ModelServer
from tests.clients import KINDS, make_client, run
from tests.io.peers import Credentials, make_credentials, peer, read_request
from tests.luks.headers import image, make_root
from tests.waiting import async_wait_until

QUICK = RetryPolicy(attempts=5, base=0.01, cap=0.02, deadline=20.0)
BLANK = dict.fromkeys(VOLUMES, False)


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


every_kind = pytest.mark.parametrize("kind", list(KINDS))


def run_agent(
    kind: str,
    work: Callable[[Any], Any],
    model: ModelServer,
    credentials: Credentials,
    identity: ClientIdentity,
    **options: Any,
) -> Any:
    with peer(credentials, over_http(model), client_ca=identity.certificate_pem) as (url, ended):

        async def main() -> Any:
            settings: dict[str, Any] = {
                "hotkey": talk.HOTKEY,
                "vm_name": talk.VM,
                "quoter": lambda report_data: b"quote over " + report_data,
                "ca_pem": credentials.ca_pem,
                "identity": identity,
                "retry": QUICK,
            }
            async with make_client(kind, "BootAgent", url, **settings | options) as agent:
                return await work(agent)

        result = run(kind, main)
    assert ended
    return result


@every_kind
def test_a_boot_with_its_volumes(kind: str, credentials: Credentials, identity: ClientIdentity) -> None:
    async def work(agent: Any) -> Any:
        return await agent.boot(), await agent.sync(BLANK), await agent.sync(BLANK)

    grant, keys, again = run_agent(kind, work, ModelServer(iter(())), credentials, identity)
    assert grant.root_passphrase.reveal() == f"{CANARY}-root".encode()
    assert [(key.volume, key.passphrase.reveal()) for key in keys] == [
        (name, f"{CANARY}-{name}".encode()) for name in VOLUMES
    ]
    assert again == keys


@every_kind
@pytest.mark.parametrize("two_phase", [False, True])
def test_all_disks_are_opened_at_once_or_the_root_disk_first(
    kind: str,
    two_phase: bool,
    credentials: Credentials,
    identity: ClientIdentity,
    tmp_path: Path,
    require_program: Callable[[str], str],
) -> None:
    """By the real cryptsetup, on images; keys are rotated where the server has them rotate."""
    program = require_program("cryptsetup")
    volumes = {name: image(tmp_path / name) for name in VOLUMES}
    root = image(tmp_path / "root")
    make_root(root, Secret(f"{CANARY}-root".encode()))

    async def at_once(agent: Any) -> Any:
        return await agent.unlock(volumes, root=root)

    async def root_first(agent: Any) -> Any:
        early = await agent.unlock({}, root=root)
        assert [volume.name for volume in early.volumes] == ["root"]
        return await agent.unlock(volumes)

    def boot(work: Callable[[Any], Any]) -> list[tuple[str, bool]]:
        records: list[Record] = []
        model = ModelServer(iter(()), two_phase=two_phase)
        options = {"log": records.append, "images": True}
        unlocked = run_agent(kind, work, model, credentials, identity, **options)
        assert model.confirmed == ({name: {"rotated": True} for name in VOLUMES} if two_phase else None)
        assert (unlocked.k3s_encryption_key is not None) is two_phase
        assert [record.event for record in records].count("grant_received") == 1
        assert CANARY not in str(records)
        return [(volume.name, volume.formatted) for volume in unlocked.volumes]

    assert boot(at_once) == [("root", False), *((name, True) for name in VOLUMES)]
    assert boot(root_first) == [(name, False) for name in VOLUMES]
    for name, path in volumes.items():
        key = f"{CANARY}-{name}{'-next' if two_phase else ''}".encode()
        trial = [program, "open", "--test-passphrase", "--key-file=-", path]
        assert subprocess.run(trial, input=key, check=False).returncode == 0


@every_kind
def test_disks_that_cannot_be_opened(kind: str, tmp_path: Path, require_program: Callable[[str], str]) -> None:
    """Nobody is asked for their keys."""
    _ = require_program("cryptsetup")
    who: dict[str, Any] = {"hotkey": talk.HOTKEY, "vm_name": talk.VM, "quoter": lambda _: b"quote"}
    foreign = image(tmp_path / "foreign", b"a file system")
    refused: list[tuple[bool, Any, type[Exception], str]] = [
        (False, {}, LocalProtocolError, "name the root disk, or at least one volume"),
        (False, ["storage"], LocalProtocolError, "as in {'storage': '/dev/vdb'}; got .'storage'.$"),
        (False, {"storage": "disk.img"}, LocalProtocolError, "must be an absolute path"),
        (False, {"storage": Path("/dev/vdb")}, LocalProtocolError, "must be an absolute path as a string"),
        (False, {"storage": str(tmp_path / "missing")}, DiskError, "No such file.*; attach the disk to the VM, or"),
        (False, {"storage": foreign}, DiskError, "not a block device"),
        (True, {"storage": foreign}, DiskError, "neither blank nor LUKS2"),
    ]

    async def work() -> None:
        for images, volumes, error, text in refused:
            async with make_client(kind, "BootAgent", "https://keys.invalid", **who, images=images) as agent:
                with pytest.raises(error, match=text):
                    await agent.unlock(volumes)

    run(kind, work)


NAMES = [f"test-{os.getpid()}-{number}" for number in (1, 2)]


@pytest.fixture
def mappings(
    tmp_path: Path, require_program: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Mappings]:
    """Of a program that makes the file ``begun`` when it has mapped the first disk, and waits for the file ``go``."""
    held = f'case "$8" in *-1) touch {tmp_path}/begun; until [ -e {tmp_path}/go ]; do sleep 0.1; done ;; esac'
    mappings = Mappings(tmp_path, require_program("cryptsetup"), held)
    monkeypatch.setenv("PATH", mappings.path)
    yield mappings
    mappings.close(*NAMES)


@pytest.fixture
def two_disks(tmp_path: Path, require_program: Callable[[str], str]) -> Iterator[dict[str, str]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(attached(image(tmp_path / name), require_program)) for name in NAMES}


@every_kind
def test_a_failed_unlock_closes_what_it_opened_and_can_be_tried_again(
    kind: str,
    credentials: Credentials,
    identity: ClientIdentity,
    tmp_path: Path,
    mappings: Mappings,
    two_disks: dict[str, str],
) -> None:
    (tmp_path / "go").touch()
    records: list[Record] = []

    async def work(agent: Any) -> Any:
        make_root(two_disks[NAMES[1]], Secret(b"of another VM"))
        with pytest.raises(DiskError, match="the current key does not open it"):
            await agent.unlock(two_disks)
        assert mappings.open == []
        assert [record.fields["mapping"] for record in records if record.event == "disk_closed"] == NAMES[:1]
        _ = image(tmp_path / NAMES[1])
        assert [volume.path for volume in (await agent.unlock(two_disks)).volumes] == [
            f"/dev/mapper/{name}" for name in NAMES
        ]
        with pytest.raises(DiskError, match="is it open already"):
            await agent.unlock(two_disks)
        return mappings.open  # of the call that did not fail

    assert run_agent(kind, work, ModelServer(iter(())), credentials, identity, log=records.append) == NAMES


@pytest.mark.parametrize("kind", ["trio", "asyncio"])
def test_a_cancelled_unlock_closes_also_the_disk_that_it_was_opening(
    kind: str,
    credentials: Credentials,
    identity: ClientIdentity,
    tmp_path: Path,
    mappings: Mappings,
    two_disks: dict[str, str],
) -> None:
    async def work(agent: Any) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(agent.unlock, two_disks)
            await async_wait_until((tmp_path / "begun").exists)
            group.cancel_scope.cancel()
            (tmp_path / "go").touch()

    run_agent(kind, work, ModelServer(iter(())), credentials, identity)
    assert (mappings.open, mappings.closed) == ([], NAMES[:1])


@every_kind
def test_an_agent_boots_by_itself_when_it_must(kind: str, credentials: Credentials, identity: ClientIdentity) -> None:
    async def work(agent: Any) -> Any:
        first = await agent.sync(BLANK)
        other = await agent.sync({"storage": True})  # the token is redeemed: a new boot
        return first, other

    records: list[Record] = []
    options = {"log": records.append}
    first, other = run_agent(kind, work, ModelServer(iter(())), credentials, identity, **options)
    assert [key.volume for key in first] == [*VOLUMES]
    assert [key.volume for key in other] == ["storage"]
    assert [r.event for r in records].count("grant_received") == 2
    assert CANARY not in str(records)


@every_kind
def test_bad_moods_are_survived(kind: str, credentials: Credentials, identity: ClientIdentity) -> None:
    async def work(agent: Any) -> Any:
        return await agent.boot(), await agent.sync(BLANK)

    model = ModelServer(iter([503, "well", "garbage", "well", "well", 500, "redirect"]))
    grant, keys = run_agent(kind, work, model, credentials, identity)
    assert grant.boot_token is not None
    assert [key.volume for key in keys] == [*VOLUMES]


@every_kind
def test_a_refusal_ends_it(kind: str, credentials: Credentials, identity: ClientIdentity) -> None:
    async def work(agent: Any) -> Any:
        with pytest.raises(Refused, match="403"):
            await agent.boot()
        return "refused"

    model = ModelServer(iter(["well", 403]))
    assert run_agent(kind, work, model, credentials, identity) == "refused"


@every_kind
def test_a_rotation(kind: str, credentials: Credentials, identity: ClientIdentity) -> None:
    async def work(agent: Any) -> Any:
        async with agent.rotate({"storage": True, "tdx-cache": False}) as rotation:
            for name, pair in rotation.keys.items():
                assert pair.current.reveal() == f"{CANARY}-{name}".encode()
                assert pair.next.reveal() == f"{CANARY}-{name}-next".encode()
            rotation.added("storage")
        return rotation

    model = ModelServer(iter(["well", "well", 503, "well", 503, "garbage"]), in_use=["storage"], two_phase=True)
    records: list[Record] = []
    rotation = run_agent(kind, work, model, credentials, identity, log=records.append)
    assert model.confirmed == {"storage": {"rotated": True}, "tdx-cache": {"rotated": False}}
    assert [name for name, pair in rotation.keys.items() if pair.is_in_use] == ["storage"]
    assert [name for name, pair in rotation.keys.items() if pair.may_format] == ["tdx-cache"]
    assert rotation.k3s_encryption_key.reveal() == K3S_KEY.encode()
    assert CANARY not in str(records)
    assert not [token for token in model.tokens() if token in str(records)]


@every_kind
def test_a_rotation_that_fails_confirms_nothing(kind: str, credentials: Credentials, identity: ClientIdentity) -> None:
    async def work(agent: Any) -> Any:
        with pytest.raises(OSError, match="disk"):
            async with agent.rotate(BLANK) as rotation:
                rotation.added("storage")
                raise OSError("the disk does not open")
        return "raised"

    model = ModelServer(iter(()), two_phase=True)
    assert run_agent(kind, work, model, credentials, identity) == "raised"
    assert model.confirmed is None


@every_kind
def test_a_confirmation_that_is_refused_comes_out(
    kind: str, credentials: Credentials, identity: ClientIdentity
) -> None:
    async def work(agent: Any) -> Any:
        with pytest.raises(Refused, match="409"):
            async with agent.rotate(BLANK) as rotation:
                rotation.added("storage")
        return "refused"

    model = ModelServer(iter(["well", "well", "well", 409]), two_phase=True)
    assert run_agent(kind, work, model, credentials, identity) == "refused"


@every_kind
def test_the_other_exchange_than_the_granted_one(kind: str, credentials: Credentials, identity: ClientIdentity) -> None:
    async def work(agent: Any) -> Any:
        with pytest.raises(LocalProtocolError, match="rotate"):
            await agent.sync(BLANK)
        return "other"

    assert run_agent(kind, work, ModelServer(iter(()), two_phase=True), credentials, identity) == "other"

    async def rotate(agent: Any) -> Any:
        with pytest.raises(LocalProtocolError, match="sync"):
            async with agent.rotate(BLANK):
                pass
        return "other"

    assert run_agent(kind, rotate, ModelServer(iter(())), credentials, identity) == "other"


@every_kind
def test_the_older_read(kind: str, credentials: Credentials, identity: ClientIdentity) -> None:
    async def work(agent: Any) -> Any:
        return await agent.cache_passphrase(), await agent.cache_passphrase()

    one, again = run_agent(kind, work, ModelServer(iter(())), credentials, identity)
    assert one == again
    assert one.reveal() == f"{CANARY}-storage".encode()


@pytest.mark.anyio
async def test_an_own_client_stays_open(credentials: Credentials, identity: ClientIdentity) -> None:
    who: dict[str, Any] = {"hotkey": talk.HOTKEY, "vm_name": talk.VM, "identity": identity}
    with peer(credentials, over_http(ModelServer(iter(()))), client_ca=identity.certificate_pem) as (url, _):
        async with httpx.AsyncClient(verify=client_context(identity, credentials.ca_pem), trust_env=False) as client:
            async with BootAgent(url, **who, quoter=lambda _: b"quote", client=client) as agent:
                _ = await agent.boot()
            assert not client.is_closed


def test_an_own_client_without_its_identity() -> None:
    with pytest.raises(LocalProtocolError, match="identity"):
        _ = BootAgent(
            "https://localhost",
            hotkey=talk.HOTKEY,
            vm_name=talk.VM,
            quoter=lambda _: b"",
            client=httpx.AsyncClient(),
        )


@pytest.mark.parametrize("quoter", ["quote-command", None, b"quote"])
@every_kind
def test_a_quoter_that_cannot_be_called_is_refused_at_once(kind: str, quoter: Any) -> None:
    with pytest.raises(LocalProtocolError, match="cannot be called; say make_quoter"):
        _ = KINDS[kind].BootAgent("https://localhost", hotkey=talk.HOTKEY, vm_name="vm-1", quoter=quoter)


@every_kind
def test_a_gpu_tool_that_cannot_be_called_is_refused_at_once(kind: str) -> None:
    with pytest.raises(LocalProtocolError, match="cannot be called; say make_gpu_tool"):
        _ = KINDS[kind].MinerClient("https://localhost", hotkey=talk.HOTKEY, signer=bytes, gpu_tool="tool {nonce}")
