"""`policy try` on both stores: who would be refused, why and from when on; the exit code for a pipeline."""

from __future__ import annotations

import shutil
from contextlib import closing

from attrs import evolve

from chutes_proto.io.server.setup import make_setup
from chutes_proto.server import ServerConfig
from chutes_proto.server._overview import what_if_lines
from chutes_proto.store._rows import Platform, ReadWhatIf, Vm
from chutes_proto.store._run import Ask
from chutes_proto.testing.store_suite._parts import boot
from chutes_proto.units.boot import RecordRefusal
from chutes_proto.units.records import Kept
from tests.cli import test_operating
from tests.cli.test_operating import HOTKEY, NOW, PLATFORM, Site
from tests.server.test_whatif import RECOVERY

site = test_operating.site


def refusal(request_id: str, vm: str, code: str) -> RecordRefusal:
    return RecordRefusal(
        now=NOW,
        request_id=request_id,
        vm=Vm(HOTKEY, vm),
        platform=Platform(None, bytes(16)),
        code=code,
        reason="why",
        quote_digest=bytes(32),
        peer_address="",
        kept=Kept(PLATFORM.quote(bytes(64)), "{}"),
    )


def fleet(site: Site) -> None:
    """Two VMs, of which one is on a platform that is out of date, one without evidence, and one that was refused."""
    setup = make_setup(ServerConfig.load(site.configuration))
    with closing(setup.store.open()) as store:
        for name, fault in (("good", ""), ("old", "tcb_out_of_date"), ("silent", None)):
            quote = None if fault is None else (PLATFORM.having(fault) if fault else PLATFORM).quote(bytes(64))
            kept = None if quote is None else Kept(quote, "{}")
            unit = evolve(boot(name, now=NOW, vm=Vm(HOTKEY, f"vm-{name}")), vault=setup.service.vault, kept=kept)
            _ = store.transact(unit)
        assert store.transact(refusal("r", "vm-new", "measurement_mismatch"))


def test_a_policy_is_tried_before_it_bites(site: Site) -> None:
    fleet(site)
    ended = site.do("policy", "try", "--json")
    told = ended.json
    assert (ended.code, told["ok"], told["judged"], told["without_evidence"]) == (1, False, 2, 1)
    assert [(vm["vm"], vm["state"], vm["was_refused"]) for vm in told["vms"]] == [
        ("vm-new", "granted", True),
        ("vm-old", "refused", False),
    ]
    assert (told["vms"][1]["code"], told["changes"][0]["refused"]) == ("tcb_rejected", 1)
    with closing(make_setup(ServerConfig.load(site.configuration)).store.open()) as store:
        shown = what_if_lines(store.transact(Ask(ReadWhatIf())))
    assert shown is not None
    assert "the policy of the server, at " in shown[0]
    assert "1 of 2 VMs refused, 0 warned, 0 not judged; 0 refused later" in shown[0]
    assert (len(shown), f"vm-old of {HOTKEY}: tcb_rejected: " in shown[2]) == (3, True)
    policy = site.directory / "new.toml"
    _ = policy.write_text('[tcb]\naccepted_statuses = ["UpToDate", "OutOfDate"]\n')
    ended = site.do("policy", "try", policy)
    assert ended.code == 0, ended.out + ended.err
    assert "2 VMs judged" in ended.out
    assert "1 VMs have no evidence yet" in ended.out
    _ = policy.write_text("[tcb]\nplatform_grace_days = 1\n")
    assert site.do("policy", "try", policy).code == 2
    said = site.do("policy", "try").out
    assert "refused from then on:" in said
    assert "tcb_rejected" in said


def test_no_policy_grants_what_the_store_refused(site: Site) -> None:
    """A revocation and the claim on a name refuse under each policy. The newest refusal of a VM counts."""
    with closing(make_setup(ServerConfig.load(site.configuration)).store.open()) as store:
        codes = ("revoked", "platform_mismatch", "exchange_downgrade", "tcb_rejected", "tcb_rejected")
        for number, code in enumerate(codes):
            assert store.transact(refusal(f"r{number}", f"vm-{code}", code))
        for number, code in enumerate(("tcb_rejected", "revoked")):
            assert store.transact(evolve(refusal(f"s{number}", "vm-that-was-revoked", code), now=NOW + number))
    told = site.do("policy", "try", "--json").json
    assert [(vm["vm"], vm["was_refused"]) for vm in told["vms"]] == [("vm-tcb_rejected", True)]


