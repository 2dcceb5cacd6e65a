"""The help of every command: complete, no wider than the terminal, with examples that run."""

from __future__ import annotations

import base64
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import click
import pytest
from attrs import evolve
from cryptography.fernet import Fernet

from chutes_proto.cli.base import Command, Described
from chutes_proto.cli.describe import as_help
from chutes_proto.cli.operator.development import write_server
from chutes_proto.cli.tree import COMMANDS, ROOT, _Bridge, walk
from chutes_proto.io.server.store_setup import make_store_setup
from chutes_proto.keys.vault import FreshKey
from chutes_proto.secret import Secret
from chutes_proto.server import ServerConfig
from chutes_proto.store.rows import GpuRow, Vm
from chutes_proto.testing._platform import SimulatedPlatform
from chutes_proto.testing.store_suite import boot, sync
from chutes_proto.units.operator import ImportKeys
from chutes_proto.units.servers import RegisterServer
from tests.cli.conftest import HOTKEY, Ended

WALK = [(ctx, command) for ctx, command in walk() if not isinstance(command, _Bridge)]
EXAMPLES = [
    pytest.param(example, id=example.removeprefix("chutes-proto "))
    for ctx, command in WALK
    for example in command.examples
]


@pytest.mark.parametrize(("ctx", "command"), WALK, ids=lambda one: getattr(one, "command_path", ""))
def test_a_description_is_complete(ctx: click.Context, command: Described) -> None:
    told = command.describe(ctx)
    assert told.sentence.endswith(".")
    if isinstance(command, Command):
        assert len(told.examples) >= 2
        assert told.exits
    for words in told.related:
        named = ctx.find_root().command
        for word in words.split():
            if isinstance(named, _Bridge):
                break
            assert isinstance(named, click.Group)
            found = named.get_command(ctx, word)
            assert found is not None, words
            named = found
    for width in (78, 100):
        described = as_help(told, width).partition("\nExamples:\n")[0]
        assert not [line for line in described.splitlines() if len(line) > width]


def test_the_top_help_has_the_first_sentence_of_each_command() -> None:
    tops = [(ctx, command) for ctx, command in WALK if ctx.parent and not ctx.parent.parent]
    said = {command.name: command.describe(ctx).sentence for ctx, command in tops}
    assert said == {name: f"{COMMANDS[str(name)][1]}." for name in said}


# --- examples ---

NOT_RUN = ("postgresql://", "postgres.toml", "serve --dev", "serve --config server.toml")
"""They need a database, or run until a signal: their options are parsed."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that examples name, and a store with VMs and servers that they name."""
    folder = tmp_path_factory.mktemp("prepared")
    platform, now = SimulatedPlatform(bytes(32)), int(time.time())
    write_server(folder, platform, now)
    key = Fernet.generate_key()
    _ = (folder / "fernet.key").write_bytes(key)
    (folder / "fernet.key").chmod(0o600)
    tokens = {"storage": Fernet(key).encrypt(b"passphrase").decode()}
    quote = base64.b64encode(platform.quote(bytes(64))).decode()
    row = {"miner_hotkey": HOTKEY, "vm_name": "vm-7", "volume_passphrases": tokens, "boot_quote": quote}
    _ = (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    setup = make_store_setup(ServerConfig.load(folder / "server.toml"))
    with closing(setup.store.open(migrate=True)) as store:
        for label, rekey in (("1", ()), ("2", ("storage",)), ("3", ())):
            granted = evolve(boot(label, now=now, vm=Vm(HOTKEY, "vm-1")), vault=setup.vault)
            _ = store.transact(granted)
            _ = store.transact(evolve(sync(granted, "body", "storage", rekey=rekey), vault=setup.vault))
        imported = {"storage": FreshKey.of_passphrase(Secret(b"passphrase"), bytes(FreshKey.SIZE))}
        _ = store.transact(ImportKeys(now, Vm(HOTKEY, "vm-imported"), imported, None, setup.vault, "prepared"))
        for name in ("n1", "n2"):
            _ = store.transact(registration(name, now))
    return folder


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


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_runs(
    example: str, command: Callable[..., Ended], prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if any(words in example for words in NOT_RUN) and "--check" not in example:
        parse(shlex.split(example)[1:])
        return
    folder = tmp_path / "here"
    _ = shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
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
    ended = command(*shlex.split(example)[1:])
    assert ended.code == 0, ended.out + ended.err


def parse(words: list[str]) -> None:
    """Read a command line as click does, and do nothing."""
    here: click.Command = ROOT
    ctx = click.Context(here, info_name="chutes-proto")
    while isinstance(here, click.Group):
        found = here.get_command(ctx, words[0])
        assert found is not None
        here = found
        ctx = here.make_context(words[0], words[1:], ctx) if isinstance(here, Command) else click.Context(here, ctx)
        words = words[1:]
