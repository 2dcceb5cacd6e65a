"""Receipts of real boots: the evidence is judged again offline, and the exit code says which step fails."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from socket import gethostname
from typing import Any

import pytest
from attrs import define

from chutes_proto.effects import Effect, FetchCollateral
from chutes_proto.io.files import Files
from chutes_proto.io.server.development import write_server
from chutes_proto.io.server.reload import Running, prepare, record
from chutes_proto.io.server.serving import open_store
from chutes_proto.io.server.setup import make_setup
from chutes_proto.server import ServerConfig
from chutes_proto.server._app import App
from chutes_proto.testing import SimulatedPlatform
from chutes_proto.tlog.notes import Verifier
from tests.cli.conftest import Ended
from tests.cli.test_operating import NOW, PLATFORM
from tests.server.world import World

POLICY = '[tcb]\naccepted_statuses = ["UpToDate"]\n'


@define(eq=False)
class FromFiles(World):
    """A world whose collateral is that of the server's directory."""

    collateral: Any = None

    def perform(self, effect: Effect[Any]) -> Any:
        if isinstance(effect, FetchCollateral):
            return self.collateral.fetch(effect.identity, self.now)
        return super().perform(effect)


@define
class Site:
    """A server that has granted one boot, and refused one for its TCB and one for its measurements."""

    directory: Path
    command: Callable[..., Ended]

    @property
    def configuration(self) -> Path:
        return self.directory / "server.toml"

    def serve(self) -> None:
        setup = make_setup(ServerConfig.load(self.configuration))
        with closing(setup.store.open(migrate=True)) as store:
            world = FromFiles(App(setup.service), store, PLATFORM, NOW, collateral=setup.collateral)
            assert world.boot().status == 200
            for fault in ("tcb_out_of_date", "rtmr1"):
                world.platform = PLATFORM.having(fault)
                assert world.boot(vm_name=f"vm-{fault}").status == 403

    def rows(self, *options: object) -> Any:
        return self.command("audit", "list", *options, "--json", "--config", self.configuration).json["rows"]

    def show(self, entry: object, *options: str) -> Ended:
        return self.command("receipt", "show", entry, *options, "--config", self.configuration)

    def verify(self, receipt: str, *options: object) -> Ended:
        (self.directory / "receipt.json").write_text(receipt)
        key = self.command("audit", "key", "--config", self.configuration).out.strip()
        root = self.directory / "simulated-root.der"
        return self.command(
            "receipt", "verify", self.directory / "receipt.json", "--key", key, "--root", root, *options
        )


@pytest.fixture
def site(tmp_path: Path, command: Callable[..., Ended]) -> Site:
    write_server(tmp_path, PLATFORM, NOW)
    text = (tmp_path / "server.toml").read_text()
    (tmp_path / "server.toml").write_text(f'policy = "policy.toml"\n{text}')
    (tmp_path / "policy.toml").write_text(POLICY)
    site = Site(tmp_path, command)
    site.serve()
    return site


def test_grants_and_denials_are_judged_again_offline(site: Site) -> None:
    for index, verdict in enumerate(["accepted", "tcb_rejected", "measurement_mismatch"]):
        shown = site.show(index, "--evidence")
        assert shown.code == 0, shown.err
        ended = site.verify(shown.out, "--json")
        assert (ended.code, ended.json["verdict"]) == (0, verdict)
    told = json.loads(json.loads(shown.out)["entry"])
    assert json.loads(told["evidence"]).keys() == {
        *("advisories", "collateral", "judged_at", "policy", "reference_values", "stage", "tcb_date", "tcb_status"),
        *("verdict", "verifier"),
    }
    assert "was not judged again" in site.verify(site.show(0).out).out


