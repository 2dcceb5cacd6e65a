"""The examples against a served development server, over TLS; they and the pages import public names only."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, TypeVar

import pytest
from attrs import evolve

from chutes_proto.boot import RetryPolicy
from chutes_proto.errors import DiskError, TransportError
from chutes_proto.io.yaml_file import read_yaml
from chutes_proto.miner import HotkeyPair
from chutes_proto.secret import Secret
from chutes_proto.sync import BootAgent
from chutes_proto.testing._directory import PLATFORM_FILE, PlatformRecord
from chutes_proto.testing.store_suite import CASES, Case
from tests.clients import run
from tests.conftest import ROOT
from tests.dev_server import DevServer, dev_server
from tests.luks.headers import image, make_root
from tests.server.world import GPU
from tests.store.harness import together
from tests.test_public import PUBLIC
from tools.docs import pages

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
HOTKEY = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"
PROGRAMS = [example for example in EXAMPLES if "sys.argv" in example.read_text("utf-8")]

each_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevServer]:
    with dev_server(tmp_path_factory.mktemp("platform")) as server:
        yield server


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["sync", "trio", "asyncio"])
def test_a_boot_agent_opens_disks_and_formats_only_blank_ones(
    kind: str,
    server: DevServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    require_program: Callable[[str], str],
) -> None:
    _ = require_program("cryptsetup")
    root, storage, cache = (image(tmp_path / name) for name in ("root", "storage", "tdx-cache"))
    example = load(f"boot_agent_{kind}")
    example.BootAgent = partial(example.BootAgent, images=True)
    quoter = example.make_quoter(f"simulated:{server.platform}")
    ca_pem = server.ca.read_bytes()
    with BootAgent(server.url, hotkey=HOTKEY, vm_name=f"vm-{kind}", quoter=quoter, ca_pem=ca_pem) as agent:
        make_root(root, agent.boot().root_passphrase)

    def boot() -> list[str]:
        async def unlock() -> None:
            disks = {"storage": storage, "tdx-cache": cache}
            done = example.unlock(server.url, HOTKEY, f"vm-{kind}", quoter, ca_pem, root, disks)
            if inspect.isawaitable(done):
                await done

        run(kind, unlock)
        return [line.partition(" is ")[2] for line in capsys.readouterr().out.splitlines()]

    opened = ["/dev/mapper/root", "/dev/mapper/storage", "/dev/mapper/tdx-cache"]
    assert boot() == [opened[0], *(f"{path}, without a file system" for path in opened[1:])]
    assert boot() == opened
    _ = image(Path(cache))
    with pytest.raises(DiskError, match="the disk of tdx-cache is blank, but the server knows it to hold data"):
        _ = boot()


def test_a_driver_of_ones_own_boots(server: DevServer, capsys: pytest.CaptureFixture[str]) -> None:
    example = load("own_driver")
    quoter = example.make_quoter(f"simulated:{server.platform}")
    grant, keys = example.boot(server.url, HOTKEY, "vm-driver", quoter, server.ca.read_bytes(), {"storage": False})
    assert [(key.volume, len(key.passphrase), key.may_format) for key in keys] == [("storage", 128, True)]
    assert len(grant.root_passphrase) == 128
    with socket.create_server(("127.0.0.1", 0)) as port:
        nobody = f"https://127.0.0.1:{port.getsockname()[1]}"
    retry = RetryPolicy(attempts=2, base=0.01)
    example.BootSettings = partial(example.BootSettings, retry=retry)
    with pytest.raises(TransportError, match="no connection"):
        example.boot(nobody, HOTKEY, "vm-driver", quoter, server.ca.read_bytes(), {"storage": False})
    assert "boot_delayed" in capsys.readouterr().err


def test_a_miner_registers_and_attests_a_server(server: DevServer, capsys: pytest.CaptureFixture[str]) -> None:
    example = load("miner_client")
    pair = HotkeyPair.from_secret(Secret(bytes(range(32))))
    quoter = example.make_quoter(f"simulated:{server.platform}", stage="runtime")
    for _again in range(2):
        example.attest(server.url, pair, quoter, server.ca.read_bytes(), "node-1", "1.2.3.4", [GPU])
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith("node-1 at 1.2.3.4, registered ")
        assert line.endswith(": fresh")


def test_an_httpx_client_of_ones_own_lists_the_servers(server: DevServer) -> None:
    pair = HotkeyPair.from_secret(Secret(bytes(range(1, 33))))
    quoter = load("miner_client").make_quoter(f"simulated:{server.platform}", stage="runtime")
    assert load("hotkey_auth").servers(server.url, pair, server.ca) == []
    load("miner_client").attest(
        server.url, pair, quoter, server.ca.read_bytes(), "node-2", "1.2.3.5", [evolve(GPU, uuid="GPU-2")]
    )
    (listed,) = load("hotkey_auth").servers(server.url, pair, server.ca)
    assert listed["server_id"] == "node-2"


def test_a_quoter_of_ones_own_asks_its_service(server: DevServer) -> None:
    platform = PlatformRecord.decode((server.platform / PLATFORM_FILE).read_bytes()).platform
    refused = True

    class Service(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            nonlocal refused
            report_data = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(503 if refused else 200)
            self.end_headers()
            _ = self.wfile.write(b"" if refused else platform.quote(report_data))
            refused = False  # the agent asks again

        def log_request(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Service) as service:
        threading.Thread(target=service.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{service.server_address[1]}/quote"
        grant = load("own_quoter").boot(address, server.url, HOTKEY, "vm-quoter", server.ca.read_bytes())
        service.shutdown()
    assert len(grant.root_passphrase) == 128


T = TypeVar("T")


class OwnStoreHarness:
    def __init__(self) -> None:
        self.store: Any = load("own_store").OwnStore()

    def open(self) -> Any:
        return self.store

    def together(self, calls: Sequence[Callable[[], T]]) -> list[T | Exception]:
        return together(calls)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_store_of_ones_own_keeps_the_contract(case: Case) -> None:
    harness = OwnStoreHarness()
    with closing(harness.store):
        case(harness)


def private_imports(source: str) -> list[str]:
    """The imports of a program that are not public names of ours."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [one.name for one in node.names if "chutes_proto" in one.name and one.name not in PUBLIC]
        elif isinstance(node, ast.ImportFrom) and (module := node.module or "").startswith("chutes_proto"):
            is_public = module in PUBLIC
            exported = getattr(importlib.import_module(module), "__all__", None) if is_public else ()
            for name in (f"{module}.{one.name}" for one in node.names):
                is_exported = exported is None or name.removeprefix(f"{module}.") in exported
                if not is_exported and name not in PUBLIC:
                    found.append(name)
    return found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import chutes_proto.io.files", ["chutes_proto.io.files"]),
        ("def f():\n  from chutes_proto.io import files", ["chutes_proto.io.files"]),
        ("from chutes_proto.quote import verify, _verify", ["chutes_proto.quote._verify"]),
        ("from chutes_proto.quote._verify import verify", ["chutes_proto.quote._verify.verify"]),
        ("from chutes_proto.store import StoreOp, run_script", []),
        ("import chutes_proto_trio\nfrom chutes_proto.store._rows import VmRow", ["chutes_proto.store._rows.VmRow"]),
    ],
)
def test_private_imports_are_found(source: str, found: list[str]) -> None:
    assert private_imports(source) == found


