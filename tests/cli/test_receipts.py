"""Receipts of real boots: the evidence is judged again offline, and the exit code says which step fails."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shlex
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from socket import gethostname
from typing import Any

import pytest
from attrs import define, evolve

from chutes_proto.collateral.library import Family
from chutes_proto.effects import Effect, FetchCollateral
from chutes_proto.errors import LogError, VerdictError
from chutes_proto.io.files import Files
from chutes_proto.io.server.development import write_server
from chutes_proto.io.server.reload import Running, prepare, record
from chutes_proto.io.server.serving import open_store
from chutes_proto.io.server.setup import make_setup
from chutes_proto.io.yaml_file import read_yaml
from chutes_proto.quote import TrustedRoot
from chutes_proto.quote._verify import verify_collateral
from chutes_proto.secret import Secret
from chutes_proto.server import ServerConfig
from chutes_proto.server._app import App
from chutes_proto.server._grounds import JUDGED_WITHIN_SECONDS, Bundle, judge_again
from chutes_proto.testing import SimulatedPlatform
from chutes_proto.testing._platform import PROFILE
from chutes_proto.tlog import merkle
from chutes_proto.tlog.notes import Checkpoint, Signer, Verifier
from chutes_proto.tlog.proofs import Proof
from chutes_proto.tlog.receipts import Receipt
from tests.cli.conftest import Ended
from tests.cli.test_operating import NOW, PLATFORM
from tests.server.world import World
from tools.docs.pages import DOCS, fences

STRIDE = 31 if os.environ.get("CHUTES_PROTO_SOAK") else 331
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

    def show(self, entry: object, *options: object) -> Ended:
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
    # A default that is a date is one in the document of reference values, too, which is JSON.
    text = text.replace("[profile_defaults]", "[profile_defaults]\nnot_before = 2024-02-29")
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
    assert "not judged again: the receipt is without quote" in site.verify(site.show(0).out).out


def test_evidence_under_another_root_names_the_option(site: Site) -> None:
    """As of a server with `roots`: the key of the log is right, and nothing else is."""
    assert site.verify(site.show(0, "--evidence").out).code == 0
    key = site.command("audit", "key", "--config", site.configuration).out.strip()
    ended = site.command("receipt", "verify", site.directory / "receipt.json", "--key", key)
    assert (ended.code, "--root, which names one to trust" in ended.out) == (15, True)


def test_keys_are_taken_as_they_are_printed(site: Site) -> None:
    """A log that went on under a new key has several, one a line; an empty value is none, not the default."""
    receipt = site.directory / "receipt.json"
    receipt.write_text(site.show(0).out)
    key = site.command("audit", "key", "--config", site.configuration).out.strip()
    other = Signer("keys.example/older", Secret(bytes(32))).verifier
    for value, code in ((f"{other}\n{key}", 0), (str(other), 12), (f"{key}\n", 2), ("", 2)):
        ended = site.command("receipt", "verify", receipt, "--key", value)
        assert ended.code == code, ended.err
    assert site.command("audit", "verify", "--config", site.configuration, "--key", "").code == 2


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
    for name in members["evidence"]:
        data = base64.b64decode(members["evidence"][name])
        at = len(data) // 3  # of a chain, within its first certificate
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
    assert (ended.code, "not kept: policy (SHA-256 " in ended.err) == (1, True)
    assert site.show(0).code == 0
    (site.directory / "before.toml").write_text(POLICY)
    before = site.directory / "server-before.toml"
    before.write_text(site.configuration.read_text().replace('"policy.toml"', '"before.toml"'))
    shown = site.command("receipt", "show", 0, "--evidence", "--config", before)
    assert site.verify(shown.out, "--json").json["verdict"] == "accepted"


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
    assert (ended.code, "names no evidence" in ended.err, "leave out --evidence" in ended.err) == (1, True, True)
    assert "nothing to judge again" in site.verify(shown.out).out


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


def test_a_receipt_with_any_bit_of_its_evidence_changed_is_refused(site: Site) -> None:
    """Bits of chains and signatures, too, of which an entry has no digest."""
    data = site.show(0, "--evidence").out.encode()
    key = Verifier.parse(site.command("audit", "key", "--config", site.configuration).out.strip())
    root = TrustedRoot.from_der((site.directory / "simulated-root.der").read_bytes())

    def judged(changed: bytes) -> str:
        receipt = Receipt.from_bytes(changed)
        _ = receipt.verify([key])
        return judge_again(json.loads(receipt.entry), Bundle.of(receipt.evidence), read_yaml, root)

    assert judged(data) == "accepted"
    for at in range(0, 8 * len(data), STRIDE):
        changed = bytearray(data)
        changed[at // 8] ^= 1 << at % 8
        with pytest.raises(LogError):
            _ = judged(bytes(changed))


def test_a_chain_in_a_receipt_has_one_spelling(site: Site) -> None:
    """Its text may be spelt in many ways where it comes from: as other tools write it, with Windows' lines …"""
    for path in (site.directory / "collateral").glob("*.json"):
        collateral = json.loads(path.read_bytes())
        for name in (each for each in collateral if each.endswith("_chain")):
            collateral[name] = "text before\r\n" + collateral[name].replace("\n", "\r\n")
        path.write_text(json.dumps(collateral))
    shown = site.show(0, "--evidence")
    assert site.verify(shown.out).code == 0
    members = json.loads(shown.out)
    for name in (each for each in members["evidence"] if each.endswith("_chain")):
        chain = base64.b64decode(members["evidence"][name])
        evidence = members["evidence"] | {name: base64.b64encode(b"# the chain\n" + chain).decode()}
        ended = site.verify(json.dumps(members | {"evidence": evidence}, ensure_ascii=False) + "\n")
        assert (ended.code, f"{name} is not written as one" in ended.out) == (14, True)


