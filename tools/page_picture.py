"""Pictures of the admin listener's page for the documentation: ``python -m tools.page_picture DIRECTORY [CHROMIUM]``.

Fills a store with a fleet that is made up, serves it, and takes ``page-light.png`` and ``page-dark.png`` of the page in
a headless Chromium.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Final

from attrs import evolve

from chutes_proto.io.server.development import CONFIGURATION, write_server
from chutes_proto.io.stores.sqlite import SqliteStore
from chutes_proto.server._why import Difference, Finding
from chutes_proto.store._rows import NoteWhatIf, Vm, WhatIf
from chutes_proto.store._run import Ask
from chutes_proto.testing._platform import SimulatedPlatform
from chutes_proto.testing.store_suite._parts import VM, boot, platform
from chutes_proto.units.boot import RecordRefusal
from chutes_proto.wire.codes import Code
from tools.browser import browser

GROUPS: Final = (
    ("8xh200", "1.4.0", "UpToDate", 131),
    ("8xh200", "1.3.2", "UpToDate", 38),
    ("8xb200", "1.4.0", "UpToDate", 24),
    ("8xh200", "1.4.0", "SWHardeningNeeded", 9),
)
MISMATCH: Final = Finding(
    step=22,
    code="measurement_mismatch",
    rule="the measurements are those of an accepted profile",
    stage="boot",
    profile="8xh200 1.4.0",
    differences=(Difference("RTMR2", "3f0a91c2" * 12, "77b1e04d" * 12),),
)
DENIALS: Final = (
    (Code.MEASUREMENT_MISMATCH, "RTMR2 differs", MISMATCH.to_json()),
    (Code.TCB_REJECTED, "TCB status OutOfDate, advisory INTEL-SA-01079; accepted: UpToDate", None),
    (Code.PLATFORM_MISMATCH, "a proven claim binds it to another platform", None),
)
DAY: Final = 86_400


def tried(now: int) -> WhatIf:
    """The summary of a `policy try` that would refuse two VMs."""
    counts = {"judged": 202, "refused": 2, "warned": 9, "not_judged": 0, "refused_later": 4}
    reason = "TCB status OutOfDate, advisory INTEL-SA-01079; accepted: UpToDate, SWHardeningNeeded"
    first = [
        {"vm": f"gpu-{n}", "hotkey": VM.hotkey, "code": str(Code.TCB_REJECTED), "reason": reason} for n in (112, 140)
    ]
    changes = [{"at": now + 30 * DAY, "refused": 2}, {"at": now + 90 * DAY, "refused": 6}]
    found = {
        "policy": "policy.toml, early TCB info",
        "at": now + 30 * DAY,
        **counts,
        "changes": changes,
        "first": first,
    }
    return WhatIf(now - 7300, json.dumps(found))


def fill(path: Path, now: int) -> None:
    """A fleet, its boots of a day, and some denials."""
    chance = random.Random(24)  # noqa: S311 - a picture
    vms = [(name, version, status) for name, version, status, count in GROUPS for _ in range(count)]
    boots = [
        (now - int(DAY * chance.random() ** 1.5), number)
        for number in range(len(vms))
        for _ in range(chance.choice((1, 1, 2)))
    ]
    with closing(SqliteStore(path)) as store:
        store.transact(Ask(NoteWhatIf(tried(now))))
        for at, number in sorted(boots):
            name, version, status = vms[number]
            unit = boot(f"{number} {at}", now=at, vm=Vm(VM.hotkey, f"gpu-{number:03}"))
            unit = evolve(unit, profile_name=name, profile_version=version, tcb_status=status)
            _ = store.transact(evolve(unit, platform=platform(str(number)), root=None))
        for number in range(7):
            code, reason, finding = DENIALS[number % 3]
            _ = store.transact(
                RecordRefusal(
                    now=now - 1700 * (7 - number),
                    request_id=f"{number:032x}",
                    vm=Vm(VM.hotkey, f"gpu-{17 * number:03}"),
                    platform=platform(f"denied {number}"),
                    code=code,
                    reason=reason,
                    quote_digest=bytes([number]) * 32,
                    peer_address=f"192.0.2.{number + 1}",
                    finding=finding,
                )
            )


def main(directory: Path, program: str = "chromium") -> int:
    now = int(time.time())
    with tempfile.TemporaryDirectory(prefix="chutes-proto-") as name:
        place = Path(name)
        write_server(place, SimulatedPlatform(os.urandom(32)), now)
        with (place / CONFIGURATION).open("a") as file:
            _ = file.write('\n[admin]\nlisten = "127.0.0.1:0"\n')
        fill(place / "keys.db", now)
        command = [sys.executable, "-m", "chutes_proto", "serve", "--config", str(place / CONFIGURATION)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
            assert server.stderr is not None
            log = next(line for line in server.stderr if '"serving"' in line)
            (url,) = re.findall(r'"admin":\["(http://[0-9.:]+)"\]', log)
            try:
                take(url, directory, program)
            finally:
                server.send_signal(signal.SIGTERM)
    return 0


def take(url: str, directory: Path, program: str) -> None:
    """Take both pictures, once the page shows the fleet."""
    directory.mkdir(parents=True, exist_ok=True)
    with browser(program) as page:
        page.open(f"{url}/")
        _ = page.wait("document.querySelector('#groups')?.children.length")
        _ = page.evaluate("document.querySelector('#denied details').open = true")
        for theme in ("light", "dark"):
            page.show(dark=theme == "dark", width=1100)
            path = directory / f"page-{theme}.png"
            _ = path.write_bytes(page.picture())
            print(path)


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
