"""`verify` and `inspect`: verdicts, exit codes, the shape of the JSON, and files that are none."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from chutes_proto.io.server.development import write_server
from chutes_proto.quote._eventlog import parse_event_log
from chutes_proto.quote._measurements import parse_profiles_toml
from chutes_proto.testing._directory import simulation_files
from chutes_proto.testing._faults import Fault
from chutes_proto.testing._platform import MRTD, PROFILE, RUNTIME_RTMRS, SimulatedPlatform
from tests.cli.conftest import Ended, is_root
from tests.cli.test_replay import GOOD, OTHER
from tests.collateral.network import PLATFORM as NETWORK_PLATFORM
from tests.collateral.network import Upstream, running
from tests.quote.logs import as_json, log

NOW = 1_780_000_000
REPORT_DATA = bytes(range(64))
PLATFORM = SimulatedPlatform(bytes(32))
JUDGED = {"genuine", "accepted", "tcb_status", "advisory_ids", "refusals"}

Command = Callable[..., Ended]


@pytest.fixture
def verify(command: Command, tmp_path: Path) -> Command:
    """Simulates with faults, then verifies with more options."""

    def run(*options: object, faults: tuple[str, ...] = (), stage: Any = "boot", form: Any = "v4") -> Ended:
        platform = evolve(PLATFORM, form=form).having(*faults)
        for name, data in simulation_files(platform, REPORT_DATA, now=NOW, stage=stage).items():
            _ = (tmp_path / name).write_bytes(data)
        files = [tmp_path / "quote.bin", "--collateral", tmp_path / "collateral.json", "--root", tmp_path / "root.der"]
        return command("verify", *files, "--at", NOW, *options)

    return run


def codes(ended: Ended) -> list[str]:
    for refusal in ended.json["refusals"]:
        assert refusal.keys() == {"code", "detail"}
        assert refusal["detail"]
    return [refusal["code"] for refusal in ended.json["refusals"]]


XFAM = "X87 SSE AVX AVX512_OPMASK AVX512_ZMM_HI256 AVX512_HI16_ZMM PKRU TILECFG TILEDATA".split()


@pytest.mark.parametrize("form", ["v4", "v5-td15ex"])
def test_what_is_genuine_and_acceptable_is_accepted(verify: Command, form: str) -> None:
    ended = verify("--json", "--report-data", REPORT_DATA.hex().upper(), form=form)
    assert ended.code == 0
    said = ended.json
    assert said.keys() >= JUDGED
    assert (said["genuine"], said["accepted"], said["tcb_status"], said["refusals"]) == (True, True, "UpToDate", [])
    assert (said["mr_td"], said["report_data"], said["version"]) == (MRTD.hex(), REPORT_DATA.hex(), int(form[1]))
    assert said["pck"]["fmspc"] == PLATFORM.fmspc.hex()
    assert said["attribute_names"] == ["SEPT_VE_DISABLE"]
    assert said["xfam_names"] == XFAM
    assert said["steps"] == [number for number in range(1, 38) if number != 26]  # no chain beside the collateral


@pytest.mark.parametrize(
    ("fault", "genuine", "code"),
    [
        ("truncated_body", False, "quote_structure"),
        ("quote_signature", False, "quote_signature"),
        ("debug", True, "debug"),
        ("tcb_out_of_date", True, "tcb_status"),
    ],
)
def test_what_is_wrong_is_refused_with_its_code(verify: Command, fault: str, genuine: bool, code: str) -> None:
    ended = verify("--json", faults=(fault,))
    assert ended.code == 1
    assert (ended.json["genuine"], ended.json["accepted"]) == (genuine, False)
    assert codes(ended) == [code]
    assert (ended.json["tcb_status"] is not None) == genuine


def test_all_that_a_policy_refuses_is_told(verify: Command) -> None:
    assert codes(verify("--json", faults=("tcb_out_of_date", "debug", "migratable"))) == [
        "tcb_status",
        "debug",
        "migratable",
    ]


def test_registers_that_a_policy_accepts_with_any_value_are_told(verify: Command, tmp_path: Path) -> None:
    told, registers = "Measurements were not compared with anything", ["MRTD", "RTMR0", "RTMR1", "RTMR2", "RTMR3"]
    assert told in verify().out
    write_server(tmp_path, PLATFORM, NOW)
    pinned = (tmp_path / "measurements.toml").read_text()
    for text, unpinned, is_told in (
        (pinned, [], False),
        (re.sub("(?m)^(mrtd|boot.rtmr2) .*", r'\1 = "any"', pinned), ["MRTD", "RTMR2"], False),
        ('measurements = "unchecked"', registers, True),
    ):
        _ = (tmp_path / "policy.toml").write_text(text)
        options = ("--policy", tmp_path / "policy.toml")
        accepted = verify(*options)
        assert (told in accepted.out) == is_told, accepted.out
        assert ("MRTD, RTMR2: not compared with anything" in accepted.out) == (len(unpinned) == 2)
        assert verify(*options, "--json").json["unpinned"] == unpinned


RULED = re.compile("(?m)^(boot.rtmr2) .*")


def with_log(tmp_path: Path, rule: str) -> tuple[object, ...]:
    """A quote with the registers of a log, and a policy whose profile replays RTMR2; the options of both."""
    rtmrs = parse_event_log(GOOD).rtmrs

    def change(draft: Any) -> Any:
        return evolve(draft, body=evolve(draft.body, rtmrs=rtmrs))

    platform = PLATFORM.having(Fault(name="logged", side="quote", what="RTMRs of a log", quote=change))
    for name, data in simulation_files(platform, REPORT_DATA, now=NOW, stage="boot").items():
        _ = (tmp_path / name).write_bytes(data)
    registers = "".join(f'boot.rtmr{number} = "{rtmr.hex()}"\n' for number, rtmr in enumerate(rtmrs))
    profile = f'[[profile]]\nname = "logged"\nversion = "1"\nmrtd = "{MRTD.hex()}"\n{registers}'
    _ = (tmp_path / "policy.toml").write_text(
        RULED.sub(rf"\1 = {rule}", profile) + registers.replace("boot", "runtime")
    )
    files = (tmp_path / "quote.bin", "--collateral", tmp_path / "collateral.json", "--root", tmp_path / "root.der")
    return (*files, "--at", NOW, "--policy", tmp_path / "policy.toml")


def test_an_event_log_explains_registers_that_a_profile_replays(command: Command, tmp_path: Path) -> None:
    options = with_log(tmp_path, "{ replayed = {} }")
    log_file = tmp_path / "CCEL"
    for written in (GOOD, as_json(GOOD)):
        _ = log_file.write_bytes(written)
        said = command("verify", *options, "--event-log", log_file, "--json").json
        assert (said["accepted"], said["replayed"], said["unpinned"]) == (True, ["RTMR2"], [])
    assert "event log was not" not in command("verify", *options, "--event-log", log_file).out
    without = command("verify", *options, "--json")
    assert (without.code, codes(without)) == (1, ["event_log"])
    assert "--event-log" in without.json["hint"]
    for wrong, code in ((OTHER, "event_log"), (b"none", "event_log_format")):
        _ = log_file.write_bytes(wrong)
        refused = command("verify", *options, "--event-log", log_file, "--json")
        assert (refused.code, refused.json["genuine"], codes(refused)) == (1, True, [code])
        assert "hint" not in refused.json
    assert str(log_file) in refused.json["refusals"][0]["detail"]


def test_a_directory_of_collateral_is_refused(verify: Command, tmp_path: Path) -> None:
    refused = verify("--collateral", tmp_path)
    assert (refused.code, refused.out) == (2, "")
    assert f"{tmp_path} is a directory; name the file of the quote's platform" in refused.err


@pytest.mark.parametrize("fault", ["tcb_info_expired", "pck_crl_future"])
def test_collateral_out_of_its_time_says_nothing_about_the_quote(verify: Command, tmp_path: Path, fault: str) -> None:
    refused = verify(faults=(fault,))
    assert refused.code == 1
    assert refused.out.startswith("REFUSED: the quote cannot be verified with this collateral\ncollateral_")
    assert "got 2026-05-28T20:26:40Z, expected at " in refused.out
    assert "verify at another time with --at" in refused.out
    assert "--at" in verify("--json", faults=(fault,)).json["hint"]
    assert f"Fetch {tmp_path}/collateral.json again" in refused.out


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("tcb_info_fmspc", "fmspc_mismatch"),
        ("pck_chain_other", "pck_chain_mismatch"),
    ],
)
def test_collateral_of_another_platform_says_nothing_about_the_quote(
    verify: Command, tmp_path: Path, fault: str, code: str
) -> None:
    refused = verify(faults=(fault,))
    assert refused.code == 1
    assert refused.out.startswith(f"REFUSED: the quote cannot be verified with this collateral\n{code}: ")
    fetch = f"`chutes-proto collateral fetch --quote {tmp_path}/quote.bin --root {tmp_path}/root.der --upstream"
    assert f"{tmp_path}/collateral.json is not of the platform of {tmp_path}/quote.bin; fetch its own: {fetch}" in (
        refused.out
    )


@pytest.mark.parametrize(
    "fault",
    "pck_crl_signature tcb_signer_expired tcb_info_garbage".split(),
)
def test_collateral_that_does_not_verify_says_nothing_about_the_quote(
    verify: Command, tmp_path: Path, fault: str
) -> None:
    refused = verify("--json", faults=(fault,))
    assert (refused.code, refused.json["unjudged"]) == (1, True)
    assert refused.json["hint"].startswith(f"{tmp_path}/collateral.json is at fault: fetch it again")
    told = verify(faults=(fault,)).out
    assert told.startswith("REFUSED: the quote cannot be verified with this collateral\n")
    for others in ((fault, "quote_signature"), (fault, "pck_expired")):  # the quote's own fault comes first
        assert "unjudged" not in verify("--json", faults=others).json


@pytest.mark.parametrize("fault", ["intermediate_revoked", "quote_signature"])
def test_a_fault_of_the_quote_is_not_the_collaterals(verify: Command, fault: str) -> None:
    assert "unjudged" not in verify("--json", faults=(fault,)).json


def test_what_is_no_collateral_says_nothing_about_the_quote(verify: Command, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    refused = verify("--collateral", tmp_path / "empty")
    assert refused.out.startswith("REFUSED: the quote cannot be verified with this collateral\ncollateral_format: ")
    assert f"{tmp_path}/empty: fetch it with `chutes-proto collateral fetch`" in refused.out


@pytest.mark.parametrize(
    "write",
    [
        bytes,
        base64.encodebytes,
        lambda quote: base64.urlsafe_b64encode(quote).rstrip(b"="),
        lambda quote: f"0x{quote.hex().upper()}\n".encode(),
    ],
)
def test_a_quote_may_be_text_and_come_from_standard_input(
    verify: Command, command: Command, tmp_path: Path, write: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    _ = verify()
    written = write((tmp_path / "quote.bin").read_bytes())
    options = ("--collateral", tmp_path / "collateral.json", "--root", tmp_path / "root.der", "--at", NOW)
    _ = (tmp_path / "quote.txt").write_bytes(written)
    assert command("verify", tmp_path / "quote.txt", *options).code == 0
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(written)))
    assert command("verify", "-", *options).code == 0
    assert command("inspect", tmp_path / "quote.txt").code == 0
    assert command("profile", tmp_path / "quote.txt", tmp_path / "quote.bin", "--name", "one").code == 0
    _ = (tmp_path / "log").write_bytes(log())
    assert command("replay", tmp_path / "log", "--quote", tmp_path / "quote.txt", "--json").json["parsed"]
    nowhere = ("--upstream", "http://127.0.0.1:1", "--root", tmp_path / "root.der", "--out", tmp_path / "fetched")
    unfetched = command("collateral", "fetch", "--quote", tmp_path / "quote.txt", *nowhere)
    assert "quote.txt" not in unfetched.err


@pytest.mark.parametrize("text", [b"A" * 1025, b"0" * 1024 + b"g", b"A" * 2048])
def test_text_that_is_no_quote(command: Command, tmp_path: Path, text: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    _ = (tmp_path / "quote.txt").write_bytes(text)
    assert command("inspect", tmp_path / "quote.txt").code == 1
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
    assert "Is standard input a quote" in command("verify", "-", "--collateral", tmp_path / "none.json").out


def test_several_quotes_have_a_line_each_and_a_summary(verify: Command, command: Command, tmp_path: Path) -> None:
    _ = verify()
    names = []
    for fault in ("", "debug", "tcb_out_of_date", "quote_signature"):
        platform = PLATFORM.having(fault) if fault else PLATFORM
        names.append(tmp_path / f"{fault or 'good'}.bin")
        _ = names[-1].write_bytes(platform.quote(REPORT_DATA))
    options = ("--collateral", tmp_path / "collateral.json", "--root", tmp_path / "root.der", "--at", NOW)
    ended = command("verify", *names, *options)
    assert ended.code == 1
    lines = ended.out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["ACCEPTED", "REFUSED", "REFUSED", "REFUSED"]
    assert lines[4] == "1 of 4 accepted, 1 debug, 1 quote_signature, 1 tcb_status"
    assert [line.partition(" was not")[0].partition(" were not")[0] for line in lines[5:]] == [
        "The report data",
        "Measurements",
        "The TCB recovery",
    ]
    assert lines[1].split()[1] == "debug"
    explained = command("verify", *names, *options, "--why").out
    assert "TDX TCB component 3 is 4, not 5" in explained
    assert "step 33: the attestation key signed the quote" in explained
    said = command("verify", *names, *options, "--json").json
    assert said["summary"]["codes"] == {"debug": 1, "quote_signature": 1, "tcb_status": 1}
    assert [report["accepted"] for report in said["quotes"]] == [True, False, False, False]
    assert said["quotes"][2]["behind"][0]["part"] == "platform"
    assert command("verify", names[0], names[0], *options).code == 0
    assert command("verify", *names, *options, "--report-data", REPORT_DATA.hex()).code == 2


def test_collateral_may_be_fetched(command: Command, tmp_path: Path) -> None:
    quote = tmp_path / "quote.bin"
    _ = quote.write_bytes(NETWORK_PLATFORM.quote(REPORT_DATA))
    _ = (tmp_path / "root.der").write_bytes(NETWORK_PLATFORM.root_der)
    with running(Upstream()) as upstream:
        options = ("--fetch", "--service", upstream.url, "--root", tmp_path / "root.der")
        assert command("verify", quote, *options).code == 0
        upstream.asked.clear()
        other = tmp_path / "other.bin"
        _ = other.write_bytes(NETWORK_PLATFORM.another(1).quote(REPORT_DATA))
        assert command("verify", quote, quote, other, quote, *options).code == 0
        assert upstream.rounds() == 2, "once for each kind of platform"
        upstream.service = evolve(upstream.service, platforms=(NETWORK_PLATFORM.another(1),))
        refused = command("verify", quote, *options)
    assert (refused.code, "collateral_unavailable: no collateral for" in refused.out) == (1, True)
    for wrong in ((), ("--fetch", "--collateral", quote), ("--collateral", quote, "--service", "https://a")):
        assert command("verify", quote, *wrong).code == 2


def test_the_quote_must_bind_the_expected_report_data(verify: Command) -> None:
    ended = verify("--json", "--report-data", bytes(64).hex())
    assert ended.code == 1
    assert codes(ended) == ["report_data_mismatch"]


def test_no_other_root_is_trusted_unasked(verify: Command, command: Command, tmp_path: Path) -> None:
    assert verify().code == 0
    ended = command(
        "verify", tmp_path / "quote.bin", "--collateral", tmp_path / "collateral.json", "--at", NOW, "--json"
    )
    assert ended.code == 1
    assert codes(ended) == ["untrusted_root"]
    assert "--root" in ended.json["hint"]


def test_a_servers_measurements_are_a_policy(verify: Command, tmp_path: Path) -> None:
    write_server(tmp_path, PLATFORM, NOW)
    policy = tmp_path / "measurements.toml"
    assert verify("--policy", policy, "--json").json["profile"] == "simulated"
    wrong = verify("--policy", policy, "--json", faults=("rtmr1",))
    assert codes(wrong) == ["measurement_mismatch"]
    assert "RTMR1" in wrong.json["refusals"][0]["detail"]
    assert verify("--policy", policy, stage="runtime").code == 1
    assert verify("--policy", policy, "--stage", "runtime", stage="runtime").code == 0
    _ = policy.write_text('[tcb]\naccepted_statuses = ["UpToDate", "OutOfDate"]\n' + policy.read_text())
    assert verify("--policy", policy, faults=("tcb_out_of_date",)).code == 0


@pytest.mark.parametrize("content", [b"", b"garbage", bytes(5_000_000), b"\xff" * 700, b"[" * 9000], ids=len)
@pytest.mark.parametrize("name", ["quote.bin", "collateral.json"])
def test_what_does_not_parse_is_refused_in_the_same_shape(
    verify: Command, command: Command, tmp_path: Path, name: str, content: bytes
) -> None:
    _ = verify()
    _ = (tmp_path / name).write_bytes(content)
    ended = command("verify", tmp_path / "quote.bin", "--collateral", tmp_path / "collateral.json", "--json")
    assert ended.code == 1
    assert ended.json.keys() >= JUDGED
    assert codes(ended)[0].startswith(name[:5])
    assert (ended.json["genuine"], ended.json["accepted"], ended.json["tcb_status"]) == (False, False, None)
    assert ("mr_td" in ended.json) == (name != "quote.bin")
    assert f"{tmp_path / name}" in ended.json["hint"]


def test_nothing_in_a_file_steers_the_terminal(verify: Command, command: Command, tmp_path: Path) -> None:
    _ = verify()
    _ = (tmp_path / "collateral.json").write_text(json.dumps({"\x1b[2J": "\x07"}))
    ended = command("verify", tmp_path / "quote.bin", "--collateral", tmp_path / "collateral.json")
    assert ended.code == 1
    assert "\x1b" not in ended.out


@pytest.mark.parametrize("option", ["quote", "--collateral", "--root", "--policy"])
@pytest.mark.parametrize("what", ["missing", "directory", "unreadable"])
def test_a_file_that_cannot_be_opened_is_2(
    verify: Command, command: Command, tmp_path: Path, option: str, what: str
) -> None:
    if what == "unreadable" and is_root():
        pytest.skip("root reads everything")
    _ = verify()
    bad = tmp_path / "bad"
    if what == "directory":
        bad.mkdir()
    elif what == "unreadable":
        bad.touch(0o000)
    quote = bad if option == "quote" else tmp_path / "quote.bin"
    options = {"--collateral": tmp_path / "collateral.json"} | ({} if option == "quote" else {option: bad})
    ended = command("verify", quote, *(part for pair in options.items() for part in pair), "--json")
    assert (ended.code, ended.out) == (2, "")
    assert str(bad) in ended.err


@pytest.mark.parametrize(
    ("option", "content"),
    [
        ("--root", b""),
        ("--root", b"\xff\xfe\0garbage"),
        ("--policy", b"\xff\xfe\0garbage"),
        ("--policy", b'x = "unknown"'),
        ("--policy", b"[" * 100_000),
        ("--policy", bytes(5_000_000)),
    ],
    ids=["empty root", "binary root", "binary policy", "unknown key", "deep policy", "huge policy"],
)
def test_a_root_or_policy_that_cannot_be_is_usage(verify: Command, tmp_path: Path, option: str, content: bytes) -> None:
    bad = tmp_path / "bad"
    _ = bad.write_bytes(content)
    ended = verify(option, bad)
    assert (ended.code, ended.out) == (2, "")
    assert str(bad) in ended.err


def test_an_empty_policy_has_no_profile_and_accepts_nothing(verify: Command, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert codes(verify("--policy", tmp_path / "empty", "--json")) == ["no_profiles"]


@pytest.mark.parametrize(
    "options",
    [(), ("--collateral",), ("--at", "-1"), ("--at", "x"), ("--report-data", "ab"), ("--stage", "x"), ("--nonsense",)],
    ids=str,
)
def test_wrong_usage_is_2(verify: Command, command: Command, tmp_path: Path, options: tuple[str, ...]) -> None:
    _ = verify()
    collateral = () if not options else ("--collateral", tmp_path / "collateral.json")
    assert command("verify", tmp_path / "quote.bin", *collateral, *options).code == 2


# --- real quotes ---


def test_an_enclave_is_measured_where_the_policy_names_it(command: Command, vectors: Path, tmp_path: Path) -> None:
    case = vectors / "real" / "sgx-v3-00a067110000-f8b81014-20250531"
    options = ("--collateral", case / "collateral.json", "--at", (case / "now.txt").read_text().strip())
    enclave = command("inspect", case / "quote.bin", "--json").json["mr_enclave"]
    statuses = '[tcb]\naccepted_statuses = ["ConfigurationAndSWHardeningNeeded"]\n'
    for text, is_told in (
        (f'measurements = "unchecked"\n{statuses}', True),
        (f'{statuses}[identity]\nmr_enclave = ["{enclave}"]\n', False),
    ):
        _ = (tmp_path / "policy.toml").write_text(text)
        ended = command("verify", case / "quote.bin", *options, "--policy", tmp_path / "policy.toml")
        assert ended.code == 0, ended.out
        assert ("Measurements were not compared" in ended.out) == is_told


def test_real_quotes_get_the_verdict_that_is_expected(command: Command, vectors: Path) -> None:
    cases = [case for case in sorted((vectors / "real").iterdir()) if not expected(case)["divergence"]]
    assert cases
    for case in cases:
        wanted = expected(case)
        ended = command(
            "verify", case / "quote.bin", "--collateral", case / "collateral.json", "--json",
            "--at", (case / "now.txt").read_text().strip(),
        )  # fmt: skip
        said = ended.json
        assert (case.name, said["genuine"], said["tcb_status"]) == (
            case.name,
            wanted["outcome"] == "ok",
            wanted["tcb_status"],
        )
        assert sorted(said["advisory_ids"]) == sorted(wanted["advisory_ids"] or [])
        assert ended.code == (0 if said["accepted"] else 1)
        assert said["accepted"] == (not said["refusals"])
        assert said["report_data"] == wanted["parsed"]["report"]["report_data"]


def expected(case: Path) -> Any:
    return json.loads((case / "expected.json").read_text())


# --- inspect ---


def test_inspect_decodes_and_says_that_it_verifies_nothing(verify: Command, command: Command, tmp_path: Path) -> None:
    _ = verify(faults=("quote_signature", "debug"), stage="runtime", form="v5-td15")
    ended = command("inspect", tmp_path / "quote.bin", "--json")
    said = ended.json
    assert (ended.code, said["parsed"], said["verified"]) == (0, True, False)
    assert (said["version"], said["tee"], said["body_type"]) == (5, "TDX", "TD15")
    assert [said[f"rtmr{number}"] for number in range(4)] == [rtmr.hex() for rtmr in RUNTIME_RTMRS]
    assert said["attribute_names"] == ["DEBUG", "SEPT_VE_DISABLE"]
    assert said["pck"]["ppid"] == PLATFORM.ppid.hex()
    assert said["mr_service_td"] == "00" * 48
    lines = command("inspect", tmp_path / "quote.bin").out.splitlines()
    assert "Nothing of it was verified" in lines[0]
    assert f"rtmr3                      {RUNTIME_RTMRS[3].hex()}" in lines


@pytest.mark.parametrize("fault", ["chain_garbage", "sgx_extension_missing", "sgx_extension_deep"])
def test_inspect_does_without_a_platform(verify: Command, command: Command, tmp_path: Path, fault: str) -> None:
    _ = verify(faults=(fault,))
    assert command("inspect", tmp_path / "quote.bin", "--json").json["pck"] is None
    assert "pck                        -" in command("inspect", tmp_path / "quote.bin").out.splitlines()


def test_inspect_of_what_is_no_quote(command: Command, tmp_path: Path) -> None:
    _ = (tmp_path / "quote.bin").write_bytes(b"\x1b[2J" + bytes(1000))
    ended = command("inspect", tmp_path / "quote.bin", "--json")
    assert ended.code == 1
    assert codes(ended) == ["quote_version"]
    ended = command("inspect", tmp_path / "quote.bin")
    assert ended.code == 1
    assert "not a quote" in ended.out
    assert command("inspect", tmp_path).code == 2


# --- profile ---


def test_a_profile_is_made_of_two_quotes(command: Command, tmp_path: Path) -> None:
    boot, runtime, policy = tmp_path / "boot.quote", tmp_path / "runtime.quote", tmp_path / "profiles.toml"
    _ = boot.write_bytes(PLATFORM.quote(bytes(64)))
    _ = runtime.write_bytes(PLATFORM.quote(bytes(64), stage="runtime"))
    ended = command("profile", boot, runtime, "--name", 'a "good" \N{SNOWMAN} one', "--version", "2.0")
    assert ended.code == 0
    _ = policy.write_text(ended.out)
    ((profile, _),) = parse_profiles_toml(policy.read_bytes())
    assert (profile.name, profile.version) == ('a "good" \N{SNOWMAN} one', "2.0")
    assert (profile.mrtd, profile.boot, profile.runtime) == (PROFILE.mrtd, PROFILE.boot, PROFILE.runtime)
    said = command("profile", boot, runtime, "--name", "one", "--json").json["profile"]
    assert (said["name"], said["runtime"]["rtmr3"]) == ("one", RUNTIME_RTMRS[3].hex())


def test_what_makes_no_profile(command: Command, tmp_path: Path) -> None:
    boot, other = tmp_path / "boot.quote", tmp_path / "other.quote"
    quote = PLATFORM.quote(bytes(64))
    _ = boot.write_bytes(quote)
    start = quote.index(PROFILE.mrtd)
    _ = other.write_bytes(quote[:start] + bytes(48) + quote[start + 48 :])
    ended = command("profile", boot, other, "--name", "one", "--json")
    assert (ended.code, codes(ended)) == (1, ["mrtd_differs"])
    _ = other.write_bytes(b"\x1b[2J" + bytes(5000))
    ended = command("profile", boot, other, "--name", "one")
    assert (ended.code, ended.out) == (1, "")
    assert "other.quote" in ended.err
    assert command("profile", boot, tmp_path / "none", "--name", "one").code == 2
    ended = command("profile", boot, boot, "--name", "a\nb")
    assert ended.code == 2
    assert "--name" in ended.err
