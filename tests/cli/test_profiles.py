"""``chutes-proto profiles``: the schedule and its VMs; an import's changes, its question, its file."""

from __future__ import annotations

import os
import pty
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from attrs import evolve

from chutes_proto.io.server.development import write_server
from chutes_proto.io.server.store_setup import make_store_setup
from chutes_proto.quote import parse_profiles_json
from chutes_proto.server import ServerConfig
from chutes_proto.store._rows import Vm
from chutes_proto.testing._platform import PROFILE, SimulatedPlatform
from chutes_proto.testing.store_suite._parts import boot
from tests.cli.conftest import HOTKEY, PROGRAM, Ended
from tests.dev_server import dev_server
from tests.quote.test_published import AMD, BY_PLATFORM, FLAT, NO_TDX, RTMR1, image, published

Command = Callable[..., Ended]


@pytest.fixture
def into(tmp_path: Path) -> Path:
    return tmp_path / "measurements.json"


def test_what_would_change_is_shown_first(command: Command, tmp_path: Path, into: Path) -> None:
    """Without a terminal nobody can be asked, so that a script says --yes."""
    source = tmp_path / "published.json"
    _ = source.write_bytes(published(upper=True))
    asked = command("profiles", "import", str(source), "--into", str(into))
    assert asked.code == 1
    assert "added" in asked.out
    assert "--yes" in asked.err
    as_json = command("profiles", "import", str(source), "--into", str(into), "--json")
    assert (as_json.code, as_json.json["imported"], "--yes" in as_json.err) == (1, False, True)
    assert not into.exists()
    done = command("profiles", "import", str(source), "--into", str(into), "--yes")
    assert (done.code, into.read_bytes()) == (0, source.read_bytes())
    again = command("profiles", "import", str(source), "--into", str(into))
    assert (again.code, again.out) == (0, f"{into} has these values already\n")


def test_a_published_list_does_not_replace_a_file_with_options(command: Command, tmp_path: Path) -> None:
    source, into = tmp_path / "published.json", tmp_path / "measurements.toml"
    _ = source.write_bytes(published(upper=True))
    text = f"# ours\n{PROFILE.to_toml()}"
    _ = into.write_text(text)
    for _ in range(2):
        ended = command("profiles", "import", str(source), "--into", str(into), "--yes")
        assert (ended.code, "name a file of their own" in ended.err) == (2, True), ended
        assert not into.exists() or into.read_text() == text
        into.unlink(missing_ok=True)


@pytest.mark.parametrize(("said", "code"), [(b"n\n", 1), (b"y\n", 0)])
def test_an_operator_at_a_terminal_is_asked(tmp_path: Path, into: Path, said: bytes, code: int) -> None:
    source = tmp_path / "published.json"
    _ = source.write_bytes(published(upper=True))
    ours, theirs = pty.openpty()
    words = [*PROGRAM, "profiles", "import", str(source), "--into", str(into)]
    _ = os.write(ours, said)
    done = subprocess.run(words, stdin=theirs, capture_output=True, text=True, check=False, timeout=60)
    for end in (ours, theirs):
        os.close(end)
    assert "added" in done.stdout
    assert f"Write them into {into}?" in done.stderr
    assert (done.returncode, into.exists()) == (code, code == 0)


def test_an_image_for_amd_alone_does_not_keep_the_others_out(command: Command, tmp_path: Path, into: Path) -> None:
    source = tmp_path / "published.yaml"
    _ = source.write_text(BY_PLATFORM + image(tdx=NO_TDX, snp=AMD))
    done = command("profiles", "import", str(source), "--into", str(into), "--yes")
    assert (done.code, into.read_bytes()) == (0, source.read_bytes()), done
    assert done.out.count("added") == 3
    assert "not served: 8xpro6000 1.12: SEV-SNP" in done.out


def test_a_file_for_amd_alone_is_not_imported(command: Command, tmp_path: Path, into: Path) -> None:
    """It would take all profiles of the server away, and leave it none."""
    source = tmp_path / "published.yaml"
    _ = source.write_text("measurements:\n" + image(tdx=NO_TDX, snp=AMD))
    for before in (None, FLAT):
        if before is not None:
            _ = into.write_text(before)
        done = command("profiles", "import", str(source), "--into", str(into), "--yes")
        assert done.code == 1
        assert done.out.splitlines() == [
            "not served: 8xpro6000 1.12: SEV-SNP",
            f"nothing was imported: no image of {source} is for Intel TDX",
        ]
        as_json = command("profiles", "import", str(source), "--into", str(into), "--yes", "--json")
        assert (as_json.code, as_json.json) == (
            1,
            {"ok": False, "imported": False, "changes": [], "not_served": ["8xpro6000 1.12: SEV-SNP"]},
        )
        assert (into.read_text() if into.exists() else None) == before