@each_example
def test_an_example_imports_public_names_only(example: Path) -> None:
    assert private_imports(example.read_text("utf-8")) == []


PAGES = [ROOT / "README.md", *sorted(pages.DOCS.rglob("*.md"))]
PROGRAMS_OF_PAGES = [(page, f.text) for page in PAGES for f in pages.fences(page) if f.language == "python"]


def test_pages_have_programs() -> None:
    assert {"README.md", "boot-agent.md", "embed.md", "verifier.md"} <= {page.name for page, _ in PROGRAMS_OF_PAGES}


@pytest.mark.parametrize(("page", "program"), PROGRAMS_OF_PAGES, ids=[page.stem for page, _ in PROGRAMS_OF_PAGES])
def test_a_program_of_a_page_imports_public_names_only(page: Path, program: str) -> None:
    assert private_imports(program) == [], page


@pytest.mark.parametrize("example", PROGRAMS, ids=lambda path: path.stem)
def test_an_example_without_arguments_says_how_it_is_used(example: Path) -> None:
    ended = subprocess.run([sys.executable, example], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stderr.startswith("usage: ")


def test_haproxy_accepts_its_configuration(require_program: Callable[[str], str]) -> None:
    """What it does in front of a cluster is shown in ``tests/cluster``, for minutes."""
    command = [require_program("haproxy"), "-c", "-f", str(ROOT / "examples" / "patroni" / "haproxy.cfg")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


CONTAINER = ROOT / "examples" / "container"


def test_no_layer_of_the_image_has_the_keys_beside_the_checkout() -> None:
    """The files of compose.yaml are made in the checkout: a KEK among them."""
    lines = re.findall(r"^COPY (?!--from)(.+) \S+$", (CONTAINER / "Containerfile").read_text(), re.MULTILINE)
    copied = [ROOT / word for line in lines for word in line.split()]
    assert ROOT / "src" in copied
    assert not [path for path in copied if path == CONTAINER or path in CONTAINER.parents]


def test_compose_starts_a_service_after_the_one_whose_network_it_uses() -> None:
    """podman-compose takes only depends_on for an order."""
    services: Any = read_yaml((CONTAINER / "compose.yaml").read_bytes())
    shared = [each for each in services["services"].values() if "network_mode" in each]
    assert shared
    assert all(each["network_mode"].removeprefix("service:") in each.get("depends_on", ()) for each in shared)