def test_a_decision_is_judged_again_with_the_collateral_of_its_time_alone(site: Site) -> None:
    """Its files are refreshed each day; another one never stands in, and a receipt says what it was made without."""
    (path,) = (site.directory / "collateral").glob("*.json")
    of_then = path.read_bytes()
    path.write_bytes(PLATFORM.collateral_json(NOW + 60))
    ended = site.show(0, "--evidence")
    digest = hashlib.sha256(json.loads(of_then)["tcb_info"].encode()).hexdigest()
    assert (ended.code, ended.out) == (1, "")
    assert f"not kept: collateral.tcb_info (SHA-256 {digest}), " in ended.err
    assert "not judged again: the receipt is without quote" in site.verify(site.show(0).out).out

    of_another, changed = site.directory / "another.json", site.directory / "changed.json"
    of_another.write_bytes(path.read_bytes())
    changed.write_bytes(of_then.replace(b"UpToDate", b"UptoDate"))
    for file in (of_another, changed):
        ended = site.show(0, "--evidence", "--collateral", file)
        assert (ended.code, ended.out, f"and {file} does not have it" in ended.err) == (1, "", True)
    for file in (site.directory / "missing.json", site.configuration):
        ended = site.show(0, "--evidence", "--collateral", file)
        assert (ended.code, ended.out, str(file) in ended.err) == (2, "", True), ended.err
    assert site.show(0, "--collateral", changed).code == 2, "without --evidence"

    own = site.directory / "then.json"
    own.write_bytes(of_then)
    given = site.show(0, "--evidence", "--collateral", own)
    assert (given.code, site.verify(given.out).code) == (0, 0)
    kept = site.directory / "collateral" / "earlier" / "any-name.json"
    kept.parent.mkdir()
    own.rename(kept)
    assert site.verify(site.show(0, "--evidence").out, "--json").json["verdict"] == "accepted"


def test_a_server_keeps_the_collateral_that_it_fetched_for_receipts(site: Site) -> None:
    text = site.configuration.read_text()
    of_services = '{ upstreams = ["https://pccs.invalid"], cache = "fetched" }'
    site.configuration.write_text(text.replace('{ directory = "collateral" }', of_services))
    assert site.show(0, "--evidence").code == 1, "nothing is fetched yet"
    source: Any = make_setup(ServerConfig.load(site.configuration)).collateral
    for age in (0, 60):
        collateral = PLATFORM.collateral(NOW + age)
        verified = verify_collateral(collateral, now=NOW + age, root=source.cache.root)
        assert source.keep(Family.of(verified), collateral) is None
    assert site.verify(site.show(0, "--evidence").out, "--json").json["verdict"] == "accepted"


@define
class Liar:
    """One who has the log's key, and so can sign any text as an entry, in place of the one in ``receipt``."""

    site: Site
    receipt: Receipt

    def verified(self, members: dict[str, Any]) -> Ended:
        signer = Signer("keys.example/audit", Secret(bytes(32)))
        entry = json.dumps(members)
        note = signer.sign(Checkpoint(signer.name, 1, merkle.leaf_hash(entry.encode())).text)
        made = evolve(self.receipt, entry=entry, proof=Proof(0, (), note))
        path = self.site.directory / "lie.json"
        path.write_bytes(made.to_bytes())
        given = ("--key", signer.verifier, "--root", self.site.directory / "simulated-root.der", "--json")
        return self.site.command("receipt", "verify", path, *given)


def test_entries_of_a_log_that_lies_are_refused(site: Site) -> None:
    """Each is judged as well, and nothing in it stops the tool."""
    shown = Receipt.from_bytes(site.show(0, "--evidence").out.encode())
    verified = Liar(site, shown).verified
    members = json.loads(shown.entry)
    grounds = json.loads(members["evidence"])
    assert verified(members).code == 0
    for value in (10**400, ["x"]):
        for name in grounds:
            ended = verified(members | {"evidence": json.dumps(grounds | {name: value})})
            assert ended.code in (14, 15) or name == "verifier", (name, value)
        for name, code in {"evidence": 14, "quote_digest": 14, "profile": 15, "hotkey": 0}.items():
            assert verified(members | {name: value}).code == code, (name, value)


