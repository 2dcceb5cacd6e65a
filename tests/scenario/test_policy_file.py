"""Every rule of the policy language, from the file of a served server to the text that a VM is told, over HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from hashlib import sha256, sha384
from typing import Any

import attrs
import pytest

from chutes_proto.auth.hotkey import HotkeyPair
from chutes_proto.auth.signing import signature_headers
from chutes_proto.io.files import write_file
from chutes_proto.io.server.control import ask_to_reload
from chutes_proto.io.server.development import write_collateral
from chutes_proto.quote._attributes import AttributePolicy
from chutes_proto.quote._identity import IdentityPolicy
from chutes_proto.quote._layout import parse_quote
from chutes_proto.quote._measurements import SCHEDULE_KEYS
from chutes_proto.quote._policy import TcbPolicy
from chutes_proto.secret import Secret
from chutes_proto.testing._faults import Fault
from chutes_proto.testing._platform import PROFILE, SimulatedPlatform
from chutes_proto.wire import json
from chutes_proto.wire.codes import Code
from tests.cli.conftest import HOTKEY
from tests.scenario.premises import Premises

TCB = "Unable to parse provided quote for verification. (TCB status)"
ATTRIBUTES = "Unable to parse provided quote for verification. (attributes)"
MEASURED = "Quote does not match expected measurements. Ensure you are running a supported VM."
RETRY = "No collateral for this platform now. Retry shortly."
STALE = "tcb_out_of_date"
PAIR = HotkeyPair.from_secret(Secret(b"s" * 32))
PROVEN = PAIR.hotkey.address
OTHER_16, OTHER_48 = f'["{"07" * 16}"]', f'["{"07" * 48}"]'
OUTDATED = 'tcb.accepted_statuses = ["UpToDate", "OutOfDate"]'
SERVICE = 'attributes.service_td = "allowed"'
TD = f'attributes.mr_service_td = ["{sha384(b"another").hexdigest()}"]'

# The file, the faults of the platform, and the answer: a code with its text, or None for a boot that is granted. Each
# rule stands beside a row that shows the opposite of its outcome.
ROWS: list[tuple[str, str, str, tuple[Code, str] | None]] = [
    ("", "", "", None),
    ("accepted_statuses", "", STALE, (Code.TCB_REJECTED, TCB)),
    ("accepted_statuses", OUTDATED, STALE, None),
    ("accepted_statuses", 'tcb.accepted_statuses = ["SWHardeningNeeded"]', "", (Code.TCB_REJECTED, TCB)),
    ("accepted_statuses", OUTDATED, "tcb_sw_hardening_needed", (Code.TCB_REJECTED, TCB)),
    ("platform_grace", f"{OUTDATED}\ntcb.platform_grace = 9000000000", STALE, None),
    ("platform_grace", f"{OUTDATED}\ntcb.platform_grace = 1", STALE, (Code.TCB_REJECTED, TCB)),
    ("qe_grace", f"{OUTDATED}\ntcb.qe_grace = 9000000000", "qe_outdated", None),
    ("qe_grace", f"{OUTDATED}\ntcb.qe_grace = 1", "qe_outdated", (Code.TCB_REJECTED, TCB)),
    ("rejected_advisories", f"{OUTDATED}\ntcb.rejected_advisories = ['INTEL-SA-00837']", STALE, None),
    (
        "rejected_advisories",
        f"{OUTDATED}\ntcb.rejected_advisories = ['SIMULATED-SA-OUTOFDATE']",
        STALE,
        (Code.TCB_REJECTED, TCB),
    ),
    ("min_evaluation_number", "tcb.min_evaluation_number = 1", "", None),
    ("min_evaluation_number", "tcb.min_evaluation_number = 999999", "", (Code.COLLATERAL_UNAVAILABLE, RETRY)),
    ("evaluation_numbers", "", "two recoveries", (Code.COLLATERAL_UNAVAILABLE, RETRY)),
    ("evaluation_numbers", 'tcb.evaluation_numbers = "any"', "two recoveries", None),
    ("min_tcb_date", "tcb.min_tcb_date = 2001-01-01", "", None),
    ("min_tcb_date", "tcb.min_tcb_date = 2199-01-01", "", (Code.TCB_REJECTED, TCB)),
    ("min_tcb_info_version", "tcb.min_tcb_info_version = 3", "", None),
    ("allow_dynamic_platform", "tcb.allow_dynamic_platform = false", "", (Code.TCB_REJECTED, TCB)),
    ("allow_cached_keys", "tcb.allow_cached_keys = false", "", None),
    ("allow_cached_keys", "tcb.allow_cached_keys = false", "silent", (Code.TCB_REJECTED, TCB)),
    ("allow_smt", "tcb.allow_smt = false", "", (Code.TCB_REJECTED, TCB)),
    ("collateral_grace", "", "expired", (Code.COLLATERAL_UNAVAILABLE, RETRY)),
    ("collateral_grace", "tcb.collateral_grace = 172800", "expired", None),
    ("ppid", "MINE", "", None),  # the values of this very platform and TD, for this row and those of the other names
    *(
        (name, f"identity.{name} = {OTHER_16}", "", (Code.TCB_REJECTED, TCB))
        for name in ("ppid", "platform_instance_id")
    ),
    *(
        (name, f"identity.{name} = {OTHER_48}", "", (Code.MEASUREMENT_MISMATCH, f"{MEASURED} ({register})"))
        for name, register in {
            "mr_seam": "MRSEAM",
            "mr_config_id": "MRCONFIGID",
            "mr_owner": "MROWNER",
            "mr_owner_config": "MROWNERCONFIG",
        }.items()
    ),
    ("unsafe_allow_debug", "", "debug", (Code.ATTRIBUTES_REJECTED, ATTRIBUTES)),
    ("unsafe_allow_debug", "attributes.unsafe_allow_debug = true", "debug", None),
    ("sept_ve_disable", "", "sept_ve_disable_clear", (Code.ATTRIBUTES_REJECTED, ATTRIBUTES)),
    ("sept_ve_disable", 'attributes.sept_ve_disable = "any"', "sept_ve_disable_clear", None),
    ("migratable", "", "migratable", (Code.ATTRIBUTES_REJECTED, ATTRIBUTES)),
    ("servtd_ext", "", "servtd_ext", (Code.ATTRIBUTES_REJECTED, ATTRIBUTES)),
    ("servtd_ext", 'attributes.servtd_ext = "allowed"', "servtd_ext", None),
    ("migratable", f'attributes.migratable = "allowed"\n{SERVICE}\n{TD}', "migratable+service_td", None),
    ("service_td", "", "service_td", (Code.ATTRIBUTES_REJECTED, ATTRIBUTES)),
    ("service_td", f"{SERVICE}\n{TD}", "service_td", None),
    (
        "mr_service_td",
        f"{SERVICE}\nattributes.mr_service_td = {OTHER_48}",
        "service_td",
        (Code.ATTRIBUTES_REJECTED, ATTRIBUTES),
    ),
    ("attributes_allowed", "attributes.attributes_allowed = 0", "", (Code.ATTRIBUTES_REJECTED, ATTRIBUTES)),
    ("xfam_allowed", "attributes.xfam_allowed = 3", "", (Code.ATTRIBUTES_REJECTED, ATTRIBUTES)),
    ("xfam_required", "attributes.xfam_required = 0x60003", "", None),
    ("xfam_required", "attributes.xfam_required = 0x803", "", (Code.ATTRIBUTES_REJECTED, ATTRIBUTES)),
    ("any_of", f"[[any_of]]\ntcb.min_tcb_date = 2199-01-01\n[[any_of]]\n{OUTDATED}", STALE, None),
    ("any_of", f"[[any_of]]\n{OUTDATED}", "debug", (Code.ATTRIBUTES_REJECTED, ATTRIBUTES)),
    ("all_of", f"[[all_of]]\n{OUTDATED}\n[[all_of]]\n{OUTDATED}", STALE, None),
    ("all_of", f"[[all_of]]\n{OUTDATED}\n[[all_of]]", STALE, (Code.TCB_REJECTED, TCB)),
    ("per_profile", f"[per_profile.simulated]\n{OUTDATED}", STALE, None),
    ("per_profile", f"[per_profile.'simulated 1']\n{OUTDATED}", STALE, None),
    ("per_profile", f"[per_profile.simulated]\nidentity.ppid = {OTHER_16}", "", (Code.TCB_REJECTED, TCB)),
    # A hotkey that is only claimed loosens nothing, and escapes nothing.
    ("per_hotkey", f"[per_hotkey.{HOTKEY}]\n{OUTDATED}", STALE, (Code.TCB_REJECTED, TCB)),
    ("per_hotkey", f"[per_hotkey.{HOTKEY}]\nidentity.ppid = {OTHER_16}", "", (Code.TCB_REJECTED, TCB)),
    ("per_hotkey", f"{OUTDATED}\n[per_hotkey.{HOTKEY}]\n{OUTDATED}", STALE, None),
]

# The same for the keys of a profile's schedule and for its attributes.
PROFILE_ROWS: list[tuple[str, str, str, tuple[Code, str] | None]] = [
    ("not_before", "not_before = 2001-01-01", "", None),
    ("not_before", "not_before = 2199-01-01", "", (Code.MEASUREMENT_MISMATCH, MEASURED)),
    ("not_after", "not_after = 2199-01-01", "", None),
    ("not_after", "not_after = 2001-01-01", "", (Code.MEASUREMENT_MISMATCH, MEASURED)),
    ("retirement_grace", "not_after = 2001-01-01\nretirement_grace = 9000000000", "", None),
    ("mode", 'mode = "warn"', "", None),
    ("mode", 'mode = "warn"', "rtmr1", (Code.MEASUREMENT_MISMATCH, f"{MEASURED} (RTMR1)")),
    ("attributes", '[profile.attributes]\nsept_ve_disable = "any"', "sept_ve_disable_clear", None),
]

TWO_RECOVERIES = Fault(
    name="two recoveries",
    side="collateral",
    what="TCB info of another recovery than the QE identity",
    tcb_info=lambda info: attrs.evolve(info, evaluation_number=info.evaluation_number + 1),
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Premises]:
    """A server with a policy file."""
    premises = Premises(tmp_path_factory.mktemp("policy") / "site", "sqlite:keys.db")
    premises.edit("hotkeys =", 'policy = "policy.toml"\ncontrol = "control.sock"\nhotkeys =')
    (premises.directory / "policy.toml").touch()
    premises.start()
    yield premises
    premises.close()


@pytest.mark.parametrize(("rule", "policy", "faults", "answer"), ROWS, ids=[f"{row[0]}-{row[2]}" for row in ROWS])
def test_a_rule_decides_over_a_boot(
    served: Premises, rule: str, policy: str, faults: str, answer: tuple[Code, str] | None
) -> None:
    boot_by(served, policy.replace("MINE", own(served.platform)), "", faults, answer)


@pytest.mark.parametrize(("rule", "lines", "faults", "answer"), PROFILE_ROWS)
def test_a_profile_decides_over_a_boot(
    served: Premises, rule: str, lines: str, faults: str, answer: tuple[Code, str] | None
) -> None:
    boot_by(served, "", lines, faults, answer)


def own(platform: SimulatedPlatform) -> str:
    """Each rule about who it is, with the one value that this platform and its TDs have."""
    body = parse_quote(platform.quote(bytes(64))).body
    found = {name: getattr(body, name) for name in ("mr_seam", "mr_config_id", "mr_owner", "mr_owner_config")}
    found |= {"ppid": platform.ppid, "platform_instance_id": platform.platform_instance_id}
    return "".join(f'identity.{name} = ["{value.hex()}"]\n' for name, value in found.items())


@pytest.mark.parametrize(
    ("policy", "faults", "answer"),
    [
        (f"[per_hotkey.{PROVEN}]\n{OUTDATED}", STALE, None),
        (f"{OUTDATED}\n[per_hotkey.{PROVEN}]\nidentity.ppid = {OTHER_16}", STALE, (Code.TCB_REJECTED, TCB)),
        (f"identity.ppid = {OTHER_16}\n[per_hotkey.{PROVEN}]\nMINE", "", None),
    ],
)
def test_the_exception_for_a_hotkey_decides_over_who_proves_it(
    served: Premises, policy: str, faults: str, answer: tuple[Code, str] | None
) -> None:
    def signed(status: int) -> dict[str, Any]:
        vm = served.vm("vm-signed")
        nonce = str(vm.ask("GET", "/servers/nonce", params={"miner_hotkey": PROVEN})["nonce"])
        body = json.encode({"quote": vm.quote(nonce, "boot"), "miner_hotkey": PROVEN, "vm_name": vm.name})
        message = f"{PROVEN}:{nonce}:{sha256(body).hexdigest()}".encode()
        headers = dict(signature_headers(PAIR.hotkey, nonce, message, PAIR.sign)) | {"content-type": "application/json"}
        return vm.ask("POST", "/servers/boot/attestation", content=body, headers=headers, status=status)

    boot_by(served, policy.replace("MINE", own(served.platform)), "", faults, answer, signed)


def boot_by(
    served: Premises,
    policy: str,
    profile: str,
    faults: str,
    answer: tuple[Code, str] | None,
    boot: Callable[[int], dict[str, Any]] | None = None,
) -> None:
    """Boot a VM on a platform with ``faults`` by these files, and expect ``answer``."""
    boot = boot or (lambda status: served.vm().boot(status=status))
    write_file(served.directory / "policy.toml", policy.encode())
    write_file(served.directory / "measurements.toml", f"{PROFILE.to_toml()}{profile}".encode())
    honest = served.platform
    served.platform = _with(honest, faults)
    age = 31 * 86400 if faults == "expired" else 0
    write_collateral(served.directory / "collateral", served.platform, int(time.time()) - age)
    answered = ask_to_reload(served.directory / "control.sock")
    assert answered["ok"], answered
    try:
        told = boot(200 if answer is None else 503 if answer[1] == RETRY else 403)
    finally:
        served.platform = honest
    assert answer is None or (told["code"], told["detail"]) == answer


def _with(platform: SimulatedPlatform, faults: str) -> SimulatedPlatform:
    """The platform with these faults; a silent one's certificate says less of it."""
    if faults in ("", "expired", "silent"):
        return attrs.evolve(platform, ca="processor" if faults == "silent" else "platform")
    return platform.having(*([TWO_RECOVERIES] if faults == "two recoveries" else faults.split("+")))


def test_the_table_has_every_rule() -> None:
    """Of TDs: a server serves no enclaves."""
    of_enclaves = {"mr_enclave", "mr_signer", "isv_prod_id", "min_isv_svn"}
    rules = {key for part in (TcbPolicy, AttributePolicy, IdentityPolicy) for key in attrs.fields_dict(part)}
    assert {*SCHEDULE_KEYS, "attributes"} == {row[0] for row in PROFILE_ROWS}
    assert rules - of_enclaves | {"any_of", "all_of", "per_profile", "per_hotkey"} == {row[0] for row in ROWS} - {""}