def test_the_exit_code_says_which_step_failed(site: Site) -> None:
    good = site.show(0, "--evidence").out
    members = json.loads(good)

    def changed(**more: object) -> str:
        return json.dumps(members | more, ensure_ascii=False) + "\n"

    assert site.verify(changed()).code == 0
    assert site.verify(good[1:]).code == 11
    assert site.verify(changed(proof=members["proof"].replace("chutes-proto/", "other/"))).code == 12
    assert site.verify(good, "--witness", str(Verifier("w.example", bytes(32), is_witness=True))).code == 12
    assert site.verify(changed(entry=members["entry"].replace("granted", "refused"))).code == 13
    without = {name: text for name, text in members["evidence"].items() if name != "policy"}
    assert site.verify(changed(evidence=without)).code == 14
    for name in (each for each in members["evidence"] if not each.endswith("_chain")):  # PEM has bits of no meaning
        data = base64.b64decode(members["evidence"][name])
        at = len(data) // 2
        wrong = base64.b64encode(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]).decode()
        ended = site.verify(changed(evidence=members["evidence"] | {name: wrong}), "--json")
        # Chains and signatures have no digest in the entry: they only prove the documents that have one.
        is_named = not name.endswith(("_chain", "_signature"))
        assert ended.code == (14 if is_named else 15), name
        assert ended.json["step"] == ended.code - 10
    ended = site.command(
        *("receipt", "verify", site.directory / "receipt.json"),
        *("--key", site.command("audit", "key", "--config", site.configuration).out.strip()),
    )
    assert ended.code in (14, 15), "a simulated root is not Intel's"


def test_another_policy_is_not_the_one_that_judged(site: Site) -> None:
    (site.directory / "policy.toml").write_text(f"{POLICY}# another one\n")
    ended = site.show(0, "--evidence")
    assert (ended.code, "not kept any more: policy" in ended.err) == (1, True)
    assert site.show(0).code == 0


def test_a_reload_names_the_documents_of_before_and_after(site: Site) -> None:
    running = Running(make_setup(ServerConfig.load(site.configuration)))
    (site.directory / "policy.toml").write_text(f"{POLICY}# another one\n")
    with closing(running.setup.store.open()) as store:
        record(store, "root", prepare(running, store, Files()))
    shown = site.show(3)
    told = json.loads(json.loads(json.loads(shown.out)["entry"])["evidence"])
    assert told["before"]["reference_values"] == told["after"]["reference_values"]
    assert told["before"]["policy"] != told["after"]["policy"]
    ended = site.show(3, "--evidence")
    assert (ended.code, "names no evidence" in ended.err) == (1, False)


def test_a_start_with_other_files_is_an_entry_of_that_server(site: Site) -> None:
    """Of several processes of a server one writes it; servers with different files write none in turns for ever."""

    def start(config: Path) -> None:
        with open_store(Running(make_setup(ServerConfig.load(config)))):
            pass

    def started() -> list[Any]:
        return [json.loads(row["evidence"]) for row in site.rows("--event", "started")]

    other = site.directory / "other.toml"
    other.write_text(site.configuration.read_text().replace("policy.toml", "other-policy.toml"))
    (site.directory / "other-policy.toml").write_text(f"{POLICY}# of another server\n")
    for config in (site.configuration, other, site.configuration, other):
        start(config)
    first, second = started()
    assert (first["before"], second["before"], first["after"] != second["after"]) == (None, None, True)
    (site.directory / "policy.toml").write_text(f"{POLICY}# another one\n")
    with ThreadPoolExecutor(4) as processes:
        list(processes.map(start, [site.configuration] * 4))
    (*_, changed) = found = started()
    assert (len(found), changed["before"], changed["after"] != first["after"]) == (3, first["after"], True)
    (site.directory / "gpus.toml").write_text("")
    text = f'gpu_evidence = {{ policy = "gpus.toml" }}\n{site.configuration.read_text()}'
    site.configuration.write_text(text)
    (site.directory / "simulated-root.der").write_bytes(SimulatedPlatform(b"other".ljust(32)).root_der)
    start(site.configuration)
    (row,) = site.rows("--event", "started", "--last", 1)
    assert row["reason"].endswith("server.toml: changed: gpu_policy, root")
    running = Running(make_setup(ServerConfig.load(site.configuration)))
    (site.directory / "policy.toml").write_text(POLICY)
    with closing(running.setup.store.open()) as store:
        record(store, "root", prepare(running, store, Files()))
    start(site.configuration)
    assert len(started()) == 4, "the reload has said it"
    shown = site.show(f"files of {gethostname()}:{site.configuration}")
    assert json.loads(json.loads(shown.out)["entry"])["event"] == "reloaded"
    assert site.verify(shown.out).code == 0
