"""The help of every command: complete, no wider than the terminal, with examples that run."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import click
import pytest
from attrs import evolve
from cryptography.fernet import Fernet

from chutes_proto.cli import console
from chutes_proto.cli.agent import make_parser
from chutes_proto.cli.base import Command
from chutes_proto.cli.describe import Description
from chutes_proto.cli.main import main
from chutes_proto.cli.tree import COMMANDS, ROOT
from chutes_proto.io.server.development import write_server
from chutes_proto.io.server.store_setup import make_store_setup
from chutes_proto.keys.vault import FreshKey
from chutes_proto.secret import Secret
from chutes_proto.server import ServerConfig
from chutes_proto.store._rows import GpuRow, HostProfileRow, Platform, Revocable, Vm
from chutes_proto.testing._platform import SimulatedPlatform
from chutes_proto.testing.store_suite._parts import boot, sync
from chutes_proto.units.boot import RecordRefusal
from chutes_proto.units.fleet import RegisterHost
from chutes_proto.units.operator import ImportKeys
from chutes_proto.units.revocations import Revoke
from chutes_proto.units.servers import RegisterServer
from tests.cli import examples
from tests.cli.conftest import HOTKEY, Ended, Server
from tools.man_pages import name_of, page

ALL = ROOT.descriptions(click.Context(ROOT, info_name="chutes-proto"))


def takes_json(told: Description) -> bool:
    return any(option.startswith("--json") for option, _ in told.options)


def with_json(told: Description) -> list[str]:
    """The first example with ``--json``, where no example has it, so that all forms of JSON are seen."""
    is_seen = any("--json" in example for example in told.examples)
    return [f"{told.examples[0]} --json"] if takes_json(told) and not is_seen else []


EXAMPLES = [
    pytest.param(example, id=example.removeprefix("chutes-proto "))
    for told in ALL
    for example in (*told.examples, *with_json(told))
]


def test_the_top_help_has_the_first_sentence_of_each_command() -> None:
    said = {told.words: told.sentence for told in ALL if told.words in COMMANDS}
    assert said == {name: f"{sentence}." for name, (_, sentence) in COMMANDS.items()}


def test_manual_pages_have_every_command_and_no_fault(tmp_path: Path, require_program: Callable[[str], str]) -> None:
    files = [tmp_path / f"{name_of(told.words)}.1" for told in ALL]
    for file, told in zip(files, ALL, strict=True):
        _ = file.write_text(page(told), "ascii")
    groff = require_program("groff")
    done = subprocess.run([groff, "-man", "-Tutf8", "-ww", *files], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    for told in ALL:
        assert told.sentence.rstrip(".") in " ".join(done.stdout.replace("\u2019", "'").split()), told.words


# --- JSON ---

_README = (Path(console.__file__).parent / "README.md").read_text("utf-8").partition("\n## JSON\n")[2]
JSON = {
    words: (frozenset(re.findall(r"`([a-z0-9_]+)`", members)), frozenset(re.findall(r"`([a-z0-9_]+)\??`", members)))
    for words, members in re.findall(r"^\| `([a-z -]+)` \| (.*) \|$", _README.partition("\nObjects")[0], re.MULTILINE)
}
"""By command: the members that its JSON always has, and those that it may have."""
_OF_A_QUOTE = frozenset({"verify", "inspect"})


def test_the_json_of_every_command_is_documented() -> None:
    assert {*JSON} == {told.words for told in ALL if takes_json(told)}


def check_json(words: list[str], printed: str) -> None:
    """The output of a command line has the members that the README says."""
    name = next(name for size in (2, 1) if (name := " ".join(words[:size])) in JSON)
    if name.startswith("agent"):
        return
    always, sometimes = JSON[name]
    members = {*json.loads(printed)}
    assert always <= members
    assert members <= always | sometimes or name in _OF_A_QUOTE


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("re", {"reload", "register", "registrations", "replay", "revocations"}),
        ("vm re", {"rebind", "revoke"}),
        ("agent ", {"run", "resume"}),
        ("keys purge --y", {"--yes"}),
        ("agent run --d", {"--dry-run"}),
        ("agent resume --", {"--help", "--config", "--images", "--json"}),
        ("agent run --config a", {"file,a"}),
        ("verify quo", {"file,quo"}),
        ("verify quote.bin --policy ", {"file,"}),
        ("gpu verify evidence.json --rim r", {"file,r"}),
        ("serve --config ", {"file,"}),
        ("simulate --out ", {"dir,"}),
    ],
)
def test_commands_and_options_are_completed(
    command: Callable[..., Ended], words: str, found: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_CHUTES_PROTO_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", f"chutes-proto {words}")
    monkeypatch.setenv("COMP_CWORD", str(len(words.split(" "))))
    assert {line.removeprefix("plain,") for line in command().out.splitlines()} == found


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("verfy", "no such command 'verfy'. Did you mean 'verify'? See chutes-proto --help"),
        ("audit list --lst", "no such option '--lst'. Did you mean '--last'? See chutes-proto audit list --help"),
        (
            "audit list --event-id",
            "no such option '--event-id'. Did you mean '--event' or '--request-id'? See chutes-proto audit list --help",
        ),
        ("zzz", "no such command 'zzz'; see chutes-proto --help"),
        ("agent", "the following arguments are required: ACTION; see chutes-proto agent --help"),
        ("agent run", "the following arguments are required: --config; see chutes-proto agent run --help"),
    ],
)
def test_a_wrong_word_is_told_in_one_line(command: Callable[..., Ended], words: str, told: str) -> None:
    ended = command(*words.split())
    assert (ended.code, ended.err) == (2, f"chutes-proto: {told}\n")


# --- examples ---

NOT_RUN = (
    *("postgresql://", "postgres.toml", "serve --dev", "serve --config server.toml"),
    *("https://pccs.example", "https://api.trustedservices.intel.com", "collateral serve", "import https://"),
    *("agent run", "agent resume", "gpu fetch", "reload --config"),
)
"""They need a database, a network or a VM's disks, or run until a signal: their options are parsed."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that examples name, and a store with VMs and servers that they name."""
    folder = tmp_path_factory.mktemp("prepared")
    platform, now = SimulatedPlatform(bytes(32)), int(time.time())
    write_server(folder, platform, now)
    examples.write_files(folder, platform, now)
    key = Fernet.generate_key()
    _ = (folder / "fernet.key").write_bytes(key)
    (folder / "fernet.key").chmod(0o600)
    tokens = {"storage": Fernet(key).encrypt(b"passphrase").decode()}
    quote = base64.b64encode(platform.quote(bytes(64))).decode()
    row = {"miner_hotkey": HOTKEY, "vm_name": "vm-7", "volume_passphrases": tokens, "boot_quote": quote}
    _ = (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    setup = make_store_setup(ServerConfig.load(folder / "server.toml"))
    with closing(setup.store.open(make=True)) as store:
        for label, rekey in (("1", ()), ("2", ("storage",)), ("3", ())):
            granted = evolve(boot(label, now=now, vm=Vm(HOTKEY, "vm-1")), vault=setup.vault)
            _ = store.transact(granted)
            _ = store.transact(evolve(sync(granted, "body", "storage", rekey=rekey), vault=setup.vault))
        imported = {"storage": FreshKey.of_passphrase(Secret(b"passphrase"), bytes(FreshKey.SIZE))}
        _ = store.transact(ImportKeys(now, Vm(HOTKEY, "vm-imported"), imported, None, setup.vault, "prepared"))
        _ = store.transact(refused("9" * 32, now))
        revoked: tuple[tuple[Revocable, str], ...] = (
            ("vm", f"{HOTKEY}/vm-2"),
            ("hotkey", OTHER),
            ("platform", "ppid:ffeeddccbbaa99887766554433221100"),
        )
        for number, (kind, subject) in enumerate(revoked, 1):
            store.transact(Revoke(now, number, kind, subject, None, "prepared"))
        for name in ("n1", "n2"):
            _ = store.transact(registration(name, now))
        _ = store.transact(RegisterHost(HostProfileRow("3f9a".ljust(64, "0"), HOTKEY, '{"cpu":{"count":64}}', now)))
    _ = shutil.copy(folder / "keys.db", folder / "newer.db")
    new = (folder / "server.toml").read_text().replace("keys.db", "new.db")
    _ = (folder / "new.toml").write_text(new)
    assert main(["audit", "export", str(folder / "log"), "--config", str(folder / "server.toml")]) == 0
    return folder


OTHER = "5FHneW46xGXgs5mUiveU4sbTyGBzmstUspZC92UhjJM694ty"


def refused(request_id: str, now: int) -> RecordRefusal:
    return RecordRefusal(
        now=now,
        request_id=request_id,
        vm=Vm(HOTKEY, "vm-1"),
        platform=Platform(None, bytes(16)),
        code="tcb_rejected",
        reason="the platform's TCB status is OutOfDate",
        quote_digest=bytes(32),
        peer_address="192.0.2.1",
    )


def registration(name: str, now: int) -> RegisterServer:
    return RegisterServer(
        now=now,
        request_id=name,
        hotkey=HOTKEY,
        server_id=name,
        name=name,
        host=f"198.51.100.{name[1:]}",
        address=f"198.51.100.{name[1:]}",
        gpus=(GpuRow(f"gpu-{name}", name, "h200", "{}"),),
        profiles={},
        peer_address="192.0.2.1",
    )


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    state = tmp_path_factory.mktemp("state")
    with examples.served(state) as server:
        yield server, state


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_runs(
    example: str,
    command: Callable[..., Ended],
    prepared: Path,
    require_program: Callable[[str], str],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    example = example.replace("\\\n", "")
    opens_disks = "agent run --config agent.toml --images" in example
    runs = "--check" in example or opens_disks
    if any(words in example for words in NOT_RUN) and not runs:
        parse(shlex.split(example, comments=True)[1:])
        return
    folder = tmp_path / "here"
    _ = shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    if " agent " in example:
        server, state = request.getfixturevalue("live")
        examples.write_agent(folder, server)
        monkeypatch.setenv("XDG_STATE_HOME", str(state))
        monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if opens_disks:
        _ = require_program("cryptsetup")
    if examples.URL in example:
        server, state = request.getfixturevalue("live")
        ended = examples.run_against(server, state, example, command, monkeypatch)
        assert ended.code == 0, ended.out + ended.err
        if "--json" in example:
            check_json(shlex.split(example)[1:], ended.out)
        return
    if set(example) & set("|>$;"):
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", example],
            capture_output=True,
            text=True,
            env=environment,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return
    words = shlex.split(example)[1:]
    ended = command(*words)
    assert ended.code == 0, ended.out + ended.err
    if "--json" in words:
        check_json(words, ended.out)


def parse(words: list[str]) -> None:
    """Read a command line as click does, and do nothing."""
    if words[0] == "agent":
        _ = make_parser().parse_args(words[1:])
        return
    here: click.Command = ROOT
    ctx = click.Context(here, info_name="chutes-proto")
    while isinstance(here, click.Group):
        found = here.get_command(ctx, words[0])
        assert found is not None
        here = found
        ctx = here.make_context(words[0], words[1:], ctx) if isinstance(here, Command) else click.Context(here, ctx)
        words = words[1:]