@pytest.mark.parametrize(
    ("index", "lie"),
    [
        (0, {"platform_id": "00" * 16}),
        (0, {"platform_id": None}),
        (0, {"platform_kind": "ppid"}),
        (0, {"at": 4_000_000_000}),
        (0, {"at": NOW + 601}),
        (0, {"at": NOW - 601}),
        (0, {"at": float(NOW)}),
        (0, {"profile": None}),
        (0, {"event": "keys purged"}),
        (0, {"event": "attest volumes"}),
        (0, {"event": ["boot"]}),
        (0, {"decision": None}),
        (0, {"decision": "done"}),
        (1, {"decision": "granted"}),
        (1, {"decision": "replayed"}),
        (1, {"profile": f"{PROFILE}"}),
    ],
)
def test_an_entry_that_contradicts_its_evidence_is_refused(site: Site, index: int, lie: dict[str, Any]) -> None:
    """Another platform or profile than that of the quote, another time or decision, or a grant for a rejected one."""
    shown = Receipt.from_bytes(site.show(index, "--evidence").out.encode())
    verified = Liar(site, shown).verified
    members = json.loads(shown.entry)
    assert verified(members).code == 0
    assert verified(members | lie).code == 15


def test_reference_values_that_are_nested_too_deeply_are_refused(site: Site) -> None:
    """A server that lies wrote the entry, too, with their digest: a checker's program must not end by them."""
    shown = Receipt.from_bytes(site.show(0, "--evidence").out.encode())
    bundle, members = Bundle.of(shown.evidence), json.loads(shown.entry)
    root = TrustedRoot.from_der((site.directory / "simulated-root.der").read_bytes())
    deep = evolve(bundle, documents=evolve(bundle.documents, reference_values=1_000_000 * b"["))  # 3.14 parses 50,000
    members["evidence"] = json.dumps(json.loads(members["evidence"]) | deep.digests)
    with pytest.raises(VerdictError, match=r"cannot be read: .*(recursion|Stack overflow)"):
        _ = judge_again(members, deep, read_yaml, root)


def test_the_time_of_an_entry_is_about_that_of_its_verdict(site: Site) -> None:
    shown = Receipt.from_bytes(site.show(0, "--evidence").out.encode())
    verified = Liar(site, shown).verified
    members = json.loads(shown.entry)
    for at in (NOW - JUDGED_WITHIN_SECONDS, NOW + JUDGED_WITHIN_SECONDS):
        assert verified(members | {"at": at}).code == 0


def test_the_last_step_has_one_text_everywhere(command: Callable[..., Ended]) -> None:
    step = "the same verdict, platform and profile, of that time, and no grant for a quote that is rejected"
    reference = (DOCS / "reference" / "stores.md").read_text()
    said = command("receipt", "verify", "--help").out
    counts = [" ".join(text.split()).count(step) for text in (reference, said, str(judge_again.__doc__))]
    assert counts == [2, 1, 1]


def test_a_forged_row_hides_no_change_of_the_files(site: Site) -> None:
    """Who writes the database adds a row that says that the server went on with these files."""
    setup = make_setup(ServerConfig.load(site.configuration))
    with open_store(Running(setup)):
        pass
    (site.directory / "policy.toml").write_text(f"{POLICY}# another one\n")
    changed = make_setup(ServerConfig.load(site.configuration))
    with closing(sqlite3.connect(site.directory / "keys.db")) as database, database:
        columns = [name for _, name, *_ in database.execute("PRAGMA table_info(audit)") if name not in ("id", "idx")]
        (row,) = database.execute(f"SELECT {', '.join(columns)} FROM audit WHERE event = 'started'")
        values = dict(zip(columns, row, strict=True)) | {"evidence": json.dumps({"after": changed.judged_by})}
        places = ", ".join(f":{name}" for name in columns)
        _ = database.execute(f"INSERT INTO audit ({', '.join(columns)}) VALUES ({places})", values)
    with open_store(Running(changed)):
        pass
    rows = [row for row in site.rows("--event", "started") if not row["idx"] or row["idx"] >= 0]
    assert [json.loads(row["evidence"])["after"] for row in rows] == [setup.judged_by, changed.judged_by]


def test_the_guide_is_followed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(site.directory)
    said = key = ""
    page = list(fences(DOCS / "how-to" / "receipts.md"))
    (witnesses,) = [fence.text for fence in page if fence.language == "toml"]
    text = site.configuration.read_text().replace("\nstore = ", '\nstore.mark_file = "mark"\nstore.url = ')
    assert ServerConfig.from_toml(f"{text}\n{witnesses}".encode()).audit.witnesses
    for line in (line for fence in page if fence.language == "sh" for line in fence.text.splitlines()):
        words, _, file = line.replace(" 17 ", " 0 ").partition(" > ")
        if "receipt verify" in words:
            words = re.sub(r"--key \S+", f"--key {key} --root simulated-root.der", words)
        ended = site.command(*shlex.split(words)[1:])
        assert ended.code == 0, (line, ended.err)
        said = ended.out
        if "audit key" in words:
            key = said.strip()
        if file:
            _ = Path(file).write_text(said)
    assert said.endswith(": accepted\n")
