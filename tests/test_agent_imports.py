"""Imports of the boot agent in a whole boot, by the installed command, with real `cryptsetup`."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.dev_server import dev_server

HOTKEY = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"
UNWANTED = frozenset(
    "OpenSSL anyio asyncio bz2 concurrent http httpcore httpx hypothesis logging lzma msgspec multiprocessing "
    "psycopg schemathesis shutil sqlite3 sr25519 trio uuid chutes_proto_asyncio chutes_proto_trio".split()
)
"""Packages: each costs more than the agent's part in a boot, or an initramfs does not have it."""
UNWANTED_ROOMS = frozenset(
    f"chutes_proto.{room}"
    for room in "io.http.httpx_messages io.stores collateral quote._verify server store testing transport.h1 units "
    "wire.endpoints wire.miners wire.public".split()
)


def test_a_boot_imports_no_more_than_it_needs(tmp_path: Path, require_program: Callable[[str], str]) -> None:
    _ = require_program("cryptsetup")
    chutes_proto = Path(sys.executable).with_name("chutes-proto")
    with dev_server(tmp_path / "platform") as server, (tmp_path / "disk.img").open("wb") as disk:
        _ = disk.truncate(32 * 1024 * 1024)
        simulate = [chutes_proto, "simulate", "--platform", server.platform, "--out", tmp_path / "quote"]
        quoter = tmp_path / "quoter"
        make = f'{shlex.join(map(str, simulate))} --report-data "$(cat)" >&2'
        _ = quoter.write_text(f"#!/bin/sh\n{make} && cat {tmp_path}/quote/quote.bin\n")
        quoter.chmod(0o755)
        said = {"ca_file": str(server.ca), "quoter": f"command:{quoter}", "hotkey": HOTKEY, "vm_name": "vm-1"}
        lines = [f"servers = [{json.dumps(server.url)}]", *(f"{key} = {json.dumps(it)}" for key, it in said.items())]
        settings = tmp_path / "agent.toml"
        _ = settings.write_text("\n".join([*lines, "[volumes.storage]", f'device = "{disk.name}"', ""]))
        done = subprocess.run(
            [sys.executable, "-X", "importtime", chutes_proto, "agent", "run", "--images", "--config", settings],
            capture_output=True,
            text=True,
            env={"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"},
            check=False,
        )
    assert done.returncode == 0, done.stderr
    imported = set(re.findall(r"^import time: .*\| +(\S+)$", done.stderr, re.MULTILINE))
    assert {"ssl", "h11._connection", "chutes_proto.boot._flows", "chutes_proto.wire.codec"} <= imported
    assert {name for name in imported if name.partition(".")[0] in UNWANTED} == set()
    assert "cryptography.x509" not in imported
    rooms = {".".join(name.split(".")[:size]) for name in imported for size in (2, 3)}
    assert rooms & UNWANTED_ROOMS == set()
