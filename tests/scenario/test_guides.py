"""How-to guides of an operator: a shell runs their commands, in order, where real machines are simulated."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path

import psycopg
import pytest
from attrs import frozen
from psycopg.conninfo import conninfo_to_dict

from chutes_proto.auth.server_identity import make_server_identity
from chutes_proto.cli.main import main
from chutes_proto.io.files import make_directory, write_file
from chutes_proto.io.quoters.simulated import open_platform
from chutes_proto.store._rows import HostProfileRow
from chutes_proto.units.fleet import RegisterHost
from tests.cli.conftest import HOTKEY, PROGRAM, end, start_server
from tests.cli.test_replay import GOOD
from tests.conftest import ROOT
from tests.scenario.premises import Premises
from tools.docs.newcomer import PAGES as FOLLOWED
from tools.docs.pages import DOCS, Step, command_lines, fences, steps

in_a_file = pytest.mark.parametrize("premises", ["sqlite"], indirect=True)


def commands(page: str) -> list[Step]:
    """The scripts of a guide that call ``chutes-proto``."""
    found = [step for fence in fences(DOCS / "how-to" / f"{page}.md") for step in steps(fence)]
    return [step for step in found if step.command.startswith("chutes-proto ")]


def run(premises: Premises, step: Step, home: Path) -> str:
    program = f'set -e\nchutes-proto() {{ {shlex.quote(sys.executable)} -m chutes_proto "$@"; }}\n'
    program += "journalctl() { cat ../log; }\n"
    done = subprocess.run(
        ["bash", "-c", program + step.command],
        cwd=premises.directory,
        env=os.environ | {"XDG_STATE_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{step.command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@in_a_file
@pytest.mark.parametrize(
    ("page", "least"), [("reference-values", 5), ("upgrade", 1), ("denied-at-night", 2), ("capacity", 1)]
)
def test_a_guide_is_followed(
    premises: Premises, page: str, least: int, tmp_path: Path, require_program: Callable[[str], str]
) -> None:
    premises.start()
    vm = premises.vm()
    _ = vm.boot()
    nonce = vm.nonce()
    _ = vm.boot(nonce, quote=vm.quote(nonce, "runtime"), status=403)
    for log in ("CCEL", "good/CCEL"):
        write_file(make_directory((premises.directory / log).parent) / "CCEL", GOOD)
    listed = commands(page)
    assert len(listed) >= least
    for step in listed:
        _ = run(premises, step, tmp_path / "home")
    if page == "denied-at-night" and require_program("curl"):
        probe = Operator(premises.directory, {"https://keys.example:8443": premises.url})
        assert '"nonce"' in probe.run("4. No answer at all", page=page)
    if page == "reference-values":
        assert 'name = "8xh200"' in (premises.directory / "8xh200-1.1.toml").read_text()


@frozen
class Operator:
    """Runs the commands of a guide in a directory of its own, with another word where the page names a real machine."""

    directory: Path
    instead: dict[str, str]

    def run(self, heading: str, part: int = 0, *, page: str, code: int = 0) -> str:
        found = [f.text for f in fences(DOCS / "how-to" / f"{page}.md") if f.language == "sh" and f.heading == heading]
        script = found[part]
        for words, meant in self.instead.items():
            script = script.replace(words, meant)
        program = f'set -e\nchutes-proto() {{ {shlex.join(PROGRAM)} "$@"; }}\n'
        done = subprocess.run(
            ["bash", "-c", program + script],
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == code, f"{script}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr


def text_of(page: str, title: str) -> str:
    """The file that a guide says to save under this name."""
    (found,) = [fence.text for fence in fences(DOCS / "how-to" / f"{page}.md") if fence.title == title]
    return found


@contextmanager
def collateral_service(*options: object) -> Iterator[str]:
    """The URL of a service with the simulated platform's collateral."""
    command = [*PROGRAM, "collateral", "serve", *map(str, options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[-1]
        finally:
            end(process)


INTELS = (
    "--upstream https://api.trustedservices.intel.com",
    "    --root-ca-crl https://certificates.trustedservices.intel.com/IntelSGXRootCA.der",
)


def from_there(url: str) -> dict[str, str]:
    """The service and the root that take the place of Intel's."""
    return {
        INTELS[0]: f"--upstream {url}",
        INTELS[1]: "    --root root.der",
        "show early": "show early --root root.der",
        "check collateral": "check collateral --root root.der",
        "*.json": "*.json --root root.der",
    }


def test_a_server_is_set_up_for_production(tmp_path: Path, require_program: Callable[[str], str]) -> None:
    analyze, curl = require_program("systemd-analyze"), require_program("curl")
    page, site, state = "production", tmp_path / "etc", tmp_path / "state"
    site.mkdir()
    state.mkdir()
    platform = open_platform(tmp_path / "platform", now := int(time.time())).platform
    identity = make_server_identity(now, os.urandom(32))
    for name, data in {
        "server.pem": identity.chain_pem,
        "server.key": identity.key_pem.reveal(),
        "ca.pem": identity.ca_pem,
        "root.der": platform.root_der,
        "boot.quote": platform.quote(bytes(64), stage="boot"),
        "runtime.quote": platform.quote(bytes(64), stage="runtime"),
    }.items():
        write_file(site / name, data)
    with collateral_service("--platform", tmp_path / "platform") as url:
        operator = Operator(
            site, from_there(url) | {"chown keys": f"chown {os.getuid()}", "runuser -u keys -- ": "", "curl": curl}
        )
        for part in (0, 1):
            _ = operator.run("2. Make the key-encryption key", part, page=page)
        assert {(site / name).stat().st_mode & 0o777 for name in ("kek", "server.key")} == {0o600}
        _ = operator.run("3. Write down your image's measurements", page=page)
        for part in (0, 1):
            _ = operator.run("4. Get Intel's collateral", part, page=page)
    configuration = text_of(page, "server.toml").replace("/var/lib/chutes-proto", str(state))
    configuration = configuration.replace("0.0.0.0:8443", "127.0.0.1:0")
    _ = (site / "server.toml").write_text('roots = "root.der"\n' + configuration)
    said = operator.run("6. Check", page=page)
    assert "NOT Intel's root" in said
    assert not list(state.iterdir())

    unit = tmp_path / "chutes-proto.service"
    text = text_of(page, unit.name)
    (program,) = re.findall(r"^ExecStart=(\S+) serve --config /etc/chutes-proto/server.toml$", text, re.MULTILINE)
    _ = unit.write_text(text.replace(program, sys.executable).replace("User=keys", "User=root"))
    held = unit.with_suffix(".socket")
    _ = held.write_text(text_of(page, held.name))
    done = subprocess.run([analyze, "verify", "--man=no", unit, held], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert f'listen = "{re.findall("ListenStream=(.*)", held.read_text())[0]}"' in text_of(page, "server.toml")
    server = start_server("--config", site / "server.toml", ca=site / "ca.pem")
    try:
        operator.instead["https://keys.example:8443"] = server.url
        operator.instead["--fail"] = "--fail --cacert ca.pem"
        assert '"nonce"' in operator.run("7. Start", 1, page=page)
        operator.instead["--hotkey HOTKEY"] = f"--hotkey {HOTKEY} --ca ca.pem"
        operator.instead["--quoter auto"] = f"--platform {tmp_path / 'platform'}"
        assert "granted" in operator.run("8. Prove that it works", page=page)
        script = (
            f'{shlex.join(PROGRAM)} simulate --fault rtmr1 --report-data "$1" --platform ../platform --out other >&2'
        )
        _ = (site / "other-image").write_text(f"{script} && cat other/quote.bin\n")
        operator.instead["--quoter auto"] = "--quoter 'sh other-image {report_data}'"
        assert "measurement_mismatch" in operator.run("8. Prove that it works", page=page, code=1)
    finally:
        end(server.process)


@in_a_file
def test_a_certificate_is_renewed(premises: Premises, require_program: Callable[[str], str]) -> None:
    _ = require_program("openssl")
    premises.edit('store = "sqlite:keys.db"', 'store = "sqlite:keys.db"\ncontrol = "control.sock"')
    premises.start()
    page, site = "renew-certificate", premises.directory
    (reload,) = re.findall(
        r"^ExecReload=/opt/chutes-proto/bin/(.+)$", text_of("production", "chutes-proto.service"), re.MULTILINE
    )
    operator = Operator(
        site,
        {
            "systemctl reload chutes-proto": reload.replace("/etc/chutes-proto", str(site)),
            "keys.example:8443 -servername keys.example": premises.url.removeprefix("https://"),
        },
    )
    heading = "Renew the TLS certificate"
    shown = operator.run(heading, 2, page=page)
    identity = make_server_identity(premises.now - 86_400, os.urandom(32))
    (site / "new").mkdir()
    write_file(site / "new" / "server.pem", identity.chain_pem)
    write_file(site / "new" / "server.key", identity.key_pem.reveal())
    for part in (0, 1):
        _ = operator.run(heading, part, page=page)
    premises.wait_for_log("reloaded")
    assert (site / "server.key").stat().st_mode & 0o777 == 0o600
    renewed = operator.run(heading, 2, page=page)
    assert "notAfter=" in renewed
    assert renewed != shown
    write_file(site / "new" / "server.key", make_server_identity(premises.now, os.urandom(32)).key_pem.reveal())
    _ = operator.run(heading, 0, page=page)
    assert "nothing was changed: " in operator.run(heading, 1, page=page, code=1)
    premises.wait_for_log("reload_refused", '"level":"error"')
    assert operator.run(heading, 2, page=page) == renewed


def test_a_tcb_recovery_is_seen_early(tmp_path: Path) -> None:
    page, heading = "tcb-recovery", "1. Learn early which platforms will fail"
    platform = open_platform(tmp_path / "platform", int(time.time())).platform
    site = tmp_path / "site"
    site.mkdir()
    write_file(site / "quote.bin", platform.quote(bytes(64)))
    write_file(site / "root.der", platform.root_der)
    with collateral_service("--platform", tmp_path / "platform") as url:
        operator = Operator(site, from_there(url))
        assert "UpToDate" in operator.run(heading, page=page)
        old = [*PROGRAM, "simulate", "--report-data", "00" * 64, "--platform", str(tmp_path / "platform")]
        old += ["--out", str(site)]
        _ = subprocess.run([*old, "--fault", "tcb_out_of_date"], check=True, stdout=subprocess.DEVNULL)
        said = operator.run(heading, page=page, code=1)
    assert re.search(r"^tcb_status: .*OutOfDate", said, re.MULTILINE)
    assert "SIMULATED-SA-OutOfDate" in said
    (date,) = re.findall(r"^tcb_date +(\S+)$", said, re.MULTILINE)
    (policy,) = [fence.text for fence in fences(DOCS / "how-to" / f"{page}.md") if fence.language == "toml"]
    needed = int(time.time() - datetime.fromisoformat(date).timestamp()) + 86_400
    for seconds, code in ((31_536_000, 1), (needed, 0)):
        text = policy.replace("31536000", str(seconds)).replace('per_profile."8xh200 1.4.0".tcb', "tcb")
        _ = (site / "policy.toml").write_text(f'measurements = "unchecked"\n{text}')
        command = [*PROGRAM, "verify", "quote.bin", "--collateral", *map(str, (site / "early").glob("*.json"))]
        command += ["--root", "root.der", "--policy", "policy.toml"]
        done = subprocess.run(command, cwd=site, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout
        assert ("platform_grace" in done.stdout) == bool(code)


@in_a_file
def test_a_store_begins_in_an_empty_database(premises: Premises, database: str) -> None:
    page, name = "postgresql", f"keys_{os.getpid()}"
    listed = list(fences(DOCS / "how-to" / f"{page}.md"))
    sql = next(fence.text for fence in listed if fence.language == "sql")
    store = next(fence.text for fence in listed if fence.language == "toml")
    with psycopg.connect(database, autocommit=True) as administrator:
        try:
            for statement in re.sub(r"(ROLE|DATABASE|OWNER) keys", rf"\1 {name}", sql).split(";")[:-1]:
                _ = administrator.execute(statement.encode())
            line = text_of(page, "pgpass")
            line = line.replace("db.example:5432:keys:keys", f"*:*:{name}:{name}")
            write_file(premises.directory / "pgpass", line.encode(), mode=0o600)
            host = conninfo_to_dict(database)["host"]
            store = store.replace("keys@db.example/keys?", f"{name}@/{name}?host={host}&")
            store = store.replace("/etc/chutes-proto", str(premises.directory))
            premises.edit('store = "sqlite:keys.db"\n', store)
            said = Operator(premises.directory, {}).run("Start with an empty database", page=page)
            assert f"{name}: sealed keys: 1, its own included" in said
            premises.start()
            assert premises.vm().boot()
            premises.stop()
        finally:
            _ = administrator.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)".encode())
            _ = administrator.execute(f"DROP ROLE IF EXISTS {name}".encode())


@in_a_file
@pytest.mark.parametrize(
    ("page", "least"),
    [("how-to/revoke", 6), ("how-to/newer-images", 5), ("how-to/container", 1), ("reference/policies", 1)],
)
def test_each_command_of_a_page_runs(
    premises: Premises, page: str, least: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One after the other, where the VM that they name has booted."""
    premises.start_here()
    _ = premises.vm().boot()
    with closing(premises.open()) as store:
        _ = store.transact(RegisterHost(HostProfileRow("3f9a".ljust(64, "0"), HOTKEY, "{}", premises.now)))
    _ = (premises.directory / "policy.toml").write_bytes((ROOT / "examples/policy.toml").read_bytes())
    monkeypatch.chdir(premises.directory)
    listed = list(command_lines(DOCS / f"{page}.md"))
    assert len(listed) >= least
    for line in listed:
        assert main(shlex.split(line)[1:]) == 0, f"{line}\n{capsys.readouterr()}"


# --- no command of a page is without a run ---

RUN_BY = {
    **{
        str(page.relative_to(ROOT)): "docs/test_tools.py:test_a_newcomer_gets_through_every_tutorial"
        for page in FOLLOWED
    },
    **dict.fromkeys(
        ("docs/how-to/backup-restore.md", "docs/how-to/keys-and-disks.md", "docs/how-to/rotate-kek.md"),
        "scenario/test_recipes.py:test_no_recipe_is_left_out",
    ),
    **dict.fromkeys(
        (
            "docs/how-to/reference-values.md",
            "docs/how-to/upgrade.md",
            "docs/how-to/denied-at-night.md",
            "docs/how-to/capacity.md",
        ),
        "scenario/test_guides.py:test_a_guide_is_followed",
    ),
    **dict.fromkeys(
        (
            "docs/how-to/revoke.md",
            "docs/how-to/newer-images.md",
            "docs/how-to/container.md",
            "docs/reference/policies.md",
        ),
        "scenario/test_guides.py:test_each_command_of_a_page_runs",
    ),
    "docs/how-to/production.md": "scenario/test_guides.py:test_a_server_is_set_up_for_production",
    "docs/how-to/tcb-recovery.md": "scenario/test_guides.py:test_a_tcb_recovery_is_seen_early",
    "docs/how-to/postgresql.md": "scenario/test_recipes.py:test_a_move_to_postgresql",
    "docs/how-to/nginx.md": "scenario/test_nginx.py:test_a_boot_and_its_sync",
    "docs/how-to/gpus.md": "cli/test_gpu.py:test_what_was_fetched_is_a_bundle_for_offline_use",
}
"""Each page with commands, and the test that runs them."""


def test_no_command_of_a_page_is_without_a_run() -> None:
    pages = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
    assert {str(page.relative_to(ROOT)) for page in pages if any(command_lines(page))} == set(RUN_BY)
    for page, place in RUN_BY.items():
        file, _, test = place.partition(":")
        source = (ROOT / "tests" / file).read_text("utf-8")
        assert f"def {test}(" in source, place
        assert Path(page).stem in source or test.startswith("test_a_newcomer"), f"{place} does not name {page}"