def test_a_vm_that_was_granted_since_counts_as_granted_alone(site: Site) -> None:
    setup = make_setup(ServerConfig.load(site.configuration))
    kept = Kept(PLATFORM.quote(bytes(64)), "{}")
    with closing(setup.store.open()) as store:
        for number, (name, is_granted) in enumerate([("a", False), ("a", True), ("b", True), ("b", False)]):
            if is_granted:
                unit = evolve(boot(name, now=NOW + number, vm=Vm(HOTKEY, f"vm-{name}")), kept=kept)
                _ = store.transact(evolve(unit, vault=setup.service.vault))
            else:
                denial = evolve(refusal(f"r{number}", f"vm-{name}", "tcb_rejected"), now=NOW + number)
                assert store.transact(denial)
    told = site.do("policy", "try", "--json").json
    assert (told["granted"], [(vm["vm"], vm["was_refused"]) for vm in told["vms"]]) == (2, [("vm-b", True)])


def test_a_store_that_nobody_made_is_not_tried(site: Site) -> None:
    """A wrong address must not say that every VM is granted, nor leave a store behind."""
    wrong = site.directory / "wrong.toml"
    lines = site.configuration.read_text().splitlines()
    _ = wrong.write_text(
        "\n".join('store = "sqlite:wrong.db"' if line.startswith("store = ") else line for line in lines)
    )
    wrong.chmod(0o600)
    ended = site.command("policy", "try", "--config", wrong)
    assert (ended.code, "not made yet" in ended.err) == (1, True), ended.out + ended.err
    assert not list(site.directory.glob("wrong.db*"))


def test_a_fleet_without_evidence_is_not_called_granted(site: Site) -> None:
    site.boot("1")
    ended = site.do("policy", "try")
    assert "every VM is granted" not in ended.out
    assert "no VM has evidence to be judged" in ended.out
    assert "1 VMs have no evidence yet" in ended.out


def test_another_collateral_and_none(site: Site) -> None:
    fleet(site)
    setup = make_setup(ServerConfig.load(site.configuration))
    assert setup.config.collateral.directory is not None
    directory = site.directory / setup.config.collateral.directory
    early = site.do("policy", "try", "--update", "early", "--json")
    assert early.code == 1
    assert {vm["state"] for vm in early.json["vms"]} == {"not judged"}
    _ = shutil.copytree(directory, directory / "early")
    assert site.do("policy", "try", "--update", "early", "--json").json["not_judged"] == 0
    (file,) = (directory / "early").iterdir()
    _ = file.write_bytes(PLATFORM.having(RECOVERY).collateral_json(NOW))
    assert site.do("policy", "try", "--update", "early", "--json").json["refused"] == 2
    assert site.do("policy", "try", "--json").json["refused"] == 1
    _ = shutil.copy(next(directory.glob("*.json")), file)
    assert site.do("policy", "try", "--collateral", directory / "early", "--json").json["refused"] == 1
    assert site.do("policy", "try", "--at", "2050-06-01", "--json").json["refused"] == 2  # certificates have expired


def test_what_a_server_has_fetched_is_its_collateral_too(site: Site) -> None:
    """No service is asked: the files that the server keeps are those of a directory."""
    fleet(site)
    text = site.configuration.read_text()
    (given,) = (line for line in text.splitlines() if line.startswith("collateral"))
    directory = ServerConfig.load(site.configuration).collateral.directory
    assert directory is not None
    for kept, code in ((f'cache = "{directory}", ', 1), ("", 2)):
        fetched = f'collateral = {{ {kept}upstreams = ["https://127.0.0.1:1"] }}'
        _ = site.configuration.write_text(text.replace(given, fetched))
        ended = site.do("policy", "try", "--json")
        assert (ended.code, "name one with --collateral" in ended.err) == (code, code == 2), ended.err
        assert code == 2 or (ended.json["refused"], ended.json["not_judged"]) == (1, 0)


def test_each_fault_of_the_configuration_is_a_line(site: Site) -> None:
    _ = (site.directory / "new.toml").write_text("tcb = 1")
    ended = site.do("policy", "try", site.directory / "new.toml", "--measurements", site.directory / "nowhere.toml")
    assert (ended.code, [line.split()[1] for line in ended.err.splitlines()]) == (2, ["measurements:", "policy:"])