def test_registers_that_anybodys_image_matches_are_shown(command: Command, tmp_path: Path, into: Path) -> None:
    """An operator who confirms the import of a list must see what it does not check."""
    names = [f"{stage}.rtmr{number}" for stage in ("boot", "runtime") for number in range(4)]
    pinned = '[[profile]]\nname = "a"\nversion = "1"\nmrtd = "x"\n' + "".join(f'{name} = "x"\n' for name in names)
    pinned = pinned.replace('"x"', f'"{RTMR1}"')

    def shown(text: str) -> str:
        source = tmp_path / "published.toml"
        _ = source.write_text(text)
        done = command("profiles", "import", str(source), "--into", str(into), "--yes", "--json")
        (change,) = done.json["changes"]
        return f"{change['change']}: {change['parts']}"

    loose = pinned.replace(f'mrtd = "{RTMR1}"', 'mrtd = "any"')
    assert shown(loose) == "added: MRTD is any"
    looser = loose.replace(f'boot.rtmr2 = "{RTMR1}"', "boot.rtmr2 = { replayed = {} }")
    assert shown(looser) == "changed: RTMR2 (boot), rules, MRTD is any, RTMR2 (boot) is replayed"
    loosest = looser.replace("{ replayed = {} }", '"any"')
    assert shown(loosest) == "changed: rules, MRTD is any, RTMR2 (boot) is any"


def test_a_key_servers_list_is_fetched(command: Command, tmp_path: Path, into: Path) -> None:
    with dev_server(tmp_path / "platform") as server:
        url = f"{server.url}/servers/tee/measurements"
        done = command("profiles", "import", url, "--ca-file", str(server.ca), "--into", str(into), "--yes")
        wrong = command("profiles", "import", f"{server.url}/nowhere", "--ca-file", str(server.ca), "--into", str(into))
    assert done.code == 0, done.err
    assert [one.name for one, _ in parse_profiles_json(into.read_bytes())] == ["simulated"]
    assert wrong.code == 2
    assert "answers 404" in wrong.err


def test_a_file_that_is_none_changes_nothing(command: Command, tmp_path: Path, into: Path) -> None:
    _ = (tmp_path / "bad").write_text("measurements: [x]\n")
    ended = command("profiles", "import", str(tmp_path / "bad"), "--into", str(into), "--yes")
    assert ended.code == 2
    assert not into.exists()


SCHEDULE = """
[schedule.simulated]
not_after = 2031-01-01
retirement_grace = 86400
[schedule."simulated 1"]
not_after = 2030-01-01
retirement_grace = 86400
"""


def test_the_schedule_and_the_vms_that_need_another_image(command: Command, tmp_path: Path) -> None:
    now = int(time.time())
    write_server(tmp_path, SimulatedPlatform(bytes(32)), now)
    config = str(tmp_path / "server.toml")
    empty = command("profiles", "list", "--config", config, "--json").json
    (entry,) = empty["profiles"]
    assert (entry["state"], entry["not_after"], entry["vms"]) == ("enforced", None, None)
    setup = make_store_setup(ServerConfig.load(config))
    with closing(setup.store.open(make=True)) as store:
        for name, profile in (("vm-1", "simulated"), ("vm-2", "gone")):
            granted = boot(name, now=now, vm=Vm(HOTKEY, name))
            _ = store.transact(evolve(granted, profile_name=profile, profile_version="1", vault=setup.vault))
    assert command("profiles", "list", "--config", config, "--json").json["profiles"][0]["vms"] == 1

    def vms(*options: str) -> dict[str, str]:
        listed = command("profiles", "vms", "--config", config, "--json", *options).json["vms"]
        return {one["vm"]: one["state"] for one in listed}

    assert vms() == {"vm-2": "removed"}
    _ = Path(config).write_text(Path(config).read_text() + SCHEDULE)  # name and version come after the name
    for at, state in (("2029-12-31", None), ("2030-01-01", "retiring"), ("2030-01-02", "ended")):
        (entry,) = command("profiles", "list", "--config", config, "--json", "--at", at).json["profiles"]
        assert entry["state"] == state or "enforced"
        assert entry["ends_at"] == entry["not_after"] + 86400
        assert vms("--at", at) == {"vm-2": "removed"} | ({"vm-1": state} if state else {})
    shown = command("profiles", "list", "--config", config, "--at", "2030-01-01").out
    assert "retiring" in shown
    assert "2030-01-02T00:00:00Z" in shown


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ("[schedule.simulatd]\nmode = 'warn'", "did you mean 'simulated'"),
        ("[schedule.other]\nmode = 'warn'", "no such profile is served"),
        ("[schedule.1]\nretirement_grace = 1", "schedule.1.retirement_grace: goes with not_after"),
    ],
)
def test_a_schedule_of_no_profile_is_refused(command: Command, tmp_path: Path, lines: str, problem: str) -> None:
    write_server(tmp_path, SimulatedPlatform(bytes(32)), int(time.time()))
    config = tmp_path / "server.toml"
    _ = config.write_text(f"{config.read_text()}\n{lines}\n")
    ended = command("profiles", "list", "--config", str(config))
    assert ended.code == 2
    assert problem in ended.err
